"""The Attention tab's routes: over both of TensorBoard's loaders, in real processes, and where things go wrong."""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard import errors
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from vit.dashboard.format import PAIRS, PLUGIN, PROBE, RUN, STEPS, encode, unpack
from vit.dashboard.plugin import Loader
from vit.dashboard.summary import blob_summary, tensor_summary

HERE = Path(__file__).parent
PREFIX = f"/data/plugin/{PLUGIN}"
HOSTILE_RUN = "a<img src=x onerror=alert(1)>/../b"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fake = load("fake_run", HERE / "fake_run.py")
board = load("board_process", HERE / "board_process.py")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind."""
    folder = tmp_path_factory.mktemp("logs")
    fake.write(folder / "good", [0, 10, 20], pairs=(0, 20)).close()
    fake.write(folder / HOSTILE_RUN.split("/", maxsplit=1)[0], [0]).close()
    events = fake.write(folder / "mixed", [0, 1])
    events.write(tensor_summary(STEPS, encode(fake.steps_record(2))[:40]), 2)
    events.write(tensor_summary(STEPS, zlib.compress(b'{"v":2}')), 3)
    events.write(tensor_summary(STEPS, zlib.compress(b'{"v":2}')), 4)
    events.write(tensor_summary(STEPS, encode({"step": 5, "probes": [{"predicted": "<b>"}] * 3})), 5)
    events.write(tensor_summary(STEPS, encode(fake.steps_record(6, probes=9))), 6)
    events.write(tensor_summary(STEPS, encode(fake.steps_record(7))), 7)
    events.write(tensor_summary(f"{PROBE}00", encode({**fake.probe_record(2), "rows": {"shape": [9, 9, 9]}})), 2)
    events.write(blob_summary(f"{PAIRS}00", b"nonsense"), 2)
    events.close()
    later = fake.write(folder / "later", [0])
    later.close()
    events = type(later)(folder / "future")
    events.write(tensor_summary(RUN, zlib.compress(b'{"v":2}')), 0)
    events.close()
    other = type(later)(folder / "other")
    other.scalars({"loss": 1.0}, 0)
    other.close()
    # many steps: the loaders keep all that the plugin asks them to
    fake.write(folder / "long", list(range(100)), probes=1, pairs=tuple(range(0, 100, 5))).close()
    return folder


@pytest.fixture(scope="module", params=["fast", "python"])
def server(request: pytest.FixtureRequest, logs: Path) -> Iterator[Any]:
    started = board.Server(logs, *(["--load_fast=false"] if request.param == "python" else ["--load_fast=true"]))
    yield started
    started.close()


def test_both_loaders_give_the_same(server: Any, logs: Path) -> None:
    def loaded(found: Any) -> bool:
        return len(found) == 6 and len(found["long"]["steps"]) == 100 and bool(found["good"]["pairs"])

    runs = server.wait(loaded)
    assert set(runs) == {"good", "a<img src=x onerror=alert(1)>", "mixed", "later", "future", "long"}
    good = runs["good"]
    assert good["info"] == {"v": 1, **fake.run_record()}
    assert good["steps"] == [{"v": 1, **fake.steps_record(step, 3, step == 0)} for step in (0, 10, 20)]
    assert good["pairs"] == [0, 20]
    assert good["problems"] == []
    # what one of TensorBoard's loaders would by itself thin out to ten
    assert [each["step"] for each in runs["long"]["steps"]] == list(range(100))
    assert runs["long"]["pairs"] == list(range(0, 100, 5))

    probe = server.get("/probe", run="good", probe=1)
    assert probe == {"steps": [{"v": 1, **fake.probe_record(step, 1)} for step in (0, 10, 20)], "problems": []}
    assert unpack(probe["steps"][0]["rows"]).shape == (fake.L, fake.H, fake.P)
    pairs = server.get("/pairs", run="good", probe=2, step=20)
    assert pairs == {"v": 1, **fake.pairs_record(20)}

    future = runs["future"]
    assert (future["info"], future["steps"]) == (None, [])
    assert future["problems"] == [
        "1 record of attention/run cannot be shown: written in format 2, and this TensorBoard reads 1: update vit"
    ]
    mixed = runs["mixed"]
    assert [each["step"] for each in mixed["steps"]] == [0, 1, 7]
    assert len(mixed["problems"]) == 2
    assert mixed["problems"][0] == "3 records of attention/steps cannot be shown: the record is cut off, or too large"
    assert mixed["problems"][1].startswith("2 records of attention/steps cannot be shown: written in format 2")
    probe = server.get("/probe", run="mixed", probe=0)
    assert [each["step"] for each in probe["steps"]] == [0, 1]
    assert probe["problems"] == ["1 record of attention/probe/00 cannot be shown: the record is damaged: rows"]
    status, _, body = server.open(f"{PREFIX}/pairs", run="mixed", probe=0, step=2)
    assert status == 404
    assert "damaged" in json.loads(body)["error"]

    # nothing changed: the answer is short
    status, headers, _ = server.open(f"{PREFIX}/runs")
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, _, body = server.open(f"{PREFIX}/runs", {"If-None-Match": headers["ETag"]})
    assert (status, body) == (304, b"")
    status, headers, body = server.open(f"{PREFIX}/runs", {"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert {run["run"] for run in json.loads(gzip.decompress(body))["runs"]} == set(runs)

    # the tab is there, without a word from is_active
    status, _, body = server.open("/data/plugins_listing")
    listed = json.loads(body)[PLUGIN]
    assert listed["enabled"]
    assert listed["tab_name"] == "Attention"
    assert listed["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{PREFIX[1:]}/index.js"} or (
        listed["loading_mechanism"]["module_path"].endswith(f"{PLUGIN}/index.js")
    )

    for route, query in BAD:
        status, headers, body = server.open(f"{PREFIX}{route}", **query)
        assert status in (400, 404), (route, query, body)

    # a run that is being written: what is new shows, and the mark changes
    before = server.open(f"{PREFIX}/runs")[1]["ETag"]
    events = fake.EventFile(logs / f"new_{server.process.pid}")
    events.write(tensor_summary(RUN, encode(fake.run_record())), 0)
    events.flush()
    name = events.folder.name
    assert server.wait(lambda found: name in found)[name]["steps"] == []
    events.write(tensor_summary(STEPS, encode(fake.steps_record(4))), 4)
    events.close()
    assert [each["step"] for each in server.wait(lambda found: found[name]["steps"])[name]["steps"]] == [4]
    assert server.open(f"{PREFIX}/runs")[1]["ETag"] != before
    events.path.unlink()
    events.folder.rmdir()


BAD = [
    ("/probe", {}),
    ("/probe", {"run": "good"}),
    ("/probe", {"run": "good", "probe": "-1"}),
    ("/probe", {"run": "good", "probe": "1e3"}),
    ("/probe", {"run": "good", "probe": "٣"}),
    ("/probe", {"run": "good", "probe": "9" * 30}),
    ("/probe", {"run": "good", "probe": "../../00"}),
    ("/probe", {"run": "good", "probe": "3"}),
    ("/probe", {"run": "../good", "probe": "0"}),
    ("/probe", {"run": "", "probe": "0"}),
    ("/probe", {"run": "other", "probe": "0"}),
    ("/probe", {"run": "/etc/passwd\0", "probe": "0"}),
    ("/pairs", {"run": "good", "probe": "0"}),
    ("/pairs", {"run": "good", "probe": "0", "step": "5"}),
    ("/pairs", {"run": "gone", "probe": "0", "step": "0"}),
    ("/pairs", {"run": "future", "probe": "0", "step": "0"}),
    ("/../../plugin.py", {}),
    ("/plugin.py", {}),
    ("/static/index.js", {}),
    ("/index.js/..", {}),
    ("/", {}),
]


# without a process


def provider(folder: Path) -> MultiplexerDataProvider:
    sizes = {PLUGIN: 0}
    multiplexer = EventMultiplexer(tensor_size_guidance=sizes).AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return MultiplexerDataProvider(multiplexer, str(folder))


def client(source: Any, hints: dict[str, int] | None = None) -> dict[str, Client]:
    plugin = Loader().load(TBContext(data_provider=source, sampling_hints=hints or {}))
    return {route: Client(app) for route, app in plugin.get_plugin_apps().items()}


@pytest.mark.parametrize(("hint", "kept"), [(None, 100), (0, 100), (7, 7), (200, 100)])
def test_samples_per_plugin_is_followed_and_zero_means_all(logs: Path, hint: int | None, kept: int) -> None:
    apps = client(provider(logs), {} if hint is None else {PLUGIN: hint})
    runs = {run["run"]: run for run in apps["/runs"].get("/").json["runs"]}
    assert len(runs["long"]["steps"]) == kept
    assert runs["long"]["steps"][-1]["step"] == 99
    assert len(apps["/probe"].get("/?run=long&probe=0").json["steps"]) == kept
    assert len(runs["long"]["pairs"]) == min(kept, 20)


class Broken:
    """A data provider that cannot."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any, **options: Any) -> Any:
            raise self.error

        return fail


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("the data server died"), 503), (errors.NotFoundError("x"), 404), (KeyError("x"), 503)],
)
def test_a_provider_that_fails_is_said_and_is_no_500(error: Exception, status: int) -> None:
    apps = client(Broken(error))
    for route, query in (("/runs", ""), ("/probe", "run=a&probe=0"), ("/pairs", "run=a&probe=0&step=0")):
        answer = apps[route].get(f"/?{query}")
        assert answer.status_code == status
        assert answer.mimetype == "application/json"
        assert answer.json["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_but_get(logs: Path, method: str) -> None:
    for app in client(provider(logs)).values():
        answer = app.open("/", method=method)
        assert answer.status_code == 405
        assert "GET" in answer.headers["Allow"]


def test_without_a_data_provider_there_is_no_plugin() -> None:
    assert Loader().load(TBContext()) is None


def test_a_fault_in_the_plugin_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vit.dashboard.serving", None)
    assert Loader().load(TBContext(data_provider=Broken(KeyError()))) is None


def test_the_entry_point_is_the_loader_and_loads_lightly() -> None:
    found = {each.name: each for each in importlib.metadata.entry_points(group="tensorboard_plugins")}
    assert found[PLUGIN].load() is Loader
    code = (
        "import sys, vit.dashboard.plugin\n"
        "heavy = {'torch', 'lightning', 'tensorflow', 'PIL', 'werkzeug', 'tensorboard.backend'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_flags_are_only_filled_in() -> None:
    class Flags:
        samples_per_plugin: Any = None

    flags = Flags()
    Loader().fix_flags(flags)
    assert flags.samples_per_plugin is None
    for given, expected in (({}, 200), ({PLUGIN: 5}, 5), ({PLUGIN: 0}, 0)):
        flags.samples_per_plugin = dict(given)
        Loader().fix_flags(flags)
        assert flags.samples_per_plugin == {PLUGIN: expected}


def test_static_files_have_their_types_and_no_others_are_served(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("index.js", "viewer.css", "notes.txt", "secret.py"):
        (tmp_path / name).write_text(f"/* {name} é */", encoding="utf-8")
    monkeypatch.setattr("vit.dashboard.serving.STATIC", tmp_path)
    apps = client(provider(logs))
    assert set(apps) == {"/index.js", "/viewer.css", "/runs", "/probe", "/pairs"}
    for name, kind in (("index.js", "text/javascript"), ("viewer.css", "text/css")):
        answer = apps[f"/{name}"].get("/")
        assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.text == f"/* {name} é */"


@pytest.mark.parametrize("value", [np.array([b"x", b"y"], object), np.array([], object), np.zeros(3), np.float32(1)])
def test_a_tensor_that_is_no_record_is_a_problem_and_no_fault(value: Any) -> None:
    class Datum:
        step, wall_time, numpy = 3, 1.0, np.asarray(value)

    class Odd(Broken):
        def read_tensors(self, *args: Any, **options: Any) -> Any:
            return {"r": {RUN: [Datum()], STEPS: [Datum()]}}

        def list_tensors(self, *args: Any, **options: Any) -> Any:
            return {"r": {}}

        def list_blob_sequences(self, *args: Any, **options: Any) -> Any:
            return {}

        read_blob_sequences = list_blob_sequences

    run = client(Odd(KeyError()))["/runs"].get("/").json["runs"][0]
    assert (run["info"], run["steps"], len(run["problems"])) == (None, [], 2)


# no record that was tampered with gets through, whatever was changed in it


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*path, key))


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(record))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


