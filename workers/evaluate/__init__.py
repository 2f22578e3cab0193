"""Evaluating dictionaries on held-out rows."""
