"""Side-by-side measurements: each module is one command that measures the peer or the limit in the same run."""
