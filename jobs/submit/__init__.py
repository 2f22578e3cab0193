"""Submitting a spec to a cluster."""
