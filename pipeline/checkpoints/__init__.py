"""A model's files: where they are, whether they are complete and match the config, their fingerprint."""
