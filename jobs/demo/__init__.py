"""The demo: a tiny Llama that ships with the project, and the text of the running Python's standard library."""
