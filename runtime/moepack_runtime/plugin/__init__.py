"""The transformers plug-in: the config of a pack, its checks, and what builds its model."""
