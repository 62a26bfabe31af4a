"""Guessing the next layers' experts, and whether that pays."""
