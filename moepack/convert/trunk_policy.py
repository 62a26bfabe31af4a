"""Which linear layers of the trunk are stored packed, decided without a list of names.

Packed is every ``nn.Linear`` except the output head, the routers, those that the model keeps in
float32, and those whose weight something reads directly: a packed layer has no ``weight``. The
last kind is found in the source of transformers' modeling code, not by running it, because the
fused kernels that read weights are only taken on a GPU.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moepack_formats.manifest import PackedEntry
from moepack_formats.schemes import Scheme
from moepack_runtime.experts import ExpertsAdapter

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# These run before the layers are replaced.
_BEFORE_LOADING = ("__init__", "_init_weights", "reset_parameters")
# Functions that are given a layer, or a list of layers, without taking it apart.
_HARMLESS = {
    "enumerate",
    "hasattr",
    "isinstance",
    "len",
    "list",
    "reversed",
    "tuple",
    "type",
    "zip",
}


@dataclass(frozen=True)
class TrunkLinear:
    """A linear layer to be packed: ``weight`` is [rows, cols], outputs x inputs."""

    name: str
    rows: int
    cols: int


@dataclass(frozen=True)
class KeptLinear:
    """A linear layer that keeps the source's own bits, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TrunkPolicy:
    """What becomes of every linear layer outside the experts, each in model order."""

    packed: tuple[TrunkLinear, ...]
    kept: tuple[KeptLinear, ...]


def trunk_policy(
    model: PreTrainedModel, adapters: Sequence[ExpertsAdapter], scheme: Scheme
) -> TrunkPolicy:
    """Decides for every linear layer of the trunk; shared experts belong to it.

    Args:
        model: The model, on the meta device or real, experts stripped or not.
        adapters: Its experts.
        scheme: The scheme the layers would be packed with.

    Returns:
        The packed and the kept layers.
    """
    modules = dict(model.named_modules())
    experts = tuple(f"{adapter.name}." for adapter in adapters)
    routers = _routers(modules, adapters)
    head = model.get_output_embeddings()
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties.keys(), *ties.values()}
    packed: list[TrunkLinear] = []
    kept: list[KeptLinear] = []
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or name.startswith(experts):
            continue
        # Some models compute out_features with tensors, which the meta device does not fill.
        rows, cols = module.weight.shape
        if module is head:
            reason = "the output head"
        elif type(module) is not nn.Linear:
            reason = f"a {type(module).__name__}, not a plain Linear"
        elif name in routers:
            reason = "part of a router"
        elif f"{name}.weight" in tied:
            reason = "its weight is shared with another layer"
        elif _stays_float32(model, name):
            reason = "the model keeps it in float32"
        elif (where := _weight_reader(modules, name)) is not None:
            reason = f"its weight is read directly ({where})"
        elif scheme.is_raw or scheme.packed_nbytes(rows, cols) >= rows * cols * 2:
            reason = f"{rows} x {cols} would not be smaller in {scheme.name}"
        else:
            packed.append(TrunkLinear(name, rows, cols))
            continue
        kept.append(KeptLinear(name, reason))
    return TrunkPolicy(tuple(packed), tuple(kept))


def has_tied_head(model: PreTrainedModel, absent: Container[str]) -> bool:
    """Whether the output head has no weight of its own, given the parameters a source lacks."""
    head = model.get_output_embeddings()
    return any(
        f"{name}.weight" in absent for name, module in model.named_modules() if module is head
    )


