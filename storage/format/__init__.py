"""The store's format: names, records, arrays, int8 rows, units."""
