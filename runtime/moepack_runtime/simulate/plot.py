"""The two figures of Eliseev & Mazur (arXiv 2312.17238, figure 2) for a routing trace, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moepack_formats import osio
from moepack_formats.errors import UsageError

from ..trace.trace_file import TraceInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

_POINTS = 12
_OPTIMUM = "belady"
_MARKERS = "osD^vPX*"
_INK, _FAINT = "#222222", "#bbbbbb"
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933")


def sizes_to_plot(info: TraceInfo) -> list[int]:
    """Cache sizes in experts, from one token's worth or less to all."""
    everything = len(info.records)
    first = max(everything // 16, 1)
    steps = [first + (everything - first) * i / (_POINTS - 1) for i in range(_POINTS)]
    return sorted({round(step) for step in steps})


def plot_hits(
    path: Path, info: TraceInfo, sizes: Sequence[int], hits: Mapping[str, Sequence[float]]
) -> None:
    """Hit ratio against cache size, a line for each policy.

    Args:
        path: The PNG to write.
        info: Of the trace.
        sizes: Slots.
        hits: Hit ratios by policy, for each of ``sizes``.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure, axes = _figure()
    everything = len(info.records)
    # The policy that is best on the whole comes first in the legend.
    order = sorted(hits, key=lambda name: (name != _OPTIMUM, -sum(hits[name])))
    colours = iter(_COLOURS)
    for i, name in enumerate(order):
        if name == _OPTIMUM:
            axes.plot(sizes, hits[name], "--", color=_INK, label=f"{name} (offline optimum)")
        else:
            marker = _MARKERS[i % len(_MARKERS)]
            axes.plot(sizes, hits[name], marker=marker, color=next(colours, _INK), label=name)
    axes.plot([0, everything], [0, 1], ":", color=_FAINT, label="share in memory")
    axes.set_xlim(0, everything * 1.015)
    axes.set_xlabel(f"experts in memory, of {everything} in {info.layers} layers")
    axes.set_ylabel("demanded experts found in memory")
    axes.set_title(f"Hit ratio against cache size: {info.model}, {info.top_k} experts a token")
    _finish(figure, axes, path)


def plot_recall(path: Path, info: TraceInfo, recall: Sequence[Sequence[float]]) -> None:
    """Recall of speculation against experts fetched, a line for each number of layers ahead.

    Args:
        path: The PNG to write.
        info: Of the trace.
        recall: As :func:`moepack_runtime.simulate.simulator.recall` gives.

    Raises:
        UsageError: matplotlib is not installed, or nothing was guessed.
    """
    if not any(recall):
        raise UsageError(
            "the trace has no guesses to plot", remedy="record one with --ahead 1 or more"
        )
    figure, axes = _figure()
    colours = iter(_COLOURS)
    for ahead, shares in enumerate(recall, 1):
        if shares:
            label = f"{ahead} layer{'s' if ahead > 1 else ''} ahead"
            fetched = range(1, len(shares) + 1)
            marker = _MARKERS[(ahead - 1) % len(_MARKERS)]
            axes.plot(fetched, shares, marker=marker, color=next(colours, _INK), label=label)
    kept = max(map(len, recall))
    experts = max(map(len, info.record_nbytes))
    axes.plot([0, kept], [0, kept / experts], ":", color=_FAINT, label="guessed at random")
    axes.axvline(info.top_k, color=_FAINT, linewidth=1)
    axes.annotate(
        f"used by a token: {info.top_k}",
        (info.top_k, 0.02),
        (4, 0),
        textcoords="offset points",
        color="#777777",
    )
    axes.set_xlim(0, kept * 1.015)
    axes.xaxis.set_major_locator(_whole_numbers(kept))
    axes.set_xlabel(f"experts fetched for a layer, of {experts}")
    axes.set_ylabel("used experts that were fetched")
    axes.set_title(f"Recall of speculation: {info.model}")
    _finish(figure, axes, path)


def _figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "figures need matplotlib, which is not installed",
            remedy="run `pip install matplotlib`",
        ) from None
    # No pyplot: nothing global is touched, and no display is looked for.
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _whole_numbers(most: int) -> MultipleLocator:
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(max(1, math.ceil(most / 10)))


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for line in axes.lines:
        line.set_markersize(4.5)
    axes.legend(frameon=False, loc="lower right")
    with osio.io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
