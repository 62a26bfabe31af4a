"""Sizes, options, and which residency they choose."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moepack
from moepack_formats.errors import UsageError
from moepack_runtime.loading import load_pack
from moepack_runtime.options import (
    RuntimeOptions,
    current_options,
    format_size,
    options,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1000),
        ("1KiB", 1024),
        ("512MB", 512_000_000),
        ("1.5G", 1_500_000_000),
        ("1.5GiB", 3 << 29),
        ("6GiB", 6 << 30),
        ("2TiB", 2 << 40),
        (" 7 gib ", 7 << 30),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e3", "1.GiB", "6GB2", "6XB", "6i", "nan", "1,5G"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="as 6GiB"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_shown_sizes_are_read_again(nbytes: int) -> None:
    shown = parse_size(format_size(nbytes))
    assert abs(shown - nbytes) <= max(0.06 * nbytes, 1)


def test_shown_sizes() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 29, 2 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "1.5 GiB",
        "2.0 TiB",
    ]


def test_options_end_with_their_block() -> None:
    assert current_options() == RuntimeOptions()
    with moepack.options(ram="6GiB", io="mmap") as outer:
        assert outer == RuntimeOptions(ram=6 << 30, io="mmap")
        with options(io="buffered"):
            assert current_options() == RuntimeOptions(ram=6 << 30, io="buffered")
        assert current_options() == outer
    assert current_options() == RuntimeOptions()
    with pytest.raises(KeyError), options(prefetch=False):
        raise KeyError
    assert current_options() == RuntimeOptions()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rom": 1}, "no option 'rom' .*policy, prefetch, ram"),
        ({"io": "telepathy"}, "auto or direct or buffered or mmap"),
        ({"ram": "much"}, "not a size"),
        ({"io_threads": 0}, "1 or more"),
        ({"slots": 0}, "1 or more"),
    ],
)
def test_options_that_are_wrong(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words), options(**changes):
        pass


def test_an_unknown_policy(pack: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown policy .*lru"):
        load_pack(pack, io="buffered", policy="fifo")


def test_auto_maps_what_fits(pack: Path) -> None:
    everything = load_pack(pack, ram="4GiB")
    assert everything.moepack.residency.describe() == "records memory-mapped"
    slots = load_pack(pack, ram="4GiB", io="buffered")
    assert slots.moepack.residency.describe().startswith("24 of 24 experts fit")
    assert "buffered reads" in slots.moepack.residency.describe()
    for number, io, words in (
        (1, "auto", "1 of 24 experts fit"),
        (1, "mmap", "records memory-mapped"),
        (6, "auto", "6 of 24 experts fit"),
    ):
        model = load_pack(pack, ram="4GiB", slots=number, io=io)
        assert model.moepack.residency.describe().startswith(words)
