"""Registering the plug-in without loading transformers before it is needed."""

from __future__ import annotations

from types import ModuleType

import wrapt

# Each part registers right after the module with its registry; transformers imports these in the
# middle of others, so the parts may import nothing that comes later.
_PARTS = {
    "transformers.models.auto.configuration_auto": "pack_config",
    "transformers.quantizers.auto": "quantizer",
}


def register() -> None:
    """Register now where transformers is loaded already, else right after it is."""
    for module, part in _PARTS.items():

        def load(_: ModuleType, part: str = part) -> None:
            __import__(f"{__package__}.{part}")

        wrapt.register_post_import_hook(load, module)
