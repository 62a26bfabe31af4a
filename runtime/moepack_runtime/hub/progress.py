"""One bar for a transfer of many files, whichever way the Hub client moves them."""

from __future__ import annotations

from typing import Any, Protocol

from tqdm import tqdm


class TransferProgress(Protocol):
    """Is told how far a transfer has come."""

    def start(self, nbytes: int, what: str | None = None) -> None:
        """A part of it begins, to which so many bytes belong; ``what`` names it."""

    def advance(self, nbytes: int) -> None:
        """So many more are done; negative when some have to come again."""

    def notice(self, line: str) -> None:
        """Something the user should know."""


class Quiet:
    """A progress that nobody watches."""

    def start(self, nbytes: int, what: str | None = None) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def notice(self, line: str) -> None:
        """Nothing."""


class Bar:
    """A bar on stderr, on a terminal only; notices are printed everywhere.

    Args:
        what: Stands before the bar.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm[Any] | None = None

    def start(self, nbytes: int, what: str | None = None) -> None:
        """See :class:`TransferProgress`."""
        self.close()
        if not nbytes:
            return
        self._bar = tqdm(
            total=nbytes,
            desc=what or self._what,
            unit="B",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
        )

    def advance(self, nbytes: int) -> None:
        """See :class:`TransferProgress`."""
        if self._bar is not None:
            self._bar.update(nbytes)

    def notice(self, line: str) -> None:
        """See :class:`TransferProgress`."""
        import sys

        tqdm.write(f"moepack: {line}", file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Counter(tqdm):  # type: ignore[type-arg]
    """What the Hub client takes for a bar: shows nothing, and counts.

    A client that finds ``update_transfer`` reports bytes from the network there and bytes on the
    disk through ``update``; only the second count.
    """

    def __init__(self, progress: TransferProgress, *_: Any, **__: Any) -> None:
        super().__init__(disable=True)
        self._progress = progress

    def update(self, n: float | None = 1) -> bool | None:
        self._progress.advance(int(n or 0))
        self.n += n or 0
        return None

    def update_transfer(self, n: float) -> None:
        """Bytes from the network."""

    def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
        """A speed, shown nowhere."""


def client_bar(progress: TransferProgress) -> type[tqdm[Any]]:
    """A class to give to the Hub client as ``tqdm_class``."""

    class Counter(_Counter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(progress, *arguments, **options)

    return Counter
