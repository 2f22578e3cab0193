"""Reading rows: a site's rows, shuffled streams, moments, rows that are held out or of extreme norm."""
