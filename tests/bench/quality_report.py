"""Writes docs/quality.md and its plots from measured rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moepack.intervals import Interval, mean_interval, paired_interval

Row = dict[str, Any]

KQUANTS = ("Q", "IQ")

COMPARISONS = (
    ("search q2g16s4", "hqq-lib q2g64"),
    ("search q2g16s4", "Q2_K"),
    ("search q2g16s4", "IQ2_S"),
    ("search q2g16s4", "hqq q2g16s4"),
    ("mixed 2.6 uncalibrated", "Q2_K"),
    ("mixed 2.625 uncalibrated", "Q2_K"),
    ("hqq q2g16s4 + importance", "Q2_K + importance"),
    ("gptq q2g16s4", "Q2_K + importance"),
    ("gptq q2g64", "IQ2_S + importance"),
    ("gptq q2g16s4", "search q2g16s4"),
    ("mixed 2.6", "gptq q2g16s4"),
    ("hqq q3g16s5", "hqq-lib q3g64"),
    ("hqq q3g16s5", "Q3_K"),
    ("hqq q3g16s5", "IQ3_S"),
    ("hqq q3g16s5", "hqq q3g32s4"),
    ("hqq q3g16s5 + importance", "Q3_K + importance"),
    ("hqq q3g16s5 + importance", "IQ3_S + importance"),
    ("gptq q3g16s5", "Q3_K + importance"),
    ("gptq q3g16s5", "IQ3_S + importance"),
    ("gptq q3g16s5", "gptq q3g32s4"),
    ("gptq q3g16s5", "hqq q3g16s5"),
    ("gptq q4g64", "hqq q4g64"),
)
"""Pairs whose differences the report gives: what should be better, then what it is held against."""

DEFAULTS = (
    ("`--expert-bits 2`", "search q2g16s4", ("Q2_K", "hqq-lib q2g64")),
    ("`--expert-bits 2 --calibrate`", "gptq q2g16s4", ("Q2_K + importance", "IQ2_S + importance")),
    ("`--expert-bits 2.6 --calibrate`", "mixed 2.6", ("Q2_K + importance", "gptq q2g16s4")),
    ("`--expert-bits 3`, the default", "hqq q3g16s5", ("Q3_K", "hqq-lib q3g64")),
    ("`--expert-bits 3 --calibrate`", "gptq q3g16s5", ("Q3_K + importance", "IQ3_S + importance")),
    ("`--expert-bits 4`", "hqq q4g64", ("hqq-lib q4g64",)),
    ("`--expert-bits 4 --calibrate`", "gptq q4g64", ("hqq-lib q4g64",)),
)
"""What the options give, under which name it was measured, and what it is held against."""

RIVALS = (
    ("search q2g16s4", False),
    ("hqq q2g16s4 + importance", True),
    ("gptq q2g16s4", True),
    ("hqq q3g16s5", False),
    ("hqq q3g16s5 + importance", True),
    ("gptq q3g16s5", True),
)
"""Recipes of ours, and whether others may know the inputs too, for the list of lost comparisons."""

SAME_SIZE = 0.07
"""Bits a weight more that another format may take and still count as no larger."""

INTRODUCTION = """# Quality

Written by `make quality MODEL=folder` from the results in `docs/quality/`; do not edit.

