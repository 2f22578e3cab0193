"""Harvests of a table: their log of commits, failures and drivers, writing units, moments, progress."""
