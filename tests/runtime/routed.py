"""Running a pack token by token while its routing is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moepack_formats.pack import Pack
from moepack_runtime.trace.recorder import RoutingRecorder
from moepack_runtime.trace.trace_file import Routing, Trace, TraceInfo


def info_of(pack: Pack, top_k: int = 2, ahead: int = 0) -> TraceInfo:
    """What a trace of this pack says."""
    sizes = tuple(tuple(at.spec.nbytes for at in records) for records in pack.layers)
    return TraceInfo("0" * 64, pack.manifest.source.id, sizes, top_k, ahead, 0)


def decode(model: Any, ids: torch.Tensor, ahead: int = 0) -> Trace:
    """Decode ``[T]`` token ids one at a time and record them all."""
    parts, cache = [], None
    with torch.no_grad(), RoutingRecorder(model, ahead) as recorder:
        for token in ids:
            cache = model(token[None, None], past_key_values=cache, use_cache=True).past_key_values
            parts.append(recorder.take(1))
    routing = Routing(
        np.concatenate([part.experts for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate([part.guesses for part in parts], axis=1),
    )
    return Trace(info_of(model.moepack.pack, ahead=ahead), routing)
