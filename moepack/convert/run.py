"""Carrying a plan out: experts, trunk, small files, and the manifest last."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moepack import __version__
from moepack.hub.card import CARD_NAME, model_card
from moepack.quant import Quantizer, get_quantizer, quantize_matrix
from moepack_formats import FORMAT_VERSION, checksum, osio
from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.journal import FinishedFile, Journal
from moepack_formats.layer import LayerPlan, layer_writer
from moepack_formats.manifest import (
    FORMAT_NAME,
    MANIFEST_NAME,
    FileEntry,
    LayerEntry,
    Manifest,
    Recipe,
    to_json,
)
from moepack_formats.matrix import pack_matrix
from moepack_formats.pack import read_manifest
from moepack_formats.record import Part, pack_record
from moepack_formats.schemes import DEFAULT_SCHEME, SCHEMES, get_scheme
from moepack_formats.tiles import Bytes
from moepack_formats.writer import TensorFileWriter
from moepack_runtime.disk.room import check_space

from .calibrated import (
    calibrate,
    calibration_ids,
    calibration_nbytes,
    choose_schemes,
    forget,
    needs_products,
    text_digest,
)
from .calibration import Calibration
from .model_files import write_model_files
from .one_ahead import one_ahead
from .output_folder import (
    STAGE_NAME,
    check_apart,
    check_locked,
    check_usable,
    clear_old_pack,
    locked,
    old_files,
)
from .plan import ConversionPlan, TrunkTensor

_SMALL_FILES_NBYTES = 64_000_000
"""Room for tokenizer, config and headers when the disk's space is checked."""


