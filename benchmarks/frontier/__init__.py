"""The parts of python -m benchmarks.frontier: its cells, rows, comparison and plot."""
