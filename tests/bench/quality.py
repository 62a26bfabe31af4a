"""Size against quality: what each quantizer leaves of a model, at its true bits a weight.

    python tests/bench/quality.py MODEL --text held-out.txt --calibrate other.txt

Only the experts are quantized, everything else stays as the source has it, so that rows differ in
nothing but the experts. Results go to ``docs/quality/NAME.json`` with the sums of every window, and
``docs/quality.md`` with its plots is written from all such files. Rows that are there already are
kept; ``--only`` measures some again.

A network whose channels are put in another order computes the same function, but groups are cut
along that order, so the error of one order is one draw of many: what it does to the likelihood of a
text is luck as much as merit. ``--orders N`` quantizes N orders and keeps the mean of each window.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))

import kquants
import quality_report

from moepack.convert import mixed
from moepack.convert.calibration import Calibration, record
from moepack.convert.meta_model import build_meta_model, stored_dtype
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack.divergence import Scores
from moepack.perplexity import window_length, windows
from moepack.quant import InputAwareQuantizer, get_quantizer, quantize_matrix
from moepack.quant.inputs import InputMoments
from moepack.streaming import Parts, StreamedModel
from moepack_formats.matrix import dequantize
from moepack_formats.schemes import get_scheme

RESULTS = Path("docs/quality")

Place = tuple[int, int, str]
"""Layer, expert, and ``gate``, ``up`` or ``down``."""

RoundTrip = Callable[[Place, Tensor, InputMoments | None], tuple[Tensor, float]]
"""Where a matrix is, itself and its inputs' moments -> its values, and the bits it takes."""


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: As the table has it.
        calibrated: Whether it is told of the inputs.
        products: Whether it needs more than their squares.
        round_trip: What becomes of a matrix.
    """

    name: str
    calibrated: bool
    products: bool
    round_trip: RoundTrip


def variants() -> Iterator[Variant]:
    """Every row, as far as the libraries for it are there."""
    for quantizer, scheme in (
        ("rtn", "q2g16s4"),
        ("hqq-lib", "q2g64"),
        ("hqq", "q2g64"),
        ("hqq", "q2g16s4"),
        ("search", "q2g16s4"),
        ("rtn", "q3g32s4"),
        ("hqq-lib", "q3g64"),
        ("hqq", "q3g32s4"),
        ("search", "q3g32s4"),
        ("rtn", "q3g16s5"),
        ("hqq", "q3g16s5"),
        ("search", "q3g16s5"),
        ("hqq-lib", "q4g64"),
        ("hqq", "q4g64"),
    ):
        yield _own(quantizer, scheme, calibrated=False)
    for quantizer, scheme in (
        ("hqq", "q2g16s4"),
        ("search", "q2g16s4"),
        ("gptq", "q2g64"),
        ("gptq", "q2g16s4"),
        ("search", "q3g32s4"),
        ("gptq", "q3g32s4"),
        ("hqq", "q3g16s5"),
        ("search", "q3g16s5"),
        ("gptq", "q3g16s5"),
        ("gptq", "q4g64"),
    ):
        yield _own(quantizer, scheme, calibrated=True)
    if kquants.library() is None:
        print("llama-cpp-python or gguf is missing: no k-quants", file=sys.stderr)
        return
    for kind in ("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"):
        for calibrated in (False, True):
            if calibrated or kind not in kquants.NEEDS_IMPORTANCE:
                yield _ggml(kind, calibrated=calibrated)


def _own(quantizer: str, scheme: str, *, calibrated: bool) -> Variant:
    chosen, stored = get_quantizer(quantizer), get_scheme(scheme)

    def round_trip(_: Place, weight: Tensor, inputs: InputMoments | None) -> tuple[Tensor, float]:
        matrix = quantize_matrix(weight, stored, chosen, inputs=inputs)
        bits = stored.packed_nbytes(*matrix.shape) * 8
        return torch.from_numpy(dequantize(matrix)), bits

    aware = isinstance(chosen, InputAwareQuantizer)
    products = aware and chosen.needs_products
    suffix = " + importance" if calibrated and not products else ""
    return Variant(f"{quantizer} {scheme}{suffix}", calibrated, products, round_trip)


def _ggml(kind: str, *, calibrated: bool) -> Variant:
    def round_trip(_: Place, weight: Tensor, inputs: InputMoments | None) -> tuple[Tensor, float]:
        importance = None if inputs is None else inputs.squares
        values = kquants.round_trip(weight, kind, importance)
        return values, kquants.true_bits(kind) * weight.numel()

    suffix = " + importance" if calibrated else ""
    return Variant(f"{kind}{suffix}", calibrated, False, round_trip)


MIXTURES = {
    "mixed 2.6": (2.6, "gptq"),
    "mixed 3.0": (3.0, "gptq"),
    "mixed 2.6 uncalibrated": (2.6, "hqq"),
    "mixed 2.625 uncalibrated": (2.625, "hqq"),  # Q2_K's bits
    "mixed 2.7 uncalibrated": (2.7, "hqq"),
}


class Bench:
    """A model, its logits on held-out windows, and what calibration text shows of it."""

    def __init__(self, model: Path, text: Path, calibrate: Path, args: argparse.Namespace) -> None:
        self.checkpoint = open_checkpoint(str(model))
        meta = build_meta_model(self.checkpoint.config, dtype=stored_dtype(self.checkpoint))
        self.mapping = WeightMapping(meta, self.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(model)
        length = window_length(meta)

        def ids_of(path: Path, start: int, count: int) -> Tensor:
            ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
            return torch.tensor(ids[start : start + count])

        self.orders = args.orders
        self.runs = list(windows(ids_of(text, 0, args.windows * length), length))
        self.work = TemporaryDirectory(prefix="moepack-quality-")
        folder = Path(self.work.name) / "calibration"
        # From the same file, behind what is measured on.
        behind = args.windows * length if text == calibrate else 0
        record(self.mapping, ids_of(calibrate, behind, args.calibrate_tokens), folder, "bench")
        self.calibration = Calibration(folder)
        print(self.calibration.report(), file=sys.stderr)
        self.expected = list(self.run(None))
        self.losses: dict[str, mixed.Losses] = {}

    def run(self, experts: Callable[[int, int, Parts], Parts] | None) -> Iterator[Tensor]:
        """Logits ``[1, T, V]`` of each window."""
        streamed = StreamedModel(self.checkpoint, mapping=self.mapping, experts=experts)
        return streamed.run([run[None] for run in self.runs])

    def mixed(self, name: str, bits: float, quantizer: str) -> Variant:
        """A mixture of schemes of at most so many bits, chosen with the calibration or without."""
        calibrated = quantizer == "gptq"
        if quantizer not in self.losses:  # all mixtures are chosen from the same
            known = self.calibration if calibrated else None
            self.losses[quantizer] = mixed.measure(self.mapping, known, quantizer)
        adapters = self.mapping.adapters
        weights = sum(
            (2 + a.gated) * a.hidden_size * a.intermediate_size * a.num_experts for a in adapters
        )
        layers = mixed.mix(adapters, self.losses[quantizer], int(bits * weights / 8))
        print(layers.line, file=sys.stderr)
        chosen = get_quantizer(quantizer)

        def round_trip(
            place: Place, weight: Tensor, inputs: InputMoments | None
        ) -> tuple[Tensor, float]:
            layer, expert, part = place
            plan = layers.layers[layer]
            spec = plan.specs[plan.spec_of[expert]]
            first = "gate_up" if adapters[layer].gated else "up"
            planned = spec.tensor("down" if part == "down" else first)
            assert planned is not None
            scheme = get_scheme(planned.scheme)
            matrix = quantize_matrix(weight, scheme, chosen, inputs=inputs)
            bits = scheme.packed_nbytes(*matrix.shape) * 8
            return torch.from_numpy(dequantize(matrix)), bits

        return Variant(name, calibrated, calibrated, round_trip)

    def measure(self, variant: Variant) -> dict[str, object]:
        """One row of the table, the mean of all orders."""
        sizes = _Sizes()
        rows = [asdict(self._scores(variant, order, sizes)) for order in range(self.orders)]
        scores = {
            key: [sum(values) / self.orders for values in zip(*(r[key] for r in rows), strict=True)]
            for key in rows[0]
        }
        return {
            "name": variant.name,
            "calibrated": variant.calibrated,
            "bits": sizes.bits / sizes.weights,
            "relative_squared_error": sizes.lost / sizes.power,
            "parameters_per_second": sizes.weights / sizes.seconds,
            **scores,
            "tokens": [len(run) - 1 for run in self.runs],
        }

    def _scores(self, variant: Variant, seed: int, sizes: _Sizes) -> Scores:
        """Compare on every window, channels in the order of a seed."""

        def experts(layer: int, expert: int, parts: Parts) -> Parts:
            inputs = None
            if variant.calibrated:
                adapter = self.mapping.adapters[layer]
                inputs = self.calibration.expert(
                    layer, expert, parts, adapter, full=variant.products
                )
            changed = dict(parts)
            for name in ("gate", "up", "down"):
                if name not in parts:
                    continue
                order = channel_order(parts[name].shape[1], seed)
                weight = parts[name][:, order]
                moments = None if inputs is None else inputs.of(name)
                if moments is not None and seed:
                    moments = _reordered(moments, order)
                start = time.perf_counter()
                values, bits = variant.round_trip((layer, expert, name), weight, moments)
                sizes.add(weight, values, bits, time.perf_counter() - start)
                changed[name] = values[:, order.argsort()]
            return changed

        scores = Scores()
        for run, logits, expected in zip(self.runs, self.run(experts), self.expected, strict=True):
            scores.add(run, logits[0], expected[0])
        return scores


@dataclass
class _Sizes:
    """Sums over all matrices and orders."""

    bits: float = 0.0
    weights: int = 0
    lost: float = 0.0
    power: float = 0.0
    seconds: float = 0.0

    def add(self, weight: Tensor, values: Tensor, bits: float, seconds: float) -> None:
        """Count a matrix ``[R, C]`` and what became of it."""
        self.bits += bits
        self.weights += weight.numel()
        self.lost += float((values - weight.float()).square().sum())
        self.power += float(weight.float().square().sum())
        self.seconds += seconds


def channel_order(columns: int, seed: int) -> Tensor:
    """``[C]`` int64: the order of a matrix's inputs; that of the source for seed 0."""
    if seed == 0:
        return torch.arange(columns)
    return torch.randperm(columns, generator=torch.Generator().manual_seed(seed))


