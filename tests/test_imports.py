"""Which room may import what, read from the source, and what light entry points load, seen in fresh processes.

Imports go downwards only: cli -> training -> evaluation -> inference, explain -> pretrained -> data -> model.  A
new room or a new dependency needs a line in `ROOMS`: that is a decision, and this is where it is written down.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"checksums", "errors", "files", "map_methods", "options", "processors", "shell", "signals"}
"""Modules beside the rooms that every room may use: standard library only."""


@dataclass(frozen=True)
class Room:
    rooms: set[str]  # rooms below it
    load: set[str]  # packages that its modules may import when they are loaded
    lazy: set[str]  # further packages that a function may import when it is called


MODEL = {"model"}
MIDDLE = MODEL | {"data", "pretrained"}
UPPER = MIDDLE | {"inference", "explain"}
ROOMS = {
    "model": Room(set(), {"torch"}, set()),
    "pretrained": Room(MODEL | {"data"}, {"torch", "numpy"}, {"timm", "safetensors", "huggingface_hub"}),
    "data": Room(MODEL, {"numpy", "PIL", "torch"}, {"torchvision", "sklearn", "scipy", "pyarrow", "rich"}),
    # above explain since a classifier explains its answers
    "inference": Room(
        MIDDLE | {"explain"}, {"numpy", "PIL"}, {"torch", "onnx", "onnxruntime", "safetensors", "huggingface_hub"}
    ),
    "explain": Room(MIDDLE, {"torch", "numpy", "PIL"}, {"matplotlib", "rich"}),
    "evaluation": Room(UPPER, {"numpy"}, {"torch", "torchmetrics", "matplotlib", "PIL", "rich"}),
    "dashboard": Room(set(), {"numpy", "tensorboard", "werkzeug"}, set()),
    "training": Room(
        UPPER | {"evaluation", "dashboard"},
        {
            "torch",
            "numpy",
            "PIL",
            "lightning",
            "hydra",
            "omegaconf",
            "yaml",
            "torchmetrics",
            "tensorboard",
            "rich",
            "google_crc32c",
        },
        {"peft", "IPython"},
    ),
    "cli": Room(UPPER | {"training", "evaluation", "dashboard"}, set(), {"rich", "argcomplete"}),
}
# files that are allowed more, or less, than their room
FILES: dict[str, tuple[set[str], set[str]]] = {
    "data/decode.py": ({"numpy", "PIL"}, set()),
    "data/filetype.py": (set(), {"PIL", "pillow_heif"}),
    "data/preprocess.py": ({"numpy", "PIL"}, set()),
    "inference/torch_backend.py": ({"numpy", "torch"}, {"safetensors"}),
    "inference/weights.py": ({"torch"}, {"safetensors"}),
    "evaluation/collect.py": ({"numpy", "torch"}, set()),
    "evaluation/faithful.py": ({"numpy", "torch"}, {"rich"}),
}


class Import(NamedTuple):
    target: str  # dotted
    line: int
    lazy: bool  # inside a function


def source_files() -> list[Path]:
    return sorted((ROOT / "vit").rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files()}


def imports_of(path: Path, root: Path = ROOT, types: bool = False) -> list[Import]:
    """Every import of a file; with `types` also those for type checkers only."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if not types and isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                package = module_name(path, root).split(".")
                kept = len(package) - child.level + (path.name == "__init__.py")
                prefix = ".".join([*package[:kept], child.module or ""]).strip(".") if child.level else child.module
                for alias in child.names:
                    whole = f"{prefix}.{alias.name}"
                    yield Import(whole if whole in MODULES else str(prefix), child.lineno, lazy)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, lazy or function)

    return list(visit(ast.parse(path.read_text("utf-8")), False))


def test_the_reader_of_imports_sees_them_all(tmp_path):
    """The tests below stand on it: functions, conditions, aliases and relative imports."""
    path = ROOT / "vit" / "model" / "__init__.py"
    assert {i.target for i in imports_of(path)} >= {"vit.model.arguments", "vit.model.vision_transformer"}
    source = (
        "from . import options\nimport a.b as c\n"
        "from vit import errors\nif TYPE_CHECKING:\n    import never\ntry:\n    import d\n"
        "except ImportError:\n    pass\nclass C:\n    import e\n    def f(self):\n        from g import h\n"
    )
    (tmp_path / "vit").mkdir()
    file = tmp_path / "vit" / "x.py"
    file.write_text(source)
    found = {(i.target, i.lazy) for i in imports_of(file, tmp_path)}
    at_once = {"vit.options", "a.b", "vit.errors", "d", "e"}
    assert found == {(target, False) for target in at_once} | {("g", True)}


def test_every_room_has_its_rule():
    found = {path.parent.name for path in (ROOT / "vit").glob("*/__init__.py")}
    assert found <= set(ROOMS), f"no rule for {found - set(ROOMS)}"
    beside = {path.stem for path in (ROOT / "vit").glob("*.py")} - {"__init__", "__main__"}
    assert beside <= GROUND, f"no rule for {beside - GROUND}"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT / "vit")))
def test_imports_go_downwards_only(path):
    place = path.relative_to(ROOT / "vit")
    room = ROOMS.get(place.parts[0])
    own = place.parts[0] if room else None
    load, lazy = FILES.get(place.as_posix(), (room.load, room.lazy) if room else (set(), set()))
    for target, line, inside in imports_of(path):
        where, top = f"{place}:{line} imports {target}", target.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top == "vit":
            below = target.split(".")[1] if "." in target else None
            if place.name == "__main__.py":
                assert below == "cli", where
            elif room is None:
                assert below in GROUND, f"{where}: this file stands under every room"
            else:
                assert below is None or below in GROUND | room.rooms | {own}, f"{where}: not below vit/{own}"
        elif inside:
            assert top in load | lazy, f"{where}: vit/{own} does without {top}"
        else:
            assert top in load, f"{where} when loaded" + (": import it in the function" if top in lazy else "")


