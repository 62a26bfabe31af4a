"""Importing transformers without what running a pack never uses."""
