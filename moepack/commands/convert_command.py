"""``moepack convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepack_formats.schemes import SCHEMES
from moepack_runtime.options import format_size, parse_size

from .common import common_options, print_json, refuse_with, say, set_up

if TYPE_CHECKING:
    from moepack.convert.plan import ConversionPlan
    from moepack_formats.manifest import Manifest


@click.command("convert")
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--attn-bits", type=int, default=4, show_default=True, help="Bits of the trunk's Linears."
)
@click.option(
    "--expert-bits",
    type=float,
    default=3,
    show_default=True,
    help="Bits of the experts: 2, 3, 4, 6, 8, 16, or a decimal that caps the true bits a weight.",
)
@click.option(
    "--head-bits", type=int, default=6, show_default=True, help="Bits of embeddings and output."
)
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="Exact scheme of the experts.")
@click.option(
    "--budget", type=parse_size, metavar="SIZE", help="Largest size of the pack, as 12GiB."
)
@click.option(
    "--mix",
    type=click.Choice(["expert", "layer", "none"]),
    default="expert",
    show_default=True,
    help="What --budget and a decimal --expert-bits choose schemes for; none: the whole model.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="A UTF-8 text; the source is run on it to see which inputs and experts matter.",
)
@click.option(
    "--calibrate-tokens",
    type=click.IntRange(2),
    default=16384,
    show_default=True,
    help="How much of the text is used.",
)
@click.option(
    "--quantizer",
    help="hqq, search, gptq, rtn or hqq-lib.  [default: gptq with --calibrate; without, search at "
    "2 bits and hqq at others]",
)
@click.option("--revision", help="Branch, tag or commit of a Hub source.")
@click.option("--force", is_flag=True, help="Overwrite what the output folder holds.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@common_options
def command(
    src: str,
    out: Path,
    attn_bits: int,
    expert_bits: float,
    head_bits: int,
    scheme: str | None,
    budget: int | None,
    mix: str,
    calibrate: Path | None,
    calibrate_tokens: int,
    quantizer: str | None,
    revision: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Convert SRC, a checkpoint folder or a Hub id, into a pack in the folder OUT.

    An interrupted conversion goes on where it stopped when the same command is given again. Of a
    Hub id only a few shards lie on the disk at a time, in OUT, unless the Hub cache has them all.
    """
    set_up(verbose)
    from moepack.convert.calibrated import calibration_ids, check_calibration
    from moepack.convert.options import ConvertOptions, default_quantizer
    from moepack.convert.output_folder import STAGE_NAME, check_usable
    from moepack.convert.plan import make_plan
    from moepack.convert.run import convert
    from moepack.convert.sources.checkpoint import open_checkpoint

    if scheme is not None:
        refuse_with("--scheme", "mix", "expert_bits")
    elif budget is not None:
        refuse_with("--budget", "expert_bits")
    elif expert_bits.is_integer():
        refuse_with("one scheme for all experts: no --budget, no decimal --expert-bits", "mix")
    if calibrate is None:
        refuse_with("a conversion without --calibrate", "calibrate_tokens")
    if quantizer is None:
        quantizer = default_quantizer(expert_bits, scheme, calibrated=calibrate is not None)
    check_calibration(quantizer, calibrate)
    options = ConvertOptions(
        attn_bits=attn_bits,
        expert_bits=expert_bits,
        head_bits=head_bits,
        scheme=scheme,
        budget=budget,
        quantizer=quantizer,
        mix=mix,
        calibrate=calibrate,
        calibrate_tokens=calibrate_tokens,
    )
    if not dry_run:
        check_usable(out, force=force)
    checkpoint = open_checkpoint(src, revision=revision, stage=out / STAGE_NAME)
    try:
        for line in checkpoint.notices:
            say(f"moepack: {line}")
        plan = make_plan(checkpoint, options)
        if dry_run:
            calibration_ids(plan)  # refuses what the conversion would
            _print_plan(plan, out, as_json)
            return
        if plan.checkpoint.staged_nbytes:
            say(f"moepack: disk: {_disk(plan, out)}")
        if verbose:
            _say_details(plan)
        progress = _Bar()
        try:
            manifest = convert(plan, out, progress, force=force)
        except KeyboardInterrupt:
            again = ", without --force," if force else ""
            say(f"moepack: the same command again{again} resumes this conversion")
            raise
        finally:
            progress.close()
        _print_result(manifest, out, as_json)
    finally:
        checkpoint.close()


