"""How much memory there is, and what takes how much of it."""