Only the experts are quantized; attention, embeddings and head are the source's. *Bits* are true
bits a weight, scales and padding of matrices included. *Error* is the relative squared error of the
weights. *KL* is the mean of KL(source || quantized) over the tokens of the held-out text, in nats;
*top-1* how often both think the same token most likely. ± are 95% intervals over windows.
Differences are paired, window by window. `+ importance` weighs errors by the mean square of each
input on calibration text; gptq and mixed use the same text. Q2_K to IQ3_S are round trips through
llama.cpp's own quantizers, with the same importance where it says so.
"""

LOSSES = """Formats of no more bits (or up to 0.07 more) that stay significantly nearer to the
source than the recipe of ours that knows as much of the inputs. IQ2 and IQ3 choose their codes from
lattices, which a kernel has to look up; the grids here cost one multiplication and one addition a
weight. With `--calibrate`, where gptq is the default, the grids win.
"""

ORDERS = """A network whose channels are put in another order computes the same function, but groups
of weights are cut along that order: the error of one order is one draw of many. Here every figure
is the mean of {} orders, the source's and random ones, the same for each row.
"""


def perplexity(row: Row) -> tuple[float, float, float]:
    """Lower end, value and upper end."""
    return mean_interval(row["nats"], row["tokens"]).exp()


def divergence(row: Row) -> Interval:
    """Mean KL divergence."""
    return mean_interval(row["divergence"], row["tokens"])


def agreement(row: Row) -> Interval:
    """Share of equal first choices."""
    return mean_interval(row["agreed"], row["tokens"])


def line(row: Row) -> str:
    """A row of the table."""
    kl, top1 = divergence(row), agreement(row)
    return (
        f"| {row['name']} | {row['bits']:.3f} | {row['relative_squared_error']:.4f} "
        f"| {perplexity(row)[1]:.2f} | {kl.mean:.4f} ± {kl.half_width:.4f} "
        f"| {top1.mean:.1%} ± {top1.half_width:.1%} "
        f"| {row['parameters_per_second'] / 1e6:.1f} |"
    )


def write(results: Path, report: Path) -> None:
    """Write the report of all results."""
    paths = sorted(results.glob("*.json"))
    models = [json.loads(path.read_text()) for path in paths]
    parts = [INTRODUCTION, _defaults(models), _lost(models)]
    for path, facts in zip(paths, models, strict=True):
        parts.append(_model(facts))
        plot = results / f"{path.stem}.png"
        if _plot(facts, plot):
            parts.append(f"![bits against KL divergence](quality/{plot.name})\n")
    report.write_text("\n".join(parts))


def _defaults(models: list[dict[str, Any]]) -> str:
    """What the options give on every model, and against whom."""
    lines = [
        "## What you get by default\n",
        "Differences are nats a token against the other, paired, with 95% intervals; bold where "
        "the whole interval is below zero.\n",
        "| options | model | bits | perplexity, source | against | nats a token | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for options, name, others in DEFAULTS:
        for facts in models:
            rows = {row["name"]: row for row in facts["rows"]}
            if name not in rows:
                continue
            ours = rows[name]
            source = mean_interval(ours["source_nats"], ours["tokens"]).exp()[1]
            start = (
                f"| {options} | {facts['model']} | {ours['bits']:.3f} "
                f"| {perplexity(ours)[1]:.2f}, {source:.2f} "
            )
            for other in others:
                if other in rows:
                    nats, kl = (_difference(ours, rows[other], k) for k in ("nats", "divergence"))
                    against = f"{other} ({rows[other]['bits']:.3f})"
                    lines.append(f"{start}| {against} | {_signed(nats)} | {_signed(kl)} |")
                    start = "| | | | "
    return "\n".join([*lines, ""])


def _lost(models: list[dict[str, Any]]) -> str:
    """Where another format of no more bits is significantly nearer to the source."""
    lines = []
    for facts in models:
        rows = {row["name"]: row for row in facts["rows"]}
        for name, calibrated in RIVALS:
            for other in rows.values() if name in rows else ():
                theirs = other["name"].startswith(KQUANTS)
                if not theirs or (other["calibrated"] and not calibrated):
                    continue
                if other["bits"] > rows[name]["bits"] + SAME_SIZE:
                    continue
                difference = _difference(rows[name], other, "divergence")
                if difference.low > 0:
                    lines.append(
                        f"- {facts['model']}: {name} ({rows[name]['bits']:.3f} bits) against "
                        f"{other['name']} ({other['bits']:.3f}): KL {_signed(difference)}."
                    )
    if not lines:
        return ""
    return "\n".join(["### Where it loses\n", LOSSES, *lines, ""])


def _difference(left: Row, right: Row, key: str) -> Interval:
    return paired_interval(left[key], right[key], left["tokens"])


def _model(facts: dict[str, Any]) -> str:
    def width(row: Row) -> int:
        return sum(row["bits"] > edge for edge in (2.7, 3.5))  # about 2, 3 and 4 bits

    rows = sorted(facts["rows"], key=lambda row: (width(row), divergence(row).mean))
    first = rows[0]
    source = mean_interval(first["source_nats"], first["tokens"])
    orders = facts.get("orders", 1)
    lines = [
        f"## {facts['model']}\n",
        *([ORDERS.format(orders)] if orders > 1 else []),
        f"Measured on {sum(first['tokens'])} tokens of {facts['text']} in {len(first['tokens'])} "
        f"windows, where the source's perplexity is {source.exp()[1]:.2f}; calibrated on "
        f"{facts['calibrated_on']}. The last column is million weights a second of the quantizer "
        "alone, on 2 cores with other work beside: not to be compared in detail.\n",
        "| experts | bits | error | perplexity | KL | top-1 | Mw/s |",
        "|---|---|---|---|---|---|---|",
        *[line(row) for row in rows],
        "",
    ]
    by_name = {row["name"]: row for row in rows}
    pairs = [(a, b) for a, b in COMPARISONS if a in by_name and b in by_name]
    if pairs:
        lines += [
            "| this | against | bits | KL difference | nats a token, difference |",
            "|---|---|---|---|---|",
        ]
    for a, b in pairs:
        left, right = by_name[a], by_name[b]
        differences = [_difference(left, right, key) for key in ("divergence", "nats")]
        bits = f"{left['bits']:.3f} / {right['bits']:.3f}"
        lines.append(f"| {a} | {b} | {bits} | " + " | ".join(map(_signed, differences)) + " |")
    return "\n".join([*lines, ""])


def _signed(interval: Interval) -> str:
    text = f"{interval.mean:+.4f} ± {interval.half_width:.4f}"
    return f"**{text}**" if interval.high < 0 else text


def _plot(facts: dict[str, Any], path: Path) -> bool:
    """Bits against divergence; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return path.exists()
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    kinds = {
        "uncalibrated": ("o", "tab:blue", []),
        "calibrated": ("s", "tab:green", []),
        "llama.cpp": ("^", "tab:gray", []),
        "llama.cpp, importance matrix": ("v", "tab:orange", []),
    }
    for row in facts["rows"]:
        theirs = row["name"].startswith(KQUANTS)
        names = list(kinds)
        kinds[names[2 * theirs + row["calibrated"]]][2].append(row)
    for name, (marker, color, rows) in kinds.items():
        if not rows:
            continue
        kl = [divergence(row) for row in rows]
        axes.errorbar(
            [row["bits"] for row in rows],
            [k.mean for k in kl],
            yerr=[k.half_width for k in kl],
            fmt=marker,
            color=color,
            label=name,
            capsize=2,
        )
        for row, k in zip(rows, kl, strict=True):
            label = row["name"].replace(" + importance", "")
            if label.startswith("search"):
                continue  # lies on top of hqq
            axes.annotate(
                label, (row["bits"], k.mean), fontsize=6, xytext=(4, 3), textcoords="offset points"
            )
    axes.set_yscale("log")
    axes.set_xlabel("true bits a weight of the experts")
    axes.set_ylabel("KL(source || quantized), nats a token")
    axes.set_title(f"{facts['model']}, {facts['text']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
