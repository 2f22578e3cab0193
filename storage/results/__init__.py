"""What is computed from rows and kept in the store: anchors and runs."""
