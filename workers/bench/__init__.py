"""Cells of the Linear Representation Bench on workers."""
