"""`python -m benchmarks compare` sees a changed weight, a changed key and a changed output, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def call(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "compare", *arguments]
    # benchmarks of `root`: another checkout than the one that is installed
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, env=environment)


def load(path: Path) -> Any:
    """benchmarks/ is no package that is installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load(ROOT / "benchmarks/compare.py")
state = load(ROOT / "benchmarks/programs/record_state.py")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout that may be changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("vit", "conf", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "measured"))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    for recipe in (folder / "conf/experiment").iterdir():
        if recipe.name != "shapes.yaml":
            recipe.unlink()
    return folder


def test_an_unchanged_checkout_is_the_same_and_a_changed_one_is_not(checkout: Path, tmp_path: Path) -> None:
    before = str(tmp_path / "before.json")
    done = call("--record", before, "--only", "config,maps", root=checkout)
    assert done.returncode == 0, done.stderr
    again = call(before, root=checkout)
    assert again.returncode == 0, again.stdout + again.stderr
    lines = again.stdout.splitlines()
    assert "same     config: train" in lines
    assert "same     maps: attention, merge" in lines
    assert lines[-1] == f"{len(lines) - 1} the same, 0 different"

    recipe = checkout / "conf/experiment/shapes.yaml"
    recipe.write_text(recipe.read_text("utf-8") + "monitor: val/loss\n", "utf-8")
    changed = call(before, "--only", "config", root=checkout)
    assert changed.returncode == 1, changed.stderr
    assert (
        "differs  config: shapes\n           out: -monitor: val/top1\n           out: +monitor: val/loss\n"
        in changed.stdout
    )
    assert "same     config: train" in changed.stdout

    record = json.loads(Path(before).read_text("utf-8"))
    record["parts"] = {"maps": record["parts"]["maps"]}
    record["parts"]["maps"]["token, none"]["rollout"]["sha256"] = "0"
    del record["parts"]["maps"]["mean, keep"]
    Path(before).write_text(json.dumps(record), "utf-8")
    changed = call(before, root=checkout)
    assert changed.returncode == 1, changed.stderr
    found = [line for line in changed.stdout.splitlines() if line.startswith("differs")]
    assert found == ["differs  maps: mean, keep", "differs  maps: token, none"]


def test_a_commit_is_compared_with_the_working_tree(checkout: Path) -> None:
    git = ("git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout))
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "all")):
        subprocess.run([*git, *arguments], check=True, capture_output=True, timeout=60)
    recipe = checkout / "conf/experiment/shapes.yaml"
    recipe.write_text(recipe.read_text("utf-8") + "seed: 3\n", "utf-8")
    done = call("--against", "HEAD", "--only", "config", root=checkout)
    assert done.returncode == 1, done.stderr
    assert done.stdout == (
        "same     config: eval\n"
        "differs  config: shapes\n           out: -seed: 0\n           out: +seed: 3\n"
        "same     config: train\n"
        "2 the same, 1 different\n"
    )
    written = call("--record", "record.json", "--against", "HEAD", "--only", "config", root=checkout)
    assert written.stdout == "wrote record.json: 3 items\n"
    assert call("record.json", root=checkout).stdout == done.stdout
    wrong = call("--against", "no-such-commit", root=checkout)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("no-such-commit: ")


def test_one_changed_value_of_a_weight_is_seen_even_where_none_is_looked_at() -> None:
    import torch

    weight = torch.zeros(10, 100)
    before = {"w": state.array(weight)}
    weight[5, 5] = 1e-30
    assert list(compare.differences(before, {"w": state.array(weight)})) == [
        "w: 0.0e+00 apart where values are up to 0.0e+00, at 16 places looked at"
    ]
    weight[0, 0] = 0.5
    (line,) = compare.differences(before, {"w": state.array(weight)})
    assert line.startswith("w: 5.0e-01 apart")
    assert list(compare.differences(before, {"w": state.array(weight[:5])})) == [
        "w: float32[10, 100], now float32[5, 100]"
    ]
    assert list(compare.differences(before, {"v": before["w"]})) == ["w: is gone", "v: is new"]


def test_differences_of_figures_text_and_lists() -> None:
    def lines(before: Any, now: Any) -> list[str]:
        return list(compare.differences(before, now))

    assert lines({"top1": 0.5, "seed": 0}, {"top1": 0.5, "seed": 0}) == []
    assert lines({"top1": 0.5}, {"top1": 0.75}) == ["top1: 0.5, now 0.75 (+2.5e-01)"]
    assert lines({"out": "a\nb\n"}, {"out": "a\nc\n"}) == ["out: -b", "out: +c"]
    assert lines([1, 2], [1]) == ["2 entries, now 1"]
    assert lines({"status": 0, "x": None}, {"status": 2, "x": "y"}) == [
        "status: 0, now 2 (+2.0e+00)",
        'x: nothing, now "y"',
    ]
    summed = {"figures": [1.0], "tolerance": 1e-6}
    assert lines(summed, {**summed, "figures": [1 + 1e-7]}) == []
    assert len(lines(summed, {**summed, "figures": [1 + 1e-5]})) == 1
    assert len(lines(summed, {**summed, "figures": [float("nan")]})) == 1


def test_what_changes_from_run_to_run_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = state.Work(ROOT, False)
    texts = [
        f"{tmp_path}/runs/digits/2026-11-30_15-19-45 trained in {seconds} s at {rate} images/s\n"
        f"epoch 1/5  loss {rate}  0:0{seconds} left\nepoch 5/5  loss 1.14  {rate} img/s  0:0{seconds} in all\n"
        for seconds, rate in ((6, "1,140"), (7, "980"))
    ]
    assert work.masked(texts[0]) == work.masked(texts[1])
    assert "loss 1.14" in work.masked(texts[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a file, or --against COMMIT"),
        (["--record", "--against", "HEAD"], "expected a file, or --against COMMIT"),
        (["a.json", "--against", "HEAD"], "expected a file or --against COMMIT, not both"),
        (["a.json", "--only", "map"], "--only: no 'map'; there are digits, folder, logits"),
        (["no/such.json"], "no such file; --record writes it"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
