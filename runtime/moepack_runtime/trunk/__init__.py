"""All of a model but its experts: its files, and the modules that compute from packed weights."""
