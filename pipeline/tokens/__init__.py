"""Tokenizers: loading one, comparing two, long texts."""
