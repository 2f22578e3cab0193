"""What a person writes, a module a section. Validated values; no torch, no Ray."""
