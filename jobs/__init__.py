"""What a person runs: the command line, the spec file, submitting to a cluster, reports, the demo."""
