import re
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.generate_cli import PAGE, render
from moepack_formats.matrix import dequantize, pack_matrix, unpack_matrix
from moepack_formats.schemes import SCHEMES

ROOT = PAGE.parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("formats/*.md")]
    if path.name != "CHANGELOG.md"
)


def test_cli_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs-cli`"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_contributing_lists_the_folders_of_the_runtime() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("In `runtime/moepack_runtime/`")[1].split("\n`moepack` may")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    folders = (ROOT / "runtime" / "moepack_runtime").glob("*/__init__.py")
    assert {name for row in rows for name in re.findall(r"`(\w+)/`", row)} == {
        path.parent.name for path in folders
    }


def test_readme_options_exist() -> None:
    """An option that a page shows must be one that the command line has."""
    known = set(re.findall(r"--[a-z][a-z-]+", render()))
    text = "\n".join(
        line
        for page in ("README.md", "docs/quickstart.md")
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith("moepack ")
    )
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known


def test_format_page_lists_every_scheme() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(SCHEMES) <= named


def test_quantizer_recipe_works() -> None:
    recipe = code_block("QUANTIZER")
    weight = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))

    matrix = recipe["QUANTIZER"].quantize(weight, SCHEMES["q4g64"])

    restored = unpack_matrix(pack_matrix(matrix), matrix.scheme, matrix.shape)
    error = dequantize(restored) - weight.numpy()
    assert (error**2).mean() < 0.02


def test_policy_recipe_works() -> None:
    policy = code_block("POLICY")["POLICY"]()
    for expert in range(3):
        policy.insert((0, expert))
    policy.touch((0, 0))
    policy.remove((0, 1))
    assert policy.victim(lambda key: key != (0, 0), None) == (0, 2)


def code_block(defines: str) -> dict[str, Any]:
    """Run the recipe of docs/extending.md that defines a name and return what it defined."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (source,) = (block for block in blocks if f"\n{defines} = " in block)
    scope: dict[str, Any] = {}
    exec(compile(source, f"docs/extending.md ({defines})", "exec"), scope)
    return scope
