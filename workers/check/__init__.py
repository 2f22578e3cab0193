"""Recomputing stored units, to audit them or to repair them."""
