"""lm-eval, EleutherAI's evaluation harness, on packs.

    python -m moepack.lm_eval --model moepack --model_args pretrained=PACK,ram=6GiB --tasks piqa

takes the arguments of the ``lm_eval`` command, which has no way to find models of other packages.
In Python ``import moepack`` is enough for ``lm_eval.simple_evaluate(model="moepack", ...)``.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import torch

from moepack.commands.common import pack_tokenizer, physical_cores
from moepack_formats.errors import MoepackError, UsageError
from moepack_runtime.loading import load_pack
from moepack_runtime.options import RuntimeOptions

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(
        f"moepack: lm-eval is missing ({error}); pip install '.[lm-eval]' in a clone",
        file=sys.stderr,
    )
    sys.exit(2)


class PackLM(HFLM):  # type: ignore[misc]
    """A pack as the harness sees it: its own transformers model, loaded our way.

    Args:
        pretrained: The pack's folder, or its Hub id.
        revision: Branch, tag or commit of a Hub id.
        device: ``cpu``, or ``cuda`` with or without a number. The harness says ``cuda:0`` unless it
            is told otherwise, so that is the CPU where there is no GPU, as in its own models.
        dtype: What the trunk computes in; ``auto`` as in ``moepack eval``: float32 on the CPU, 16
            bits on a GPU.
        arguments: Fields of :class:`RuntimeOptions`, as ``ram=6GiB`` or ``activations=float``; the
            rest goes to the harness's own model, as ``batch_size`` or ``add_bos_token``.

    Raises:
        MoepackError: The pack is not valid, does not fit, or has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **arguments: Any,
    ) -> None:
        found = None if dtype == "auto" else getattr(torch, dtype, dtype)
        if found is not None and not isinstance(found, torch.dtype):
            raise UsageError("no such dtype", wanted="as float32 or bfloat16", got=dtype)
        names = {field.name for field in fields(RuntimeOptions)}
        ours = {name: arguments.pop(name) for name in names & arguments.keys()}
        threads = ours.setdefault("threads", physical_cores())
        torch.set_num_threads(threads)
        ours["device"] = _chosen(device)
        model = load_pack(pretrained, revision=revision, dtype=found, **ours)
        tokenizer = pack_tokenizer(model, pretrained)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **arguments)
        # For the report; what was given above is the model itself.
        self.pretrained, self.revision = pretrained, revision or "main"


def _chosen(device: str | None) -> str:
    """The option for a name of the harness's.

    Raises:
        UsageError: A device of another kind.
    """
    kind, _, number = (device or "cuda").partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError("no such device", wanted="cpu or cuda", got=device)
    if kind == "cpu":
        return "cpu"
    if number and torch.cuda.is_available():
        torch.cuda.set_device(int(number))
    return "auto"


def main() -> None:
    """The ``lm_eval`` command, with errors of packs in one line."""
    from lm_eval.__main__ import cli_evaluate

    import moepack  # noqa: F401 - makes the name known

    try:
        cli_evaluate()
    except MoepackError as error:
        print(f"moepack: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
