"""Checking a store against its own records and checksums: findings and their remedies."""
