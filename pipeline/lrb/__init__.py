"""The Linear Representation Bench: its data, methods and cells."""
