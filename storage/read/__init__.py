"""Reading rows: of one site, in shuffled streams; moments over units; rows of extreme norm; held-out rows."""
