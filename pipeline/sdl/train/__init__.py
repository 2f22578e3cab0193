"""Training a dictionary: objective, losses, optimiser steps, resampling, anchor controls."""
