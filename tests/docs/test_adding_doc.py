"""docs/adding.md names files that exist, and something for each kind of thing that can be added."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/adding.md").read_text("utf-8")


def test_every_file_and_folder_that_it_names_exists() -> None:
    named = set(re.findall(r"`((?:vit|conf|tests|docs)/[\w./-]*)`", TEXT)) | {
        f"docs/{link}" for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", TEXT)
    }
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_section_ends_with_its_test() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    kinds = ("recipe", "option", "pooling", "map method", "data set", "augmentation", "optimiser", "schedule", "logger")
    assert all(any(kind in section.splitlines()[0] for section in sections) for kind in (*kinds, "command", "test"))
    assert [
        section.splitlines()[0] for section in sections[:-1] if "Test" not in section or "`tests/" not in section
    ] == []


def test_each_step_of_a_section_is_numbered_in_order() -> None:
    for section in re.split(r"^## ", TEXT, flags=re.M)[1:]:
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", section, flags=re.M)]
        assert numbers == list(range(1, len(numbers) + 1)), section
