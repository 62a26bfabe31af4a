"""Packs on the Hugging Face Hub: finding, reading by range, fetching and checking their files.

Nothing here imports torch or transformers.
"""
