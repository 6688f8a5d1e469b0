"""Attention as training logs it: real trainings, and what their event files say afterwards."""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
import logging
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from vit.dashboard.format import PLUGIN, unpack
from vit.dashboard.reading import NotFound, Reader
from vit.data.augment import normalise
from vit.data.dataset import Split
from vit.errors import VitError
from vit.explain import explain
from vit.training import attention, budget, observation
from vit.training.attention import AttentionLog
from vit.training.observation import Observation, plan
from vit.training.tracked_images import choose_probes, stratified

CTX = RequestContext()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is no object."""
    monkeypatch.setattr(budget.Budget, "remaining", lambda self, progress, reserve=0.0: math.inf)


def prepare(small: ModuleType, folder: Path, *overrides: str, count: int = 4, **options: Any) -> Any:
    run = small.prepare(folder, *overrides, **options)
    run.log = AttentionLog(count, run.data, run.module.description.preprocessing, run.monitor.events)
    run.trainer.callbacks.append(run.log)
    return run


def reader(folder: Path) -> Reader:
    multiplexer = EventMultiplexer(tensor_size_guidance={PLUGIN: 0}).AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return Reader(MultiplexerDataProvider(multiplexer, str(folder)))


def read(folder: Path) -> tuple[dict[str, Any], dict[int, list[dict[str, Any]]], Reader]:
    """The run as the tab gets it, the records of its probes, and the reader."""
    found = reader(folder)
    (run,) = found.runs(CTX, "")["runs"]
    assert run["problems"] == []
    probes = {i: found.probe(CTX, "", run["run"], i) for i in range(len(run["info"]["probes"]))}
    assert all(not each["problems"] for each in probes.values())
    return run, {i: each["steps"] for i, each in probes.items()}, found


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_all_that_is_promised_is_there(small: ModuleType, tmp_path: Path, always: None) -> None:
    run = prepare(small, tmp_path, "model.depth=2", "model.registers=1", count=5, epochs=3, size=12).run()
    record, probes, found = read(tmp_path)
    info = record["info"]
    assert (info["name"], info["classes"]) == ("synthetic", small.NAMES)
    assert (info["grid"], info["image"], info["patch"], info["prefix"]) == ([3, 3], [12, 12], [4, 4], 2)
    assert (info["layers"], info["heads"], info["readout"]) == (2, 2, "token")
    labels = [each["label"] for each in info["probes"]]
    assert labels == sorted(labels)
    assert sorted(np.bincount(labels)) == [1, 2, 2]
    picked = run.log._probes
    for i, each in enumerate(info["probes"]):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["png"]))))
        np.testing.assert_array_equal(pixels, picked.images[i].permute(1, 2, 0).numpy())
        assert each["name"].startswith("synthetic/")

    steps = [each["step"] for each in record["steps"]]
    assert steps[0] == 0
    assert steps[-1] == 24
    assert steps == sorted(set(steps))
    assert len(steps) > 15
    assert record["pairs"][0] == 0
    assert record["pairs"][-1] == 24
    assert len(record["pairs"]) <= 7
    assert set(record["pairs"]) <= set(steps)
    for each in probes.values():
        assert [one["step"] for one in each] == steps
    for each in record["steps"][1:]:  # before training there is nothing to measure faithfulness of
        for one in each["probes"]:
            assert set(one["faithfulness"]) == {*observation.FIRST, *observation.REST}
    assert record["steps"][0]["probes"][0]["faithfulness"] is None

    # the last record is of the model that training ends with
    preprocessing = run.module.description.preprocessing
    images = normalise(picked.images, preprocessing.mean, preprocessing.std)
    model = run.module.eval_model
    logits = model.eval()(images)
    for method in ("rollout", "relevance", "legrad"):
        maps = explain(model, images, method).flatten(1).numpy()
        for i, each in probes.items():
            packed = each[-1]["rollout"]["mean"] if method == "rollout" else each[-1][method]
            row = unpack(packed)[-1 if method == "rollout" else 0]
            np.testing.assert_allclose(row, maps[i], atol=maps[i].max() / 255 + 1e-6)
    for i, each in enumerate(record["steps"][-1]["probes"]):
        assert each["predicted"] == int(logits[i].argmax())
        assert each["probability"] == pytest.approx(float(logits[i].detach().softmax(0).max()), abs=1e-4)
        assert unpack(probes[i][-1]["rows"]).shape == (2, 2, 9)
    pairs = unpack(found.pairs(CTX, "", record["run"], 4, 24)["attention"])
    assert pairs.shape == (2, 2, 11, 11)
    np.testing.assert_allclose(pairs.sum(-1), 1, atol=11 / 255)

    board = events(tmp_path)
    tags = {tag for tag in board.Tags()["scalars"] if tag.startswith("attention/")}
    by_layer = {f"attention/{k}/layer_0{i}" for k in ("distance", "entropy", "patch_mass") for i in (0, 1)}
    assert tags == by_layer | {"attention/sinks/top_patch_mass", "attention/sinks/outlier_share"}
    for tag in tags:
        assert [each.step for each in board.Scalars(tag)] == steps
        assert all(math.isfinite(each.value) for each in board.Scalars(tag))
    drawn = {tag for tag in board.Tags()["images"] if tag.startswith("attention/")}
    assert drawn == {"attention/rollout", "attention/relevance", *(f"attention/heads/0{i}" for i in range(3))}
    page = (Path(__file__).parents[2] / "docs" / "tensorboard.md").read_text("utf-8")
    said = [tag.replace("NN", r"\d\d") for tag in re.findall(r"`(attention/[\w/]+)`", page)]
    assert len(said) > 6
    assert all(any(re.fullmatch(each, tag) for tag in tags | drawn) for each in said)
    assert all(any(re.fullmatch(each, tag) for each in said) for tag in tags | drawn)
    for tag in drawn:
        at = [each.step for each in board.Images(tag)]
        assert (at[0], at[-1]) == (0, 24)
        assert len(at) <= 7
        picture = Image.open(io.BytesIO(board.Images(tag)[-1].encoded_image_string))
        assert 100 < picture.width < 1200


def test_both_of_tensorboards_loaders_read_a_real_run(small: ModuleType, tmp_path: Path, always: None) -> None:
    place = Path(__file__).parents[1] / "dashboard" / "board_process.py"
    spec = importlib.util.spec_from_file_location("board_process", place)
    assert spec is not None
    assert spec.loader is not None
    board = importlib.util.module_from_spec(spec)
    sys.modules["board_process"] = board
    spec.loader.exec_module(board)
    prepare(small, tmp_path / "run", epochs=3, count=3).run()
    expected, probes, found = read(tmp_path)
    for option in ("--load_fast=true", "--load_fast=false"):
        server = board.Server(tmp_path, option)
        try:
            expected["run"] = "run"
            assert server.wait(lambda runs: runs == {"run": expected}) == {"run": expected}
            assert server.get("/probe", run="run", probe=2)["steps"] == probes[2]
            step = expected["pairs"][-1]
            assert server.get("/pairs", run="run", probe=1, step=step) == found.pairs(CTX, "", "run", 1, step)
        finally:
            server.close()


# training is not touched


class Watch(L.Callback):
    """The generators' states at the start of every step, and the modules' modes at its end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(torch.get_rng_state().tolist())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([module.training for module in pl_module.modules()])
        self.seen.append([p.requires_grad for p in pl_module.parameters()])
        self.seen.append(np.random.get_state()[1].sum())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dropout=0.1", "model.attention_dropout=0.1", "model.drop_path=0.1", "model.patch_dropout=0.5"],
        ["model.pool=attention", "ema.decay=0.9", "optim=muon"],
        ["model.pool=mean", "model.registers=2", "optim.accumulate=3", "optim.clip=1"],
    ],
    ids=["dropout", "average", "accumulate"],
)
def test_weights_are_those_of_a_training_without_to_the_bit(
    small: ModuleType, tmp_path: Path, always: None, overrides: list[str]
) -> None:
    ends, watched = [], []
    for count in (0, 3):
        torch.manual_seed(0)
        watch = Watch()
        run = prepare(small, tmp_path / str(count), *overrides, "model.depth=2", count=count, extra=[watch])
        run.run()
        ends.append({key: value.clone() for key, value in run.module.state_dict().items()})
        watched.append(watch.seen)
        for module in run.module.modules():
            assert not module._forward_hooks
            assert "forward" not in vars(module)
            assert "pool_tokens" not in vars(module)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert watched[0] == watched[1]
    record, _, _ = read(tmp_path / "1") if (tmp_path / "1").exists() else read(tmp_path / "3")
    assert len(record["steps"]) > 3
    assert not reader(tmp_path / "0").runs(CTX, "")["runs"]


