"""Complete command lines at TAB with argcomplete; `docs/install.md` shows how to switch it on in a shell."""

from __future__ import annotations

import argparse
from typing import Any

FLAGS = ("--help", "--version", "--multirun", "--cfg", "--config-dir", "--config-name", "--info", "--resolve")


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that a shell asks for, and exit the process."""
    import argcomplete

    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in ("train", "eval"):
        (arguments,) = commands.choices[name]._actions
        arguments.completer = _overrides
    argcomplete.autocomplete(parser)


def _overrides(prefix: str, parsed_args: argparse.Namespace, **context: Any) -> list[str]:
    """List groups, keys and their values that may begin with `prefix`; an empty list lets the shell complete files."""
    from argcomplete.completers import FilesCompleter

    from vit import options
    from vit.training.config import CONF, Config, EvalConfig

    training = parsed_args.command == "train"
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()] if training else ["data"]
    choices = {name: sorted(file.stem for file in (CONF / name).glob("*.yaml")) for name in groups}
    keys = {key.name: key for key in options.list_keys(Config if training else EvalConfig)}
    name, equals, value = prefix.partition("=")
    if not equals:
        words = list(FLAGS) if prefix.startswith("-") else [f"{word}=" for word in sorted([*choices, *keys])]
        return words + choices["data"] if training and not parsed_args.arguments else words
    if name in choices:
        return [f"{name}={choice}" for choice in choices[name]]
    if name not in keys:
        return []
    kinds = options.describe_type(keys[name].type, keys[name].rule).split()
    words = [*keys[name].rule.choices, *(word for word in ("true", "false", "auto", "null") if word in kinds)]
    files = FilesCompleter()(value) if "text" in kinds else []
    return [f"{name}={word}" for word in [*words, *files]]
