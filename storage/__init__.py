"""Where activations live: the store format, and writing, reading, streaming, querying and checking it.

Imports neither Ray nor `pipeline`, nor torch: a store is readable on a machine that has none of them.
"""
