"""Fetch files from the Hugging Face hub into its cache; later reads need no network.

timm uses `huggingface_hub` too, so both share one cache (HF_HOME, HF_HUB_CACHE), one switch for offline work
(HF_HUB_OFFLINE=1), one endpoint (HF_ENDPOINT) and one login.  Every error is one line that says what to do.
Imports neither torch nor timm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, overload

from vit.errors import VitError

_REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


class Fetched(NamedTuple):
    """Holds the path of a file in the cache and its commit."""

    path: Path
    commit: str


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Split "NAME@REVISION", or "NAME" and a revision, into name and revision.

    Raises `VitError` when both give different revisions, or one is no name of a branch, tag or commit.
    """
    name, at, pinned = name.partition("@")
    if at and revision not in (None, pinned):
        raise VitError(f"{name}@{pinned} names its revision already, so revision={revision!r} contradicts it")
    revision = pinned if at else revision
    if revision is not None and not _REVISION.fullmatch(revision):
        raise VitError(f"{name}: no revision {revision!r}; expected a branch, a tag or a commit, such as {name}@main")
    return name, revision


@overload
def fetch(repo: str, names: Sequence[str], revision: str | None = None) -> Fetched: ...
@overload
def fetch(repo: str, names: Sequence[str], revision: str | None = None, *, optional: bool) -> Fetched | None: ...
def fetch(repo: str, names: Sequence[str], revision: str | None = None, *, optional: bool = False) -> Fetched | None:
    """Fetch the first of `names` that the repository ("ORG/NAME") has, from the cache or the hub.

    With `optional`, returns None if the repository exists and has none of them.  Raises `VitError` when the repository,
    the revision or all of the files do not exist, may not be read, or are neither in the cache nor on a hub that
    answers.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not _REPO.fullmatch(repo):
        raise VitError(
            f"{repo!r} is no name on the hub: expected ORG/NAME, such as timm/vit_small_patch16_224.augreg_in1k"
        )
    failed: Exception | None = None  # an unanswered request counts more than a missing file
    for name in names:
        try:
            if find_in_cache(repo, name, revision) is None:
                _request_metadata(repo, name, revision)  # fails at once where downloading would try for half a minute
            path = Path(hf_hub_download(repo, name, revision=revision))
            return Fetched(path, _commit(path))
        except EntryNotFoundError as error:
            failed = error if failed is None or isinstance(error, LocalEntryNotFoundError) else failed
        except Exception as error:  # of any HTTP library: huggingface_hub has changed it before
            if not _unreachable(error):
                _raise_error(repo, revision, names, error)
            failed = error
    assert failed is not None
    if optional and isinstance(failed, EntryNotFoundError) and not isinstance(failed, LocalEntryNotFoundError):
        return None
    _raise_error(repo, revision, names, failed)


def find_in_cache(repo: str, name: str, revision: str | None = None) -> Path | None:
    """Find a file of the hub in the cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def cache_folder() -> str:
    """Get the folder of the hub's cache on this machine."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _request_metadata(repo: str, name: str, revision: str | None) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))


def _commit(path: Path) -> str:
    """Read the commit from the path of a file in the cache: snapshots/COMMIT/."""
    parts = path.parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1] if "snapshots" in parts else ""


def _unreachable(error: Exception) -> bool:
    """Check whether the hub did not answer, so that it is unknown whether it has the file."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    refused = isinstance(error, HfHubHTTPError | HFValidationError | VitError)
    return not refused or _status(error) in {500, 502, 503, 504}


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _raise_error(repo: str, revision: str | None, names: Sequence[str], error: Exception) -> NoReturn:
    """Report an error of the hub as a `VitError` that says what to do."""
    from huggingface_hub import errors

    repository = f"{repo}@{revision}" if revision else repo
    files = " or ".join(names)
    if isinstance(error, errors.GatedRepoError):
        raise VitError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo} and log in (`hf auth login`)"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise VitError(f"{repo} has no revision {revision!r} on the hub; leave it out for the newest") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise VitError(f"the hub has no model {repo}, or it is private and needs a login (`hf auth login`)") from None
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        raise VitError(f"{repository} on the hub has no file {files}") from None
    if not _unreachable(error):
        raise VitError(f"cannot fetch {files} of {repository}: {_first_line(error)}") from None
    reason = "HF_HUB_OFFLINE is set" if _offline() else f"the hub does not answer ({_first_line(_root_cause(error))})"
    raise VitError(
        f"{files} of {repository} is not in the cache, and {reason}: fetch it once with a network, or put a copy of "
        f"the folder models--{repo.replace('/', '--')} into {cache_folder()}, or give local-dir:FOLDER or a file of "
        "weights"
    ) from None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
