"""Running packs: the transformers plug-in, the expert cache, prefetch and kernels.

Importing this package is cheap: neither torch nor transformers is loaded by it.
"""