def test_the_average_is_what_is_explained(small: ModuleType, tmp_path: Path, always: None) -> None:
    run = prepare(small, tmp_path, "ema.decay=0.999").run()
    record, probes, _ = read(tmp_path)
    preprocessing = run.module.description.preprocessing
    images = normalise(run.log._probes.images, preprocessing.mean, preprocessing.std)
    maps = explain(run.module.ema, images).flatten(1).numpy()
    np.testing.assert_allclose(unpack(probes[0][-1]["rollout"]["mean"])[-1], maps[0], atol=maps[0].max() / 255 + 1e-6)
    raw = run.module.model.eval()(images).softmax(1).max(1).values
    said = [each["probability"] for each in record["steps"][-1]["probes"]]
    assert not np.allclose(said, raw.detach().numpy(), atol=1e-4)


def test_a_compiled_model(small: ModuleType, tmp_path: Path, always: None) -> None:
    run = prepare(small, tmp_path)
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(run.trainer.global_step)
        return graph.forward

    run.module.model.compile(backend=backend)
    run.run()
    record, _, _ = read(tmp_path)
    assert len(record["steps"]) > 5
    assert set(compiled) <= {0, 8, 16}, "explaining compiles nothing: only the first step and validations do"


# every model, all data


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["model.pool=mean"], {}),
        (["model.pool=attention", "model.registers=2"], {}),
        (["model.attention=dot_product"], {}),
        (["model.attention=scaled_dot_product", "model.norm=post"], {}),
        (["model.position=rotary", "model.class_token=true", "model.pool=mean"], {}),
        (["data.image_size=[8,16]"], {}),
        (["data.image_size=[12,8]", "data.patch_size=[4,2]"], {}),
        (["trainer.precision=bf16"], {}),
        ([], {"classes": 1}),
        ([], {"classes": 40, "train": 80, "val": 80}),
        ([], {"channels": 1}),
        ([], {"channels": 5}),
        ([], {"val": 0}),
        ([], {"val": 2}),
    ],
    ids=str,
)
def test_any_model_and_any_data(
    small: ModuleType, tmp_path: Path, always: None, overrides: list[str], options: dict[str, Any]
) -> None:
    run = prepare(small, tmp_path, *overrides, epochs=1, count=4, **options).run()
    record, probes, _ = read(tmp_path)
    count = min(4, options.get("val") or 4)
    assert len(record["info"]["probes"]) == len(probes) == count
    assert [each["step"] for each in record["steps"]][-1] == run.trainer.global_step
    labels = [each["label"] for each in record["info"]["probes"]]
    classes = options.get("classes", 3)
    assert len(set(labels)) == min(classes, count)
    for each in probes.values():
        assert unpack(each[-1]["rows"]).shape[2] == math.prod(record["info"]["grid"])


