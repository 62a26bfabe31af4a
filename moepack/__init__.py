"""moepack: Mixture-of-Experts models as packs of quantized, streamable experts.

``import moepack`` teaches transformers to load packs, as in
``AutoModelForCausalLM.from_pretrained("path/to/pack")``, and lm-eval the model ``moepack``. The
import itself is cheap; torch and transformers are loaded when they are needed.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

from moepack_formats.errors import MoepackError
from moepack_runtime.options import options
from moepack_runtime.plugin.register import register

__version__: str

__all__ = ["MoepackError", "__version__", "options"]

register()


def _register_with_lm_eval(models: ModuleType) -> None:
    """Name the model of ``moepack.lm_eval``; the harness imports it when it is asked for."""
    from lm_eval.api.registry import model_registry

    model_registry.register("moepack", target="moepack.lm_eval:PackLM")


wrapt.register_post_import_hook(_register_with_lm_eval, "lm_eval.models")


def __getattr__(name: str) -> str:
    # Looking the version up costs more than the rest of this import.
    if name != "__version__":
        raise AttributeError(f"module 'moepack' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moepack")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0.0.0"