def test_no_module_waits_for_itself():
    """What modules import when they are loaded has no circle, so any of them can be imported first."""
    edges = {
        name: {i.target for i in imports_of(path) if not i.lazy} & MODULES.keys() for name, path in MODULES.items()
    }
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in edges[name] - {name}:
                follow(target, (*trail, name))
            done.add(name)

    for name in edges:
        follow(name, ())


CIRCLES = [
    {"data.small_sets", "data.torchvision_sets"},
    {"data.decode", "data.filetype"},
    {"data.assemble", "data.catalogue", "data.folder", "data.memory", "data.parquet", "data.run_splits"},
    {"inference.bundle", "inference.export", "inference.loading", "inference.onnx_backend", "inference.onnx_graph"}
    | {"inference.onnx_weights"},
    {"training.config", "training.pretrained"},
    {"training.folder", "training.resume"},
]
"""Modules that need each other, by imports inside functions and for types too.  The list may only become shorter."""


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest groups of modules in which each reaches each other one."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    all_reached = {name: reached(name) for name in edges}
    return {
        frozenset(other for other in found if name in all_reached[other])
        for name, found in all_reached.items()
        if name in found
    }


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"f"}, "f": {"d"}, "g": {"g"}, "h": {"a"}}
    assert circles(edges) == {frozenset("bc"), frozenset("def"), frozenset("g")}


def test_no_two_modules_need_each_other():
    """The package `vit` has the version and is loaded before all of its modules, so importing it closes no circle."""
    edges = {}
    for name, path in MODULES.items():
        edges[name] = {i.target for i in imports_of(path, types=True)} & MODULES.keys() - {"vit", name}
    found, known = circles(edges), {frozenset(f"vit.{each}" for each in circle) for circle in CIRCLES}
    new = [sorted(circle) for circle in found if not any(circle <= old for old in known)]
    assert not new, f"modules that need each other: {new}"
    gone = [sorted(circle) for circle in known if circle not in found]
    assert not gone, f"take out of CIRCLES, or make smaller there: {gone}"


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of every module that a fresh interpreter imports."""
    # a measured run would load the tool that measures
    plain = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = (line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {line.split(".")[0] for line in lines}


HEAVY = {
    "torch", "torchvision", "lightning", "timm", "hydra", "omegaconf", "sklearn", "scipy", "matplotlib", "tensorboard",
    "torchmetrics", "onnx", "onnxruntime", "pyarrow", "safetensors",
}  # fmt: skip
IMAGES = {"numpy", "PIL"}
NOTHING = HEAVY | IMAGES | {"rich", "yaml", "asyncio", "multiprocessing"}


def light_entries() -> list[tuple[str, set[str]]]:
    """Modules that must load lightly, with what they must not load; those among them that there are."""
    entries = {"vit": NOTHING, "vit.errors": NOTHING, "vit.files": NOTHING, "vit.options": NOTHING, "vit.cli": NOTHING}
    entries |= {"vit.cli.parser": NOTHING, "vit.data": NOTHING, "vit.inference": NOTHING, "vit.evaluation": NOTHING}
    with_torch = {"vit.inference.torch_backend", "vit.inference.weights"}
    for name in MODULES:
        if name.startswith(("vit.cli.", "vit.inference.")) and name not in {*entries, *with_torch}:
            entries[name] = HEAVY
    # what a training command checks before it starts, so that a slip is reported at once
    entries |= dict.fromkeys(["vit.data.decode", "vit.data.preprocess", "vit.data.catalogue"], HEAVY)
    entries |= {
        "vit.training": NOTHING,
        "vit.training.config": HEAVY,
        "vit.training.app": HEAVY - {"hydra", "omegaconf"},
    }
    entries |= {"vit.model": HEAVY - {"torch"} | {"PIL", "rich"}, "vit.evaluation.metrics": HEAVY}
    entries |= {"vit.pretrained": NOTHING, "vit.pretrained.hub": NOTHING}
    entries |= {"vit.pretrained.labels": HEAVY, "vit.pretrained.preprocessing": HEAVY}
    # TensorBoard loads these: its start must not wait for torch, nor need it
    entries |= {name: HEAVY - {"tensorboard"} | {"PIL"} for name in MODULES if name.startswith("vit.dashboard")}
    return [(name, without) for name, without in entries.items() if name in MODULES]


@pytest.mark.parametrize(
    ("name", "without"), light_entries(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_light_modules_load_lightly(name, without):
    assert not loaded_by("-c", f"import {name}") & without


@pytest.mark.skipif("vit.__main__" not in MODULES, reason="there is no `vit` command")
@pytest.mark.parametrize("arguments", [["--help"], ["classify", "--help"]], ids=" ".join)
def test_help_is_answered_without_loading_anything(arguments):
    assert not loaded_by("-m", "vit", *arguments) & (HEAVY | IMAGES)


def test_the_public_names_come_from_their_rooms():
    import vit
    import vit.pretrained.create

    for name in vit.__all__:
        assert getattr(vit, name) is not None
        assert name in dir(vit)
    assert vit.create_model is vit.pretrained.create.create_model
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = vit.create_modle
