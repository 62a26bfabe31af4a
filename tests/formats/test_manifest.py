"""The manifest: round trip, versions, names, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack_formats.errors import FormatError, UsageError
from moepack_formats.journal import Journal
from moepack_formats.manifest import Manifest, from_json, to_json
from moepack_formats.pack import MAX_MANIFEST_NBYTES, Pack, read_manifest
from moepack_formats.paths import check_names, check_relative
from tests.formats.builders import build_pack
from tests.formats.hostile import refused

LAYER = "experts/layer-00000.safetensors"
HEAD = "lm_head"
DIGEST = "0" * 32
SHA = "0" * 64

Damage = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture
def fields(manifest: Manifest) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(to_json(manifest))
    return parsed


def read(fields: object) -> Manifest:
    return from_json(json.dumps(fields).encode())


def test_round_trip(manifest: Manifest) -> None:
    assert from_json(to_json(manifest)) == manifest
    assert to_json(from_json(to_json(manifest))) == to_json(manifest)


def test_what_has_a_default_may_be_absent(fields: dict[str, Any], manifest: Manifest) -> None:
    for name in ("revision", "license"):
        del fields["source"][name]
    del fields["files"]["config.json"]["header_xxh3"]
    del fields["packed"][HEAD]["tied_to"]
    found = read(fields)
    assert (found.source.revision, found.source.license) == (None, None)
    assert (found.files, found.packed) == (manifest.files, manifest.packed)


def test_true_bits(manifest: Manifest) -> None:
    sizes = manifest.sizes
    assert sizes.expert_bits == 8 * sizes.expert_nbytes / sizes.expert_parameters
    assert sizes.trunk_bits == 8 * sizes.trunk_nbytes / sizes.trunk_parameters
    total = 8 * (sizes.expert_nbytes + sizes.trunk_nbytes)
    assert sizes.total_bits == total / (sizes.expert_parameters + sizes.trunk_parameters)


def first_layer(f: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = f["layers"][0]
    return layer


def tie(f: dict[str, Any], **head: object) -> None:
    f["packed"]["embed"] = {"kind": "embedding", "scheme": "q4g64", "shape": [18, 20]}
    f["trunk"]["embed.packed"] = DIGEST
    f["packed"][HEAD].update({"tied_to": "embed", **head})


CASES: dict[str, tuple[Damage, str]] = {
    "format": (
        lambda f: f.update(format="zip"),
        "not a moepack manifest .*wanted moepack, got zip",
    ),
    "no format": (lambda f: f.pop("format"), "not a moepack manifest"),
    "newer reader": (lambda f: f.update(min_reader=2), "needs a newer reader.*upgrade moepack"),
    "newer reader, other fields": (
        lambda f: (f.clear(), f.update(format="moepack", min_reader=9, novelty=1)),
        "needs a newer reader.*upgrade moepack",
    ),
    "min_reader over format_version": (lambda f: f.update(format_version=0), "min_reader is not"),
    "min_reader 0": (lambda f: f.update(min_reader=0), "min_reader is not"),
    "min_reader as text": (lambda f: f.update(min_reader="2"), "min_reader: .*wrong type"),
    "min_reader true": (lambda f: f.update(min_reader=True), "min_reader: .*wrong type"),
    "unknown field": (lambda f: f.update(compression="zstd"), "unknown field 'compression'"),
    "unknown field inside": (
        lambda f: f["files"][LAYER].update(codec="zstd"),
        f"{LAYER}: unknown field 'codec'",
    ),
    "missing field": (lambda f: f.pop("trunk"), "field 'trunk' is missing"),
    "list for object": (lambda f: f.update(files=[]), "files: .*wrong type"),
    "object for list": (lambda f: f.update(layers={}), "layers: .*wrong type"),
    "null": (lambda f: f.update(generator=None), "generator: .*wrong type"),
    "unknown scheme": (
        lambda f: f["packed"][HEAD].update(scheme="zstd"),
        f"{HEAD}: unknown sch",
    ),
    "bits": (lambda f: f["packed"][HEAD].update(scheme="q5g64"), "unknown scheme .*'q5g64'"),
    "group": (lambda f: f["packed"][HEAD].update(scheme="q4g32"), "unknown scheme .*'q4g32'"),
    "kind": (lambda f: f["packed"][HEAD].update(kind="conv"), "unknown kind"),
    "shape": (lambda f: f["packed"][HEAD].update(shape=[0, 20]), "impossible shape"),
    "shape dimensions": (lambda f: f["packed"][HEAD].update(shape=[20]), "shape: .*2 items"),
    "packed without tensor": (lambda f: f["trunk"].pop(f"{HEAD}.packed"), "has no tensor"),
    "tied to nothing": (
        lambda f: f["packed"][HEAD].update(tied_to="embed"),
        "tied to something else",
    ),
    "tied to itself": (lambda f: f["packed"][HEAD].update(tied_to=HEAD), "tied to something else"),
    "tied to another shape": (lambda f: tie(f, shape=[18, 21]), "differs from its embedding"),
    "tied to another scheme": (lambda f: tie(f, scheme="q8g64"), "differs from its embedding"),
    "layer order": (lambda f: f["layers"].reverse(), "not numbered from 0"),
    "layer number": (lambda f: first_layer(f).update(index=5), "not numbered from 0"),
    "huge layer number": (lambda f: first_layer(f).update(index=2**63 - 1), "not numbered from 0"),
    "layer without experts": (lambda f: first_layer(f).update(num_experts=0), "without experts"),
    "layer without files": (
        lambda f: first_layer(f).update(files=[]),
        "without experts or without",
    ),
    "module twice": (
        lambda f: first_layer(f).update(module=f["layers"][1]["module"]),
        "two layers have one module",
    ),
    "file of two layers": (
        lambda f: first_layer(f).update(files=f["layers"][1]["files"]),
        "named twice",
    ),
    "file twice": (lambda f: first_layer(f).update(files=[LAYER, LAYER]), "named twice"),
    "file of a layer not listed": (lambda f: f["files"].pop(LAYER), f"not listed .wanted {LAYER}"),
    "file of a layer not tensors": (
        lambda f: first_layer(f).update(files=["config.json"]),
        "not a safetensors file",
    ),
    "no header digest": (
        lambda f: f["files"][LAYER].update(header_xxh3=None),
        "have a header_xxh3",
    ),
    "header digest of text": (
        lambda f: f["files"]["config.json"].update(header_xxh3=DIGEST),
        "have a header_xxh3",
    ),
    "sha256": (lambda f: f["files"][LAYER].update(sha256="0" * 40), f"{LAYER}: not a checksum"),
    "trunk digest": (lambda f: f["trunk"].update(x="G" * 32), "x: not a checksum"),
    "itself": (
        lambda f: f["files"].update({"moepack.json": {"size": 1, "sha256": SHA}}),
        "lists itself",
    ),
    "itself in capitals": (
        lambda f: f["files"].update({"MoePack.json": {"size": 1, "sha256": SHA}}),
        "differ only by case",
    ),
    "huge size": (lambda f: f["files"][LAYER].update(size=2**63), "size: .*wrong type"),
    "float size": (lambda f: f["files"][LAYER].update(size=1e3), "size: .*wrong type"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, fields: dict[str, Any]) -> None:
    damage, message = CASES[case]
    damage(fields)
    error = refused(FormatError, message, lambda: read(fields))
    assert "moepack.json" in str(error)


def test_tied_head(fields: dict[str, Any]) -> None:
    tie(fields)
    del fields["trunk"][f"{HEAD}.packed"]
    assert read(fields).packed[HEAD].tied_to == "embed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" {}",
        b"[]",
        b"{",
        b"\xff\xfe{\0}\0",
        b'{"format":"moepack","format":"moepack"}',
        b'{"format":' + b"[" * 100_000,
        b'{"format":"\\ud800"}',
        b'{"format":"moepack"}{}',
        b'{"min_reader":' + b"9" * 5000 + b"}",
    ],
)
def test_not_json(data: bytes) -> None:
    refused(FormatError, "moepack.json", lambda: from_json(data))


BAD_NAMES = {
    "empty": "",
    "parent": "../model.safetensors",
    "parent inside": "experts/../../x",
    "parent at the end": "experts/..",
    "absolute": "/etc/passwd",
    "drive": "C:\\windows\\x",
    "drive with slash": "c:/windows",
    "drive, relative": "C:x",
    "UNC": "\\\\server\\share\\x",
    "UNC with slashes": "//server/share/x",
    "backslash": "experts\\layer",
    "NUL": "config.json\0.txt",
    "newline": "a\nb",
    "escape": "a\x1b[2Jb",
    "right to left": "a\u202eb",
    "here": "./config.json",
    "empty part": "experts//x",
    "slash at the end": "experts/",
    "long part": "x" * 256,
    "long": "/".join(["x" * 100] * 50),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_unsafe_names(case: str, fields: dict[str, Any]) -> None:
    fields["files"][BAD_NAMES[case]] = {"size": 1, "sha256": SHA}
    error = refused(FormatError, "unsafe file name", lambda: read(fields))
    assert "\0" not in str(error)


def test_plain_names_pass() -> None:
    for name in ("config.json", "experts/layer-00000.safetensors", ".x", "a b", "..x/y..", "é"):
        assert check_relative(name) == name


@pytest.mark.parametrize(
    "names", [("config.json", "Config.json"), ("a/ß", "a/SS"), ("\u00e9", "e\u0301")]
)
def test_names_that_collide(names: tuple[str, str], fields: dict[str, Any]) -> None:
    refused(FormatError, "file names differ only by case", lambda: check_names(names))
    for name in names:
        fields["files"][name] = {"size": 1, "sha256": SHA}
    refused(FormatError, "file names differ only by case", lambda: read(fields))


def test_manifest_absent(tmp_path: Path) -> None:
    refused(FormatError, "no moepack.json: run convert again", lambda: read_manifest(tmp_path))
    Journal(tmp_path, "x").close()
    refused(
        FormatError,
        "unfinished conversion: run convert again",
        lambda: Pack(tmp_path),
    )
    refused(UsageError, "no such folder", lambda: read_manifest(tmp_path / "none"))


def test_manifest_that_is_only_half_there(tmp_path: Path, manifest: Manifest) -> None:
    data = to_json(manifest)
    for size in range(0, len(data) - 2, 97):
        (tmp_path / "moepack.json").write_bytes(data[:size])
        refused(FormatError, "moepack.json", lambda: read_manifest(tmp_path))


def test_manifest_over_the_cap(tmp_path: Path) -> None:
    with open(tmp_path / "moepack.json", "wb") as file:
        file.write(b"{")
        file.truncate(MAX_MANIFEST_NBYTES + 1)
    refused(FormatError, "manifest is over the cap", lambda: read_manifest(tmp_path))
