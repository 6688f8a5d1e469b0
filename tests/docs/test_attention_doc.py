"""docs/attention.md keeps its word: its Python runs and prints what it shows, its links and overrides exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "attention.md"
TEXT = PAGE.read_text("utf-8")


class Example(NamedTuple):
    line: int
    code: str
    printed: str  # as the page shows it
    varies: bool  # the figures differ a little from machine to machine


def examples() -> list[Example]:
    pattern = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text( varies)?\n(.*?)^```$)?", re.M | re.S)
    return [
        Example(TEXT[: m.start()].count("\n") + 2, m[1], m[3] or "", m[2] is not None) for m in pattern.finditer(TEXT)
    ]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def shape(text: str) -> list[str]:
    """The lines of an output without its figures and shades."""
    return [re.sub(r"[\d.%░▒▓█\s]+", "#", line) for line in lines(text)]


def run(blocks: list[Example]) -> None:
    """Run blocks in one session and compare what each prints with the page."""
    session: dict[str, object] = {"__name__": "attention_doc"}
    for block in blocks:
        # numbered as in the page, so that a failing assert points there
        code = compile("\n" * (block.line - 1) + block.code, str(PAGE), "exec")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, session)
        where = f"{PAGE.name}, line {block.line}"
        if block.varies:
            assert shape(output.getvalue()) == shape(block.printed), where
        else:
            assert lines(output.getvalue()) == lines(block.printed), where


def test_every_block_is_found_with_what_it_prints():
    blocks = examples()
    assert len(blocks) == TEXT.count("```python\n")
    assert len(blocks) >= 10
    for block in blocks:
        assert ("print(" in block.code) == bool(block.printed), f"{PAGE.name}, line {block.line}"


def test_the_blocks_before_training_print_what_the_page_shows():
    blocks = examples()
    run(blocks[: [block.varies for block in blocks].index(True)])


@pytest.mark.slow
def test_every_block_prints_what_the_page_shows():
    """With the training of step 11: some twenty seconds."""
    run(examples())


def test_every_link_names_something_that_is_there():
    links = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for name, target in links:
        path = (PAGE.parent / target).resolve()
        assert path.is_file(), f"{name}: no file {target}"
        if name.endswith((".py", "/")):
            continue
        defined = ast.parse(path.read_text("utf-8")).body
        for part in name.split("."):
            found = [n for n in defined if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
            assert found, f"{target} has no {name}"
            defined = found[0].body


OVERRIDES = sorted(set(re.findall(r"`(?:python train\.py )?(model\.\w+=\w[^`]*)`", TEXT)))


@pytest.mark.parametrize("override", OVERRIDES)
def test_every_override_makes_a_model(override):
    """On the default data and model, as a reader would type it after `python train.py`."""
    import hydra

    from vit.model import VisionTransformer
    from vit.training.app import CONF, resolve
    from vit.training.config import check, load

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = load(resolve(hydra.compose("train", [override])))
    check(config)
    model = VisionTransformer(**config.model.arguments(num_classes=10)).eval()
    height, width = model.image_size
    with torch.no_grad():
        assert model(torch.zeros(2, config.model.in_channels, height, width)).shape == (2, 10)
    key, value = override.removeprefix("model.").split("=")
    assert str(model.architecture[key]).strip("[]").split(",")[0] == value


def test_the_mechanisms_of_the_lecture_each_have_their_override():
    wanted = {
        "model.attention=dot_product", "model.attention=scaled_dot_product", "model.attention=multi_head",
        "model.pool=attention", "model.norm=post", "model.norm=pre", "model.position=none", "model.position=rotary",
        "model.position=sincos", "model.position=learned",
    }  # fmt: skip
    assert wanted <= set(OVERRIDES)
