"""Checkpoints in folders and on the Hub, plain and quantized, and what their tensors are called."""
