"""The first argument without a key: `vit train photos`, `vit eval RUN`; and the two ways to start either command."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vit import errors
from vit.cli import main
from vit.errors import VitError, command_name
from vit.shell import quote_for_hydra
from vit.training import app, eval_app
from vit.training.first_argument import expand_data_argument

CATALOGUE = ["cifar10", "digits", "folder", "parquet"]


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("\\'\"${}:,=[]()~*#? ab\n\té"), min_size=1))
def test_any_text_is_quoted_to_mean_itself(text):
    value = OverridesParser.create().parse_override(f"data.root={quote_for_hydra(text)}").value()
    assert OmegaConf.create({"root": value, "???": 0})["root"] == text or text == "???"


def test_what_data_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "it's ${mine}", "digits", "tables"):
        (tmp_path / name).mkdir()
    (tmp_path / "tables" / "a.parquet").touch()
    (tmp_path / "one.PARQUET").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {
        "digits": ["data=digits"],  # the name, not the folder
        "./digits": ["data=folder", "data.root='./digits'"],
        "photos": ["data=folder", "data.root='photos'"],
        "~/photos": ["data=folder", f"data.root='{tmp_path}/photos'"],
        "it's ${mine}": ["data=folder", "data.root='it\\'s \\${mine}'"],
        "tables": ["data=parquet", "data.root='tables'"],
        "one.PARQUET": ["data=parquet", "data.root='one.PARQUET'"],
    }
    assert {text: expand_data_argument(text, CATALOGUE) for text in expected} == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("phots", "phots: there is no folder, data set or .parquet file of that name; did you mean 'photos'?"),
        ("below/phots", "did you mean 'below/photos'?"),
        ("cifar11", "did you mean 'cifar10'?"),
        ("xyz", "choose from cifar10, digits, folder, parquet"),
        ("note.txt", "note.txt: is no folder of images and no .parquet file of that name; "),
        ("nowhere/at/all", "there is no folder"),
    ],
)
def test_what_is_no_data_gets_one_line(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below" / "photos").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "note.txt").touch()
    with pytest.raises(VitError) as refusal:
        expand_data_argument(text, CATALOGUE)
    assert told in str(refusal.value)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_subcommand_is_the_script(command, tmp_path, monkeypatch):
    """Both call one function with what was typed, options included; its status is the command's."""
    seen = []

    def launch(task, name, schema, argv=None, *, expand_first):
        seen.append((task, name, argv, expand_first("MODEL", ["MODEL"])))
        return 130

    module = "app" if command == "train" else "eval_app"
    monkeypatch.setattr(f"vit.training.{module}.launch", launch)
    assert main([command, "-m", "a=1", "--cfg", "job", "--help", "--config-dir", "own", "b=2"]) == 130
    assert (app.train_main if command == "train" else eval_app.eval_main)() == 130
    (task, name, argv, first), (same, _, none, _) = seen
    assert task is same
    assert (name, none) == (command, None)
    assert argv == ["-m", "a=1", "--cfg", "job", "--help", "--config-dir", "own", "b=2"]
    assert first == (["data=MODEL"] if command == "train" else ["checkpoint='MODEL'"])


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval"], ["classify"], ["info"], ["tune-reduction"], ["push"]])
def test_the_version_is_the_projects(arguments, capsys):
    import vit

    try:
        status = main([*arguments, "--version"])
    except SystemExit as leaving:
        status = leaving.code
    assert (status, capsys.readouterr().out) == (0, f"vit {vit.__version__}\n")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train.py", "python eval.py"),
        ("../the checkout/eval.py", "python '../the checkout/eval.py'"),
        ("/opt/env/bin/vit", "vit eval"),
        ("/lib/vit/__main__.py", "python -m vit eval"),
        ("/lib/pytest/__main__.py", "vit eval"),
        ("", "vit eval"),
    ],
)
def test_commands_are_printed_as_they_were_typed(script, expected, monkeypatch):
    monkeypatch.setattr(errors.sys, "argv", [script, "seed=1"])
    assert command_name("eval") == expected


def test_a_sweep_runs_its_jobs_without_the_scripts(tmp_path):
    """Each job is a process that composes the same configuration, the first argument and --config-dir among it."""
    (tmp_path / "photos").mkdir()
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.125\n")
    arguments = ["photos", "-m", "--config-dir", "own", "experiment=mine", "seed=1,2"]
    result = subprocess.run(
        [sys.executable, "-m", "vit", "train", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    # an empty folder: found out by each job for itself, after everything was composed and checked
    assert result.stderr.count("job ") == 2, result.stderr
    assert "data=folder data.root='photos' experiment=mine seed=2" in result.stderr or "photos" in result.stderr
    assert "0 of 2 jobs done" in result.stdout
    assert "Traceback" not in result.stderr
