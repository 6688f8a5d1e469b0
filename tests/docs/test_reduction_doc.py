"""docs/reduction.md keeps its word: its Python prints what it shows, its names and commands exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

from vit.cli.parser import parse as parse_command
from vit.model.reduction import METHODS, SCHEDULES, format_reduction, parse
from vit.training.sections import ModelConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reduction.md"
TEXT = PAGE.read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```$)?", TEXT, re.M | re.S)
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


def test_every_block_prints_what_the_page_shows():
    assert len(BLOCKS) == TEXT.count("```python\n") >= 6
    session: dict[str, object] = {"__name__": "reduction_doc"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code, printed in BLOCKS:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(PAGE), "exec"), session)
            assert output.getvalue().rstrip() == printed.rstrip(), code


def test_every_link_names_something_that_is_there():
    links = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", TEXT)
    assert links
    for name, target in links:
        path = (PAGE.parent / target).resolve()
        defined = {node.name for node in ast.parse(path.read_text("utf-8")).body if hasattr(node, "name")}
        assert name in defined, f"{target} has no {name}"
    for target in re.findall(r"\]\((\w+\.md)\)", TEXT):
        assert (PAGE.parent / target).is_file()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("vit ")])
def test_every_command_can_be_read(command):
    parse_command(shlex.split(command)[1:])


@pytest.mark.parametrize("line", sorted(set(re.findall(r"\b((?:keep|merge):[\d.:\-a-z]*\d)", TEXT))))
def test_every_line_is_a_reduction(line):
    assert format_reduction(parse(line)).startswith(line)


def test_every_training_composes():
    import hydra

    from vit.training.app import CONF, resolve_config
    from vit.training.config import load_config

    commands = [each for each in COMMANDS if each.startswith("python train.py") and "RUN" not in each]
    assert commands
    for command in commands:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = load_config(resolve_config(hydra.compose("train", shlex.split(command)[2:])))
        assert config.model.reduction in METHODS[1:]


def test_every_schedule_and_key_is_on_the_page():
    for name in SCHEDULES:
        assert f"| `{name}` |" in TEXT
    for key in re.findall(r"`model\.(\w+)", TEXT):
        assert key in ModelConfig.__dataclass_fields__
