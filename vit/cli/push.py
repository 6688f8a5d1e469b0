"""Run `vit push`: put a bundle on the Hugging Face hub.  With --dry-run, list the files without a network."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vit.data.decode import printable
from vit.errors import VitError
from vit.inference.bundle import CARD
from vit.inference.loading import locate
from vit.inference.push import Files, check_repo, gather, push, size


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0.  Raises `VitError` when there is no bundle, or it cannot be pushed."""
    check_repo(arguments.repo)
    files = gather(_find_bundle(arguments.model), arguments.repo)
    if arguments.dry_run:
        kind = "private" if arguments.private else "public"
        print(f"would push to {arguments.repo} ({kind}, branch {arguments.revision or 'main'}); nothing was sent")
        print(_format_files(files))
        card = files[CARD]
        assert isinstance(card, bytes)
        print(f"\n{printable_lines(card.decode('utf-8', 'replace'))}")
        return 0
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is loaded
    url = push(files, arguments.repo, private=arguments.private, revision=arguments.revision, message=arguments.message)
    model = f"hf-hub:{arguments.repo}" + (f"@{arguments.revision}" if arguments.revision not in (None, "main") else "")
    print(f"{_format_files(files)}\npushed to {printable(url)}; try: vit classify {model} photo.jpg")
    return 0


def _find_bundle(model: str) -> Path:
    """Find the bundle of `model`.  Raises `VitError` when it is a model of another kind, or no model."""
    resolved = locate(model)
    if resolved.bundle is None:
        name = printable(model)
        raise VitError(f"{name} is not a bundle: `vit export {name} FOLDER` makes one, which can be pushed")
    return resolved.bundle


def _format_files(files: Files) -> str:
    rows = [(name, size(content)) for name, content in files.items()]
    rows.append((f"{len(rows)} files", sum(count for _, count in rows)))
    return "\n".join(f"  {name:<20} {count:>13,} bytes" for name, count in rows)


def printable_lines(text: str) -> str:
    """Escape the control characters of a text for a terminal, but keep its lines."""
    return "\n".join(printable(line) for line in text.rstrip("\n").split("\n"))
