"""MODEL as a user writes it, its config and kind, and the model in memory."""
