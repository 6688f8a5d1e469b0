"""Write the table of all keys in `docs/configuration.md`: `python -m vit.training.reference`.

Types, limits and help come from the dataclasses, defaults from the composed `conf/train.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from vit import options
from vit.files import write_text
from vit.training.config import CONF, Config

DOCUMENT = CONF.parent / "docs" / "configuration.md"
START, END = "<!-- keys: written by python -m vit.training.reference -->", "<!-- end of keys -->"


def format_table() -> str:
    """Format all keys as Markdown: a section for each part of `Config`, and one for top-level keys."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = hydra.compose("train")
    defaults = OmegaConf.to_container(composed, resolve=False)
    parts: dict[str, list[str]] = {}
    for key in options.list_keys(Config):
        section = key.name.rpartition(".")[0]
        takes = options.describe_type(key.type, key.rule)
        row = f"| `{key.name}` | {_format_default(defaults, key.name)} | {takes} | {key.rule.help} |"
        parts.setdefault(section, []).append(row)
    summaries = {name: _summary(kind) for name, kind in options.list_sections(Config).items()}
    summaries[""] = "What stands alone."
    lines = []
    for section, rows in parts.items():
        lines += [f"### {section or 'On their own'}", "", summaries[section], ""]
        lines += ["| key | default | takes | what it is |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def update_document(text: str) -> str:
    """Replace the table of keys in `text` by the current one."""
    before, after = text.split(START)
    return f"{before}{START}\n\n{format_table()}\n{END}{after.split(END)[1]}"


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _format_default(defaults: Any, name: str) -> str:
    value = defaults
    for part in name.split("."):
        value = value[part]
    return f"`{options.format_value(value)}`".replace("'", "")


def main(path: Path = DOCUMENT) -> int:
    """Write the table into the document."""
    write_text(path, update_document(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
