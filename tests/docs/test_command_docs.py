"""docs/explain.md and docs/classify.md keep their word: their commands and Python run, their tables are complete."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vit.cli import main
from vit.map_methods import MAP_METHODS

ROOT = Path(__file__).parents[2]
EXPLAIN, CLASSIFY = ((ROOT / "docs" / name).read_text("utf-8") for name in ("explain.md", "classify.md"))
RUN = "runs/digits/2026-01-01_10-00-00"


def commands(text: str) -> list[str]:
    """The commands of a page, without their comments."""
    return [
        re.sub(r"\s+#.*", "", line.strip()) for line in text.splitlines() if re.match(r"    (find .*\| )?vit \w", line)
    ]


@pytest.fixture
def place(small_bundle, photographs, tmp_path, monkeypatch) -> Path:
    """A folder with what the pages speak of."""
    shutil.copytree(small_bundle, tmp_path / RUN / "model")
    shutil.copytree(photographs[0].parent, tmp_path / "photos")
    for name in ("photo.jpg", "other.png", "a.jpg", "b.png"):
        shutil.copy(photographs[0], tmp_path / name)
    (tmp_path / "list.txt").write_text("a.jpg\nb.png\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", [EXPLAIN, CLASSIFY], ids=["explain", "classify"])
def test_every_command_runs(place, text):
    assert len(commands(text)) >= 6
    for command in commands(text):
        written = command.replace("MODEL", RUN)
        if "|" in command:
            inside = written.replace("vit ", f"{sys.executable} -m vit ")
            environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
            subprocess.run(inside, shell=True, check=True, env=environment, timeout=300)
        else:
            assert main(shlex.split(written)[1:]) == 0, command
        if "--output maps" in command or "--explain maps" in command:
            made = sorted(path.name for path in (place / "maps").iterdir())
            assert ("photo.png" if "photo.jpg" in command else "11.png") in made
            assert ("index.html" in made) == ("vit explain" in command)
            assert ("11.npz" in made) == ("--save-maps" in command)
            shutil.rmtree(place / "maps")


def test_the_python_of_the_page_runs(place, capsys):
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", EXPLAIN)
    assert len(blocks) == EXPLAIN.count("```python") == 2
    assert main(["explain", RUN, "photo.jpg", "--output", "maps", "--save-maps", "--index", "0"]) == 0
    for block in blocks:
        exec(compile(block, "docs/explain.md", "exec"), {})
    assert re.search(r"\d%: most from row [0-3], column [0-3]\n", capsys.readouterr().out)
    assert (place / "panel.png").stat().st_size > 1000


def test_the_page_names_every_method_and_option():
    table = EXPLAIN[EXPLAIN.index("## The methods") : EXPLAIN.index("For a first look")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(MAP_METHODS)
    help_text = subprocess.run(
        [sys.executable, "-m", "vit", "explain", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    for option in set(re.findall(r"--[a-z-]+", help_text)) - {"--help", "--version", "--recursive"}:
        assert f"`{option}" in EXPLAIN, option
    assert set(re.findall(r"(?<=`)--[a-z-]+", EXPLAIN)) <= set(re.findall(r"--[a-z-]+", help_text))


def test_links_lead_somewhere():
    for text in (EXPLAIN, CLASSIFY):
        for target, _, anchor in re.findall(r"\]\(([\w./-]*)(#?)([\w-]*)\)", text):
            page = (ROOT / "docs" / target).read_text("utf-8") if target else text
            heads = [
                re.sub(r"[^\w -]", "", head).replace(" ", "-").lower() for head in re.findall(r"^#+ (.*)", page, re.M)
            ]
            assert not anchor or anchor in heads, (target, anchor)
