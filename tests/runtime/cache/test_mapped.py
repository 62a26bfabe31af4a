"""Memory-mapped records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moepack_formats.errors import IntegrityError, ResourceError
from moepack_formats.pack import Pack
from moepack_runtime.cache.mapped import MappedRecords
from moepack_runtime.statistics import Statistics

LAYER = "experts/layer-00001.safetensors"


def test_records_are_the_files_bytes(pack: Path) -> None:
    with Pack(pack) as opened:
        stats = Statistics()
        mapped = MappedRecords(opened, stats)
        for layer, records in enumerate(opened.layers):
            seen = []
            for expert, view in mapped.fetch(layer, [3, 0, 7]):
                at = records[expert]
                data = (pack / at.file).read_bytes()[at.offset : at.offset + at.spec.nbytes]
                assert bytes(view.numpy().data) == data
                seen.append(expert)
            assert seen == [3, 0, 7]
        nbytes = opened.layers[0][0].spec.nbytes
        assert (stats.misses, stats.hits, stats.bytes_read) == (9, 0, 9 * nbytes)
        list(mapped.fetch(0, [0, 1]))
        assert (stats.misses, stats.hits) == (10, 1)
        assert mapped.describe() == "records memory-mapped"
        mapped.close()


def test_views_outlive_the_mapping(pack: Path) -> None:
    with Pack(pack) as opened:
        mapped = MappedRecords(opened, Statistics())
        ((_, view),) = mapped.fetch(0, [2])
        before = bytes(view.numpy().data)
        mapped.close()
    assert bytes(view.numpy().data) == before


def test_writing_to_a_view_does_not_reach_the_file(damaged: Path) -> None:
    before = (damaged / LAYER).read_bytes()
    with Pack(damaged) as opened:
        mapped = MappedRecords(opened, Statistics())
        for _, view in mapped.fetch(1, [0]):
            view.zero_()
        mapped.close()
    assert (damaged / LAYER).read_bytes() == before


def test_damage_is_found_on_the_first_use(damaged: Path) -> None:
    with Pack(damaged) as opened:
        at = opened.layers[1][4]
        data = bytearray((damaged / LAYER).read_bytes())
        data[at.offset + 100] ^= 1
        (damaged / LAYER).write_bytes(data)
        mapped = MappedRecords(opened, Statistics())
        for _ in range(2):  # a record that failed is looked at again
            with pytest.raises(IntegrityError, match="layer 1, expert 4"):
                list(mapped.fetch(1, [4]))
        assert [e for e, _ in mapped.fetch(1, [3, 5])] == [3, 5]


def test_a_file_that_is_cut(damaged: Path) -> None:
    """Before a record is touched its file's size is asked: no SIGBUS."""
    with Pack(damaged) as opened:
        stats = Statistics()
        mapped = MappedRecords(opened, stats)
        list(mapped.fetch(1, range(8)))
        at = opened.layers[1][5]
        os.truncate(damaged / LAYER, at.offset + 10)
        assert [e for e, _ in mapped.fetch(1, [0, 4])] == [0, 4]
        with pytest.raises(ResourceError, match=r"layer 1, expert 5.*truncated while in use"):
            list(mapped.fetch(1, [5]))
        mapped.prefetch(1, [5, 6])


def test_guesses_are_hints(pack: Path) -> None:
    with Pack(pack) as opened:
        stats = Statistics()
        mapped = MappedRecords(opened, stats)
        mapped.prefetch(0, [1, 2])
        assert (stats.speculative_reads, stats.bytes_read) == (2, 0)
        list(mapped.fetch(0, [1]))
        mapped.prefetch(0, [1])  # it is there already
        assert stats.speculative_reads == 2
