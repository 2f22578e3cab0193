"""A model's files: on the hub, in a cache or a folder; whether they are whole and fit; their fingerprint."""
