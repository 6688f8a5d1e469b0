"""Fields that say what they take: names, types, limits, and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit import options
from vit.errors import VitError
from vit.options import option, setting


@dataclass(frozen=True)
class Inner:
    rate: float = setting("how fast", gt=0, le=10)
    count: int | None = setting("how many", ge=1)
    mode: str = setting("which", choices=("fast", "slow"))
    devices: int | str = setting("where", choices=("auto",), ge=1)
    span: tuple[float, float] = setting("from, to", ge=0)
    names: tuple[str, ...] | None = setting("which")
    flag: bool | str = setting("whether", choices=("auto",))


@dataclass(frozen=True)
class Outer:
    inner: Inner
    part: Mapping[str, object] = option(None, "some of them", subset_of=Inner)
    seed: int = option(0, "of all", ge=0)


GOOD = {
    "rate": 1,
    "count": None,
    "mode": "fast",
    "devices": 2,
    "span": [0, 1.5],
    "names": ["a", "b"],
    "flag": "auto",
}


def outer(**changes):
    return options.build(Outer, {"inner": GOOD | changes, "part": {}, "seed": 3})


def test_values_take_the_declared_types():
    inner = outer().inner
    assert inner == Inner(1.0, None, "fast", 2, (0.0, 1.5), ("a", "b"), "auto")
    assert isinstance(inner.rate, float)
    assert isinstance(inner.span[0], float)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rate", 0, "inner.rate: expected a number above 0 and up to 10, got 0"),
        ("rate", 11.5, "inner.rate: expected a number above 0 and up to 10, got 11.5"),
        ("rate", "1e-3", "inner.rate: expected a number above 0 and up to 10, got '1e-3'"),
        ("rate", True, "inner.rate: expected a number above 0 and up to 10, got true"),
        ("rate", float("nan"), "inner.rate: expected a number above 0 and up to 10, got nan"),
        ("rate", None, "inner.rate: expected a number above 0 and up to 10, got null"),
        ("count", 1.0, "inner.count: expected a whole number of at least 1 or null, got 1"),
        ("count", "many", "inner.count: expected a whole number of at least 1 or null, got 'many'"),
        ("mode", "fsat", "inner.mode: expected one of fast, slow, got 'fsat'; did you mean 'fast'?"),
        ("mode", None, "inner.mode: expected one of fast, slow, got null"),
        ("devices", "all", "inner.devices: expected a whole number of at least 1 or auto, got 'all'"),
        ("devices", 0, "inner.devices: expected a whole number of at least 1 or auto, got 0"),
        ("span", [1], "inner.span: expected a list of 2 numbers of at least 0, got [1]"),
        ("span", [1, -1], "inner.span: expected a list of 2 numbers of at least 0, got [1, -1]"),
        ("span", 3, "inner.span: expected a list of 2 numbers of at least 0, got 3"),
        ("names", ["a", None], "inner.names: expected a list of texts or null, got ['a', null]"),
        ("names", {"a": 1}, "inner.names: expected a list of texts or null, got {a: 1}"),
        ("flag", "yes", "inner.flag: expected true, false or auto, got 'yes'"),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(key, value, told):
    with pytest.raises(VitError) as error:
        outer(**{key: value})
    assert str(error.value) == told


def test_text_may_arrive_as_a_number():
    @dataclass(frozen=True)
    class Precise:
        precision: str = setting("", choices=("16", "32"))
        name: str = setting("")

    # local classes cannot be resolved from their annotations as text, so these are given
    Precise.__annotations__.update(precision=str, name=str)
    assert options.build(Precise, {"precision": 32, "name": 2024}) == Precise("32", "2024")
    with pytest.raises(VitError, match="precision: expected one of 16, 32, got true"):
        options.build(Precise, {"precision": True, "name": ""})


def test_names_have_to_be_those_of_the_fields():
    with pytest.raises(VitError, match=r"^inner\.rat: no such key; did you mean 'inner\.rate'\?$"):
        outer(rat=1)
    with pytest.raises(VitError, match=r"^new\.key: no such key; there are inner, part, seed$"):
        options.build(Outer, {"inner": GOOD, "part": {}, "seed": 0, "new": {"key": 1}})
    with pytest.raises(VitError, match=r"^seed: is missing"):
        options.build(Outer, {"inner": GOOD, "part": {}})
    with pytest.raises(VitError, match=r"^inner: expected a section with keys such as inner\.rate, .*, got 3$"):
        options.build(Outer, {"inner": 3, "part": {}, "seed": 0})


def test_a_part_holds_what_was_given_and_checks_it():
    given_ = options.build(Outer, {"inner": GOOD, "part": {"rate": 2, "count": None, "span": [1, 2]}, "seed": 0})
    assert given_.part == {"rate": 2.0, "span": (1.0, 2.0)}
    with pytest.raises(VitError, match=r"^part\.rate: expected a number"):
        options.build(Outer, {"inner": GOOD, "part": {"rate": -1}, "seed": 0})
    with pytest.raises(VitError, match=r"^part\.rte: no such key; did you mean 'part\.rate'"):
        options.build(Outer, {"inner": GOOD, "part": {"rte": 1}, "seed": 0})


def test_fit_checks_an_object_that_was_made_by_hand():
    made = Inner(1, None, "fast", "auto", [1, 2], None, True)  # type: ignore[arg-type]
    options.check_fields(made, "x.")
    assert made.span == (1.0, 2.0)
    with pytest.raises(VitError, match=r"^x\.mode"):
        options.check_fields(Inner(1, None, "warp", "auto", (1, 2), None, True), "x.")


KNOWN = ["optim.lr", "optim.matrix_lr", "optim.clip", "model.size", "model.patch_size", "schedule.final", "seed"]


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("optim.lrr", "optim.lr"),
        ("modle.size", "model.size"),
        ("mdoel.ptch_size", "model.patch_size"),
        ("lr", "optim.lr"),
        ("SEED", "seed"),
        ("sede", "seed"),
    ],
)
def test_the_nearest_key_comes_first(typed, first):
    assert options.similar_keys(typed, KNOWN)[0] == first


def test_nothing_alike_lists_what_there_is():
    assert options.similar_keys("optim.zzzzzz", KNOWN) == []
    assert (
        options.unknown_key_message("optim.zzzzzz", KNOWN) == "optim.zzzzzz: no such key; optim has lr, matrix_lr, clip"
    )
    assert options.unknown_key_message("zzzzzz", KNOWN) == "zzzzzz: no such key; there are optim, model, schedule, seed"
    assert options.unknown_key_message("seed.x", KNOWN) == "seed.x: no such key; seed is a value and has no keys in it"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GOOD)), values)
def test_any_value_is_taken_or_refused_in_one_line(key, value):
    refusal = None
    try:
        taken = getattr(outer(**{key: value}).inner, key)
    except VitError as error:
        refusal = str(error)
    if refusal is None:
        # what was taken is taken again, and stays what it is
        assert getattr(outer(**{key: taken}).inner, key) == taken
    else:
        assert refusal.startswith(f"inner.{key}: expected ")
        assert "\n" not in refusal


def test_a_tilde_is_the_home_folder_in_every_key_that_is_a_path(monkeypatch):
    from vit.training.config import Config, EvalConfig

    monkeypatch.setenv("HOME", "/home/someone")
    paths = {key.name for schema in (Config, EvalConfig) for key in options.list_keys(schema) if key.rule.path}
    words = ("folder", "file of", "run folder", "MODEL", "whose weights", "where they are kept", "cache")
    sounds = {
        key.name
        for schema in (Config, EvalConfig)
        for key in options.list_keys(schema)
        if "str" in str(key.type) and any(word in key.rule.help for word in words) and not key.rule.choices
    }
    assert {"run.root", "resume", "checkpoint", "output", "data.root", "data.cache_folder", "model.weights"} <= paths
    assert {"model.name", "distill.teacher", "probe.cache"} <= paths
    assert sounds - paths <= {"run.name", "data.image_column", "trainer.name"}
    for key in (key for schema in (Config, EvalConfig) for key in options.list_keys(schema) if key.rule.path):
        assert options.convert(key.name, "~/x", key.type, key.rule) == "/home/someone/x"
    assert options.expand_path("local-dir:~/x") == "local-dir:/home/someone/x"
    values = {"run": {"root": "~/runs", "name": "~"}, "resume": "~", "model": {"name": None}}
    assert options.expand_paths(Config, values) == {
        "run": {"root": "/home/someone/runs", "name": "~"},
        "resume": "/home/someone",
        "model": {"name": None},
    }


def test_without_a_home_folder_a_tilde_is_refused(monkeypatch):
    monkeypatch.setattr(options.os.path, "expanduser", lambda path: path)  # no HOME, and no entry among the users
    with pytest.raises(VitError, match="set HOME"):
        options.expand_path("~/runs")
    assert options.expand_path("~nobody/x") == "~nobody/x"