METHODS = ("relevance", "gradient_rollout", "legrad")
FREE = {"v", "step", "name", "readout", "label"}  # text is shown as text; TensorBoard's step counts; null is a label


@pytest.mark.parametrize("kind", ["run", "steps", "probe", "pairs"])
def test_every_field_is_looked_at(kind: str) -> None:
    from vit.dashboard.check import check
    from vit.dashboard.format import RecordError

    tag = {"run": RUN, "steps": STEPS, "probe": f"{PROBE}00", "pairs": f"{PAIRS}00"}[kind]
    record = {"run": fake.run_record(), "steps": fake.steps_record(3, measured=True)}.get(kind) or {
        "probe": fake.probe_record(3, 1),
        "pairs": fake.pairs_record(3),
    }[kind]
    check(tag, record)
    for path in places(record):
        for value in (-1, "<b>", 10**400, True, {"a": 1}, [None], KeyError):
            if path[-1] in FREE or (isinstance(path[-1], int) and value is KeyError):
                continue
            original = record
            for key in path:
                original = original[key]
            if (type(value) is type(original) and not isinstance(value, int)) or value == original:
                continue  # a text for a text
            if value is KeyError and ((path[-1] in METHODS and kind == "probe") or path[-2:-1] == ("faithfulness",)):
                continue  # a method that was not measured
            with contextlib.suppress(RecordError):
                check(tag, changed(record, path, value))
                if value == 10**400 and isinstance(original, int):
                    continue  # a large whole number is one
                raise AssertionError(f"{path} = {str(value)[:20]} got through")
