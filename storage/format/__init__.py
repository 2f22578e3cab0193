"""The format of a store: names, records, arrays, units. Its number is in `storage.table.root`."""
