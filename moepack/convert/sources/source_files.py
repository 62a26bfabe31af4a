"""The small files of a checkpoint folder, and which of its names may be followed.

What lies in a checkpoint was written by others: names may not leave the folder, JSON is checked,
and whatever could execute code is refused or reported.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.manifest import Source
from moepack_formats.osio import io_errors, resource_error
from moepack_formats.paths import hub_snapshot, is_inside, is_plain

JSON_CAP = 100 << 20  # bytes; what safetensors itself allows a header
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_SUFFIX = ".safetensors.index.json"


def find_index(folder: Path) -> str | None:
    """The name of the index of a sharded checkpoint, if there is one."""
    # Folders written by AutoGPTQ name their files after the settings.
    names = [f"model{INDEX_SUFFIX}", *_names(folder, f"gptq_model-*{INDEX_SUFFIX}")]
    return next((name for name in names if os.path.lexists(folder / name)), None)


def find_weights(folder: Path) -> str:
    """The name of the file that holds all the tensors, or of the index of several.

    Raises:
        UsageError: There are no safetensors weights.
    """
    if os.path.lexists(folder / "model.safetensors"):
        return "model.safetensors"
    if (index := find_index(folder)) is not None:
        return index
    singles = _names(folder, "gptq_model-*.safetensors")
    if len(singles) == 1:
        return singles[0]
    pickles = [name for name in _names(folder, "*") if name.endswith(PICKLE_SUFFIXES)]
    raise UsageError(
        f"only pickles ({some(pickles)}), which are never opened"
        if pickles
        else "no safetensors weights",
        where=folder,
        wanted=f"model.safetensors or model{INDEX_SUFFIX}",
        remedy="convert the weights to safetensors first",
    )


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def read_weight_map(folder: Path, index_name: str) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name to shard name.

    Raises:
        IntegrityError: It is damaged or names a tensor twice.
        UsageError: It names a path that leaves the folder.
    """
    where = folder / index_name
    weight_map = parse_json(_read_small(folder, index_name), where, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError("the index has no weight_map", where=where)
    shards = set(map(str, weight_map.values()))
    for name in sorted(shards):
        check_relative(name, where)
    return {key: str(name) for key, name in weight_map.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        UsageError: There is none.
        IntegrityError: It is not a JSON object.
    """
    if not os.path.lexists(folder / "config.json"):
        raise UsageError("no config.json", where=folder, remedy="name a checkpoint's folder")
    return read_json(folder, "config.json")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        IntegrityError: The file is missing or is not a JSON object.
        UsageError: The file lies outside the folder or is not a regular file.
    """
    return parse_json(_read_small(folder, name), folder / name)


def parse_json(data: bytes, where: Path, *, strict: bool = False) -> dict[str, Any]:
    """Parse a JSON object; `strict` refuses a key that is there twice.

    Raises:
        IntegrityError: It is not a JSON object.
    """
    hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] = _unique if strict else dict
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"damaged JSON: {error}", where=where) from error
    if not isinstance(document, dict):
        raise IntegrityError("damaged JSON: not an object", where=where)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def check_relative(name: str, where: Path) -> None:
    """Refuse a file name that could point outside the folder on any system.

    Raises:
        UsageError: It is not plain, see :func:`moepack_formats.paths.is_plain`.
    """
    if not is_plain(name):
        raise UsageError(
            "a file name leaves the checkpoint, or might on another system",
            where=where,
            got=repr(name),
        )


def safe_path(folder: Path, name: str) -> Path:
    """The real path of file `name` of a checkpoint folder.

    Args:
        folder: The folder.
        name: A relative path with forward slashes.

    Raises:
        UsageError: The path leaves the folder (and is no link into its Hub cache's blobs), or is
            not a regular file.
        IntegrityError: There is no such file.
        ResourceError: The system cannot follow it.
    """
    where = folder / name
    check_relative(name, folder)
    try:
        path = where.resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise IntegrityError(
            "missing file", where=where, remedy="download the checkpoint again"
        ) from None
    except OSError as error:
        raise resource_error(error, where) from error
    except RuntimeError:  # a loop of links, before Python 3.13
        raise UsageError("a loop of links", where=where) from None
    if not is_inside(path, folder.resolve()):
        raise UsageError("the file is a link that leaves the checkpoint", where=where)
    if not stat.S_ISREG(mode):
        raise UsageError("not a regular file", where=where)
    return path


def read_source(folder: Path, repo_id: str | None = None) -> Source:
    """Where a resolved folder came from: a Hub cache's layout and the model card tell."""
    snapshot = hub_snapshot(folder)
    if snapshot is None:
        # The folder's name alone: its path says things about the machine.
        return Source(id=repo_id or folder.name, license=_license(folder))
    found = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
    return Source(id=repo_id or found, revision=snapshot.name, license=_license(folder))


def _license(folder: Path) -> str | None:
    """The licence that the model card's metadata names, if there is a readable card."""
    from huggingface_hub.repocard import metadata_load

    try:
        card = metadata_load(safe_path(folder, "README.md")) or {}
    except Exception:
        # A card is prose: whatever is wrong with it, the licence is just not known.
        return None
    name = card.get("license")
    if name == "other":
        name = card.get("license_name") or name
    return name if isinstance(name, str) else None


def _read_small(folder: Path, name: str) -> bytes:
    path = safe_path(folder, name)
    with io_errors(folder / name), open(path, "rb") as file:
        data = file.read(JSON_CAP + 1)
    if len(data) > JSON_CAP:
        raise UsageError("the file is too large", where=folder / name, wanted=f"<= {JSON_CAP} B")
    return data


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
