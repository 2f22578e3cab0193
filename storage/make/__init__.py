"""Creating a store in one step, and growing its table."""
