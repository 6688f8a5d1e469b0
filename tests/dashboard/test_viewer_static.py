"""The viewer's files, without a browser: colours, and what may not be in them."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

STATIC = Path(__file__).parents[2] / "vit" / "dashboard" / "static"
FILES = sorted(STATIC.iterdir())


@pytest.mark.parametrize(("constant", "name"), [("INFERNO", "inferno"), ("COOLWARM", "coolwarm")])
def test_colours_are_matplotlibs(constant: str, name: str) -> None:
    source = (STATIC / "colours.js").read_text()
    table = re.search(rf"const {constant} = \((.*?)\);", source, re.DOTALL)
    assert table is not None
    found = bytes.fromhex("".join(re.findall(r'"([0-9a-f]+)"', table[1])))
    wanted = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    assert found == wanted.tobytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_from_outside_and_no_markup_from_data(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.style"
    assert not re.search(forbidden, text)
    assert max(map(len, text.splitlines())) <= 160
