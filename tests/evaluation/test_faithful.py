"""`faithfulness=true`: every method against every measure, on a model whose right answers are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vit.data.catalogue import DataConfig, open_data, preprocessing_for
from vit.evaluation.faithful import measure_faithfulness
from vit.evaluation.table import LOWER_IS_BETTER, print_faithfulness
from vit.explain.methods import METHODS
from vit.model import VisionTransformer
from vit.training.eval_app import eval_main

PATCHES = {"deletion", "insertion", "positive", "negative", "random_head", "random_model"}


@pytest.fixture(scope="module")
def shapes():
    """Two objects an image, and a small model that has not been trained."""
    config = DataConfig(
        name="shapes", image_size=32, objects=2, object_scale=0.2, train_images=16, val_images=1, test_images=40
    )
    data = open_data(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=32, patch_size=8, num_classes=6, width=32, depth=2, heads=2, pool="mean")
    return model.train(), data.splits["test"], preprocessing_for(config, data)


def test_every_method_has_every_measure_with_an_interval_around_its_mean(shapes):
    model, split, preprocessing = shapes
    state = torch.get_rng_state()
    found = measure_faithfulness(model, split, preprocessing, images=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert found["images"] == 30
    assert found["methods"].keys() == METHODS.keys()
    for method, measures in found["methods"].items():
        wanted = PATCHES | {"pointing", "pointing_centre", "energy", "pointing_each"}
        wanted |= {"agreement"} if method in ("relevance", "gradient_rollout", "legrad") else set()
        assert measures.keys() == (wanted - {"random_head", "random_model"} if method == "random" else wanted)
        for name, row in measures.items():
            assert row["low"] <= row["mean"] <= row["high"], (method, name)
            has_rival = method != "random" and name in found["methods"]["random"]
            assert isinstance(row["better"], bool) == has_rival
    json.dumps(found, allow_nan=False)


def test_chance_is_what_random_maps_come_to(shapes):
    found = measure_faithfulness(*shapes, images=40)
    for name in ("pointing", "pointing_centre", "energy"):
        row = found["methods"]["random"][name]
        spread = row["high"] - row["low"]
        assert abs(row["mean"] - found["chance"][name]) < 1.5 * spread + 1e-6


def test_one_seed_gives_one_result(shapes):
    first, again = (measure_faithfulness(*shapes, images=12, seed=4) for _ in range(2))
    assert first == again
    assert measure_faithfulness(*shapes, images=12, seed=5)["methods"]["random"] != first["methods"]["random"]


def test_a_method_no_better_than_random_is_named(capsys):
    def row(mean: float, better: bool | None) -> dict:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "better": better}

    methods = {
        "rollout": {"deletion": row(0.2, True), "insertion": row(0.4, False)},
        "gradient_rollout": {"deletion": row(0.3, False), "insertion": row(0.3, False)},
        "random": {"deletion": row(0.3, None), "insertion": row(0.3, None)},
    }
    print_faithfulness({"images": 9, "methods": methods, "chance": {"pointing": 0.125}})
    text = capsys.readouterr().out
    assert "not to be trusted here, no better than random: gradient rollout\n" in text
    assert "0.200*" in text
    assert ".19-.21" in text
    assert "by chance: pointing 0.125" in text
    assert "deletion ↓" in text
    assert "insertion ↑" in text
    assert "insertion" not in LOWER_IS_BETTER


@pytest.fixture
def here(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(digits_run, tmp_path / "runs" / "digits" / "one")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_the_table_and_keeps_it(here: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ["checkpoint=runs/digits/one", "faithfulness=true", "faithfulness_images=60"]
    assert eval_main(arguments) == 0
    text = capfd.readouterr().out
    assert "attention maps on 60 images" in text
    measured = json.loads((here / "runs/digits/one/evaluation/metrics.json").read_text())["faithfulness"]
    assert measured["images"] == 60
    # a trained model: what its class token reads is no accident
    for method in ("raw", "relevance"):
        assert measured["methods"][method]["deletion"]["better"]
        assert measured["methods"][method]["insertion"]["better"]
    assert np.isfinite([row["mean"] for each in measured["methods"].values() for row in each.values()]).all()


def test_an_onnx_file_is_measured_by_its_weights(here: Path, capfd: pytest.CaptureFixture[str]):
    found = []
    for model in ("runs/digits/one", "runs/digits/one/model/model.onnx"):
        assert eval_main([f"checkpoint={model}", "faithfulness=true", "faithfulness_images=12", "output=out"]) == 0
        found.append(json.loads((here / "out/metrics.json").read_text())["faithfulness"])
    assert "attention maps on 12 images" in capfd.readouterr().out
    for method, measures in found[0]["methods"].items():
        for name, row in measures.items():
            assert found[1]["methods"][method][name]["mean"] == pytest.approx(row["mean"], abs=1e-6)
