"""Running contexts through a model and collecting activations at sites: batches, taps, rounding, moments."""