def test_the_choice_is_even_fixed_and_no_function_of_anything_else() -> None:
    labels = np.repeat([2, 0, 1], [50, 5, 1])
    chosen = stratified(labels, 12)
    assert len(set(chosen.tolist())) == 12
    assert np.bincount(labels[chosen]).tolist() == [5, 1, 6]
    np.testing.assert_array_equal(chosen[:5], stratified(labels, 5))
    assert len(stratified(labels, 1000)) == 56
    assert len(stratified(np.zeros(0, np.int64), 4)) == 0
    many = stratified(np.arange(1000).repeat(3), 16)
    assert len(set((many // 3).tolist())) == 16
    assert np.ptp(many // 3) > 500


def test_images_that_cannot_be_read_are_passed_over(small: ModuleType, tmp_path: Path) -> None:
    from vit.data.decode import ImageError

    run = small.prepare(tmp_path)
    split: Split = run.data.splits["val"]
    first = stratified(split.labels, 4).tolist()

    class Some:
        def read(self, i: int, *arguments: Any) -> Any:
            if i in first[:2]:
                raise ImageError("broken", "x")
            return split.images.read(i, *arguments)

        def name(self, i: int) -> str:
            return f"/home/someone/pictures/cat/{i}.jpg"

    run.data.splits["val"] = Split(split.labels, Some(), 3, native_size=None)
    probes = choose_probes(run.data, run.module.description.preprocessing, 4)
    assert probes is not None
    assert len(probes) == 4
    assert not {f"cat/{i}.jpg" for i in first[:2]} & set(probes.names)
    assert {f"cat/{i}.jpg" for i in first[2:]} <= set(probes.names)


# how often, how much


def test_a_resumed_run_shows_the_same_images_and_goes_on(small: ModuleType, tmp_path: Path, always: None) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    folder = tmp_path / "run"
    prepare(small, folder, "seed=1", epochs=2, extra=[Save()]).run()
    before, _, _ = read(folder)
    (first,) = folder.iterdir()
    os.rename(first, first.with_name("events.out.tfevents.0000000001.earlier"))
    prepare(small, folder, "seed=1", epochs=4, checkpoint=tmp_path / "one.ckpt").run()
    after, _, _ = read(folder)
    assert after["info"] == before["info"]
    steps = [each["step"] for each in after["steps"]]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 32)
    assert [each for each in after["steps"] if each["step"] <= 8] == [
        each for each in before["steps"] if each["step"] <= 8
    ]
    assert any(8 < step < 32 for step in steps)


@pytest.mark.parametrize("price", [0.0, 0.1, 3.0])
def test_the_clock_is_kept(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, price: float) -> None:
    """A training whose steps take a second each, and whose explanations take `price`."""
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    real = observation.look
    looked: list[int] = []

    def look(*arguments: Any, **options: Any) -> Observation:
        now[0] += price
        looked.append(run.trainer.global_step)
        return real(*arguments, **options)

    measures: list[int] = []

    def measured(*arguments: Any, **options: Any) -> None:
        now[0] += price
        measures.append(run.trainer.global_step)

    monkeypatch.setattr(attention, "look", look)
    monkeypatch.setattr(attention, "measure", measured)

    def forward(*arguments: Any) -> None:
        now[0] += price / 18

    monkeypatch.setattr(attention, "_forward", forward)

    class Tick(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 1.0

    run = prepare(small, tmp_path, epochs=50, count=2, extra=[Tick()])
    run.run()
    share = (run.log.maps.spent, run.log.faithfulness.spent)
    least = 2 * price  # start and end
    assert share[0] <= max(least, 0.01 * now[0]) + price
    assert share[1] <= 0.005 * now[0] + 0.01 * now[0] - share[0] + price / 18
    # nothing is measured and then thrown away for want of its baseline
    assert {count % 3 for count in np.bincount(measures or [0], minlength=401)[1:].tolist()} == {0}
    assert looked[0] == 0
    assert looked[-1] == 400
    assert len(looked) <= 100
    if price == 0:
        assert len(looked) > 90
        gaps = np.diff(looked)
        assert gaps[:20].mean() < gaps[-20:].mean(), "denser at first"
    if price == 0.1:
        assert 25 < len(looked) <= 50
        assert looked[len(looked) // 2] < 250
        shown = [each.step for each in events(tmp_path).Images("attention/rollout")]
        assert len(shown) == 7
        assert read(tmp_path)[0]["pairs"] == shown


def test_what_a_plan_allows() -> None:
    def planned(images: int, layers: int, heads: int, pixels: int, patch: int) -> observation.Plan:
        return plan(images, layers, heads, (pixels // patch) ** 2, 1)

    tiny = planned(16, 12, 3, 224, 16)
    assert (tiny.steps, tiny.pairs, tiny.per_head, tiny.pairs_images) == (100, 2, False, 16)
    base = planned(16, 12, 12, 224, 16)
    assert 40 < base.steps < 60
    digits = planned(16, 4, 4, 16, 4)
    assert (digits.steps, digits.pairs, digits.per_head) == (100, 7, True)
    large = planned(16, 12, 6, 518, 14)  # DINOv2's resolution
    assert (large.pairs, large.pairs_images, large.chunk) == (0, 0, 1)
    assert large.steps >= 2
    assert plan(16, 12, 6, 37 * 37, 1, memory=2**30).steps == 0
    some = planned(16, 12, 6, 384, 16)
    assert 0 < some.pairs_images < 16
    for images, layers, heads, pixels in itertools.product((1, 16, 64), (1, 12, 24), (1, 3, 16), (16, 224, 384, 518)):
        made = planned(images, layers, heads, pixels, 14 if pixels == 518 else 4 if pixels == 16 else 16)
        tokens = (pixels // (14 if pixels == 518 else 4 if pixels == 16 else 16)) ** 2 + 1
        size = layers * (heads if made.per_head else 1) * tokens**2 * made.pairs_images * made.pairs
        assert size <= 16_000_000
        assert 1 <= made.chunk <= images


def test_what_is_too_large_is_left_out_with_a_line(
    small: ModuleType, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observation, "_LARGEST_PAIRS", 10)
    caplog.set_level(logging.INFO, "vit")
    prepare(small, tmp_path / "pairs", epochs=1).run()
    record, _, found = read(tmp_path / "pairs")
    assert record["pairs"] == []
    assert len(record["steps"]) > 2
    with pytest.raises(NotFound):
        found.pairs(CTX, "", record["run"], 0, 0)
    assert [line for line in caplog.messages if "every patch" in line] == [
        "attention of every patch to every other is large: it is kept of no image"
    ]
    monkeypatch.setattr(attention, "free_memory", lambda device: 10)
    caplog.clear()
    prepare(small, tmp_path / "none", epochs=1).run()
    assert not reader(tmp_path / "none").runs(CTX, "")["runs"]
    assert len([line for line in caplog.messages if "attention is not logged" in line]) == 1


def test_a_hundred_steps_of_a_tiny_vit_stay_under_fifty_megabytes(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real files, of noise, which compresses worse than any attention or photograph."""
    layers, heads, grid, count = 12, 3, (14, 14), 16
    patches, tokens = 196, 197
    rng = np.random.default_rng(0)
    run = prepare(small, tmp_path, count=count)

    def rows(*shape: int) -> np.ndarray:
        values = rng.exponential(size=shape).astype(np.float32) ** 2
        return values / values.sum(-1, keepdims=True)

    def noise(model: Any, images: Any, labels: list[int], kept: observation.Plan, *, pairs: bool) -> Observation:
        methods = (*observation.FIRST, *observation.REST)
        areas = {name: {"deletion": 0.123456, "insertion": 0.654321} for name in methods}
        step = {"predicted": 1, "probability": 0.123456789, "label_probability": 0.123456789}
        step |= {"top": [[k, 0.123456789] for k in range(5)], "faithfulness": areas}
        step |= {"sink": {"top_mass": 0.123456789, "outliers": 0.0123456789}}
        probe = {"targets": [1, 2]}
        found = Observation([step] * count)
        for _ in range(count):
            maps = {name: rows(2, patches) for name in ("relevance", "gradient_rollout", "legrad")}
            rollout = {name: rows(layers, patches) for name in ("mean", "max", "min")}
            found.probes.append({**probe, "rows": rows(layers, heads, patches), "rollout": rollout, **maps})
        if pairs:
            mean = {"per_head": kept.per_head, "attention": rows(layers, 1, tokens, tokens)}
            found.pairs = [mean] * kept.pairs_images
        found.maps = {name: torch.from_numpy(rows(count, *grid)) for name in ("rollout", "relevance")}
        found.scalars = {f"attention/x/{k}": 0.5 for k in range(14)}
        return found

    monkeypatch.setattr(attention, "look", noise)
    monkeypatch.setattr(AttentionLog, "_measure", lambda *_: None)
    log: AttentionLog = run.log
    log._probes = choose_probes(run.data, run.module.description.preprocessing, count)
    assert log._probes is not None
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 224, 224), dtype=np.uint8))
    object.__setattr__(log._probes, "images", pixels)
    log._plan, log._grid = plan(count, layers, heads, patches, 1), grid
    assert log._plan.steps == 100
    log.events.write(attention.tensor_summary(attention.RUN, attention.encode({"probes": log._probes.described()})), 0)
    for step in range(100):
        log._log(step, run.module, shows=step % 16 == 0, pairs=step % 99 == 0 and log._plan.pairs > 0)
    log.events.close()
    size = log.events.path.stat().st_size
    assert 20e6 < size < 50e6
    board = events(tmp_path)
    assert len(board.Images("attention/rollout")) == 7
    assert len(board.Tensors("attention/probe/15")) == 100
    assert len(board.Tensors("attention/pairs/15")) == 2


# when something goes wrong


def test_a_fault_in_explaining_is_said_once_and_training_goes_on(
    small: ModuleType, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = observation.look

    def faulty(*arguments: Any, **options: Any) -> Observation:
        if run.trainer.global_step >= 5:
            raise RuntimeError("out of something")
        return real(*arguments, **options)

    monkeypatch.setattr(attention, "look", faulty)
    run = prepare(small, tmp_path)
    run.run()
    assert run.trainer.global_step == 16
    said = [each for each in caplog.records if "attention" in each.getMessage() and each.levelno >= logging.WARNING]
    assert [each.getMessage() for each in said] == ["attention is not logged any more: RuntimeError: out of something"]
    record, _, _ = read(tmp_path)
    assert [each["step"] for each in record["steps"]] == [0, 2, 3, 4]


@pytest.mark.parametrize("name", ["_measure", "_pictures", "_records", "_prepare", "_pairs"])
def test_a_fault_anywhere_in_it_leaves_training_alone(
    small: ModuleType, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:  # fmt: skip
    def faulty(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a fault")

    monkeypatch.setattr(AttentionLog, name, faulty)
    run = prepare(small, tmp_path, epochs=1).run()
    assert run.trainer.global_step == 8
    assert sum("a fault" in each for each in caplog.messages) == 1


def test_weights_that_are_no_numbers_do_not_end_training_here(small: ModuleType, tmp_path: Path, always: None) -> None:
    from vit.training.module import TrainingFailed

    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                pl_module.model.head.weight.data.fill_(math.nan)

    with pytest.raises(TrainingFailed, match="NaN or infinite at step"):
        prepare(small, tmp_path, epochs=1, extra=[Spoil()]).run()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_ends_training_with_its_line(small: ModuleType, tmp_path: Path, always: None) -> None:
    run = prepare(small, tmp_path)
    os.symlink("/dev/full", run.monitor.events.path)
    with pytest.raises(VitError, match="No space left"):
        run.run()


def test_two_processes(script: Any, tmp_path: Path) -> None:
    overrides = ["trainer=ddp_cpu", "trainer.devices=2", "logging.tensorboard=true", "logging.attention=3"]
    process = script("trainer.max_epochs=2", *overrides)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "attention is not logged" not in err + out
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    assert len(list(folder.glob("events*"))) == 1
    record, probes, _ = read(folder)
    assert record["steps"][0]["step"] == 0
    assert len(record["steps"]) >= 2
    assert len(probes) == 3
