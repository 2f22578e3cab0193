"""`granary bench`: measurements with a known answer, which anyone can run."""
