"""SQL over a store, in a sandbox; conditions of rows."""
