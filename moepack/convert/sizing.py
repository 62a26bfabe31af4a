"""Which recipe fits a machine, and how fast it may run: from a config alone, before any download.

Speed is what bandwidth allows: every weight that a token needs is read once, from memory where it
is resident and from the disk where it is not; of an input embedding that is one row. An expert is
taken to be resident as often as there is room for it, which is pessimistic: real texts ask for some
experts more than for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepack_formats.errors import ResourceError, UsageError
from moepack_formats.schemes import DEFAULT_SCHEME, get_scheme
from moepack_runtime.experts import find_experts
from moepack_runtime.gpu.tier import WORK_SHARE
from moepack_runtime.memory.context_memory import context_nbytes, context_tokens
from moepack_runtime.options import format_size

from .meta_model import build_meta_model
from .options import INTEGER_BITS, ConvertOptions
from .plan import expert_record
from .trunk_policy import has_tied_head, head_policy, trunk_policy

RECIPES = ("q8g64", "q6g64", "q4g64", "q3g16s5", "q2g16s4", "q2g64")
"""Schemes of the experts, from the largest."""

_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)


@dataclass(frozen=True)
class ModelSizes:
    """What a config says of a model.

    Attributes:
        expert_parameters: Weights of the routed experts.
        trunk_nbytes: Everything else, as packed.
        trunk_ram_nbytes: The same in memory on the CPU, where what is not packed is float32.
        trunk_token_nbytes: What of it a token reads.
        context_nbytes: Keys and values of a text.
        record_nbytes: ``{scheme: bytes of all experts}``.
        token_nbytes: ``{scheme: bytes of the experts that one token asks for}``.
    """

    expert_parameters: int
    trunk_nbytes: int
    trunk_ram_nbytes: int
    trunk_token_nbytes: int
    context_nbytes: int
    record_nbytes: dict[str, int]
    token_nbytes: dict[str, int]


@dataclass(frozen=True)
class Machine:
    """Room and bandwidths.

    Attributes:
        vram, ram, disk: Bytes that may be used; without ``vram`` the CPU computes.
        fixed: What the process takes of ``ram`` before trunk and experts.
        memory_speed: Bytes a second from memory.
        disk_speed: Bytes a second from the disk.
    """

    vram: int
    ram: int
    disk: int
    memory_speed: float
    disk_speed: float
    fixed: int = 0

    def room(self, sizes: ModelSizes) -> int:
        """Bytes for experts, by the rules of the runtime; negative when not even the trunk fits.

        On a GPU its slots or those in host memory, whichever is more: what is in the first has
        gone through the second, and may lie in both.
        """
        host = self.ram - self.fixed
        if not self.vram:
            return host - sizes.trunk_ram_nbytes
        device = int(self.vram * (1 - WORK_SHARE)) - sizes.trunk_nbytes - sizes.context_nbytes
        return max(device, host) if min(device, host) > 0 else min(device, host)


@dataclass(frozen=True)
class Fit:
    """A recipe on a machine.

    Attributes:
        name: A scheme, or ``mixed`` with its bits.
        options: What to give to ``moepack convert``.
        bits: True bits a weight of the experts.
        nbytes: Size of the pack.
        resident: Share of the experts that fit into memory beside the trunk.
        tokens_per_s: What bandwidth allows; 0 where the trunk itself does not fit.
        fits_disk: Whether the pack fits on the disk.
    """

    name: str
    options: str
    bits: float
    nbytes: int
    resident: float
    tokens_per_s: float
    fits_disk: bool


def sizes_of(
    config: Mapping[str, Any], *, attn_bits: int = 4, context: int | None = None
) -> ModelSizes:
    """Sizes of a model from its ``config.json``.

    Args:
        config: The file's content.
        attn_bits: Of the trunk's Linear weights.
        context: Tokens of a text; None for as many as the runtime has room for by default.

    Raises:
        UsageError: The model is not supported, or does not say how many experts a token has, or
            there is no such width.
    """
    if attn_bits not in INTEGER_BITS:
        wanted = f"one of {', '.join(map(str, INTEGER_BITS))}"
        raise UsageError("--attn-bits", wanted=wanted, got=attn_bits)
    model = build_meta_model(config)
    adapters = find_experts(model)
    expert_names = {f"{a.name}.{p}" for a in adapters for p in a.parameters}
    scheme = get_scheme(DEFAULT_SCHEME[attn_bits]) if attn_bits < 16 else None
    packed: dict[str, int] = {}
    if scheme is not None:
        for linear in trunk_policy(model, adapters, scheme).packed:
            packed[f"{linear.name}.weight"] = scheme.packed_nbytes(linear.rows, linear.cols)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    # As wide as `moepack convert` makes them by default, which is what the recipe's command says.
    head = get_scheme(DEFAULT_SCHEME[ConvertOptions().head_bits])
    for name, entry in head_policy(model, head.name, tied=has_tied_head(model, tied))[0].items():
        packed[f"{name}.weight"] = head.packed_nbytes(*entry.shape)
    trunk = {
        name: packed.get(name, tensor.numel() * tensor.element_size())
        for name, tensor in model.state_dict().items()
        if name not in expert_names and name not in tied
    }
    looked_up = _looked_up(model) - set(tied.values())
    token_trunk = sum(nbytes for name, nbytes in trunk.items() if name not in looked_up)
    top_k = _top_k(config)
    whole, token = dict.fromkeys(RECIPES, 0), dict.fromkeys(RECIPES, 0)
    parameters = 0
    for adapter in adapters:
        for name in RECIPES:
            nbytes = expert_record(adapter, name, name).nbytes
            whole[name] += nbytes * adapter.num_experts
            token[name] += nbytes * min(top_k, adapter.num_experts)
        matrices = 2 + adapter.gated
        size = adapter.hidden_size * adapter.intermediate_size * matrices
        parameters += size * adapter.num_experts
    in_memory = sum(
        packed.get(name, tensor.numel() * (4 if tensor.is_floating_point() else tensor.itemsize))
        for name, tensor in model.state_dict().items()
        if name in trunk
    )
    text = context_nbytes(model, adapters, context_tokens(model, context))
    return ModelSizes(parameters, sum(trunk.values()), in_memory, token_trunk, text, whole, token)


def recipes(sizes: ModelSizes, machine: Machine) -> list[Fit]:
    """Every recipe on a machine, the largest first; and a mixture that just fits into memory."""
    found = [
        _fit(name, f"--scheme {name}", sizes, machine, sizes.record_nbytes[name], name)
        for name in RECIPES
    ]
    room = machine.room(sizes)
    low, high = sizes.record_nbytes[RECIPES[-1]], sizes.record_nbytes["q4g64"]
    if low < room < high and all(abs(room - one.nbytes) > 0.01 * room for one in found):
        bits = int(room * 800 / sizes.expert_parameters) / 100
        nbytes = int(bits * sizes.expert_parameters / 8)
        like = next(n for n in RECIPES if sizes.record_nbytes[n] <= room)
        options = f"--expert-bits {bits:g}"
        found.append(_fit(f"mixed {bits:g}", options, sizes, machine, nbytes, like))
    return sorted(found, key=lambda one: -one.nbytes)


def best(fits: list[Fit]) -> Fit | None:
    """The most bits that are whole in memory; else the fastest that the disk can hold.

    None where no recipe fits: :func:`lacking` says what is missing.
    """
    possible = [one for one in fits if one.fits_disk and one.tokens_per_s > 0]
    whole = [one for one in possible if one.resident >= 1]
    if whole:
        return max(whole, key=lambda one: one.bits)
    return max(possible, key=lambda one: one.tokens_per_s, default=None)


def lacking(sizes: ModelSizes, machine: Machine) -> ResourceError:
    """What a machine on which no recipe fits has too little of, for the smallest one."""
    smallest = RECIPES[-1]
    needs = [
        ("memory", machine.fixed + (0 if machine.vram else sizes.trunk_ram_nbytes), machine.ram),
        ("disk", sizes.trunk_nbytes + sizes.record_nbytes[smallest] - 1, machine.disk),
    ]
    if machine.vram:
        device = int((sizes.trunk_nbytes + sizes.context_nbytes) / (1 - WORK_SHARE))
        needs.insert(0, ("GPU memory", device, machine.vram))
    short = [(what, need, there) for what, need, there in needs if there <= need]
    return ResourceError(
        f"no recipe fits, not even {smallest}",
        wanted=" and ".join(f"more than {format_size(need)} of {what}" for what, need, _ in short),
        got=" and ".join(format_size(there) for *_, there in short),
    )


def _fit(
    name: str, options: str, sizes: ModelSizes, machine: Machine, experts: int, like: str
) -> Fit:
    """A recipe whose experts take ``experts`` bytes, a token's share being as that of ``like``."""
    nbytes = sizes.trunk_nbytes + experts
    room = machine.room(sizes)
    resident = min(max(room / experts, 0.0), 1.0)
    token = sizes.token_nbytes[like] * experts / sizes.record_nbytes[like]
    seconds = (sizes.trunk_token_nbytes + token) / machine.memory_speed
    seconds += token * (1 - resident) / machine.disk_speed
    bits = experts * 8 / sizes.expert_parameters
    speed = 1 / seconds if room > 0 else 0.0
    return Fit(name, options, bits, nbytes, resident, speed, nbytes <= machine.disk)


def _looked_up(model: Any) -> set[str]:
    """Names of the input embedding's tensors, of which a token reads a row."""
    embedding = model.get_input_embeddings()
    own = {id(tensor) for tensor in embedding.parameters()} if embedding is not None else set()
    return {name for name, tensor in model.named_parameters() if id(tensor) in own}


def _top_k(config: Mapping[str, Any]) -> int:
    """Experts a token is sent to."""
    for key in _TOP_K:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    for value in config.values():
        if isinstance(value, Mapping):
            try:
                return _top_k(value)
            except UsageError:
                continue
    raise UsageError("the config does not say how many experts a token has", where="config.json")
