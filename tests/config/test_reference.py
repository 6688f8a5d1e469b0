"""The table of keys in docs/configuration.md is the one that the code gives, and its commands are real."""

from __future__ import annotations

import re
import shlex

from vit import options
from vit.training.config import Config, load_config
from vit.training.reference import DOCUMENT, main, update_document


def test_the_table_is_current():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert update_document(text) == text, "run python -m vit.training.reference"


def test_every_key_is_there_with_its_help():
    text = DOCUMENT.read_text(encoding="utf-8")
    for key in options.list_keys(Config):
        assert key.rule.help, f"{key.name} has no help"
        assert text.count(f"| `{key.name}` |") == 1
        assert key.rule.help in text


def test_writing_it_again_changes_nothing(tmp_path):
    copy = tmp_path / "configuration.md"
    text = update_document(DOCUMENT.read_text(encoding="utf-8"))
    copy.write_text(text.replace("| `seed` |", "| `sede` |"), encoding="utf-8")
    assert main(copy) == 0
    assert copy.read_text(encoding="utf-8") == text


def test_the_commands_on_the_page_compose(compose):
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^python train\.py(?: (.*?))?(?:  .*)?$", text, re.M)
    assert len(commands) >= 8
    for command in commands:
        arguments = shlex.split(command)
        if "-m" in arguments or "--help" in arguments:
            continue
        load_config(compose(*(text for text in arguments if text != "experiment=mine")))


def test_the_experiment_on_the_page_composes(compose, tmp_path):
    import hydra

    from vit.training.app import CONF, resolve_config

    text = DOCUMENT.read_text(encoding="utf-8")
    written = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert written is not None
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(written.group(1))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = hydra.compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    config = load_config(resolve_config(composed))
    assert (config.data.name, config.model.depth, config.trainer.max_seconds) == ("cifar10", 8, 3600)


def test_the_refusals_on_the_page_are_what_is_said(refused):
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = re.findall(r"^\$ python train\.py (.+)\n(.+)$", text, re.M)
    assert len(shown) >= 4
    for arguments, line in shown:
        assert refused(*shlex.split(arguments)) == line
