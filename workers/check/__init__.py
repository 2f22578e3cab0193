"""Running stored units again, and repairing damaged ones."""
