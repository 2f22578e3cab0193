"""Reading a spec: YAML, variables, paths, rules between sections, messages."""
