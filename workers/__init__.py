"""Ray actors and the supervisors that keep them busy: the only place where `pipeline` and `storage` meet."""
