"""Checking a store against FORMAT.md: findings and their remedies."""
