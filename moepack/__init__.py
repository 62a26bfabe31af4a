"""moepack: Mixture-of-Experts models as packs of quantized, streamable experts.

``import moepack`` teaches transformers to load packs, as in
``AutoModelForCausalLM.from_pretrained("path/to/pack")``. The import itself is cheap; torch and
transformers are loaded when they are needed.
"""

from __future__ import annotations

from moepack_formats.errors import MoepackError
from moepack_runtime.options import options
from moepack_runtime.register import register

__version__: str

__all__ = ["MoepackError", "__version__", "options"]

register()


def __getattr__(name: str) -> str:
    # Looking the version up costs more than the rest of this import.
    if name != "__version__":
        raise AttributeError(f"module 'moepack' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moepack")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0.0.0"
