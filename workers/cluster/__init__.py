"""Ray: connecting, tasks, the environment of workers, stopping."""
