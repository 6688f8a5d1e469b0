"""docs/pretrained.md keeps its word: commands and Python run against a stand-in for the hub and print what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vit.pretrained.create import MAY_DIFFER

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pretrained.md").read_text("utf-8")
TEXT = TEXT[TEXT.index("## Where weights come from") :]
"""What follows the models; fine-tuning has its own test."""


def section(title: str) -> str:
    start = TEXT.index(f"## {title}\n")
    end = TEXT.find("\n## ", start)
    return TEXT[start : end if end > 0 else None]


@pytest.fixture
def place(hub, photographs, tmp_path) -> Path:
    """A folder with what the page speaks of."""
    import torch
    from safetensors.torch import load_file

    shutil.copy(photographs[0], tmp_path / "photo.jpg")
    shutil.copytree(hub.folder, tmp_path / "downloaded")
    torch.save({"model": load_file(hub.folder / "model.safetensors")}, tmp_path / "weights.pth")
    return tmp_path


def run(environment: dict[str, str], program: str, place: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_runs(hub_environment, place):
    commands = [
        re.sub(r"\s+#.*", "", line.strip())
        for line in section("Where weights come from").splitlines()
        if re.match(r"    (\w+=\d )?vit ", line)
    ]
    assert len(commands) == 8
    offline = [line.removeprefix("HF_HUB_OFFLINE=1 ") for line in commands if line.startswith("HF_HUB_OFFLINE=1 ")]
    program = """
        import json, shlex, sys
        from vit.cli import main
        for command in json.loads(sys.argv[1]):
            assert main(shlex.split(command)[1:]) == 0, command
    """
    run(hub_environment, program, place, json.dumps([line for line in commands if line.startswith("vit ")]))
    assert (place / "maps" / "photo.png").is_file()
    assert (place / "tiny" / "model.onnx").is_file()
    run({**hub_environment, "HF_HUB_OFFLINE": "1"}, program, place, json.dumps(offline))


def test_the_python_runs_and_prints_what_is_shown(hub_environment, place):
    blocks = re.findall(r"^```python\n(.*?)^```$", section("In Python"), re.M | re.S)
    shown = re.findall(r"^```text\n(.*?)^```$", section("In Python"), re.M | re.S)
    assert (len(blocks), len(shown)) == (2, 1)
    printed = run(hub_environment, "".join(blocks), place)
    assert re.sub(r"commit \w{12}", "commit", printed) == re.sub(r"commit \w{12}", "commit", shown[0])


def test_the_table_of_arguments_is_complete():
    named = set(re.findall(r"`(\w+)`", section("In Python").split("| argument |")[1].split("\n\n")[0]))
    implied = {"final_norm", "crop_to_patches", "dropout", "attention_dropout", "patch_dropout", "init"}
    implied |= {key for key in MAY_DIFFER if key.startswith("reduction_")}
    assert named - {"class_names"} | implied == MAY_DIFFER