class _Bar:
    """Progress on a terminal: parameters a second and time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, parameters: int) -> None:
        """See ``Progress``."""
        from tqdm import tqdm

        # disable=None: only a terminal gets a bar.
        self._bar = tqdm(
            total=parameters, unit="param", unit_scale=True, disable=None, dynamic_ncols=True
        )

    def advance(self, parameters: int, what: str) -> None:
        """See ``Progress``."""
        self._bar.set_description(what, refresh=False)
        self._bar.update(parameters)

    def notice(self, line: str) -> None:
        """See ``Progress``."""
        say(f"moepack: {line}")

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()


def _print_plan(plan: ConversionPlan, out: Path, as_json: bool) -> None:
    from moepack_runtime.disk.room import free_nbytes

    sizes = plan.sizes
    experts = sum(layer.num_experts for layer in plan.layers)
    values = {
        "model_type": plan.model.config.model_type,
        "architecture": type(plan.model).__name__,
        "moe_layers": len(plan.layers),
        "experts": experts,
        "expert_schemes": list(plan.expert_schemes),
        **_sizes_json(sizes),
        "disk_needed": sizes.nbytes + plan.checkpoint.staged_nbytes,
        "disk_staged": plan.checkpoint.staged_nbytes,
        "disk_free": free_nbytes(out),
        "memory_needed": plan.memory_nbytes,
        "kept": {linear.name: linear.reason for linear in plan.kept},
        "unused_tensors": list(plan.mapping.unexpected),
    }
    if as_json:
        print_json(values)
        return
    click.echo(f"{values['architecture']}, {experts} experts in {len(plan.layers)} MoE layers")
    _print_sizes(sizes, ", ".join(plan.expert_schemes))
    click.echo(f"disk    {_disk(plan, out)}")
    click.echo(f"memory  about {format_size(plan.memory_nbytes)} at the peak")
    _say_details(plan)


def _disk(plan: ConversionPlan, out: Path) -> str:
    from moepack_runtime.disk.room import free_nbytes

    staged = plan.checkpoint.staged_nbytes
    needed = f"{format_size(plan.sizes.nbytes + staged)} needed"
    if staged:
        needed += f" ({format_size(staged)} of it for shards of the source, gone afterwards)"
    return f"{needed}, {format_size(free_nbytes(out))} free"


def _say_details(plan: ConversionPlan) -> None:
    reasons: dict[str, list[str]] = {}
    for linear in plan.kept:
        reasons.setdefault(linear.reason, []).append(linear.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"kept as it is: {names[0]}{more} ({reason})")
    if plan.mapping.unexpected:
        count, first = len(plan.mapping.unexpected), plan.mapping.unexpected[0]
        say(f"not part of the model, left out: {count} tensors, as {first}")


def _print_result(manifest: Manifest, out: Path, as_json: bool) -> None:
    sizes = manifest.sizes
    if as_json:
        print_json({"pack": str(out), **_sizes_json(sizes)})
        return
    _print_sizes(sizes, ", ".join(manifest.recipe.expert_schemes))
    before, after = format_size(sizes.source_nbytes), format_size(sizes.nbytes)
    saved = 1 - sizes.nbytes / max(sizes.source_nbytes, 1)
    click.echo(f"saved   {before} -> {after}, {saved:.0%} smaller")
    click.echo(f"pack    {out}")


def _print_sizes(sizes: Any, schemes: str) -> None:
    for name, parameters, nbytes, bits, how in (
        ("experts", sizes.expert_parameters, sizes.expert_nbytes, sizes.expert_bits, schemes),
        ("trunk", sizes.trunk_parameters, sizes.trunk_nbytes, sizes.trunk_bits, ""),
    ):
        line = (
            f"{name:7} {parameters:,} parameters, {format_size(nbytes)}, {bits:.3f} bits a weight"
        )
        click.echo(f"{line} ({how})" if how else line)


def _sizes_json(sizes: Any) -> dict[str, Any]:
    return {
        "expert_parameters": sizes.expert_parameters,
        "expert_bytes": sizes.expert_nbytes,
        "expert_bits": sizes.expert_bits,
        "trunk_parameters": sizes.trunk_parameters,
        "trunk_bytes": sizes.trunk_nbytes,
        "trunk_bits": sizes.trunk_bits,
        "total_bits": sizes.total_bits,
        "source_bytes": sizes.source_nbytes,
    }
