"""Compressed layer files: what they save, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from moepack.hub.compress import compress_layer_file
from moepack_formats.errors import MoepackError
from moepack_formats.pack import read_manifest
from moepack_formats.tensor_file import MAX_HEADER_NBYTES
from moepack_runtime.hub.expand import expand_layer_file
from tests.hub.conftest import Client, files_of

NAME = "experts/layer-00001.safetensors"
PLACE = "me/pack, layer-00001"


def test_compressed_round_trip(either: Client, pack: Path, tmp_path: Path) -> None:
    report = json.loads(either.ok("push", pack, "me/pack", "--compress", "--json"))
    names = sorted(either.hub.store.repos["me/pack"].commits[-1].files)
    assert f"{NAME}.zst" in names
    assert NAME not in names
    out = tmp_path / "out"
    either.ok("pull", "me/pack", out)
    assert files_of(out) == files_of(pack)
    # Again: nothing to do, although the compressed bytes are not at hand.
    either.hub.forget()
    again = json.loads(either.ok("push", pack, "me/pack", "--compress", "--json"))
    assert again["uploaded"] == 0
    assert not either.hub.uploaded()
    assert report["uploaded"] > 0
    # Without --compress the other form takes its place.
    either.ok("push", pack, "me/pack")
    names = sorted(either.hub.store.repos["me/pack"].commits[-1].files)
    assert NAME in names
    assert f"{NAME}.zst" not in names


@pytest.mark.slow
def test_generate_expands_once(client: Client, pack: Path) -> None:
    client.ok("push", pack, "me/pack", "--compress")
    arguments = ("--prompt", "And the king", "--greedy", "--max-new-tokens", "2")
    local = client.ok("generate", pack, *arguments)
    assert client.ok("generate", "me/pack", *arguments) == local
    assert not list(client.home.rglob("*.zst"))
    client.hub.close()
    assert client.ok("generate", "me/pack", *arguments, HF_HUB_OFFLINE="1") == local


def frames(data: bytes) -> list[bytes]:
    """The frames of a compressed file."""
    found = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frame.decompress(data)
        left = frame.unused_data
        found.append(data[: len(data) - len(left)])
        data = left
    return found


@pytest.fixture
def compressed(pack: Path, tmp_path: Path) -> list[bytes]:
    facts = read_manifest(pack).files[NAME]
    compress_layer_file(pack / NAME, tmp_path / "good.zst", facts)
    parts = frames((tmp_path / "good.zst").read_bytes())
    assert len(parts) == 1 + 8  # the header and eight experts
    return parts


def frame(data: bytes, **options: bool) -> bytes:
    settings = {"write_checksum": True, "write_content_size": True, **options}
    return zstandard.ZstdCompressor(level=3, **settings).compress(data)


def bomb(declared: bytes) -> bytes:
    """A frame of 3 GB of zeros that declares as many bytes as ``declared`` does."""
    zeros = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=3 << 30)
    body = b"".join([zeros.compress(bytes(64 << 20)) for _ in range(48)] + [zeros.flush()])
    if not declared:
        return body
    honest = zstandard.get_frame_parameters(body)
    size = zstandard.get_frame_parameters(declared).content_size
    # The frame header: magic 4, descriptor 1, window 1, content size 8 (the size needs 4).
    assert honest.content_size == 3 << 30
    head = bytearray(body[:6])
    return bytes(head) + size.to_bytes(4, "little") + body[10:]


HOSTILE = {
    "truncated in an expert": (lambda f: [*f[:3], f[3][:-40]], 4, "expert 2"),
    "ends after an expert": (lambda f: f[:5], 4, "expert 4"),
    "an extra frame": (lambda f: [*f, f[1]], 4, "bytes follow"),
    "trailing bytes": (lambda f: [*f, b"x"], 4, "bytes follow"),
    "flipped bit": (lambda f: [*f[:2], flipped(f[2]), *f[3:]], 4, "expert 1"),
    "an honest bomb": (lambda f: [f[0], bomb(b""), *f[2:]], 4, "expert 0"),
    "a bomb that lies": (lambda f: [f[0], bomb(f[1]), *f[2:]], 4, "expert 0"),
    "no checksum": (lambda f: [f[0], frame(plain(f[1]), write_checksum=False)], 3, "checksum"),
    "no size": (lambda f: [f[0], frame(plain(f[1]), write_content_size=False)], 3, "no size"),
    "a huge window": (lambda f: [f[0], wide(plain(f[1]))], 3, "window"),
    "another header": (lambda f: [frame(plain(f[0])[:-1] + b"\n"), *f[1:]], 4, "header"),
    "not zstd": (lambda f: [b"hello, this is not a frame"], 4, "not a zstd frame"),
    "empty": (lambda f: [], 4, "not a zstd frame"),
}


def plain(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def wide(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=27, write_checksum=True, write_content_size=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(
        size=len(data) * 400
    )
    return compressor.compress(data * 400) + compressor.flush()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames(pack: Path, compressed: list[bytes], tmp_path: Path, name: str) -> None:
    change, code, words = HOSTILE[name]
    source, target = tmp_path / "bad.zst", tmp_path / "layer.safetensors"
    source.write_bytes(b"".join(change(compressed)))
    with pytest.raises(MoepackError) as caught:
        expand_layer_file(source, target, read_manifest(pack).files[NAME], PLACE)
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert PLACE in str(caught.value) or "layer" in str(caught.value)
    assert not list(tmp_path.glob("layer*"))


def test_swapped_frames_are_caught_by_the_sha256(
    client: Client, pack: Path, compressed: list[bytes], tmp_path: Path
) -> None:
    client.ok("push", pack, "me/pack", "--compress")
    swapped = [compressed[0], compressed[2], compressed[1], *compressed[3:]]
    client.hub.store.put("me/pack", {f"{NAME}.zst": b"".join(swapped)})
    line = client.fails(4, "pull", "me/pack", tmp_path / "out")
    assert NAME in line
    client.hub.store.put("me/pack", {f"{NAME}.zst": b"".join(compressed[:4])})
    line = client.fails(4, "pull", "me/pack", tmp_path / "other")
    assert NAME in line
    assert "expert 3" in line


def empty_blocks(declared: int, count: int) -> bytes:
    """A frame that never comes to its content: blocks of no bytes, three bytes each."""
    return b"\x28\xb5\x2f\xfd\xa0" + declared.to_bytes(4, "little") + bytes(3 * count)


FIRST_FRAMES = {
    "a large header": (frame(bytes(MAX_HEADER_NBYTES + 9)), 3, "header is over the cap"),
    "no size": (frame(b"{}", write_content_size=False), 3, "header is over the cap"),
    "a large frame": (empty_blocks(900, MAX_HEADER_NBYTES // 2), 3, "first frame is over the cap"),
    "a short frame": (empty_blocks(900, 9), 4, "first frame is truncated"),
    "not zstd": (b"hello, this is not a frame", 4, "first frame is damaged"),
}


def test_hostile_headers_are_not_inspected(client: Client, pack: Path) -> None:
    """`inspect` reads no more of a file than its header can have."""
    client.ok("push", pack, "me/pack", "--compress")
    for data, code, words in FIRST_FRAMES.values():
        client.hub.store.put("me/pack", {f"{NAME}.zst": data})
        line = client.fails(code, "inspect", "me/pack")
        assert words in line
        assert f"me/pack, {NAME}" in line
