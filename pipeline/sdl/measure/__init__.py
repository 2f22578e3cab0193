"""Measuring a dictionary: metrics, diagnostics, the loss that a spliced model recovers."""
