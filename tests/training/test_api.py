"""`vit.train` and `vit.evaluate`: the commands from Python, which leave the caller's process as it was."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.version import getbase
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import vit
from vit.errors import VitError
from vit.training import api
from vit.training.app import train_main
from vit.training.config import CONF

SMALL = {
    "model": {"width": 16, "depth": 1, "heads": 2},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "export.onnx": False,
    "logging.tensorboard": False,
}
RANDOM = np.random.default_rng(0)
NUMBERS = np.arange(90) % 3
BRIGHT = np.clip(40 + 80 * NUMBERS[:, None, None] + RANDOM.normal(0, 30, (90, 8, 8)), 0, 255).astype(np.uint8)
LABELS = np.array(["dark", "grey", "light"])[NUMBERS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(place):
    """A run on arrays."""
    return vit.train((BRIGHT, LABELS), SMALL, f"run.root={place}")


def test_a_run_has_what_the_folder_has(run, place):
    assert run.metrics == json.loads((run.folder / "metrics.json").read_text())
    assert run.folder.parent == place / "memory"
    assert run.metrics["test"]["images"] == 18
    assert not run.interrupted
    assert f"{run.metrics['test']['top1']:.1%}" in repr(run)
    assert f"{run.metrics['test']['top1']:.1%}" in run._repr_html_()
    assert len(run._repr_html_()) < 600
    result = run.classifier.classify([BRIGHT[0]])[0]
    assert result.label in {"dark", "grey", "light"}
    assert run.classifier is run.classifier
    assert vit.load(run).classify([BRIGHT[0]])[0].label == result.label
    assert pickle.loads(pickle.dumps(run)).metrics == run.metrics
    log = (run.folder / "train.log").read_text()
    assert "command: vit.train(data, 'model.width=16'" in log
    assert "evaluate" not in log  # what is typed next is Python


def test_it_is_the_run_of_the_command(tmp_path, capsys):
    typed = ["data.max_images=60", "model.width=16", "model.depth=1", "model.heads=2", "trainer.max_epochs=1"]
    typed += ["trainer=cpu", "export.onnx=false", "logging.tensorboard=false", f"run.root={tmp_path}"]
    assert train_main(["data=digits", *typed, "run.name=command"]) == 0
    ours = vit.train("digits", *typed, {"run.name": "python"})
    (theirs,) = (tmp_path / "command").iterdir()
    metrics = json.loads((theirs / "metrics.json").read_text())
    assert ours.metrics["test"] == metrics["test"]
    assert ours.metrics["val"] == metrics["val"]
    out = capsys.readouterr().out
    assert out.count("eval.py") + out.count("vit eval") == 1  # the command says what to type, Python does not


def test_evaluate_knows_the_images_that_a_run_was_trained_on(run, tmp_path):
    again = vit.evaluate(run, data=(BRIGHT / 255, list(LABELS)))
    assert again["test"]["top1"] == run.metrics["test"]["top1"]
    assert again["test"]["images"] == 18
    assert again["at_training"]["top1"] == again["test"]["top1"]
    assert Path(again["folder"]).resolve() == run.folder / "evaluation"
    train = vit.evaluate(run.folder, "split=train", {"output": tmp_path / "out, ='"}, data=(BRIGHT, LABELS))
    assert train["train"]["images"] == 63
    assert (tmp_path / "out, ='" / "metrics.json").is_file()


def test_evaluate_takes_all_of_other_images(run, tmp_path):
    for data in ((BRIGHT[:30], LABELS[:30]), (BRIGHT[:30], NUMBERS[:30]), list(zip(BRIGHT[:30], LABELS, strict=False))):
        found = vit.evaluate(run.folder / "checkpoints" / "best.ckpt", {"output": tmp_path}, data=data)
        assert found["test"]["images"] == 30
        assert found["at_training"] is None
    parts = {"val": (BRIGHT[:9], LABELS[:9]), "test": (BRIGHT[9:12], LABELS[9:12])}
    assert vit.evaluate(run, {"output": tmp_path}, data=parts)["test"]["images"] == 3
    with pytest.raises(VitError, match="does not know 'purple'"):
        vit.evaluate(run, {"output": tmp_path}, data=(BRIGHT[:2], ["dark", "purple"]))


def test_without_the_images_there_is_one_line(run):
    with pytest.raises(VitError, match=r"given from Python .* again: vit\.evaluate\(MODEL, data=\.\.\.\)") as caught:
        vit.evaluate(run)
    for program, words in (("eval.py", f"checkpoint={run.folder}"), ("train.py", f"resume={run.folder}")):
        done = subprocess.run(
            [sys.executable, str(CONF.parent / program), words], capture_output=True, text=True, timeout=200
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.strip().splitlines()[-1] == str(caught.value)


def test_a_run_goes_on_with_the_same_images_only(place):
    first = vit.train((BRIGHT, LABELS), SMALL, f"run.root={place}", "run.name=on")
    with pytest.raises(VitError, match="not the images and labels"):
        vit.train((BRIGHT[:80], LABELS[:80]), f"resume={first.folder}", "trainer.max_epochs=3")
    longer = vit.train((BRIGHT, LABELS), {"resume": first.folder, "trainer.max_epochs": 3})
    assert longer.folder == first.folder
    assert longer.metrics["epochs"] == 3
    whole = vit.train((BRIGHT, LABELS), SMALL, f"run.root={place}", "run.name=whole", "schedule=constant")
    assert whole.folder != first.folder


def test_digits_do_not_go_on_with_other_images(tmp_path):
    run = vit.train("digits", SMALL, "data.max_images=60", {"run.root": tmp_path, "trainer.max_epochs": 1})
    with pytest.raises(VitError, match="trained on data=digits"):
        vit.train((BRIGHT, LABELS), f"resume={run.folder}", "trainer.max_epochs=2")
    assert vit.train(None, f"resume={run.folder}", "trainer.max_epochs=2").metrics["epochs"] == 2


def test_a_folder(tmp_path, photographs):
    from PIL import Image

    for i in range(24):
        path = tmp_path / "my photos" / ("light" if i % 2 else "dark") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(BRIGHT[i % 3][:, :, None], 3, axis=2)).save(path)
    small = {"data.image_size": 8, "data.patch_size": 4, "run.root": tmp_path / "runs"}
    found = vit.train(tmp_path / "my photos", SMALL, small)
    assert found.metrics["test"]["images"] == 5
    everything = vit.evaluate(found, "data.test_fraction=1.0", data=str(tmp_path / "my photos"))
    assert everything["test"]["images"] == 24


# --- the caller's process


def state():
    """What lasts in a process."""
    loggers = [logging.getLogger(name) for name in ("", "vit", "lightning.pytorch", "lightning.fabric", "PIL")]
    return {
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "random": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "levels": [logger.level for logger in loggers],
        "handlers": [list(logger.handlers) for logger in loggers],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hydra": (GlobalHydra.instance().is_initialized(), getbase(), HydraConfig.initialized()),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
    }


def test_nothing_of_the_callers_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "model.depth=-1", "--multirun"])
    monkeypatch.setenv("VIT_RUN_FOLDER", "mine")
    (tmp_path / "mine.yaml").write_text("a: 1")
    before = state()
    arguments = ((BRIGHT, LABELS), SMALL, {"run.root": tmp_path, "trainer.deterministic": True, "trainer.threads": 2})
    first = vit.train(*arguments)
    assert state() == before
    with hydra.initialize_config_dir(version_base="1.2", config_dir=str(tmp_path)):
        inside = state()
        second = vit.train(*arguments)
        vit.evaluate(second, data=(BRIGHT, LABELS))
        for wrong in ("model.dpeth=2", "data=[", "trainer.accelerator=gpu" if not torch.cuda.is_available() else "x"):
            with pytest.raises(VitError):
                vit.train("digits", wrong)
        assert state() == inside
        assert hydra.compose("mine").a == 1
    assert first.metrics["test"] == second.metrics["test"]


def test_a_script_and_a_thread(tmp_path):
    """A process of its own without arguments, and threads, where there are no signal handlers."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import json, os, sys, threading, warnings, logging, signal
            import vit
            heavy = {"torch", "numpy", "hydra", "lightning"} & set(sys.modules)
            assert not heavy, heavy
            del sys.argv[:]
            vit.train
            assert not {"torch", "lightning"} & set(sys.modules)
            import vit.training.run
            before = list(warnings.filters), dict(os.environ), signal.getsignal(signal.SIGINT)
            small = json.load(open("small.json"))
            runs = {}

            def train(name):
                runs[name] = vit.train("digits", small, {"run.name": name})

            threads = [threading.Thread(target=train, args=(name,)) for name in ("one", "two")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(200)
            train("three")
            assert before == (list(warnings.filters), dict(os.environ), signal.getsignal(signal.SIGINT))
            assert not logging.getLogger("vit").handlers
            figures = {name: run.metrics["test"] for name, run in runs.items()}
            assert figures["one"] == figures["two"] == figures["three"], figures
        """)
    )
    (tmp_path / "small.json").write_text(json.dumps({**SMALL, "data.max_images": 60, "trainer": {"max_epochs": 1}}))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "waiting for the run in another thread" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C here")
def test_ctrl_c_returns_the_run(tmp_path):
    """As a notebook's interrupt does it: SIGINT to the process whose main thread trains."""

    def interrupt():
        for _ in range(2400):
            if next(tmp_path.glob("*/*/checkpoints/last.ckpt"), None):
                os.kill(os.getpid(), signal.SIGINT)
                return
            done.wait(0.05)

    done = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        run = vit.train((BRIGHT, LABELS), SMALL, {"run.root": tmp_path, "trainer.max_epochs": 100_000})
    finally:
        done.set()
        thread.join(60)
    assert run.interrupted
    assert run.metrics["interrupted"] is True
    assert (run.folder / "checkpoints" / "last.ckpt").is_file()
    assert "interrupted" in repr(run)
    assert run.classifier.classify([BRIGHT[0]])[0].label
    epochs = run.metrics["epochs"] + 2
    assert not vit.train((BRIGHT, LABELS), f"resume={run.folder}", f"trainer.max_epochs={epochs}").interrupted


# --- overrides


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["${data.name}", "\\${x}", "a\\", "'", '"', "a, b", "[1,2]", "null", "true", "1e3", "key=value", ""]
    ),
    st.lists(st.one_of(st.integers(-9, 9), st.text("ab,'[\\ ", max_size=4)), max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_a_value_in_a_mapping_means_itself(value):
    (text,) = api._format_overrides(({"run": {"name": value}},))
    parsed = OverridesParser.create().parse_override(text)
    assert parsed.key_or_group == "run.name"
    config = OmegaConf.create({"a": parsed.value()})
    assert OmegaConf.to_container(config, resolve=True)["a"] == value


def test_overrides_of_every_kind():
    found = api._format_overrides(
        ("seed=1", {"model": {"size": "tiny", "reduction": None}, "optim.lr": np.float32(0.5)}, {"data.mean": (0.5, 1)})
    )
    assert found == ["seed=1", "model.size='tiny'", "model.reduction=null", "optim.lr=0.5", "data.mean=[0.5,1]"]


@pytest.mark.parametrize("wrong", [3, None, ["seed=1"], {"seed": object()}, {"seed": {1, 2}}])
def test_what_is_no_override(wrong):
    with pytest.raises(VitError):
        vit.train("digits", wrong)


def test_an_experiment_wins_over_what_suits_the_images(small_bundle):
    found = vit.data.memory.gather((BRIGHT, LABELS))
    weights = f"model.name={small_bundle}"
    values = api._compose("train", api.Config, ["data=memory"], ["experiment=finetune", weights], found)
    assert values["data"]["name"] == "memory"
    assert values["data"]["image_size"] is None  # as the weights have it
    assert values["data"]["content"] == found.content
    values = api._compose("train", api.Config, ["data=memory"], ["data.image_size=32"], found)
    assert (values["data"]["image_size"], values["model"]["image_size"], values["data"]["patch_size"]) == (32, 32, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        "model.szie=tiny",
        "data=cifr10",
        "model.depth=0",
        "optim=adan",
        "x",
        "a=[",
        "+seed=1",
        "run.name=${nope}",
        "seed=1,2",
    ],
)
def test_the_line_is_the_commands(wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_main(["data=digits", wrong]) == 2
    line = capsys.readouterr().err.strip()
    with pytest.raises(VitError) as caught:
        vit.train("digits", wrong)
    assert str(caught.value) == line
    assert list(tmp_path.iterdir()) == []


def test_one_process_trains():
    for wrong in ("trainer.devices=2", "trainer=ddp_cpu", "trainer.num_nodes=2"):
        with pytest.raises(VitError, match="one process"):
            vit.train("digits", wrong)


@pytest.mark.parametrize("data", ["cifr10", "nowhere/photos", "", "data=digits"])
def test_a_name_of_no_data(data):
    with pytest.raises(VitError) as caught:
        vit.train(data)
    assert "\n" not in str(caught.value)
