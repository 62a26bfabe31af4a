"""Malformed safetensors headers: refused with exit code 3 before anything is allocated."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats import strict_json
from moepack_formats.errors import FormatError
from moepack_formats.tensor_file import (
    MAX_HEADER_NBYTES,
    Header,
    TensorPlan,
    build_header,
    read_header,
    read_header_only,
)
from tests.formats.hostile import U8_16, refused, safetensors

Check = Callable[[bytes, str], None]


def parse(path: Path, data: bytes) -> Header:
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path.name)
    finally:
        os.close(descriptor)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """The bytes are refused with this message, which names the file."""

    def refuse(data: bytes, message: str) -> None:
        path = tmp_path / "layer-00003.safetensors"
        error = refused(FormatError, message, lambda: parse(path, data), measured=len(data) < 1e6)
        assert "layer-00003.safetensors" in str(error)

    return refuse


def one(**fields: object) -> dict[str, object]:
    return {"a": {**U8_16, **fields}}


def test_what_is_accepted(tmp_path: Path) -> None:
    header = parse(tmp_path / "a", safetensors({"__metadata__": {"k": "v"}, "a": U8_16}))
    assert header.metadata == {"k": "v"}
    assert header.tensors["a"].start == header.data_start
    assert header.end == header.data_start + 16
    empty = parse(tmp_path / "a", safetensors("{}", b""))
    assert (empty.tensors, empty.metadata) == ({}, {})
    padded = parse(tmp_path / "a", safetensors(json.dumps({"a": U8_16}) + " " * 99))
    assert padded.tensors.keys() == {"a"}
    scalar = {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    assert parse(tmp_path / "a", safetensors(scalar, bytes(4))).tensors["a"].nbytes == 4


def test_empty_file(check: Check) -> None:
    check(b"", "file is too small .*wanted 8 bytes or more, got 0")


def test_under_8_bytes(check: Check) -> None:
    check(b"\x10\0\0\0\0\0\0", "file is too small .*got 7")


def test_length_beyond_the_file(check: Check) -> None:
    check(safetensors("{}", b"", length=3), r"header ends beyond the file \(wanted <= 2, got 3\)")
    check(safetensors("{}", b"", length=15_999_999), "header ends beyond the file")


@pytest.mark.parametrize("length", [2**63, 2**63 - 1, 2**64 - 1])
def test_length_2_63(check: Check, length: int) -> None:
    check(safetensors("{}", length=length), f"header is over the cap .*got {length}")


def test_header_over_the_cap(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "layer-00003.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_NBYTES + 1) + b"{}")
    os.truncate(path, 2 * MAX_HEADER_NBYTES)
    check(path.read_bytes(), "header is over the cap")


def test_not_utf8(check: Check) -> None:
    check(safetensors(b'{"a\xff": 1}'), "not UTF-8")
    check(safetensors('{"a": 1}'.encode("utf-16")), "does not start with")
    check(safetensors(b"\xef\xbb\xbf{}"), "does not start with")


@pytest.mark.parametrize("depth", [*range(950, 1010, 4), 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deeply_nested(check: Check, depth: int, opening: str, closing: str) -> None:
    nested = opening * depth + "1" + closing * depth
    check(safetensors(f'{{"a":{nested}}}'), "nested too deeply|wrong type|unknown field")
    check(safetensors('{"a":' + opening * depth), "nested too deeply|does not parse")


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        '{"a":{"dtype":"U8","dtype":"U8","shape":[16],"data_offsets":[0,16]}}',
        '{"__metadata__":{"k":"1","k":"2"}}',
        '{"__metadata__":{},"__metadata__":{}}',
        '{"a":[[{"b":0,"\\u0062":0}]]}',
    ],
)
def test_duplicate_keys(check: Check, text: str) -> None:
    check(safetensors(text), "stands twice in the JSON")


def test_duplicate_among_many_is_found_quickly(check: Check) -> None:
    keys = ",".join(f'"{i}":0' for i in [*range(300_000), 299_999])
    start = time.process_time()
    check(safetensors(f"{{{keys}}}"), "key '299999' stands twice")
    assert time.process_time() - start < 10


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\0"])
def test_leading_space(check: Check, space: str) -> None:
    check(safetensors(f"{space}{{}}"), "does not start with")


def test_text_after_the_object(check: Check) -> None:
    for rest in ("{}", "0", "\0", "//"):
        check(safetensors(f"{{}}{rest}"), "does not parse")


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [-16]},
        {"shape": [-4, -4]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": [0, -16]},
    ],
)
def test_negative(check: Check, fields: dict[str, object]) -> None:
    check(safetensors(one(**fields)), r"wrong type \(wanted an integer from 0 to 2\^63-1, got -")


@pytest.mark.parametrize(
    "shape", [[2**32, 2**32], [2**62, 4], [2**62, 2**62, 0], [2**63 - 1] * 1000, [2] * 100_000]
)
def test_shape_product_overflow(check: Check, shape: list[int]) -> None:
    check(safetensors(one(shape=shape)), "shape overflows")


def test_offset_sum_overflow(check: Check) -> None:
    top = 2**63 - 1
    check(safetensors(one(shape=[top], data_offsets=[0, top])), "offset overflows")
    check(safetensors(one(data_offsets=[top - 16, top])), "offset overflows")


def test_sizes_that_a_file_could_have_but_has_not(check: Check) -> None:
    size = 2**60
    text = safetensors(one(shape=[size], data_offsets=[0, size]))
    check(text, "the data ends early")


def two(begin: int, end: int, nbytes: int) -> bytes:
    entry = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    return safetensors({"a": U8_16, "b": entry}, bytes(nbytes))


def test_hole_or_overlap(check: Check) -> None:
    check(two(17, 20, 20), "b: hole before a tensor")
    check(two(15, 20, 20), "b: tensors overlap")
    check(two(0, 16, 16), "tensors overlap")
    check(safetensors(one(data_offsets=[4, 20]), bytes(20)), "a: hole before a tensor")
    check(safetensors(one(data_offsets=[16, 0])), "offsets and shape disagree")
    check(safetensors(one(shape=[15])), "offsets and shape disagree .*wanted 15 bytes, got 16")


def test_trailing_bytes(check: Check) -> None:
    check(two(16, 20, 21), "bytes follow the last tensor")
    check(two(16, 20, 19), "the data ends early")


@pytest.mark.parametrize("dtype", ["U4", "u8", "", "C64", "torch.uint8", "U8 "])
def test_unknown_dtype(check: Check, dtype: str) -> None:
    check(safetensors(one(dtype=dtype)), "a: unknown dtype .*wanted one of BOOL, U8")


def test_wrong_dtype(check: Check) -> None:
    check(safetensors(one(dtype="F32")), "offsets and shape disagree")


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "x",
        [],
        {},
        {"dtype": "U8", "shape": [16]},
        {**U8_16, "more": 1},
        {**U8_16, "dtype": 8},
        {**U8_16, "shape": 16},
        {**U8_16, "shape": {"0": 16}},
        {**U8_16, "shape": [16.0]},
        {**U8_16, "shape": ["16"]},
        {**U8_16, "shape": [True]},
        {**U8_16, "shape": [None]},
        {**U8_16, "shape": [2**63]},
        {**U8_16, "data_offsets": [0]},
        {**U8_16, "data_offsets": [0, 16, 16]},
        {**U8_16, "data_offsets": None},
    ],
    ids=str,
)
def test_fields_of_another_kind(check: Check, value: object) -> None:
    check(safetensors({"a": value}), "wrong type|unknown field|is missing")


@pytest.mark.parametrize("value", [None, [], "x", {"k": 1}, {"k": None}, {"k": {}}])
def test_metadata_of_another_kind(check: Check, value: object) -> None:
    check(safetensors({"__metadata__": value}), "__metadata__.*wrong type")


@pytest.mark.parametrize(
    "number",
    ["-0", "1" * 5000, "-" + "9" * 5000, "1e5", "1E400", "-1e999", "0.5", "NaN", "Infinity", "016"],
)
def test_numbers(check: Check, number: str) -> None:
    text = f'{{"a":{{"dtype":"U8","shape":[{number}],"data_offsets":[0,16]}}}}'
    check(safetensors(text), "impossible integer|JSON holds|wrong type|does not parse")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1E999"])
def test_numbers_that_are_not_finite(number: str) -> None:
    refused(
        FormatError,
        f"here: JSON holds '{number}' .wanted finite numbers",
        lambda: strict_json.loads(f'{{"a":{number}}}'.encode(), "here"),
    )


def test_half_a_surrogate_pair(check: Check) -> None:
    check(safetensors('{"__metadata__":{"k":"\\ud800"}}', b""), "surrogate")
    check(safetensors('{"\\uDFFF":0}', b""), "surrogate")


def test_whole_surrogate_pairs_and_escapes_are_text(tmp_path: Path) -> None:
    text = '{"__metadata__":{"k":"\\ud83d\\ude00 \\u00e9"}}'
    assert parse(tmp_path / "a", safetensors(text, b"")).metadata == {"k": "\U0001f600 é"}


def test_names_do_not_reach_the_terminal_as_they_are(check: Check) -> None:
    check(safetensors({"\x1b[2J\r\nok\x00": 1}), r"\\x1b\[2J ok")


def test_long_names_and_long_lists_cost_little(check: Check) -> None:
    """A message about one number must not copy megabytes for each number before it."""
    shape = [0] * 1_000_000
    start = time.process_time()
    check(safetensors({"n" * 8_000_000: {**U8_16, "shape": [*shape, -1]}}), "wrong type")
    check(safetensors({"n" * 8_000_000: 1}), "wrong type")
    assert time.process_time() - start < 20


def test_many_tensors(tmp_path: Path) -> None:
    """A header near the cap is read within seconds and a few times its own size."""
    entries = {f"{i:x}": {**U8_16, "shape": [], "data_offsets": [i, i + 1]} for i in range(60_000)}
    data = safetensors(json.dumps(entries, separators=(",", ":")), bytes(60_000))
    start = time.process_time()
    header = parse(tmp_path / "a", data)
    assert time.process_time() - start < 10
    assert list(header.tensors) == list(entries)


@settings(max_examples=200)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_any_bytes_are_refused_or_read(tmp_path_factory, body: bytes, length: int) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    with contextlib.suppress(FormatError):
        parse(path, struct.pack("<Q", length) + body)


@settings(max_examples=300)
@given(at=st.integers(0, 300), value=st.integers(0, 255))
def test_any_changed_byte_is_refused_or_read(tmp_path_factory, at: int, value: int) -> None:
    data = bytearray(safetensors({"__metadata__": {"k": "v"}, "a": U8_16, "b": {**U8_16}}))
    data = bytearray(two(16, 20, 20)) if at % 2 else data
    data[at % len(data)] = value
    path = tmp_path_factory.mktemp("any") / "a"
    with contextlib.suppress(FormatError):
        parse(path, bytes(data))


def test_reading_the_header_alone_allows_missing_data(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(two(16, 20, 5))
    descriptor = os.open(path, os.O_RDONLY)
    assert read_header_only(descriptor, "a").end == path.stat().st_size + 15
    os.close(descriptor)


def test_the_writer_makes_no_header_that_the_reader_refuses() -> None:
    with pytest.raises(FormatError, match="two tensors have one name"):
        build_header([TensorPlan("a", "U8", (1,))] * 2, {})
    with pytest.raises(FormatError, match="over the cap"):
        build_header([TensorPlan("a" * MAX_HEADER_NBYTES, "U8", (1,))], {})
    for count in range(0, 200, 7):
        header = build_header([TensorPlan(f"a{i}", "F32", (i,)) for i in range(count)], {})
        assert len(header) % 4096 == 0
