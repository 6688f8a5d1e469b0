"""Explain errors of Hydra and OmegaConf in one line.

Their own messages are long and speak of internals.  Here each becomes: the key or file, what is wrong with it, and a
similar name that works.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from vit import options
from vit.errors import VitError, did_you_mean, printable


class ConfigNames:
    """The names that a user can type: the keys of a schema, and the groups in folders of configuration files.

    Attributes:
        folders: the project's folder, and the user's folder if --config-dir names one.
    """

    def __init__(self, schema: type, conf: Path, arguments: Sequence[str] = ()) -> None:
        self.keys = [key.name for key in options.list_keys(schema)]
        self.folders = [conf]
        self.arguments = arguments

    @property
    def groups(self) -> dict[str, list[str]]:
        """The choices of each group, by name."""
        groups: dict[str, set[str]] = {}
        for file in (file for folder in self.folders for file in folder.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, set()).add(file.stem)
        return {name: sorted(choices) for name, choices in sorted(groups.items()) if name != "hydra"}

    def files(self, name: str, *, existing: bool = False) -> list[str]:
        """Return the possible paths of a file, for messages; with `existing`, only of files that exist."""
        folder_names = [self.folders[0].name, *map(str, self.folders[1:])]
        return [
            f"{folder_name}/{name}"
            for folder_name, folder in zip(folder_names, self.folders, strict=True)
            if not existing or (folder / name).is_file()
        ]

    @property
    def all(self) -> list[str]:
        """All groups, keys and sections."""
        sections = {key.rpartition(".")[0] for key in self.keys}
        return list(dict.fromkeys([*self.groups, *self.keys, *(section for section in sections if section)]))


def explain_error(error: BaseException, names: ConfigNames, *, composing: bool = False) -> str | None:
    """Return the message for `error`, or None for a bug, which should show its traceback.

    `composing` says that only Hydra has run yet, so that any Python error comes from composing the configuration.
    """
    if isinstance(error, VitError):
        return str(error)
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return _invalid_override(error, names)
    if isinstance(error, MissingConfigException):
        return _missing_file(error, names)
    if isinstance(error, yaml.YAMLError):
        return _invalid_yaml(error)
    if isinstance(error, ConfigCompositionException):
        if isinstance(cause, yaml.YAMLError):
            return _invalid_yaml(cause)
        return _composition_error(error, names)
    if isinstance(error, OmegaConfBaseException):
        return _invalid_value(error, names)
    if isinstance(error, HydraException):
        return _join_lines(str(error))
    if composing and isinstance(error, UnicodeDecodeError):
        return f"a file of {' or '.join(names.files(''))} is not text in UTF-8: {_join_lines(str(error))}"
    if composing and str(error).startswith("Config group override must be"):
        return _invalid_choice(names)
    if composing and isinstance(error, ValueError | OSError | TypeError) and str(error):
        return _join_lines(str(error))
    if composing:
        return _composition_failure(error, names)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"cannot read or write {printable(error.filename)}: {error.strerror}"
    return None


def _composition_failure(error: BaseException, names: ConfigNames) -> str:
    """Return the message for an error inside Hydra that does not help the user."""
    overrides = [text for text in names.arguments if "=" in text and not text.startswith("-")]
    suspects = [text for text in overrides if re.search(r"[@$\[{]", text)] or overrides
    return (
        f"{' '.join(suspects) or 'the configuration'}: Hydra cannot compose this ({type(error).__name__}); write "
        "group=name, such as data=cifar10, or key=value, such as seed=1"
    )


def _invalid_override(error: OverrideParseException, names: ConfigNames) -> str:
    text = str(error.override)
    if re.fullmatch(r"[\w./-]+", text):
        suggestions = [f"{group}={text}" for group, choices in names.groups.items() if text in choices]
        if suggestions:
            return f"{text!r}: choices are written group=name; did you mean {' or '.join(suggestions)}?"
        if text in names.all:
            return f"{text!r}: has no value; write {text}=VALUE"
        return (
            f"{text!r}: choices are written key=value, such as data=cifar10 or seed=1; {did_you_mean(text, names.all)}"
        )
    reason = _join_lines(error.message.split("See https")[0]).rstrip(".")
    return (
        f"{text!r}: cannot be read ({reason}); write key=value, and put a value with special characters in quotes "
        "inside quotes: 'key=\"a, b\"'"
    )


def _invalid_choice(names: ConfigNames) -> str:
    """Return the message for a group whose value is not a name."""
    groups = names.groups
    for text in names.arguments:
        key, _, value = text.partition("=")
        group = key.lstrip("+~")
        if group in groups and value not in groups[group]:
            return f"{text}: expected one of {', '.join(groups[group])}"
    return "a group was given something else than a name: choices are written group=name, such as data=cifar10"


def _missing_file(error: MissingConfigException, names: ConfigNames) -> str:
    file_name, message = error.missing_cfg_file or "", str(error)
    if message.startswith("Cannot find primary config") or not file_name:
        choices = [file.stem for folder in names.folders for file in folder.glob("*.yaml")]
        name = file_name or _join_lines(message)
        return f"--config-name {name}: no such file in {' or '.join(names.files(''))}; {did_you_mean(name, choices)}"
    group, _, choice = file_name.removesuffix(".yaml").rpartition("/")
    choices = list(error.options or names.groups.get(group, []))
    if group.startswith("hydra/"):
        return f"{group}={choice}: Hydra has no such choice; {did_you_mean(choice, choices)}"
    match = re.match(r"In '([^']+)'", message)
    named_in = match.group(1) if match and "/" in match.group(1) else None
    line = f"{group}={choice}: there is no " + " or ".join(names.files(f"{group}/{choice}.yaml"))
    if named_in is not None:
        asking = f"{named_in}.yaml"
        line += f", which {next(iter(names.files(asking, existing=True)), asking)} asks for"
    outer, _, inner = group.partition("/")
    if inner in names.groups:
        return f"{line}; in a file of conf/{outer} write 'override /{inner}: {choice}'"
    return f"{line}; {did_you_mean(choice, choices)}" if choices else line


def _composition_error(error: ConfigCompositionException, names: ConfigNames) -> str:
    message = str(error)
    cause = error.__cause__
    match = re.search(r"Could not (?:override|append to|delete from) .*?'([^']+)'", message, re.S)
    if message.startswith("Ambiguous value"):
        key = re.search(r"argument '([^']*)'", message)
        text = key.group(1) if key else ""
        quoted = text.replace("=", "='", 1) + "'"
        return f'{text}: several values: add --multirun to try each, or quote them to mean one text: "{quoted}"'
    several = re.match(r"Multiple values for ([\w/]+)", message)
    if several:
        return f"{several.group(1)}: is chosen already: write {several.group(1)}=... once, and without a +"
    if match and match.group(1).startswith("hydra."):
        return f"{match.group(1)}: Hydra has no such setting; --hydra-help says where they are"
    if message.startswith("Could not append") and match:
        return f"{match.group(1)}: is a key already: write it without the +"
    if isinstance(cause, OmegaConfBaseException) and not message.startswith("Could not"):
        return _invalid_value(cause, names)
    if match:
        name = match.group(1).split("@")[0]
        if name in names.all:
            return f"{name}: cannot be set this way ({_join_lines(message)})"
        typed = re.search(r"\+" + re.escape(name) + r"=(.*)", message)
        return _unknown_key(name, typed.group(1) if typed else "", names)
    return _join_lines(message) or _join_lines(str(cause))


def _unknown_key(name: str, value: str, names: ConfigNames) -> str:
    """Return the message for a key that does not exist; a similar group is shown with its choices."""
    close = options.similar_keys(name, names.all if "." not in name else names.keys)
    groups = names.groups
    if close and close[0] in groups:
        choices = groups[close[0]]
        if value in choices:
            return f"{name}: no such key or group; did you mean {close[0]}={value}?"
        return f"{name}: no such key or group; did you mean {close[0]}={'|'.join(choices)}?"
    return options.unknown_key_message(name, names.keys if "." in name else names.all)


def _invalid_value(error: OmegaConfBaseException, names: ConfigNames) -> str:
    key = error.full_key or ""
    message = _join_lines(str(error).split("full_key:")[0])
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: needs a value: {key}=..."
    if isinstance(error, InterpolationKeyError):
        inner = re.search(r"Interpolation key '([^']+)'", message)
        if inner:
            return f"{key}: refers to ${{...}} {options.unknown_key_message(inner.group(1), names.keys)}"
        return f"{key}: {message}"
    if isinstance(error, InterpolationResolutionError):
        return f"{key}: {message}"
    return f"{key}: {message}" if key else message


def _invalid_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or _join_lines(str(error))
    if mark is None:
        return f"a configuration file is not valid YAML: {_join_lines(problem)}"
    return f"{_relative_path(mark.name)}, line {mark.line + 1}: not valid YAML: {_join_lines(problem)}"


def _relative_path(path: str) -> str:
    absolute = Path(path)
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return path


def _join_lines(text: str) -> str:
    return " ".join(text.split())
