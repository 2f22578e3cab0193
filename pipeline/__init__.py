"""What is computed: corpus, capture, dictionaries, losses, anchors, metrics. Pure torch and transformers.

Imports neither Ray nor `storage`: it runs on a machine that has torch and transformers alone.
"""
