"""Running contexts through a model and taking the rows that sites give: batches, taps, transfer, rounding."""