def head_policy(
    model: PreTrainedModel, scheme: str, *, tied: bool
) -> tuple[dict[str, PackedEntry], list[KeptLinear]]:
    """Decides for the input embedding and the output head.

    Args:
        model: The model, on the meta device or real.
        scheme: What they would be packed with.
        tied: Whether the head has no weight of its own.

    Returns:
        Entries of what is packed, by module name, and what is kept, with the reason.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    entries: dict[str, PackedEntry] = {}
    kept: list[KeptLinear] = []
    for module, wanted, kind in (
        (embedding, nn.Embedding, "embedding"),
        (head, nn.Linear, "linear"),
    ):
        if module is None:
            continue
        name = names[module]
        if type(module) is not wanted:
            kept.append(KeptLinear(name, f"a {type(module).__name__}, not a {wanted.__name__}"))
        elif (where := _weight_reader(modules, name)) is not None:
            kept.append(KeptLinear(name, f"its weight is read directly ({where})"))
        else:
            rows, cols = module.weight.shape
            entries[name] = PackedEntry(kind, scheme, (rows, cols))
    if tied and len(entries) == 2:
        entry = entries[names[head]]
        entries[names[head]] = PackedEntry(entry.kind, scheme, entry.shape, names[embedding])
    elif tied:
        entries.clear()  # one of the two cannot be packed, and they share one weight
    return entries, kept


def _routers(modules: dict[str, nn.Module], adapters: Sequence[ExpertsAdapter]) -> set[str]:
    """Names of the linear layers that take part in choosing experts.

    A router's last layer has one output per expert and lies beside the experts. A shared expert
    may happen to be that wide as well, but then a layer next to it takes that many inputs back.
    When the last layer lies in a module of its own, that whole module is the router.
    """
    found: set[str] = set()
    for adapter in adapters:
        # One output more may stand for "no expert".
        widths = {adapter.num_experts, adapter.num_experts + 1}
        # Experts without weights have an output of the router too.
        widths.update(shape[0] for shape in adapter.shapes.values() if len(shape) == 3)
        block = adapter.name.rpartition(".")[0]
        inside = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            and name.startswith(f"{block}.")
            and not name.startswith(f"{adapter.name}.")
        }
        for name, module in inside.items():
            parent = name.rpartition(".")[0]
            width = module.weight.shape[0]
            if width not in widths or (parent != block and _feeds_a_sibling(inside, parent, width)):
                continue
            beside = name[len(block) + 1 :].partition(".")[0]
            prefix = f"{block}.{beside}."
            found.update({name, *(other for other in inside if other.startswith(prefix))})
    return found


def _feeds_a_sibling(linears: dict[str, nn.Linear], parent: str, width: int) -> bool:
    """Whether a linear layer of the same parent takes ``width`` inputs, as ``down`` of an MLP."""
    return any(
        name.rpartition(".")[0] == parent and linear.weight.shape[1] == width
        for name, linear in linears.items()
    )


def _stays_float32(model: PreTrainedModel, name: str) -> bool:
    lists = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    patterns = [pattern.replace("*", ".*") for names in lists for pattern in names or ()]
    return any(re.search(pattern, f"{name}.weight") for pattern in patterns)


def _weight_reader(modules: dict[str, nn.Module], name: str) -> str | None:
    """Where the owner's modeling code reads the layer's weight or bias; None if nowhere."""
    owner, _, attribute = name.rpartition(".")
    while isinstance(modules[owner], _CONTAINERS):
        owner, _, attribute = owner.rpartition(".")
    for cls in type(modules[owner]).__mro__:
        if cls.__module__.startswith("torch.") or cls is object:
            break
        reads = _reads_in_source(cls.__module__)
        for scope in (cls.__name__, None):
            line = reads.get((scope, attribute))
            if line is not None:
                return f"{cls.__module__.rpartition('.')[2]}.py, line {line}"
    return None


@functools.cache
def _reads_in_source(module_name: str) -> dict[tuple[str | None, str], int]:
    """Finds in one module's source which layers' weights are read.

    Returns:
        ``{(class, attribute): line}``; the class is None when the reader is not the owner itself,
        so that any class with such an attribute may be meant.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (OSError, SyntaxError, TypeError):
        return {}
    found: dict[tuple[str | None, str], int] = {}
    for scope, function in _functions(tree):
        aliases = _aliases(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
                layers = _layers_named_by(node.value, aliases)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) not in _HARMLESS:
                # A layer handed to a function may be taken apart there.
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                layers = [
                    (value.attr, True)
                    for value in values
                    if isinstance(value, ast.Attribute) and _is_self(value.value)
                ]
            else:
                continue
            for layer, own in layers:
                found.setdefault((scope if own else None, layer), node.lineno)
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[str | None, ast.AST]]:
    """Every function that runs after loading, with the class it belongs to."""
    for statement in tree.body:
        scope = statement.name if isinstance(statement, ast.ClassDef) else None
        members = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        for member in members:
            if isinstance(member, ast.FunctionDef) and member.name not in _BEFORE_LOADING:
                yield scope, member


def _aliases(function: ast.AST) -> dict[str, list[tuple[str, bool]]]:
    """Attributes that a local name may stand for: ``for layer in self.layers``."""
    aliases: dict[str, list[tuple[str, bool]]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.For):
            targets, value = [node.target], node.iter
        else:
            continue
        attributes = [
            (part.attr, _is_self(part.value))
            for part in ast.walk(value)
            if isinstance(part, ast.Attribute)
        ]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    aliases.setdefault(part.id, []).extend(attributes)
    return aliases


def _layers_named_by(
    node: ast.expr, aliases: dict[str, list[tuple[str, bool]]]
) -> list[tuple[str, bool]]:
    """The attributes an expression in front of ``.weight`` may name, and whether of self."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return [(node.attr, _is_self(node.value))]
    if isinstance(node, ast.Name):
        return aliases.get(node.id, [])
    return []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
