"""A dictionary: its shape, activations, selection of latents, codes, normalisation, files."""
