"""What a person is told to install is this project, or something that it declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {
    canonicalize_name(Requirement(each).name) for part in (PROJECT["dependencies"], *EXTRAS.values()) for each in part
}
KINDS = {".md", ".py", ".yaml", ".yml", ".toml", ".ipynb", ".js", ".html", ".sh", ""}
WORDS = re.compile(r"""pip3? install((?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'|[^\s`'"&;|()<>#]+))+)""")


def files() -> list[Path]:
    """Every file of the project that is written by hand, but this one."""
    parts = [ROOT / name for name in (".ci", ".github", "benchmarks", "conf", "docs", "tests", "vit")]
    found = [path for part in (*ROOT.iterdir(), *parts) for path in (part.rglob("*") if part in parts else [part])]
    return [path for path in found if path.suffix in KINDS and path.is_file() and path != Path(__file__)]


def requirements(text: str) -> list[str]:
    """What every `pip install` in a text names, without options, files and folders; the text may be a regex."""
    found = []
    for match in WORDS.finditer(re.sub(r"\\(.)", r"\1", text)):
        words = [word.strip("\"'").rstrip(".,:") for word in match.group(1).split()]
        found += [word for word in words if word[:1] not in ("", "-", ".", "/", "$") and not word.endswith(".whl")]
    return found


def test_the_reader_finds_names():
    assert requirements('x: pip install -q \\"a[b]\\" c>=1 && d') == ["a[b]", "c"]
    assert requirements("`pip install -e '.[dev]'` and `pip install`, then `python -m pip install x.whl y`") == ["y"]


def test_every_name_to_install_is_the_projects_or_declared():
    seen = 0
    for path in files():
        for text in requirements(path.read_text("utf-8")):
            seen += 1
            where = f"{path.relative_to(ROOT)}: pip install {text}"
            wanted = Requirement(text)
            assert canonicalize_name(wanted.name) in DECLARED | {PROJECT["name"]}, where
            if wanted.name == PROJECT["name"]:
                assert wanted.extras <= EXTRAS.keys(), where
    assert seen >= 3


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_of_the_project_names_the_project(extra):
    own = [wanted for each in EXTRAS[extra] if (wanted := Requirement(each)).name == PROJECT["name"]]
    assert all(wanted.extras <= EXTRAS.keys() for wanted in own)
    assert all(Requirement(each).name != "vit" for each in EXTRAS[extra])
