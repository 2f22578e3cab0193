"""Training dictionaries on a store's rows."""
