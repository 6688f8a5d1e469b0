"""The workflow calls .ci/run and its commands work; hooks are local and run; templates keep their form."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def steps(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(
        ["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_workflow_calls_the_same_script_as_a_developer() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert steps(jobs["linux"]) == ["bash .ci/run"]
    assert (ROOT / ".ci/run").is_file()
    assert jobs["other-systems"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]
    wanted = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert wanted
    versions = [step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "with" in step]
    assert versions == [wanted[1]] * len(jobs)


def test_what_other_systems_run_works_here(tmp_path: Path) -> None:
    """Train two steps, classify an image; without the installation, which this environment has."""
    install, *rest = steps(read(".github/workflows/ci.yml")["jobs"]["other-systems"])
    assert install == "python -m pip install ."
    outputs = []
    for line in rest:
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    assert "test  top-1" in outputs[0]
    assert re.search(r"^\d +\d+\.\d+%  photo\.png", outputs[-1], re.M)


def test_hooks_are_local_and_run(tmp_path: Path) -> None:
    repositories = read(".pre-commit-config.yaml")["repos"]
    assert [each["repo"] for each in repositories] == ["local"]
    hooks = {hook["id"]: hook for hook in repositories[0]["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "mypy"}
    assert all(hook["language"] == "system" for hook in hooks.values())
    (tmp_path / "good.py").write_text("x = 1\n", "utf-8")
    (tmp_path / "bad.py").write_text("import os\nx  = 1\n", "utf-8")
    for name in ("ruff-check", "ruff-format"):
        for file, status in (("good.py", 0), ("bad.py", 1)):
            assert run(f"{hooks[name]['entry']} {shlex.quote(str(tmp_path / file))}", ROOT).returncode == status
    assert run(f"{hooks['mypy']['entry']} --version", ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir()), ids=lambda path: path.name)
def test_issue_forms_ask_for_something(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"]
    assert form["description"]
    identifiers = [each["id"] for each in form["body"]]
    assert len(set(identifiers)) == len(identifiers) >= 1
    assert all(each["type"] == "textarea" and each["attributes"]["label"] for each in form["body"])


def test_commands_of_the_pull_request_template_exist() -> None:
    text = (ROOT / ".github/pull_request_template.md").read_text("utf-8")
    assert "`bash .ci/run`" in text
    assert "`python -m benchmarks compare --against main`" in text
    assert [name for name in re.findall(r"[\w/]+\.md", text) if not (ROOT / name).is_file()] == []


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.+)$", text, re.M)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", each) for each in versions[1:])
    kinds = re.findall(r"^### (.+)$", text, re.M)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


LONG = {
    *("cli/test_cli_explain.py", "data/test_decode.py", "data/test_folder.py", "data/test_memory.py"),
    *("data/test_streaming.py", "data/test_torchvision_sets.py", "explain/test_record.py"),
    *("inference/test_hostile_models.py", "training/test_attention_log.py"),
}
"""Tests that are longer than a file may be.  The list may only become shorter."""


def test_no_file_is_over_400_lines() -> None:
    kinds = {".py", ".js", ".css", ".yaml"}
    folders = [ROOT / name for name in ("vit", "conf", "benchmarks", "tests")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    long = {path for path in found if path.read_bytes().count(b"\n") > 400}
    assert len(found) > 300
    assert sorted(str(path) for path in long - {ROOT / "tests" / name for name in LONG}) == []
