"""Sparse dictionary learning: dictionaries, their training, and measuring them."""
