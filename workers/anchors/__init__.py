"""Subpopulations' means, top rows and vectors from files as anchors."""
