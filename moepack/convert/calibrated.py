"""The steps of a conversion that come before its first byte: calibration and the mix of schemes.

Both leave what they found in a folder inside the output folder until the pack is complete, so that
a resumed conversion goes on with the very same figures.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moepack.quant import InputAwareQuantizer, Quantizer, get_quantizer
from moepack_formats import osio
from moepack_formats.errors import UsageError

from .calibration import FOLDER_NAME, Calibration, record
from .mixed import Losses, measure, mix
from .plan import ConversionPlan, with_layers
from .source_tokenizer import source_tokenizer

if TYPE_CHECKING:
    from .run import Progress

_LOSSES = "losses.json"


def needs_products(quantizer: Quantizer) -> bool:
    """Whether a quantizer uses more than the squares of single inputs."""
    return isinstance(quantizer, InputAwareQuantizer) and quantizer.needs_products


def text_digest(text: Path) -> str:
    """Names the contents of a file."""
    with osio.io_errors(text):
        return hashlib.sha256(text.read_bytes()).hexdigest()


def check_calibration(quantizer: str, text: Path | None) -> None:
    """Refuse a quantizer that needs text and has none, or that cannot use any.

    Raises:
        UsageError: It is so, or the text is not a regular file: it is read more than once.
    """
    chosen = get_quantizer(quantizer)
    if text is None and needs_products(chosen):
        raise UsageError(f"{quantizer} needs text", remedy="give --calibrate TEXT")
    if text is not None and not isinstance(chosen, InputAwareQuantizer):
        raise UsageError(
            f"{quantizer} cannot use calibration text", remedy="leave --calibrate or choose gptq"
        )
    if text is not None and not text.is_file():
        what = "not a regular file" if text.exists() else "no such file"
        raise UsageError(what, where=f"--calibrate {text}")


def calibration_nbytes(plan: ConversionPlan) -> int:
    """Bytes that calibration keeps on the disk until the pack is complete."""
    if plan.options.calibrate is None:
        return 0
    # Half precision, and a little for the routers' choices.
    per_token = sum(2 * adapter.hidden_size + 128 for adapter in plan.adapters)
    return plan.options.calibrate_tokens * per_token


def calibration_ids(plan: ConversionPlan) -> Tensor | None:
    """The tokens of the calibration text, ``[T]`` int64; None without one. Nothing is written.

    Raises:
        UsageError: The source has no tokenizer, or one that is code, or the text is too short or
            not UTF-8.
        ResourceError: The text cannot be read.
    """
    text = plan.options.calibrate
    if text is None:
        return None
    tokenizer = source_tokenizer(plan)
    if tokenizer is None:
        raise UsageError("the source has no tokenizer", where=plan.checkpoint.folder)
    try:
        with osio.io_errors(text):
            content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError("not a UTF-8 text", where=text) from None
    ids = tokenizer(content, verbose=False)["input_ids"][: plan.options.calibrate_tokens]
    if len(ids) < 2:
        raise UsageError(
            "the calibration text is too short", where=text, wanted="two tokens", got=len(ids)
        )
    return torch.tensor(ids)


def calibrate(
    plan: ConversionPlan, ids: Tensor, out: Path, fingerprint: str, progress: Progress
) -> Calibration:
    """Run the calibration text through the source, if it has not been done.

    Args:
        plan: What is converted.
        ids: From :func:`calibration_ids`.
        out: The output folder.
        fingerprint: Names the source and the options.
        progress: Is told about it.

    Raises:
        ResourceError: The disk is full or read-only.
    """
    folder = out / FOLDER_NAME
    record(plan.mapping, ids, folder, fingerprint, progress.notice)
    calibration = Calibration(folder)
    progress.notice(calibration.report())
    return calibration


def choose_schemes(
    plan: ConversionPlan, calibration: Calibration | None, out: Path, progress: Progress
) -> ConversionPlan:
    """The plan with mixed precision, where that was asked for.

    Raises:
        UsageError: Nothing fits.
    """
    if plan.expert_limit is None:
        return plan
    path = out / FOLDER_NAME / _LOSSES
    losses = _read_losses(path)
    if losses is None:
        progress.notice("measuring what every expert loses in every scheme")
        losses = measure(plan.mapping, calibration, plan.options.quantizer)
        values = {"first": losses.first.tolist(), "down": losses.down.tolist()}
        with osio.io_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
        osio.write_file(path, json.dumps(values).encode())
    per_layer = plan.options.mix == "layer"
    found = mix(plan.adapters, losses, plan.expert_limit, per_layer=per_layer)
    progress.notice(found.line)
    return with_layers(plan, found.layers)


def forget(out: Path) -> None:
    """Take away what calibration has left in the output folder."""
    shutil.rmtree(out / FOLDER_NAME, ignore_errors=True)


def _read_losses(path: Path) -> Losses | None:
    try:
        values = json.loads(path.read_bytes())
        return Losses(np.array(values["first"]), np.array(values["down"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
