"""What the benchmarks of a training step share: sizes, rows, the comparison of loss curves."""
