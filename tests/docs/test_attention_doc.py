"""docs/attention.md and its Spanish page: their Python runs and prints what they show, links and overrides exist."""

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
ENGLISH, SPANISH = ROOT / "docs" / "attention.md", ROOT / "docs" / "es" / "attention.md"
both_pages = pytest.mark.parametrize("page", [ENGLISH, SPANISH], ids=["english", "spanish"])


class Example(NamedTuple):
    line: int
    code: str
    printed: str  # as the page shows it
    varies: bool  # the figures differ a little from machine to machine


def examples(page: Path) -> list[Example]:
    text = page.read_text("utf-8")
    pattern = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text( varies)?\n(.*?)^```$)?", re.M | re.S)
    return [
        Example(text[: m.start()].count("\n") + 2, m[1], m[3] or "", m[2] is not None) for m in pattern.finditer(text)
    ]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def shape(text: str) -> list[str]:
    """The lines of an output without its figures and shades."""
    return [re.sub(r"[\d.%░▒▓█\s]+", "#", line) for line in lines(text)]


def run(page: Path, blocks: list[Example]) -> None:
    """Run blocks in one session and compare what each prints with the page."""
    session: dict[str, object] = {"__name__": "attention_doc"}
    for block in blocks:
        # numbered as in the page, so that a failing assert points there
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, session)
        where = f"{page}, line {block.line}"
        if block.varies:
            assert shape(output.getvalue()) == shape(block.printed), where
        else:
            assert lines(output.getvalue()) == lines(block.printed), where


class Untranslated(ast.NodeTransformer):
    """Remove what a translation may change: the text of strings, except of keyword arguments (`init="xavier"`)."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        return ast.JoinedStr([part for part in node.values if isinstance(part, ast.FormattedValue)])

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)


@both_pages
def test_every_block_is_found_with_what_it_prints(page):
    blocks = examples(page)
    assert len(blocks) == page.read_text("utf-8").count("```python\n")
    assert len(blocks) >= 10
    for block in blocks:
        assert ("print(" in block.code) == bool(block.printed), f"{page}, line {block.line}"


def test_both_languages_have_the_same_code_and_figures():
    english, spanish = examples(ENGLISH), examples(SPANISH)
    assert len(english) == len(spanish)
    for left, right in zip(english, spanish, strict=True):
        trees = [ast.unparse(Untranslated().visit(ast.parse(block.code))) for block in (left, right)]
        assert trees[0] == trees[1], f"{SPANISH}, line {right.line}"
        figures = [re.findall(r"\d[\d.]*|[░▒▓█]+", block.printed) for block in (left, right)]
        assert figures[0] == figures[1], f"{SPANISH}, line {right.line}"
    overrides = [set(re.findall(r"model\.\w+=[\w.]+", page.read_text("utf-8"))) for page in (ENGLISH, SPANISH)]
    assert overrides[0] == overrides[1]


@both_pages
def test_the_blocks_before_training_print_what_the_page_shows(page):
    blocks = examples(page)
    run(page, blocks[: [block.varies for block in blocks].index(True)])


@pytest.mark.slow
@both_pages
def test_every_block_prints_what_the_page_shows(page):
    """With the training of step 11: some twenty seconds."""
    run(page, examples(page))


@both_pages
def test_every_link_names_something_that_is_there(page):
    links = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", page.read_text("utf-8"))
    assert len(links) > 20
    for name, target in links:
        path = (page.parent / target).resolve()
        assert path.is_file(), f"{name}: no file {target}"
        if name.endswith((".py", "/")):
            continue
        defined = ast.parse(path.read_text("utf-8")).body
        for part in name.split("."):
            found = [n for n in defined if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
            assert found, f"{target} has no {name}"
            defined = found[0].body


OVERRIDES = sorted(set(re.findall(r"`(?:python train\.py )?(model\.\w+=\w[^`]*)`", ENGLISH.read_text("utf-8"))))


@pytest.mark.parametrize("override", OVERRIDES)
def test_every_override_makes_a_model(override):
    """On the default data and model, as a reader would type it after `python train.py`."""
    import hydra

    from vit.model import VisionTransformer
    from vit.training.app import CONF, resolve_config
    from vit.training.config import check_config, load_config

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = load_config(resolve_config(hydra.compose("train", [override])))
    check_config(config)
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