def _reordered(inputs: InputMoments, order: Tensor) -> InputMoments:
    products = None if inputs.products is None else inputs.products[order][:, order]
    return InputMoments(inputs.squares[order], products, inputs.tokens)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint folder; none: report")
    parser.add_argument("--text", type=Path, default="tests/assets/text/tiny-moe-valid.txt")
    parser.add_argument("--calibrate", type=Path, default="tests/assets/text/tiny-moe-valid.txt")
    parser.add_argument("--calibrate-tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--orders", type=int, default=1, help="of channels, to take the mean of")
    parser.add_argument("--name", help="of the results; the folder's by default")
    parser.add_argument("--only", nargs="*", help="rows to measure (again), by name")
    parser.add_argument("--skip", nargs="*", default=[], help="rows to leave out, by prefix")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is not None:
        _measure(args)
    quality_report.write(RESULTS, Path("docs/quality.md"))


def _measure(args: argparse.Namespace) -> None:
    title = args.name or args.model.resolve().name
    path = RESULTS / f"{title}.json"
    done = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = {row["name"]: row for row in done["rows"]}
    if rows and done.get("orders", 1) != args.orders:
        sys.exit(f"{path} has rows of {done.get('orders', 1)} orders: give this run a --name")
    named: dict[str, Callable[[Bench], Variant]] = {
        variant.name: lambda _, variant=variant: variant for variant in variants()
    }
    for mixture, (bits, quantizer) in MIXTURES.items():
        named[mixture] = partial(Bench.mixed, name=mixture, bits=bits, quantizer=quantizer)
    wanted = [
        name
        for name in named
        if not name.startswith(tuple(args.skip))
        and (name in args.only if args.only else name not in rows)
    ]
    if not wanted:
        return
    bench = Bench(args.model, args.text, args.calibrate, args)
    with closing(bench.checkpoint):
        for variant in (named[name](bench) for name in wanted):
            row = rows[variant.name] = bench.measure(variant)
            print(quality_report.line(row), file=sys.stderr, flush=True)
            facts = {
                "model": title,
                "text": args.text.name,
                "calibrated_on": f"{bench.calibration.tokens} tokens of {args.calibrate.name}",
                "orders": args.orders,
                "rows": list(rows.values()),
            }
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
