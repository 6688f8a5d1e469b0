"""The search for a schedule of token reduction, on a model that knows the digits, and the command around it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vit.evaluation.reduction
from vit.cli import main
from vit.errors import VitError
from vit.evaluation.reduction import Candidate, compute_logits, compute_metrics, search
from vit.evaluation.report import evaluate
from vit.inference.bundle import read_bundle
from vit.inference.loading import load, load_torch
from vit.model.cost import relative


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees every pixel of the digits as a patch, 64 of them."""
    from vit.data.augment import normalise
    from vit.data.catalogue import DataConfig, open_data, preprocessing_for
    from vit.data.loaders import eval_loader
    from vit.inference.bundle import write_bundle
    from vit.inference.description import Description
    from vit.model import VisionTransformer

    config = DataConfig(name="digits", image_size=8)
    data = open_data(config)
    preprocessing = preprocessing_for(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=8, patch_size=1, in_channels=1, num_classes=10, width=32, depth=3, heads=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(8):
            for batch in eval_loader(data.splits["train"], preprocessing, DataConfig(eval_batch_size=128)):
                images = normalise(batch.images, preprocessing.mean, preprocessing.std)
                torch.nn.functional.cross_entropy(model(images), batch.labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    metrics = {"test": {"top1": 0.5}}
    description = Description(model.architecture, data.class_names, preprocessing, data=data.source, metrics=metrics)
    folder = tmp_path_factory.mktemp("pixels") / "bundle"
    write_bundle(folder, model.eval(), description, onnx=False)
    return folder


@pytest.fixture(scope="module")
def material(bundle: Path) -> SimpleNamespace:
    """The model, and validation images with their classes."""
    from vit.data.catalogue import open_data
    from vit.evaluation.report import data_config
    from vit.inference.sample import from_split

    model, description = load_torch(bundle, device="cpu")
    sample = from_split(open_data(data_config(description, None)), "val", description.preprocessing, 120)
    return SimpleNamespace(model=model, description=description, images=sample.images, labels=sample.labels)


class TestSearch:
    def test_it_keeps_to_the_budget_and_takes_the_best(self, material):
        reported: list[Candidate] = []
        found = search(material.model, material.images, material.labels, 0.6, trials=12, report=reported.append)
        assert reported[0] is found.baseline
        assert reported[1:] == found.candidates
        assert found.baseline.cost == 1
        assert 6 < len(found.candidates) <= 18
        methods = {each.options["reduction"] for each in found.candidates}
        assert methods == {"keep", "merge"}
        for each in found.candidates:
            a = {**material.model.architecture, **each.options}
            assert each.cost == relative(a) <= 0.6
            assert not each.better_than(found.best)
        # named ones go up to the budget, as far as whole tokens let them
        assert max(each.cost for each in found.candidates[:6]) > 0.58
        assert found.best.top1 > found.baseline.top1 - 0.1

    def test_figures_are_those_of_the_model(self, material):
        found = search(material.model, material.images, material.labels, 0.5, trials=0)
        material.model.reduce(**found.best.options)
        with torch.no_grad():
            logits = material.model(torch.from_numpy(material.images))
        labels = torch.from_numpy(material.labels)
        assert found.best.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
        assert found.best.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
        material.model.reduce("none")

    def test_it_is_the_same_each_time_and_leaves_the_model_alone(self, material):
        material.model.reduce("keep", reduction_rate=0.25)
        before = dict(material.model.architecture)
        first, second = (search(material.model, material.images, material.labels, 0.5, trials=6) for _ in range(2))
        assert [each.line for each in first.candidates] == [each.line for each in second.candidates]
        assert material.model.architecture == before
        assert material.model.reduction is not None
        material.model.reduce("none")

    def test_seconds_are_measured(self, material, monkeypatch):
        """By a clock that goes on by each pass's FLOPs, on a machine that gets slower all the time."""
        model, now, passes = material.model, [0.0], [0]

        def work(*_: object) -> None:
            passes[0] += 1
            now[0] += relative(model.architecture) * (1 + passes[0] / 1000)

        monkeypatch.setattr(vit.evaluation.reduction.time, "perf_counter", lambda: now[0])
        handle = model.register_forward_hook(work)
        try:
            found = search(model, material.images, material.labels, 0.9, measure="latency", trials=2)
        finally:
            handle.remove()
        assert len(found.candidates) >= 6
        for each in found.candidates:
            assert each.cost == pytest.approx(relative({**model.architecture, **each.options}), rel=0.01)
            assert each.cost <= 0.9

    @pytest.mark.parametrize(("budget", "says"), [
        (1.5, "expected a share over 0 and under 1"), (0.01, "no reduction of this model costs so little"),
    ])  # fmt: skip
    def test_what_cannot_be_is_said(self, material, budget, says):
        with pytest.raises(VitError, match=says):
            search(material.model, material.images, material.labels, budget, trials=0)

    def test_a_candidate_with_more_images_right_is_better(self):
        def candidate(top1: float, loss: float) -> Candidate:
            return Candidate({"reduction": "none"}, (), 0.5, top1, loss, 1.0)

        assert candidate(0.9, 2.0).better_than(candidate(0.8, 0.1))
        assert candidate(0.9, 0.1).better_than(candidate(0.9, 0.2))
        assert not candidate(0.9, 0.1).better_than(candidate(0.9, 0.1))

    def test_scores_and_figures(self, material):
        logits = compute_logits(material.model, material.images[:21], batch_size=8)
        assert logits.shape == (21, 10)
        top1, loss = compute_metrics(np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([0, 1]))
        assert top1 == 0.5
        assert loss == pytest.approx((np.log(1 + np.exp(-2)) + np.log(2)) / 2)


class TestCommand:
    def test_it_prints_accuracy_against_cost_and_writes_a_bundle(self, bundle, tmp_path, capsys):
        out = tmp_path / "fast"
        line = ["tune-reduction", str(bundle), "--budget", "0.5", "--images", "100", "--trials", "4"]
        assert main([*line, "--output", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[0].split() == ["reduction", "cost", "images/s", "top-1", "loss"]
        assert printed.splitlines()[1].startswith("none")
        assert printed.count(" * ") == 1
        assert "images that decided nothing (digits" in printed
        description = read_bundle(out)
        a = description.architecture
        assert a["reduction"] in ("keep", "merge")
        assert relative(a) <= 0.5
        how = description.training["reduction_search"]
        assert (how["budget"], how["measure"], how["images"]) == (0.5, "flops", 100)
        assert description.metrics["test"]["top1"] != 0.5  # those of the model as it was are gone
        images = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
        with_onnx, with_torch = (load(out, backend=backend).logits(images) for backend in ("onnx", "torch"))
        np.testing.assert_allclose(with_onnx, with_torch, atol=1e-4)

    def test_without_output_it_says_how_to_have_it(self, bundle, capsys):
        line = ["tune-reduction", str(bundle), "--budget", "0.6", "--images", "64", "--trials", "0"]
        assert main(line) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("to have it: --reduction ")
        given = last.split()[4].rstrip(",")
        model, _ = load_torch(bundle, reduction=given)
        assert relative(model.architecture) <= 0.6

    def test_data_may_be_other(self, bundle, capsys):
        line = ["tune-reduction", str(bundle), "--budget", "0.6", "--images", "32", "--trials", "0"]
        assert main([*line, "--data", "val_fraction=0.3", "split_seed=5"]) == 0
        assert "(digits, test split)" in capsys.readouterr().out

    @pytest.mark.parametrize(("arguments", "says"), [
        (["--budget", "2"], "expected a share over 0 and under 1, not '2'"),
        ([], "--budget"),
        (["--budget", "0.5", "--data", "photos"], "expected KEY=VALUE, such as name=folder root=photos"),
        (["--budget", "0.5", "--data", "val_fraction=0"], "no validation images"),
        (["--budget", "0.5", "--data", "nme=folder"], "nme"),
    ], ids=str)  # fmt: skip
    def test_a_mistake_is_one_line(self, bundle, capsys, arguments, says):
        assert main(["tune-reduction", str(bundle), *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_evaluation_by_override(bundle, tmp_path, capsys):
    """`python eval.py checkpoint=MODEL reduction=...`: the figures are those of the model that reduces."""
    whole = evaluate(bundle, output=tmp_path / "whole")
    found: dict[str, Any] = evaluate(bundle, output=tmp_path / "reduced", reduction="merge:0.8")
    assert found["reduction"] == "merge:0.8:constant"
    assert found["at_training"] is None
    assert "reduction" not in whole
    assert found["test"]["loss"] != whole["test"]["loss"]
    written = json.loads((tmp_path / "reduced" / "metrics.json").read_text())
    assert written["reduction"] == "merge:0.8:constant"
