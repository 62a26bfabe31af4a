"""What the config of a compressed-tensors checkpoint says of its weights.

``config_groups`` names, for some modules each, how weights are stored (``weights``, ``format``).
Which modules those are (``targets``, ``ignore``) is not read: the tensors tell, see
:mod:`moepack.convert.sources.compressed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack_formats.errors import UsageError

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
BITS = (4, 8)


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of one of the config's groups are stored.

    Attributes:
        packed: Codes are packed into 32-bit words; otherwise there is a code a byte.
        floating: Codes are float8_e4m3fn, not integers.
        bits: Code width.
        strategy: What shares a scale: "tensor", "channel" (an output), "group" or "block".
        block: Outputs and inputs that share a scale, for "group" and "block".
        symmetric: There are no zero points.
        ordered: Inputs belong to groups as ``weight_g_idx`` says.
    """

    packed: bool
    floating: bool
    bits: int
    strategy: str
    block: tuple[int, int] | None = None
    symmetric: bool = True
    ordered: bool = False

    def tile(self, rows: int, cols: int) -> tuple[int, int]:
        """Outputs and inputs that share a scale, in a weight of ``[rows, cols]``."""
        return self.block or ((rows if self.strategy == "tensor" else 1), cols)

    def __str__(self) -> str:
        kind = "float8" if self.floating else f"int{self.bits}"
        sizes = "" if self.block is None else f" of {self.block[0]} x {self.block[1]}"
        words = " in 32-bit words" if self.packed else ""
        return f"{kind}{words}, a scale per {self.strategy}{sizes}"


@dataclass(frozen=True)
class CompressedSettings:
    """What ``quantization_config`` says that the tensors do not.

    Attributes:
        schemes: The different ones of its groups.
        notices: One line for each thing in it that is not used.
    """

    schemes: tuple[WeightScheme, ...]
    notices: tuple[str, ...] = ()


def parse_compressed(found: Mapping[str, Any], where: Path) -> CompressedSettings:
    """Read a compressed-tensors ``quantization_config``.

    Args:
        found: Its content.
        where: The file it is in, for messages.

    Raises:
        UsageError: Weights are stored in a way that is not supported.
    """
    sparsity = found.get("sparsity_config")
    form = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
    _check("sparsity format", form, ("dense",), where)
    transform = found.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise UsageError(
            "compressed-tensors transform_config not supported",
            where=where,
            remedy="convert the unquantized checkpoint instead",
        )
    groups = found.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise UsageError("config_groups is not an object", where=where)
    schemes = []
    for name, group in groups.items():
        place = f"{where}, {name}"
        if not isinstance(group, Mapping):
            raise UsageError("a group of config_groups is not an object", where=place)
        weights = group.get("weights")
        if weights is None:
            continue  # of activations alone
        if not isinstance(weights, Mapping):
            raise UsageError("weights of a group is not an object", where=place)
        form = group.get("format") or found.get("format")
        _check("format", form, FORMATS, place)
        schemes.append(_scheme(weights, form == PACKED, place))
    if not schemes:
        _check("format", found.get("format"), ("dense",), where)
    notices: tuple[str, ...] = ()
    if found.get("kv_cache_scheme") is not None:
        notices = ("ignored: kv_cache_scheme in config.json (weights alone are quantized)",)
    return CompressedSettings(tuple(dict.fromkeys(schemes)), notices)


def _scheme(weights: Mapping[str, Any], packed: bool, where: str) -> WeightScheme:
    kind, bits = weights.get("type") or "int", weights.get("num_bits", 8)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    _check("type", kind, ("int",) if packed else ("int", "float"), where)
    _check("num_bits", bits, BITS if kind == "int" else (8,), where)
    _check("strategy", strategy, ("tensor", "channel", "group", "block"), where)
    block = None
    if strategy == "group":
        block = (1, _positive("group_size", size, where))
    elif strategy == "block":
        block = _block(weights.get("block_structure"), where)
    return WeightScheme(
        packed=packed,
        floating=kind == "float",
        bits=int(bits),
        strategy=str(strategy),
        block=block,
        symmetric=weights.get("symmetric", True) is not False,
        ordered=strategy == "group" and weights.get("actorder") in (True, "group", "dynamic"),
    )


def _block(found: object, where: str) -> tuple[int, int]:
    sizes: list[Any] = []
    if isinstance(found, str):  # "128x128", in older configs
        sizes = [int(size) if size.isdecimal() else size for size in found.split("x")]
    elif isinstance(found, list):
        sizes = found
    if len(sizes) != 2:
        raise UsageError(
            "compressed-tensors block_structure not supported",
            where=where,
            wanted="two positive integers",
            got=repr(found),
        )
    rows, cols = (_positive("block_structure", size, where) for size in sizes)
    return rows, cols


def _positive(what: str, found: object, where: str) -> int:
    if type(found) is not int or found < 1:
        raise UsageError(
            f"compressed-tensors {what} not supported",
            where=where,
            wanted="a positive integer",
            got=repr(found),
        )
    return found


def _check(what: str, got: object, wanted: tuple[object, ...], where: object) -> None:
    if got not in wanted:
        raise UsageError(
            f"compressed-tensors {what} not supported",
            where=where,
            wanted=" or ".join(map(str, wanted)),
            got=repr(got),
        )
