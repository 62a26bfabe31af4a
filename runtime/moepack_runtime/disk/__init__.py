"""Reading records from a disk."""
