"""The model card: where a pack comes from, what it holds, and how to run it."""

from __future__ import annotations

from dataclasses import dataclass

from moepack_formats.manifest import Manifest
from moepack_runtime.options import format_size

MARK = "<!-- written by moepack: edits above are kept by taking this line out -->"
"""Ends a card that a later push may replace."""

CARD_NAME = "README.md"
MAX_CARD_NBYTES = 4 << 20
"""A README over this is no card and is not read: it goes through memory whole."""


@dataclass(frozen=True)
class Quality:
    """What `moepack eval` measured.

    Attributes:
        perplexity: On ``text``.
        tokens: Tokens it was measured on.
        text: What the text is.
    """

    perplexity: float
    tokens: int
    text: str


def model_card(
    manifest: Manifest, *, repo_id: str | None = None, quality: Quality | None = None
) -> bytes:
    """``README.md`` of a pack.

    Args:
        manifest: The pack's manifest; everything in the card comes from it.
        repo_id: Where the pack is on the Hub, if it is.
        quality: What was measured, if it was.
    """
    return (_metadata(manifest) + _body(manifest, repo_id, quality)).encode()


def is_ours(card: bytes) -> bool:
    """Whether a card was written here and not edited by hand since."""
    return MARK.encode() in card


def _metadata(manifest: Manifest) -> str:
    source = manifest.source
    lines = ["library_name: moepack", "pipeline_tag: text-generation"]
    lines += ["tags:", "- moepack", "- moe", "- quantized"]
    if "/" in source.id:
        lines += [f"base_model: {_scalar(source.id)}", "base_model_relation: quantized"]
    if source.license:
        lines.append(f"license: {_scalar(source.license)}")
    return "\n".join(["---", *lines, "---", ""])


def _scalar(text: str) -> str:
    """A YAML string: what a source says of itself may hold anything."""
    plain = text.replace("-", "").replace(".", "").replace("/", "").replace("_", "")
    if plain.isalnum() and plain.isascii() and not plain.isdigit():
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{" ".join(quoted.split())}"'


def _body(manifest: Manifest, repo_id: str | None, quality: Quality | None) -> str:
    source, sizes = manifest.source, manifest.sizes
    experts = sum(layer.num_experts for layer in manifest.layers)
    revision = f" at revision `{source.revision}`" if source.revision else ""
    licence = (
        f"\nThe source's licence, {_line(source.license)}, applies.\n" if source.license else ""
    )
    recipe = manifest.recipe
    trunk_schemes = f"{recipe.trunk_scheme}; head {recipe.head_scheme}"
    pack = sizes.nbytes
    measured = ""
    if quality is not None:
        measured = (
            f"\nPerplexity {quality.perplexity:.4f} on {_line(quality.text)} "
            f"({quality.tokens:,} tokens, `moepack eval`).\n"
        )
    place = repo_id or "path/to/this/folder"
    return f"""
# {_line(source.id.rsplit("/", 1)[-1])}, packed

[{_line(source.id)}]{_link(source.id)}{revision} ({manifest.architecture}) in moepack's format:
{experts} experts in {len(manifest.layers)} MoE layers, one aligned record per expert, streamed from
disk where memory is smaller than the model.
{licence}
| part | parameters | bytes | true bits a weight | schemes |
|---|---|---|---|---|
{_row("experts", sizes.expert_parameters, sizes.expert_nbytes, ", ".join(recipe.expert_schemes))}
{_row("trunk", sizes.trunk_parameters, sizes.trunk_nbytes, trunk_schemes)}

Together {format_size(pack)} of {format_size(sizes.source_nbytes)}, {sizes.total_bits:.3f} true bits
a weight, metadata and padding included. Quantizer: {recipe.quantizer}. Every file's sha256 and
every record's checksum are in `moepack.json` and the layer files' headers; `moepack verify`
compares them.
{measured}
```sh
pip install .    # in a clone of moepack's repository
moepack generate {place} --prompt "..."
```

```python
import moepack
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{place}")
```

{MARK}
"""


def _row(part: str, parameters: int, nbytes: int, schemes: str) -> str:
    bits = nbytes * 8 / max(parameters, 1)
    return f"| {part} | {parameters:,} | {format_size(nbytes)} | {bits:.3f} | {schemes} |"


def _link(source_id: str) -> str:
    return f"(https://huggingface.co/{source_id})" if "/" in source_id else ""


def _line(text: str) -> str:
    return " ".join(text.split())
