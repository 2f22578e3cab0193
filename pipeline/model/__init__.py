"""A model: its family and shape, loading it, on which devices it runs."""
