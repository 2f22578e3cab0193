"""Tokenizers: loading one, telling two apart, long texts."""
