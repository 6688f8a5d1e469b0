"""What `--help` and `--cfg job` print."""

from __future__ import annotations

import re

import yaml

from vit import options
from vit.training.app import CONF, train_main
from vit.training.config import Config


def printed(capsys, *arguments):
    assert train_main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_help_lists_every_group_with_its_choices(capsys):
    text = printed(capsys, "--help")
    for folder in CONF.iterdir():
        if folder.is_dir():
            line = re.search(rf"^{folder.name}: (.*)$", text, re.M)
            assert line is not None, folder.name
            assert line.group(1).split(", ") == sorted(file.stem for file in folder.glob("*.yaml"))


def test_every_key_and_choice_in_the_help_exists(capsys):
    text = printed(capsys, "--help")
    keys = {key.name for key in options.list_keys(Config)}
    mentioned = re.findall(r"^ +([a-z_.]+)=\S+ {2,}", text, re.M)
    assert len(mentioned) >= 10
    assert set(mentioned) <= keys
    for group, choice in re.findall(r"vit train .*?\b(data|experiment|debug)=([a-z_]+)", text):
        assert (CONF / group / f"{choice}.yaml").is_file()
    for key in re.findall(r"\b((?:model|optim|data|trainer|run)\.[a-z_]+)", text):
        assert key in keys


def test_help_fits_a_terminal(capsys):
    lines = printed(capsys, "--help").splitlines()
    assert max(map(len, lines)) <= 150
    assert len(lines) <= 60


def test_help_costs_no_torch(script):
    result = script("train.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "torchvision", "timm"}
    assert list(result.stdout) != []


def test_cfg_job_prints_the_configuration(capsys, compose):
    text = printed(capsys, "--cfg", "job", "--resolve", "data=cifar10", "seed=7")
    assert yaml.safe_load(text) == compose("data=cifar10", "seed=7")


def test_the_help_of_evaluation(script):
    result = script("eval.py", "--help")
    assert result.returncode == 0
    assert "vit eval RUN " in result.stdout
    assert "${" not in result.stdout
