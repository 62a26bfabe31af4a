"""Modules that compute from packed weights: they stand where nn.Linear and nn.Embedding stood."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moepack_formats.errors import FormatError, UsageError
from moepack_formats.manifest import PackedEntry
from moepack_formats.pack import Pack
from moepack_formats.schemes import TILE_ROWS, get_scheme

from ..kernels import Engine
from .tile_file import TileFile

FEW = 64
"""Tokens for which a GPU decodes a tile each, though some may be the same."""


def refuse_gradients(x: Tensor) -> None:
    """A packed matrix passes no gradients on, which must not look as if they were zero.

    Raises:
        UsageError: Somebody wants them.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "packs are for inference: no gradients go through packed weights",
            remedy="call the model inside torch.no_grad(), or train the source model",
        )


def refuse_copy(*_: object) -> NoReturn:
    """Experts are files and threads.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        "a loaded pack cannot be copied or pickled",
        remedy="load it again where it is needed, with from_pretrained",
    )


class PackedLinear(nn.Module):
    """A Linear whose weight is tiles of codes.

    Attributes:
        packed: ``[packed bytes]`` uint8.
        bias: ``[out_features]`` or None.
    """

    packed: Tensor

    def __init__(self, entry: PackedEntry, bias: bool, dtype: torch.dtype, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.out_features, self.in_features = entry.shape
        self.scheme = get_scheme(entry.scheme)
        nbytes = self.scheme.packed_nbytes(*entry.shape)
        self.register_buffer("packed", torch.empty(nbytes, dtype=torch.uint8))
        empty = nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False)
        self.bias = empty if bias else None

    @property
    def shape(self) -> tuple[int, int]:
        """True ``(out_features, in_features)``."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        refuse_gradients(x)
        return self._engine.linear(x, self.packed, self.scheme, self.shape, self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out_features, in_features]`` that the codes stand for."""
        return self._engine.decode(self.packed, self.scheme, self.shape, dtype)

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.scheme.name}"


class PackedEmbedding(nn.Module):
    """An Embedding whose rows are tiles of codes; only the asked tiles are decoded.

    Attributes:
        packed: ``[packed bytes]`` uint8; None when they stay in the pack's file.
    """

    packed: Tensor | None

    def __init__(
        self, entry: PackedEntry, embedding: nn.Embedding, dtype: torch.dtype, engine: Engine
    ) -> None:
        super().__init__()
        self.engine = engine
        self.num_embeddings, self.embedding_dim = entry.shape
        self.padding_idx = embedding.padding_idx
        self.scheme, self.dtype = get_scheme(entry.scheme), dtype
        nbytes = self.scheme.packed_nbytes(*entry.shape)
        self.register_buffer("packed", torch.empty(nbytes, dtype=torch.uint8))
        self._file: TileFile | None = None

    def leave_in_file(self, file: TileFile) -> None:
        """Read the tiles of each token from the file instead of keeping all in memory."""
        self.packed, self._file = None, file

    @property
    def shape(self) -> tuple[int, int]:
        """True ``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[...]`` to embeddings ``[..., embedding_dim]``.

        Raises:
            IndexError: An id is not one of the ``num_embeddings`` rows. On a GPU, which is not
                waited for, the device's next error is that.
        """
        self._check(ids)
        ids = ids.long()  # what other integers select is counted in int64
        if ids.numel() <= (1 if ids.is_cpu else FEW):  # a GPU would have to tell what is unique
            wanted = (ids // TILE_ROWS).reshape(-1)
            place = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        else:
            wanted, place = torch.unique(ids // TILE_ROWS, return_inverse=True)
        if self.packed is None:
            assert self._file is not None  # one of the two is there
            shape = len(wanted) * TILE_ROWS, self.embedding_dim
            read = self._file.read(wanted.tolist())
            rows = self.engine.decode(read, self.scheme, shape, self.dtype)
        else:
            rows = self.engine.decode(self.packed, self.scheme, self.shape, self.dtype, wanted)
        return rows[place * TILE_ROWS + ids % TILE_ROWS]

    def _check(self, ids: Tensor) -> None:
        """Beyond the last row lie padding and other tensors' bytes."""
        if ids.numel() == 0:
            return
        low, high = ids.aminmax()
        if not ids.is_cpu:
            torch._assert_async((low >= 0) & (high < self.num_embeddings))
        elif not 0 <= int(low) <= int(high) < self.num_embeddings:
            raise IndexError(
                f"token id out of range: wanted 0 to {self.num_embeddings - 1}, "
                f"got {int(low)} to {int(high)}"
            )

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.scheme.name}"


class TiedHead(nn.Module):
    """An output head that reads the codes of a :class:`PackedEmbedding`; it owns no tensor."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule twice
        self.bias = bias

    @property
    def source(self) -> PackedEmbedding:
        """The embedding whose codes it reads."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., embedding_dim]`` to logits ``[..., num_embeddings]``."""
        refuse_gradients(x)
        source = self.source
        assert source.packed is not None  # a head needs all of it, so it stays in memory
        return source.engine.linear(x, source.packed, source.scheme, source.shape, self.bias)


def swap_modules(
    model: nn.Module, packed: dict[str, PackedEntry], dtype: torch.dtype, engine: Engine
) -> None:
    """Put packed modules where ``packed`` names them.

    Args:
        model: The model on the meta device.
        packed: Entries by dotted module name.
        dtype: Of biases and embeddings.
        engine: What they compute with.

    Raises:
        FormatError: The model has no such module, or one of another kind or shape.
    """
    for name, entry in packed.items():
        parent_name, _, leaf = name.rpartition(".")
        old: Any = _replaced(model, name, entry)
        parent = model.get_submodule(parent_name)
        new: nn.Module
        if entry.tied_to is not None:
            continue
        if entry.kind == "embedding":
            new = PackedEmbedding(entry, old, dtype, engine)
        else:
            new = PackedLinear(entry, getattr(old, "bias", None) is not None, dtype, engine)
        setattr(parent, leaf, new)
    for name, entry in packed.items():
        if entry.tied_to is not None:
            embedding = model.get_submodule(entry.tied_to)
            if not isinstance(embedding, PackedEmbedding):
                raise FormatError(
                    "a head is tied to something else than a packed embedding",
                    where=name,
                    got=entry.tied_to,
                )
            parent_name, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, leaf, TiedHead(embedding, getattr(parent, leaf).bias))


def leave_embeddings(model: nn.Module, pack: Pack) -> list[str]:
    """Keep packed embeddings that no head reads out of memory.

    Args:
        model: On the meta device, with packed modules in place.
        pack: Its pack.

    Returns:
        Names of the tensors that need not be loaded.
    """
    tied = {entry.tied_to for entry in pack.manifest.packed.values()}
    left = []
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding) and name not in tied:
            tensor = f"{name}.packed"
            tile_nbytes = module.scheme.tile_nbytes(module.embedding_dim)
            module.leave_in_file(TileFile(pack, tensor, tile_nbytes))
            left.append(tensor)
    return left


def _replaced(model: nn.Module, name: str, entry: PackedEntry) -> nn.Module:
    """The module that ``entry`` stands for."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise FormatError("the config's model has no such module", where=name) from None
    kind = nn.Embedding if entry.kind == "embedding" else nn.Linear
    shape = tuple(module.weight.shape) if isinstance(module, kind) else None
    if shape != entry.shape:
        raise FormatError(
            "a packed module has another kind or shape than the config's",
            where=name,
            wanted=f"{type(module).__name__} {list(shape or ())}",
            got=f"{entry.kind} {list(entry.shape)}",
        )
    return module
