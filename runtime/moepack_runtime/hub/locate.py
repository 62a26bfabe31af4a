"""From what a user names to a pack's folder."""

from __future__ import annotations

from pathlib import Path

from moepack_formats.errors import UsageError

from .repo_id import looks_like_repo_id


def locate_pack(name: str, *, revision: str | None = None) -> Path:
    """The folder of a pack that is named by its folder or by its Hub id.

    Args:
        name: An existing folder, or ``org/name``, which is fetched into the Hub cache.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        UsageError: It is neither.
        NetworkError: The Hub cannot be reached or refuses.
        MoepackError: The repository holds no whole pack.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if revision is not None:
            raise UsageError("a revision belongs to a Hub id, not to a folder", where=name)
        return folder
    if not looks_like_repo_id(name):
        raise UsageError(
            "no such folder, and not a Hub id either",
            where=name,
            wanted="an existing folder, or org/name",
        )
    # The Hub client takes a while to import, and folders need none of it.
    from .cache import fetch_pack
    from .errors import UnreachableError

    try:
        return fetch_pack(name, revision=revision)
    except UnreachableError as error:
        raise error.or_folder() from error
