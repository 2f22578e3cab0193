"""The table of rows: its root record, tokens and documents."""
