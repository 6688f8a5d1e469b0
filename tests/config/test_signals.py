"""Ctrl-C and SIGTERM while Hydra composes: the same end at every moment, whatever Hydra makes of the exception."""

import os
import signal
import sys

import pytest

from vit.training import app
from vit.training.config import Config

MOMENTS = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def compose(number=None, moment=0):
    """Compose with a signal at the `moment`th call of a function; (status, whether the task ran, calls)."""
    calls, counting, ran = 0, False, []

    def count(frame, event, argument):
        nonlocal calls, counting
        if event != "call" or ran:
            return
        counting = counting or frame.f_code is app._parse_arguments.__code__
        calls += counting
        if calls == moment and counting:
            os.kill(os.getpid(), number)

    sys.setprofile(count)
    try:
        status = app.launch(lambda values, overrides: ran.append(values), "train", Config, ["data=shapes", "seed=3"])
    finally:
        sys.setprofile(None)
    return status, bool(ran), calls


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("part", range(MOMENTS))
def test_a_signal_ends_the_composing_at_any_moment(capsys, number, part):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    status, ran, calls = compose()
    assert (status, ran) == (0, True)
    status, ran, _ = compose(number, 1 + calls * part // MOMENTS)
    assert (status, ran, capsys.readouterr().err) == (130, False, "interrupted\n")
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("swallow", [True, False])
def test_a_signal_that_a_library_swallows_or_turns_into_its_own_error_is_remembered(
    capsys, monkeypatch, number, swallow
):
    def parse(arguments, original=app._parse_arguments):
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            if not swallow:
                raise AttributeError("of a library") from None
        return original(arguments)

    monkeypatch.setattr(app, "_parse_arguments", parse)
    ran = []
    status = app.launch(lambda values, overrides: ran.append(values), "train", Config, ["data=shapes"])
    assert (status, ran, capsys.readouterr().err) == (130, [], "interrupted\n")
