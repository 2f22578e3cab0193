"""What a spec will cost: rows, bytes, hours, money."""
