"""Making a store whole in one step, and growing its table."""
