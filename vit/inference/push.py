"""Push a bundle to the Hugging Face hub in one commit, with a model card that shows how to load it from there.

Notes:
- `gather` makes all files before anything is sent, and a dry run shows them.
- Folders of the training machine are not sent: in `config.json` and in the ONNX file's description, paths are shortened
  to the last name, and the data's root is left out.
- An edited card is sent unchanged; a generated one is made again for the repository.
- With `private`, an existing public repository is refused.
- `huggingface_hub` reads the token (HF_TOKEN, or `hf auth login`), and no message shows it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from vit.checksums import KEY, add_onnx_checksum, check_onnx, check_safetensors, read_config, with_checksum
from vit.errors import VitError
from vit.inference.bundle import CARD, CONFIG, ONNX, WEIGHTS, read_bundle
from vit.inference.card import is_generated, model_card
from vit.inference.description import Description, without_folders
from vit.inference.onnx_backend import METADATA_KEY
from vit.pretrained.hub import split_revision

Files = Mapping[str, Path | bytes]
"""Names in the repository and their contents: a local file or bytes."""

_LONGEST = 96
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_repo(repo: str) -> None:
    """Check that `repo` is a valid "ORG/NAME" of the hub.  Raises `VitError` with the nearest valid name.

    Letters, digits, "-", "_" and ".", up to 96 of them; neither "--" nor "..", no "-" or "." at an end, no ".git".
    """
    if _is_repo(repo):
        return
    plain = re.sub(r"^(https?://[^/]+/|hf[-_]hub:)", "", repo.strip())
    parts = []
    for part in [part for part in plain.split("/") if part][:2]:
        part = re.sub(r"([-.])\1+", r"\1", re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII))
        parts.append(part.removesuffix(".git").strip("-._"))
    near = "/".join(parts if len(parts) > 1 else ["YOU", *parts])[:_LONGEST].rstrip("-.")
    hint = f"; did you mean {near!r}?" if _is_repo(near) else ""
    raise VitError(f"{repo!r} is no name for a repository: expected ORG/NAME, of letters, digits, '-', '_', '.'{hint}")


def _is_repo(repo: str) -> bool:
    parts = repo.split("/")
    return (
        _NAME.fullmatch(repo) is not None
        and len(repo) <= _LONGEST
        and not any(each in repo for each in ("--", ".."))
        and not any(part[-1] in "-." for part in parts)
        and not repo.endswith(".git")
    )


def gather(bundle: Path, repo: str) -> dict[str, Path | bytes]:
    """Make the files for `repo` from the bundle.  Raises `VitError` when the bundle is damaged or has no weights."""
    public = _make_public(read_bundle(bundle))
    if not (bundle / WEIGHTS).is_file():
        raise VitError(f"{bundle} has no {WEIGHTS}: `vit export MODEL FOLDER` writes a bundle with weights")
    config = with_checksum({**read_config(bundle / CONFIG), "vit": public.to_dict()})
    check_safetensors(bundle / WEIGHTS)
    files: dict[str, Path | bytes] = {
        CARD: _make_card(bundle, public, repo),
        CONFIG: (json.dumps(config, indent=2, allow_nan=False) + "\n").encode("ascii"),
        WEIGHTS: bundle / WEIGHTS,
    }
    if (bundle / ONNX).is_file():
        files[ONNX] = _read_onnx(bundle / ONNX)
    return files


def size(content: Path | bytes) -> int:
    """Get the size of a file in bytes."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def push(
    files: Files, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Create the repository if needed, and push the files in one commit.

    Args:
        files: the files of `gather`.
        repo: "ORG/NAME"; ORG is an organisation or the user's account.
        private: whether only its owners can see the repository.
        revision: a branch, created if needed; None: main.
        message: the message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        VitError: if there is no token or network, the hub refuses, or the repository is public despite `private`.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    check_repo(repo)
    split_revision(repo, revision)
    token = huggingface_hub.get_token()
    if not token:
        raise VitError("there is no Hugging Face token: log in by `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise VitError("nothing can be pushed while HF_HUB_OFFLINE is set; --dry-run needs no network")
    api = HfApi(token=token, library_name="vit")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise VitError(f"{repo} is there already, and public: push without --private, or to another repository")
        if revision not in (None, "main"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=message or "A Vision Transformer, pushed by vit",
            revision=revision,
        )
        return str(commit.commit_url)
    except VitError:
        raise
    except Exception as error:  # of any HTTP library: huggingface_hub has changed it before
        _raise_error(error, repo, token)


def _make_public(description: Description) -> Description:
    """Remove values that only matter on the training machine from the description."""
    data = {key: value for key, value in description.data.items() if key != "root"}
    if "root" in description.data:
        data["root"] = None
    return replace(description, data=without_folders(data), training=without_folders(description.training))


def _make_card(bundle: Path, public: Description, repo: str) -> bytes:
    from safetensors import SafetensorError, safe_open

    try:
        text = (bundle / CARD).read_bytes()
    except FileNotFoundError:
        text = b""
    except OSError as error:
        raise VitError(f"cannot read {bundle / CARD}: {error.strerror or error}") from None
    if text and not is_generated(text.decode("utf-8", "replace")):
        return text
    try:
        with safe_open(bundle / WEIGHTS, "numpy") as weights:
            parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise VitError(f"{bundle / WEIGHTS} is truncated or not a safetensors file: {error}") from None
    return model_card(public, parameters=parameters, onnx=(bundle / ONNX).is_file(), repo=repo).encode()


def _read_onnx(file: Path) -> bytes:
    """Read an ONNX file and replace its description by the public one."""
    import onnx

    check_onnx(file)
    content = file.read_bytes()
    try:
        message = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's, whose implementations differ
        raise VitError(f"{file} is damaged or not an ONNX model: {error}") from None
    for entry in message.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = _make_public(Description.from_json(entry.value, file)).to_json()
    entries = [entry for entry in message.metadata_props if entry.key != KEY]
    del message.metadata_props[:]
    message.metadata_props.extend(entries)
    return add_onnx_checksum(message.SerializeToString())


def _raise_error(error: Exception, repo: str, token: str) -> NoReturn:
    """Report an error of the hub as a `VitError` that says what to do, without the token."""
    from huggingface_hub import errors

    while not isinstance(error, errors.HfHubHTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # a failed upload has its reason as cause
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(token, "...")[:160]
    if not isinstance(error, errors.HfHubHTTPError | ValueError) or status in (500, 502, 503, 504):
        raise VitError(
            f"the hub does not answer, so no files were pushed ({reason}); --dry-run needs no network"
        ) from None
    if status == 401:
        raise VitError("the hub does not accept the token: log in again by `hf auth login`, or set HF_TOKEN") from None
    if status == 403:
        raise VitError(
            f"the token may not write to {repo}: expected one with write access, and a repository of yours"
        ) from None
    raise VitError(f"cannot push to {repo}: {reason}") from None
