"""shoal: one system for a model's whole life, wherever its data and machines are."""
