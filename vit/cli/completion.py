"""What a shell offers at TAB, by argcomplete; `docs/install.md` says how a shell is told to ask."""

from __future__ import annotations

import argparse
from typing import Any

FLAGS = ("--help", "--version", "--multirun", "--cfg", "--config-dir", "--config-name", "--info", "--resolve")


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and leave the process."""
    import argcomplete

    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in ("train", "eval"):
        (arguments,) = commands.choices[name]._actions
        arguments.completer = _overrides
    argcomplete.autocomplete(parser)


def _overrides(prefix: str, parsed_args: argparse.Namespace, **context: Any) -> list[str]:
    """Groups, keys and their values that begin with `prefix`; none where it is for the shell to offer files."""
    from argcomplete.completers import FilesCompleter

    from vit import options
    from vit.training.config import CONF, Config, EvalConfig

    training = parsed_args.command == "train"
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()] if training else ["data"]
    choices = {name: sorted(file.stem for file in (CONF / name).glob("*.yaml")) for name in groups}
    keys = {key.name: key for key in options.list_keys(Config if training else EvalConfig)}
    name, equals, value = prefix.partition("=")
    if not equals:
        found = list(FLAGS) if prefix.startswith("-") else [f"{each}=" for each in sorted([*choices, *keys])]
        return found + choices["data"] if training and not parsed_args.arguments else found
    if name in choices:
        return [f"{name}={choice}" for choice in choices[name]]
    if name not in keys:
        return []
    takes = options.describe_type(keys[name].type, keys[name].rule)
    words = [*keys[name].rule.choices, *(word for word in ("true", "false", "auto", "null") if word in takes.split())]
    files = FilesCompleter()(value) if "text" in takes.split() else []
    return [f"{name}={each}" for each in [*words, *files]]
