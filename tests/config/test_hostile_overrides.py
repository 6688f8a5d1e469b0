"""Anything that can be typed behind `train.py` and `eval.py`: it is taken, or refused in one line with status 2."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit import options
from vit.training import app, eval_app
from vit.training.config import Config

KEYS = [key.name for key in options.list_keys(Config)]
LONG = "n" * 300
VALUES = (
    *("a", "1", "-1", "null", "???", "''", "true", "a b", "a=b", "a,b", "1,2", "'", "\\", "$", "%s", "{0}"),
    # interpolations: to nothing, to tables, to themselves, to what cannot be called
    *("${model}", "${data}", "${seed}", "${.seed}", "${.........seed}", "${oc.env:NOPE_NOT_SET}"),
    *("${oc.select:nope}", "${oc.select:model}", "${nope}", "${hydra:job}", "${oc.dict.values:optim}"),
    "${oc.create:{a: 1}}",
    *("str(${model})", "${oc.decode:'['}", "${" * 50, "${a:" * 50 + "1" + "}" * 50),
    # names and paths that no file has
    *(LONG, LONG + ".ckpt", "a/" + LONG, "a\0b", "'a\0b'", "'a\nb'", "'\x1b[31m'", "\udcff", "'\ud800'"),
    *("~nobody-here/x", "local-dir:" + LONG, "local-dir:", "hf-hub:", "vit_tiny_patch16_224@" + LONG, "'\u202e'"),
    "é" * 200,
    # numbers
    *("9" * 400, "-" + "9" * 5000, "1e400", "1e-320", "nan", "-inf", "0x10", "1_0", "٣", "+1"),
    # structures
    *("[1,2]", "{a: 1}", "{}", "[]", "[" * 60 + "]" * 60, "{a: " * 40 + "1" + "}" * 40, "[" * 500),
    *("range(1,3)", "glob(*)", "choice(1,2)", "sort(1,2)", "int(x)"),
)
ODD_KEYS = (
    *("", " ", ".", "..", "a..b", ".seed", "seed.", "a" * 5000, ".".join("a" * 300), "é", "\0", "\ud800"),
    *("a\nb", "[0]", "data.mean[0]", "${seed}", "'seed'", "-", "@", "@x", "x@", "data@x", "x@data"),
    *("model@_global_", "data/"),
    *("/data", "hydra", "hydra.job", "hydra.run", "hydra.mode", "hydra.callbacks", "hydra.job_logging"),
    "hydra.overrides.task",
    *("hydra.searchpath", "hydra/launcher", "hydra/sweeper", "hydra.launcher._target_", "defaults", "_target_"),
    *("data", "model", "optim", "experiment", "trainer", "run", "checkpoint", "output", "split"),
)


@st.composite
def overrides(draw):
    key = draw(st.one_of(st.sampled_from(KEYS), st.sampled_from(ODD_KEYS), st.text(max_size=5)))
    front = draw(st.sampled_from(["", "", "", "+", "++", "~", "-", "@", "+@", "+~"]))
    value = draw(st.one_of(st.sampled_from(VALUES), st.text(max_size=5)))
    return front + key + draw(st.sampled_from(["=", "=", "=", ""])) + value


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Call `train.py` or `eval.py` in this process, up to where training or evaluation would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("vit.training.run.train", lambda *arguments: None)

    def call(arguments: list[str], main=app.train_main) -> tuple[int, str]:
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = main(arguments)
        return status, error.getvalue()

    return call


def check(outcome: tuple[int, str]) -> None:
    status, error = outcome
    assert "Traceback" not in error, error[-1000:]
    assert status in (0, 2), (status, error[-1000:])
    if status:
        assert error.endswith("\n")
        assert error.count("\n") == 1, error
        assert len(error) < 1500
        assert error[:-1].isprintable()
    assert "HYDRA_FULL_ERROR" not in os.environ


def anything(command, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(overrides(), min_size=1, max_size=2))
    def test(arguments):
        check(command(arguments))

    test()


def test_anything_typed_is_taken_or_refused_in_a_line(command):
    anything(command, 40)


@pytest.mark.slow
def test_two_thousand_times_anything(command):
    anything(command, 2000)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("+@x=a", "+@x=a: Hydra cannot compose this (AssertionError); write group=name"),
        ("data=${oc.select:nope}", "data=${oc.select:nope}: Hydra cannot compose this"),
        ("+resume=${model}", "resume: expected text or null, got {name: null"),
        (f"resume={LONG}", f"resume={LONG}: expected a .ckpt file or a run folder"),
        (f"resume={LONG}.ckpt", f"resume={LONG}.ckpt: expected a .ckpt file or a run folder"),
        ("run.root='a\0b'", "run.root: expected text, got 'a\\x00b'"),
        ("run.name=${oc.env:NOPE_NOT_SET}", "run.name: "),
        (f"seed={'9' * 400}", "seed: expected a whole number of at least 0, got 999"),
        (f"optim.lr={'9' * 400}", "optim.lr: expected a number above 0, got 999"),
        ("model='a\nb'", "model=a b: there is no conf/model/a b.yaml"),
        ("data.mean=" + "{a: " * 60 + "1" + "}" * 60, "data.mean"),
    ],
)
def test_odd_overrides_are_named(argument, told, command):
    status, error = command([argument])
    check((status, error))
    assert status == 2
    assert error.startswith(told), error


@pytest.mark.parametrize("value", [LONG, LONG + "/x", "'a\0b'", "'a\nb'", "\udcff", "${data}", "''", "~nobody-here/x"])
@pytest.mark.parametrize("key", ["checkpoint", "output", "+data.root", "device"])
def test_odd_overrides_of_an_evaluation(key, value, command):
    model = [] if key == "checkpoint" else ["checkpoint=nothing"]
    status, error = command([*model, f"{key}={value}"], eval_app.eval_main)
    check((status, error))
    assert status == 2
