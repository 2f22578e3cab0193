"""From a table to committed units: the supervisor, its pool of workers, and what a worker does."""
