"""Other libraries in environments of their own: making these, and the scripts that run there."""
