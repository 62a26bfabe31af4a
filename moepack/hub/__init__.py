"""Sharing packs through the Hugging Face Hub: pushing, pulling, and looking from afar."""
