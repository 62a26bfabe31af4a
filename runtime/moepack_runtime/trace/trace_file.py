"""Routing traces: which experts each token used in each layer, in a Parquet file.

A row is one token in one layer, tokens in the order of the text and a token's layers in theirs:
``experts`` in the router's order, their ``weights``, and ``guess_1`` to ``guess_N``: the experts of
this layer as its router ranked them when it was asked that many layers ahead.

Shape letters: T tokens, L MoE layers, K experts a token, A layers ahead, G guesses kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack_formats import osio
from moepack_formats.errors import UsageError

from ..policies import Key

Experts = npt.NDArray[np.int16]
Weights = npt.NDArray[np.float32]

NOTHING = -1
"""Fills arrays where a token has fewer experts or guesses than others."""

VERSION = 1
_KEY = b"moepack"


@dataclass(frozen=True)
class TraceInfo:
    """What the trace was recorded with.

    Attributes:
        pack: sha256 of the pack's manifest.
        model: Where the pack's weights came from.
        record_nbytes: For each layer, the size of each expert's record.
        top_k: K.
        ahead: A.
        fixed_nbytes: Bytes of a memory budget that are not for expert slots.
        compute_ms: Milliseconds to decode a token when nothing has to be read; None if unknown.
        disk_mbps: Megabytes (10^6 bytes) a second that the pack's disk gives; None if unknown.
    """

    pack: str
    model: str
    record_nbytes: tuple[tuple[int, ...], ...]
    top_k: int
    ahead: int
    fixed_nbytes: int
    compute_ms: float | None = None
    disk_mbps: float | None = None

    @property
    def layers(self) -> int:
        """L."""
        return len(self.record_nbytes)

    @property
    def records(self) -> list[Key]:
        """All experts."""
        return [(at, e) for at, sizes in enumerate(self.record_nbytes) for e in range(len(sizes))]


@dataclass(frozen=True)
class Routing:
    """What happened to some tokens.

    Attributes:
        experts: ``[T, L, K]`` int16.
        weights: ``[T, L, K]`` float32.
        guesses: ``[A, T, L, G]`` int16, the likeliest first; of layer l, asked A layers before.
    """

    experts: Experts
    weights: Weights
    guesses: Experts


@dataclass(frozen=True)
class Trace:
    """A whole trace."""

    info: TraceInfo
    routing: Routing


class TraceWriter:
    """Writes a trace window by window; the file appears when all of it is written.

    Args:
        path: The file.
        ahead: A.

    Raises:
        UsageError: pyarrow is not installed, or something else than a file has that name.
        ResourceError: The file cannot be written.
    """

    def __init__(self, path: Path, ahead: int) -> None:
        if not path.name:
            raise UsageError("not a file's name", got=repr(str(path)))
        # The file comes by rename, which would put it in the place of a device or a pipe.
        if path.exists() and not path.is_file():
            raise UsageError("not a regular file", where=path, remedy="name another file")
        arrow, parquet = _pyarrow()
        self._arrow, self._path, self._ahead = arrow, path, ahead
        self._temporary = path.with_name(f"{path.name}.part")
        lists = [("experts", arrow.int16()), ("weights", arrow.float32())]
        lists += [(f"guess_{a}", arrow.int16()) for a in range(1, ahead + 1)]
        fields = [arrow.field("token", arrow.int32()), arrow.field("layer", arrow.int16())]
        fields += [arrow.field(name, arrow.list_(kind)) for name, kind in lists]
        self._schema = arrow.schema(fields)
        with osio.io_errors(path):
            self._writer = parquet.ParquetWriter(
                str(self._temporary), self._schema, compression="zstd"
            )
        self._tokens = 0

    def write(self, routing: Routing) -> None:
        """Append the tokens of one window."""
        tokens, layers, _ = routing.experts.shape
        numbers = np.arange(self._tokens, self._tokens + tokens, dtype=np.int32)
        lists = [_as_lists(self._arrow, routing.experts, routing.experts)]
        lists.append(_as_lists(self._arrow, routing.weights, routing.experts))
        lists += [_as_lists(self._arrow, guess, guess) for guess in routing.guesses]
        columns = [
            self._arrow.array(numbers.repeat(layers)),
            self._arrow.array(np.tile(np.arange(layers, dtype=np.int16), tokens)),
            *lists,
        ]
        with osio.io_errors(self._path):
            self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._schema))
        self._tokens += tokens

    def finish(self, info: TraceInfo) -> None:
        """Write what the trace was recorded with, and let the file appear."""
        text = json.dumps({"version": VERSION, **asdict(info)})
        with osio.io_errors(self._path):
            self._writer.add_key_value_metadata({_KEY: text.encode()})
            self._writer.close()
            osio.replace(self._temporary, self._path)

    def abandon(self) -> None:
        """Leave nothing behind; harmless after :meth:`finish`."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        UsageError: pyarrow is not installed, or the file is not a trace.
        ResourceError: It cannot be read.
    """
    arrow, parquet = _pyarrow()
    with osio.io_errors(path), open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file)
            info = _info(table.metadata.metadata or {})
            data = table.read()
            return Trace(info, _routing(data, info))
        except (arrow.ArrowException, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                "not a routing trace",
                where=path,
                got=f"{type(error).__name__}: {error}",
                remedy="record one with `moepack trace`",
            ) from None


def most_used(trace: Trace) -> tuple[Key, ...]:
    """The experts of a trace, the most used first."""
    experts = trace.routing.experts
    counts: Counter[Key] = Counter()
    for layer in range(trace.info.layers):
        used = experts[:, layer][experts[:, layer] >= 0]
        counts.update({(layer, e): int(n) for e, n in enumerate(np.bincount(used)) if n})
    return tuple(key for key, _ in counts.most_common())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "routing traces need pyarrow, which is not installed",
            remedy="run `pip install pyarrow`",
        ) from None
    return pyarrow, pyarrow.parquet


def _as_lists(arrow: Any, values: npt.NDArray[Any], where: Experts) -> Any:
    """``[T, L, N]`` as a column of T * L lists, without the places where ``where`` is negative."""
    kept = where >= 0
    ends = np.concatenate([[0], kept.reshape(-1, kept.shape[-1]).sum(-1).cumsum()])
    return arrow.ListArray.from_arrays(arrow.array(ends, arrow.int32()), arrow.array(values[kept]))


def _info(metadata: dict[bytes, bytes]) -> TraceInfo:
    values = json.loads(metadata[_KEY])
    if values.pop("version") != VERSION:
        raise ValueError("it is of another version of moepack")
    sizes = tuple(tuple(int(size) for size in layer) for layer in values.pop("record_nbytes"))
    return TraceInfo(record_nbytes=sizes, **values)


def _routing(table: Any, info: TraceInfo) -> Routing:
    rows = table.num_rows
    layers = np.asarray(table["layer"])
    tokens, rest = divmod(rows, info.layers) if info.layers else (0, 1)
    if not tokens or rest or (layers.reshape(tokens, -1) != np.arange(info.layers)).any():
        raise ValueError("its rows are not every layer of every token")
    experts = _as_matrix(table["experts"], np.int16, NOTHING).reshape(tokens, info.layers, -1)
    for layer, sizes in enumerate(info.record_nbytes):
        if experts[:, layer].max(initial=NOTHING) >= len(sizes):
            raise ValueError(f"it names an expert that layer {layer} does not have")
    weights = _as_matrix(table["weights"], np.float32, 0).reshape(tokens, info.layers, -1)
    if weights.shape != experts.shape:
        raise ValueError("experts and weights differ in number")
    guesses = list(_guesses(table, info, tokens))
    width = max((guess.shape[-1] for guess in guesses), default=0)
    padded = np.full((len(guesses), tokens, info.layers, width), NOTHING, np.int16)
    for a, guess in enumerate(guesses):
        padded[a, ..., : guess.shape[-1]] = guess
    return Routing(experts, weights, padded)


def _guesses(table: Any, info: TraceInfo, tokens: int) -> Iterator[Experts]:
    for a in range(1, info.ahead + 1):
        yield _as_matrix(table[f"guess_{a}"], np.int16, NOTHING).reshape(tokens, info.layers, -1)


def _as_matrix(column: Any, dtype: type[np.generic], fill: float) -> npt.NDArray[Any]:
    """A column of lists as ``[rows, longest]``."""
    lists = column.combine_chunks()
    ends = np.asarray(lists.offsets, np.int64)
    values = np.asarray(lists.values)[ends[0] : ends[-1]]
    lengths = np.diff(ends)
    matrix = np.full((len(lengths), int(lengths.max(initial=0))), fill, dtype)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = values
    return matrix
