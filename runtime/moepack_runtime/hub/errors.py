"""What goes wrong between here and the Hub, in one line each."""

from __future__ import annotations

import errno
import re

from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from moepack_formats.errors import MoepackError, NetworkError, UsageError
from moepack_formats.osio import resource_error

# The base of every error of the client's HTTP library, which changes its name between versions.
HTTPError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]

# The client's native transfer library raises RuntimeError and ConnectionError, and says in words
# only which status it met.
CLIENT_ERRORS = (HTTPError, XetDownloadError, OSError, RuntimeError, ValueError)

RETRY_STATUSES = (429, 500, 502, 503, 504)
# Another commit is being made; the client itself never tries this one again.
_BUSY_STATUS = 409
_CONFLICT_STATUS = 412
_NATIVE_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")


class UnreachableError(NetworkError):
    """There is no such repository, or nobody can be asked about it."""

    def or_folder(self) -> NetworkError:
        """The same, where the name of a folder could have been meant."""
        return NetworkError(
            f"no such folder, and {self.what}", where=self.where, remedy=self.remedy
        )


def explain(error: Exception, repo_id: str, revision: str | None = None) -> MoepackError:
    """Say in one line what an exception of the Hub client means and what to do about it.

    The client's own text is left out: it spans lines and may quote a proxy's credentials.

    Args:
        error: What the client raised.
        repo_id: The repository it was about.
        revision: The revision it was about.
    """
    cause = root_cause(error)
    if isinstance(cause, HFValidationError):
        return UsageError("not a Hub id", where=repo_id, wanted="an existing folder, or org/name")
    status = status_of(cause)
    return (
        _no_access(cause, status, repo_id, revision)
        or (None if status is None else _refused(cause, status, repo_id))
        or _not_reached(cause, repo_id)
        or _failed_here(cause, repo_id)
    )


def _no_access(
    cause: BaseException, status: int | None, repo_id: str, revision: str | None
) -> NetworkError | None:
    """The repository or revision is not there, or not for this user."""
    if isinstance(cause, GatedRepoError):
        return NetworkError(
            "the repository is gated",
            where=repo_id,
            remedy=f"log in with `hf auth login` and accept the licence at "
            f"https://huggingface.co/{repo_id}",
        )
    if isinstance(cause, RevisionNotFoundError):
        return NetworkError("no such revision on the Hub", where=repo_id, got=revision or "main")
    if isinstance(cause, RepositoryNotFoundError):
        return UnreachableError(
            "no such repository on the Hub",
            where=repo_id,
            remedy="check the name, or log in with `hf auth login` if it is private",
        )
    if status in (401, 403):
        return NetworkError(
            f"the Hub refused access (HTTP {status})",
            where=repo_id,
            remedy="log in with `hf auth login`",
        )
    return None


def _refused(cause: BaseException, status: int, repo_id: str) -> NetworkError:
    """The Hub has answered with an error."""
    if isinstance(cause, EntryNotFoundError):
        return NetworkError("the repository lacks a file", where=repo_id, got=f"HTTP {status}")
    if status in (_BUSY_STATUS, _CONFLICT_STATUS):
        return NetworkError(
            f"somebody else changed the repository at the same time (HTTP {status})",
            where=repo_id,
            remedy="run it again: what has arrived is kept",
        )
    busy = status in RETRY_STATUSES
    return NetworkError(
        f"the Hub answered HTTP {status}",
        where=repo_id,
        remedy="try again later: what has arrived is kept" if busy else None,
    )


def _not_reached(cause: BaseException, repo_id: str) -> UnreachableError | None:
    """The Hub was not asked, or has not answered."""
    if isinstance(cause, OfflineModeIsEnabled):
        return UnreachableError(
            "offline, as HF_HUB_OFFLINE says, and the Hub cache is not enough",
            where=repo_id,
            remedy="unset HF_HUB_OFFLINE",
        )
    if isinstance(cause, (LocalEntryNotFoundError, IncompleteSnapshotError)):
        return UnreachableError(
            "not whole in the Hub cache while offline",
            where=repo_id,
            remedy="check the name, or run it once online",
        )
    if isinstance(cause, (HTTPError, ConnectionError, TimeoutError)):
        return UnreachableError(
            f"the connection to the Hub failed ({type(cause).__name__})",
            where=repo_id,
            remedy="check the network and run it again: what has arrived is kept",
        )
    return None


def _failed_here(cause: BaseException, repo_id: str) -> MoepackError:
    """This machine's disk, or the client itself."""
    if isinstance(cause, OSError):
        # In the Hub cache, mostly: "permission denied" alone would not tell where.
        where = f"{repo_id}: {cause.filename}" if cause.filename else repo_id
        return resource_error(cause, where)
    if _is_full_disk(cause):
        return resource_error(OSError(errno.ENOSPC, "no space"), repo_id)
    return NetworkError(
        f"the transfer broke off in the Hub client ({type(cause).__name__})",
        where=repo_id,
        remedy="run it again: what has arrived is kept; --debug shows what the client says",
    )


def root_cause(error: BaseException) -> BaseException:
    """What made the client look into its cache in vain or give up an upload, where it says that."""
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, (HTTPError, OSError)):
        return root_cause(cause)
    if type(error) is RuntimeError and isinstance(cause, CLIENT_ERRORS):
        return root_cause(cause)
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered, if this is about one."""
    if isinstance(error, (RuntimeError, ConnectionError)):
        found = _NATIVE_STATUS.search(str(error))
        return int(found[1]) if found else None
    if not isinstance(error, HfHubHTTPError):
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def status_behind(error: NetworkError) -> int | None:
    """The HTTP status that an error of :func:`explain` is about; None if nobody answered."""
    cause = error.__cause__
    return None if cause is None else status_of(root_cause(cause))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    cause = root_cause(error)
    status = status_of(cause)
    if _is_full_disk(cause):
        return False
    if status is not None:
        return status in (*RETRY_STATUSES, _BUSY_STATUS)
    if isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return False
    # A body of another length than announced is an OSError without number: the line was cut.
    cut = isinstance(cause, OSError) and cause.errno is None
    broken = (HTTPError, ConnectionError, TimeoutError, XetDownloadError)
    return cut or isinstance(cause, broken) or type(cause) is RuntimeError


def _is_full_disk(error: BaseException) -> bool:
    """The native transfer library says it in words only."""
    return "No space left" in str(error)
