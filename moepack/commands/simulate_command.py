"""``moepack simulate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepack_formats.errors import UsageError
from moepack_runtime.options import SCOPES, format_size, parse_size
from moepack_runtime.policies import policy_names

from .common import common_options, print_json, set_up
from .types import FiniteRange

if TYPE_CHECKING:
    from moepack_runtime.simulate.simulator import Outcome, Simulator
    from moepack_runtime.trace.trace_file import Trace


def _words(_: click.Context, __: click.Parameter, value: str | None) -> list[str]:
    words = value.split(",") if value else []
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


@click.command("simulate")
@click.argument("trace", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--slots", callback=_words, metavar="N[,N...]", help="Experts that fit in memory.")
@click.option("--ram", callback=_words, metavar="SIZE[,SIZE...]", help="The same as a budget.")
@click.option(
    "--policy",
    callback=_words,
    metavar="NAME[,NAME...]",
    default=",".join(policy_names()),
    show_default=True,
    help="Which cached expert gives way; belady is the optimum.",
)
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="global",
    show_default=True,
    help="Whether all layers share the slots or each has an equal part.",
)
@click.option("--prefetch/--no-prefetch", default=False, help="Read what the trace has guessed.")
@click.option(
    "--pin",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="TRACE",
    help="Keep the most used experts of that trace in half of the slots.",
)
@click.option("--disk-mbps", type=FiniteRange(0, min_open=True), help="Disk, in MB/s.")
@click.option("--compute-ms", type=FiniteRange(0, min_open=True), help="Decoding, a token.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Write hit-ratio.png and recall.png there.",
)
@common_options
def command(
    trace: Path,
    slots: list[str],
    ram: list[str],
    policy: list[str],
    scope: str,
    prefetch: bool,
    pin: Path | None,
    disk_mbps: float | None,
    compute_ms: float | None,
    plot: Path | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Say what caches of several sizes and policies would have done on TRACE.

    TRACE is a file of `moepack trace`. Tokens count as decoded one at a time. The speeds, from what
    was measured for the trace or is given here, are those with reading after computing and with
    reading all behind computing.
    """
    set_up(verbose)
    budgets = list(_budgets(slots, ram))
    if not policy:
        raise UsageError("no policy", wanted=", ".join(policy_names()))
    from moepack_runtime.simulate.simulator import Setting, Simulator, slots_of
    from moepack_runtime.trace.trace_file import most_used, read_trace

    read = read_trace(trace)
    pins = most_used(read_trace(pin)) if pin is not None else ()
    simulator = Simulator(read)
    outcomes = [
        simulator.run(Setting(name, slots_of(read.info, **budget), scope, pins, prefetch))
        for budget in budgets
        for name in policy
    ]
    speed = (compute_ms or read.info.compute_ms, disk_mbps or read.info.disk_mbps)
    if plot is not None:
        _plot(plot, read, simulator, policy, scope)
    if as_json:
        print_json(_json(read, outcomes, speed))
    else:
        _print(read, outcomes, speed)


def _budgets(slots: Sequence[str], ram: Sequence[str]) -> Iterator[dict[str, int]]:
    if not slots and not ram:
        raise UsageError("no cache size", remedy="give --slots or --ram")
    for word in slots:
        if not word.isdecimal() or int(word) < 1:
            raise UsageError("not a number of slots", wanted="1 or more", got=word)
        yield {"slots": int(word)}
    for word in ram:
        yield {"ram": parse_size(word)}


Speed = tuple[float | None, float | None]
"""Milliseconds to compute a token and megabytes a second from the disk, as far as known."""


def _speeds(outcome: Outcome, speed: Speed) -> tuple[float, float] | None:
    compute_ms, disk_mbps = speed
    if compute_ms is None or disk_mbps is None:
        return None
    return outcome.tokens_per_s(compute_ms, disk_mbps)


def _json(trace: Trace, outcomes: Sequence[Outcome], speed: Speed) -> dict[str, Any]:
    from moepack_runtime.simulate.simulator import recall

    results = []
    for outcome in outcomes:
        speeds = _speeds(outcome, speed)
        results.append(
            {
                "policy": outcome.setting.policy,
                "slots": outcome.setting.total_slots,
                "hit_ratio": outcome.hit_ratio,
                "bytes_per_token": outcome.bytes_per_token,
                "tokens_per_s_serial": speeds and speeds[0],
                "tokens_per_s_overlapped": speeds and speeds[1],
            }
        )
    return {
        "tokens": len(trace.routing.experts),
        "layers": trace.info.layers,
        "experts": len(trace.info.records),
        "compute_ms": speed[0],
        "disk_mbps": speed[1],
        "results": results,
        "recall": {str(a + 1): values for a, values in enumerate(recall(trace))},
    }


def _print(trace: Trace, outcomes: Sequence[Outcome], speed: Speed) -> None:
    info = trace.info
    compute = "unknown" if speed[0] is None else f"{speed[0]:.2f} ms"
    disk = "unknown" if speed[1] is None else f"{speed[1]:.0f} MB/s"
    click.echo(
        f"{len(trace.routing.experts)} tokens, {len(info.records)} experts in {info.layers} "
        f"layers, {info.top_k} a token; computing a token {compute}, disk {disk}"
    )
    width = max(len(outcome.setting.policy) for outcome in outcomes)
    click.echo(f"{'policy':{width}}  slots    hits  read a token  tok/s")
    for outcome in outcomes:
        speeds = _speeds(outcome, speed)
        low_high = "unknown" if speeds is None else f"{speeds[0]:.1f} to {speeds[1]:.1f}"
        click.echo(
            f"{outcome.setting.policy:{width}}  {outcome.setting.total_slots:5}  "
            f"{outcome.hit_ratio:6.1%}  {format_size(outcome.bytes_per_token):>12}  {low_high}"
        )


def _plot(
    folder: Path, trace: Trace, simulator: Simulator, policies: Sequence[str], scope: str
) -> None:
    from moepack_runtime.simulate.plot import plot_hits, plot_recall, sizes_to_plot
    from moepack_runtime.simulate.simulator import Setting, recall, slots_of

    sizes = sizes_to_plot(trace.info)
    hits = {
        name: [
            simulator.run(Setting(name, slots_of(trace.info, slots=size), scope)).hit_ratio
            for size in sizes
        ]
        for name in policies
    }
    plot_hits(folder / "hit-ratio.png", trace.info, sizes, hits)
    plot_recall(folder / "recall.png", trace.info, recall(trace))