class Progress(Protocol):
    """Is told how far a conversion has come."""

    def start(self, parameters: int) -> None:
        """So many parameters will be converted."""

    def advance(self, parameters: int, what: str) -> None:
        """So many more are done; ``what`` is being worked on."""

    def notice(self, line: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class _Shard:
    """One file of the trunk."""

    name: str
    tensors: tuple[TrunkTensor, ...]


def convert(
    plan: ConversionPlan, out: Path, progress: Progress, *, force: bool = False
) -> Manifest:
    """Write the pack that ``plan`` describes.

    A run that was killed goes on where it stopped when it is started again with the same source
    and options, and writes the same bytes as an undisturbed one. A run that was killed after its
    last byte is only tidied up.

    Args:
        plan: From :func:`moepack.convert.plan.make_plan`.
        out: The output folder.
        progress: Is told about it.
        force: Overwrite what the folder holds.

    Raises:
        IntegrityError: A source weight is NaN or infinite.
        UsageError: The folder is the source itself, or holds an unfinished conversion with other
            options, or the calibration text is too short.
        ResourceError: The disk is full, read-only, or the folder is in use.
    """
    quantizer = get_quantizer(plan.options.quantizer)
    check_usable(out, force=force)
    check_apart(plan.checkpoint.folder, out)
    ids = calibration_ids(plan)  # a text of no use is refused before anything is written
    with locked(out):
        identity = fingerprint(plan)
        if check_locked(out, identity, force=force):
            manifest = read_manifest(out)
            with closing(Journal(out, identity)) as journal:
                _clean_up(plan, out, journal)
            return manifest
        # Before an old pack is given up. What it takes will be free, or is already done.
        done = sum(path.stat().st_size for path in old_files(out))
        # Blocks, not sizes: a staged shard of a Hub source may be a file with holes.
        stage = (out / STAGE_NAME).rglob("*")
        done += sum(path.stat().st_blocks * 512 for path in stage if path.is_file())
        staged = plan.checkpoint.staged_nbytes
        check_space(
            out, plan.sizes.nbytes + staged + calibration_nbytes(plan) + _SMALL_FILES_NBYTES - done
        )
        if force:
            clear_old_pack(out)
            forget(out)
        with closing(Journal(out, identity)) as journal:
            calibration = None
            if ids is not None:
                calibration = calibrate(plan, ids, out, identity, progress)
            plan = choose_schemes(plan, calibration, out, progress)
            progress.start(plan.sizes.expert_parameters + plan.sizes.trunk_parameters)
            manifest = _Conversion(plan, out, quantizer, journal, progress, calibration).run()
            osio.write_file(out / MANIFEST_NAME, to_json(manifest))
            _clean_up(plan, out, journal)
    return manifest


def _clean_up(plan: ConversionPlan, out: Path, journal: Journal) -> None:
    """Take away what only an unfinished conversion needs, the journal last.

    As long as the journal is there, a run that is killed in between does the rest when it is
    started again.
    """
    forget(out)
    plan.checkpoint.clear()
    journal.remove()


def fingerprint(plan: ConversionPlan) -> str:
    """Names everything that decides a byte of the output, the weights by their files' stamps."""
    folder = plan.checkpoint.folder
    stamps = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.glob("*.safetensors"))
    ]
    facts = {
        "moepack": __version__,
        # What a draft of the format may change; its records would not be told from today's.
        "spans": {name: [s.span_runs(64 * n) for n in range(1, 9)] for name, s in SCHEMES.items()},
        "torch": torch.__version__,
        "source": asdict(plan.checkpoint.source),
        "config": plan.checkpoint.config,
        "options": asdict(plan.options),
        "files": stamps,
        "text": None if plan.options.calibrate is None else text_digest(plan.options.calibrate),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class _Conversion:
    """One run: what every step needs."""

    def __init__(
        self,
        plan: ConversionPlan,
        out: Path,
        quantizer: Quantizer,
        journal: Journal,
        progress: Progress,
        calibration: Calibration | None = None,
    ) -> None:
        self.calibration = calibration
        self.plan, self.out, self.quantizer = plan, out, quantizer
        self.journal, self.progress = journal, progress
        self.files: dict[str, FileEntry] = {}
        self.trunk_digests: dict[str, str] = {}

    def run(self) -> Manifest:
        entries = tuple(self._layer(layer) for layer in self.plan.layers)
        self._trunk()
        names, notices = write_model_files(self.plan, self.out)
        for line in notices:
            self.progress.notice(line)
        for name in names:
            self._list_small_file(name)
        manifest = self._manifest(entries)
        osio.write_file(self.out / CARD_NAME, model_card(manifest))
        return manifest

    def _layer(self, layer: LayerPlan) -> LayerEntry:
        names = []
        for name, experts in layer.files(self.plan.options.max_file_nbytes):
            writer = layer_writer(self.out, layer, name, experts, self.journal)
            with closing(writer):
                done = writer.resume()
                self.progress.advance(sum(layer.spec(e).parameters for e in experts[:done]), name)
                for expert, record in self._records(layer, experts[done:]):
                    writer.append(record)
                    what = f"layer {layer.index}, expert {expert}"
                    self.progress.advance(layer.spec(expert).parameters, what)
                self._list_file(name, writer.finish())
            names.append(name)
        return LayerEntry(layer.index, layer.module, layer.num_experts, tuple(names))

    def _records(self, layer: LayerPlan, experts: Sequence[int]) -> Iterator[tuple[int, Bytes]]:
        """Records in order. One expert is read, one quantized and one packed at the same time."""
        adapter = self.plan.adapters[layer.index]
        read = one_ahead((e, self.plan.mapping.experts(adapter, e)) for e in experts)
        quantized = one_ahead((e, self._parts(layer, e, tensors)) for e, tensors in read)
        for expert, parts in quantized:
            yield expert, pack_record(layer.spec(expert), parts)

    def _parts(self, layer: LayerPlan, expert: int, tensors: dict[str, Tensor]) -> dict[str, Part]:
        adapter, spec = self.plan.adapters[layer.index], layer.spec(expert)
        inputs = None
        if self.calibration is not None:
            inputs = self.calibration.expert(
                layer.index, expert, tensors, adapter, full=needs_products(self.quantizer)
            )
        first = "gate_up" if "gate" in tensors else "up"
        schemes = {"down": "down", "gate": first, "up": first}
        parts: dict[str, Part] = {}
        for name, tensor in tensors.items():
            place = f"{adapter.name}, expert {expert}, {name}"
            if name.endswith("_bias"):
                _check_finite(tensor, place)
                parts[name] = tensor.float().numpy()
                continue
            planned = spec.tensor(schemes[name])
            scheme = get_scheme(planned.scheme if planned is not None else "")
            parts[name] = quantize_matrix(
                tensor,
                scheme,
                self.quantizer,
                where=place,
                inputs=None if inputs is None else inputs.of(name),
            )
        return parts

    def _trunk(self) -> None:
        shards = _shards(self.plan.trunk, self.plan.options.max_file_nbytes)
        writers = [
            TensorFileWriter(
                self.out,
                shard.name,
                [tensor.stored for tensor in shard.tensors],
                lambda _: {"format": "pt"},
                self.journal,
            )
            for shard in shards
        ]
        for shard, writer in zip(shards, writers, strict=True):
            with closing(writer):
                done = writer.resume()
                self.progress.advance(sum(_numel(t) for t in shard.tensors[:done]), shard.name)
                start = self.plan.trunk.index(shard.tensors[0]) + done
                rest = self.plan.mapping.trunk(start) if done < len(shard.tensors) else iter(())
                for planned in shard.tensors[done:]:
                    name, tensor = next(rest, ("nothing", None))
                    if tensor is None or name != planned.target.name:
                        raise FormatError(
                            "the source gives its tensors in another order than planned",
                            where=self.plan.checkpoint.source.id,
                            wanted=planned.target.name,
                            got=name,
                        )
                    writer.append(self._trunk_bytes(planned, tensor))
                    self.progress.advance(_numel(planned), name)
                facts = writer.finish()
            self._list_file(shard.name, facts)
            stored = [tensor.stored.name for tensor in shard.tensors]
            self.trunk_digests.update(zip(stored, facts.digests, strict=True))
        if len(shards) > 1:
            self._write_index(shards)

    def _trunk_bytes(self, planned: TrunkTensor, tensor: Tensor) -> Bytes:
        if planned.scheme is not None:
            scheme, name = get_scheme(planned.scheme), planned.target.name
            return pack_matrix(quantize_matrix(tensor, scheme, self.quantizer, where=name))
        if tensor.is_floating_point():
            _check_finite(tensor, planned.target.name)
        flat = tensor.contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy()

    def _write_index(self, shards: list[_Shard]) -> None:
        weight_map = {t.stored.name: shard.name for shard in shards for t in shard.tensors}
        total = sum(tensor.stored.nbytes for shard in shards for tensor in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        name = "model.safetensors.index.json"
        osio.write_file(self.out / name, json.dumps(index, indent=1).encode())
        self._list_small_file(name)

    def _list_file(self, name: str, facts: FinishedFile) -> None:
        self.files[name] = FileEntry(facts.size, facts.sha256, facts.header_xxh3)

    def _list_small_file(self, name: str) -> None:
        path = self.out / name
        descriptor = osio.open_regular(path)
        try:
            digest, size = checksum.sha256_of_file(descriptor, name), os.fstat(descriptor).st_size
            self.files[name] = FileEntry(size, digest)
            # So that starting over can tell it from a file of the user's.
            self.journal.finish(name, FinishedFile(size, digest, None, ()))
        finally:
            os.close(descriptor)

    def _manifest(self, layers: tuple[LayerEntry, ...]) -> Manifest:
        plan, options = self.plan, self.plan.options
        recipe = Recipe(
            quantizer=options.quantizer,
            trunk_scheme=DEFAULT_SCHEME.get(options.attn_bits, "source"),
            head_scheme=DEFAULT_SCHEME.get(options.head_bits, "source"),
            expert_schemes=plan.expert_schemes,
        )
        return Manifest(
            format=FORMAT_NAME,
            format_version=FORMAT_VERSION,
            min_reader=FORMAT_VERSION,
            generator=f"moepack {__version__}",
            model_type=plan.model.config.model_type,
            architecture=type(plan.model).__name__,
            source=plan.checkpoint.source,
            recipe=recipe,
            sizes=plan.sizes,
            layers=layers,
            packed=plan.packed,
            trunk=dict(sorted(self.trunk_digests.items())),
            files=dict(sorted(self.files.items())),
        )


def _shards(trunk: Sequence[TrunkTensor], max_nbytes: int) -> list[_Shard]:
    groups: list[list[TrunkTensor]] = [[]]
    filled = 0
    for tensor in trunk:
        if filled and filled + tensor.stored.nbytes > max_nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.stored.nbytes
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    total = len(groups)
    return [
        _Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]


def _check_finite(tensor: Tensor, where: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise IntegrityError(
            "the source weights hold NaN or infinity",
            where=where,
            remedy="download the source again or repair the tensor",
        )


def _numel(tensor: TrunkTensor) -> int:
    return math.prod(tensor.target.shape)
