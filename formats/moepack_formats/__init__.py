"""Reading and writing moepack files: records, layer files, manifest. numpy only, never torch.

``SPEC.md`` beside this package describes the bytes; a pack can be read from it alone.
"""

FORMAT_VERSION = 1
"""The newest format this package writes and reads."""

RECORD_ALIGN = 4096
"""Records start at, and are padded to, multiples of this many bytes."""

TENSOR_ALIGN = 256
"""Sub-tensors of a record start at multiples of this many bytes."""
