"""docs/data.md says what is so."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vit.data.catalogue import CATALOGUE, DataConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")


def test_every_data_set_is_described():
    table = TEXT.split("## The data sets")[1].split("```")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(CATALOGUE)


def test_every_key_exists():
    known = {field.name for field in fields(DataConfig)}
    prose = re.sub(r"```python\n.*?```", "", TEXT, flags=re.S)
    assert set(re.findall(r"\bdata\.(\w+)", prose)) <= known


def test_the_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["preprocessing"](names["train"].image(0)).shape == (1, 8, 8)
        assert names["train"].array(names["preprocessing"]).shape == (1258, 8, 8, 1)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in ("digits", "folder", "parquet", "shapes")])
def test_offline_files_are_listed(name):
    assert f"`{name}`" in TEXT.split("## Without a network")[1]
