"""The linear probe: features computed once and kept, what is fitted to them, and the run folder it leaves."""

from __future__ import annotations

import json

import hydra
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vit.data.catalogue import DataConfig, open_data
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.evaluation import collect_logits
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.inference.loading import load, load_torch
from vit.model import VisionTransformer
from vit.training import knn as neighbours
from vit.training.app import CONF, resolve_config
from vit.training.config import load_config as load_config
from vit.training.features import Backbone, collect_features
from vit.training.run import train

SIZE = Preprocessing(image_size=(16, 16), channels=1)


def network(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        size = {"image_size": 16, "patch_size": 4, "in_channels": 1, "width": 32, "depth": 2, "heads": 2}
        return VisionTransformer(**size, num_classes=3, init="xavier", **options).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights whose features are looked at.  Read only."""
    return save(tmp_path_factory.mktemp("source") / "bundle", network())


def save(folder, model):
    write_bundle(folder, model, Description(model.architecture, ["a", "b", "c"], SIZE), onnx=False)
    return folder


@pytest.fixture
def probe(tmp_path, source):
    def start(*overrides, name=source):
        typed = ["experiment=linear_probe", "data=digits", f"model.name={name}", f"run.root={tmp_path / 'runs'}"]
        typed += ["export.onnx=false", "data.max_images=300", *overrides]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            result = train(load_config(resolve_config(hydra.compose("train", typed))), typed)
        assert result is not None
        return result

    return start


# features


def digits(count=40):
    return open_data(DataConfig(name="digits", max_images=count)).splits["train"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "mean"},
        {"pool": "attention"},
        {"distillation_token": True},
        {"norm": "post"},
        {"registers": 2},
        {"reduction": "merge", "pool": "mean"},
    ],
)
def test_features_are_what_the_heads_read(options):
    """With one head its input; with two the mean of theirs, as their answers are averaged too."""
    model = network(**options)
    seen = []
    heads = [head for head in (model.head, model.head_dist) if head is not None]
    for head in heads:
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    images = torch.randn(5, 1, 16, 16)
    model(images)
    torch.testing.assert_close(Backbone(model)(images), torch.stack(seen).mean(0))


def test_kept_features_equal_fresh_ones_and_are_not_computed_again(tmp_path, monkeypatch):
    split, backbone = digits(), Backbone(network())
    fresh, kept = collect_features(backbone, split, SIZE, DataConfig(), cache=None)
    assert not kept
    first, kept = collect_features(backbone, split, SIZE, DataConfig(), cache=tmp_path)
    assert not kept
    monkeypatch.setattr("vit.training.features.collect_logits", None)
    again, kept = collect_features(Backbone(network()), digits(), SIZE, DataConfig(), cache=tmp_path)
    assert kept
    assert again.dtype == torch.float32
    for found in (first, again):
        assert torch.equal(found, fresh)


def test_another_anything_is_another_file(tmp_path):
    """Weights, architecture, preprocessing, images, order."""

    def number():
        return len(list(tmp_path.glob("*.npz")))

    def collect(model, split, preprocessing):
        return collect_features(Backbone(model), split, preprocessing, DataConfig(), cache=tmp_path)[1]

    model, split = network(), digits()
    changed = network()
    with torch.no_grad():
        changed.blocks[1].mlp.fc2.bias[0] += 1e-3
    other_head = network()
    with torch.no_grad():
        other_head.head.weight.zero_()
    assert not collect(model, split, SIZE)
    assert collect(other_head, split, SIZE)  # the head has no part in it
    assert number() == 1
    dimmed = Preprocessing(image_size=(16, 16), channels=1, mean=(0.2,))
    turned = split.subset(np.arange(len(split))[::-1])
    fewer = split.subset(np.arange(20))
    for count, (net, images, how) in enumerate(
        [(changed, split, SIZE), (network(norm="post"), split, SIZE), (model, split, dimmed), (model, turned, SIZE),
         (model, fewer, SIZE)]
    ):  # fmt: skip
        assert not collect(net, images, how)
        assert number() == 2 + count


def test_a_file_that_changed_is_looked_at_again(tmp_path):
    folder = tmp_path / "photos"
    for label in ("x", "y"):
        (folder / label).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((20, 20), 50 * k, np.uint8)).save(folder / label / f"{k}.png")
    config = DataConfig(name="folder", root=str(folder), channels=1, image_size=16, val_fraction=0, test_fraction=0)
    backbone = Backbone(network())

    def collect():
        return collect_features(backbone, open_data(config).splits["train"], SIZE, config, cache=tmp_path / "cache")

    before, kept = collect()
    assert not kept
    assert collect()[1]
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save(folder / "y" / "1.png")
    after, kept = collect()
    assert not kept
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other", "pickled"])
def test_damage_is_noticed_and_mended(tmp_path, damage, caplog):
    split, backbone = digits(), Backbone(network())
    fresh, _ = collect_features(backbone, split, SIZE, DataConfig(), cache=tmp_path)
    (path,) = tmp_path.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "other":
        np.savez(path, features=np.zeros((len(split), 5), np.float32))
    elif damage == "pickled":
        np.savez(path, features=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content[: len(content) // 3 if damage == "cut" else 0])
    again, kept = collect_features(backbone, split, SIZE, DataConfig(), cache=tmp_path)
    assert not kept
    assert torch.equal(again, fresh)
    assert "are damaged: they are computed anew" in caplog.text
    assert collect_features(backbone, split, SIZE, DataConfig(), cache=tmp_path)[1]


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    features, kept = collect_features(Backbone(network()), digits(), SIZE, DataConfig(), cache=tmp_path / "file")
    assert features.shape == (40, 32)
    assert not kept
    assert "the features are not kept: " in caplog.text


# the run


def test_the_run_folder_is_that_of_any_run(probe):
    result = probe("export.onnx=true")
    folder = result.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    bundle = {f"model/{name}" for name in ("model.safetensors", "config.json", "README.md", "model.onnx")}
    expected = {"config.yaml", "metrics.json", "train.log", "splits.csv"}
    expected |= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert events
    assert names == expected | bundle | events
    metrics = json.loads((folder / "metrics.json").read_text())
    for block in ("test", "val"):
        assert all(0 <= metrics[block][key] <= 1 for key in ("top1", "top5", "ece"))
    assert metrics["test"]["top1"] > 0.5  # of ten classes, on what random attention makes of a digit
    knn = metrics["knn"]
    assert knn["k"] in neighbours.NEIGHBOUR_COUNTS
    assert knn["top1"] > 0.4
    assert knn["val"]["top1"] > 0.4
    assert (metrics["bad_files"], metrics["seed"]) == (0, 0)
    assert metrics["trained_parameters"] == 330
    text = (folder / "train.log").read_text()
    assert "nearest neighbours)" in text
    assert "head        replaced: 3 -> 10 outputs" in text


def test_the_head_ends_in_a_model_that_classifies_as_was_measured(probe, source, tmp_path):
    result = probe()
    body, mine = load_file(source / "model.safetensors"), load_file(result.folder / "model" / "model.safetensors")
    assert all(torch.equal(mine[name], body[name]) for name in body if not name.startswith("head."))
    for place in ("", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        model, description = load_torch(result.folder / place)
        split = open_data(DataConfig.from_dict(description.data)).splits["test"]
        logits, labels = collect_logits(model, split, description.preprocessing)
        assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(result.metrics["test"]["top1"])
    digit = open_data(DataConfig(name="digits")).splits["train"]
    (row,) = load(result.folder).classify(np.asarray(digit.image(0)))
    assert row.label in description.class_names


def test_the_head_is_the_best_on_validation_data(probe, tmp_path):
    """The penalty was chosen among all that were tried, and the figures of the neighbours are those of the rule."""
    result = probe()
    log = (result.folder / "train.log").read_text().splitlines()
    tried = {line.split("penalty ")[1].split()[0]: float(line.split()[-1]) for line in log if " val/loss " in line}
    assert len(tried) > 4
    assert tried[f"{result.metrics['penalty']:.2g}"] == max(tried.values())
    model, description = load_torch(result.folder)
    data = open_data(DataConfig.from_dict(description.data))
    found = {
        name: collect_features(Backbone(model), split, description.preprocessing, DataConfig(), cache=None)[0]
        for name, split in data.splits.items()
    }
    labels = {name: torch.tensor(split.labels) for name, split in data.splits.items()}
    k = result.metrics["knn"]["k"]
    cast = neighbours.knn_votes(found["train"], labels["train"], found["test"], 10, [k])[k]
    assert float((cast.argmax(1) == labels["test"]).float().mean()) == pytest.approx(result.metrics["knn"]["top1"])


def test_a_second_probe_computes_no_features(probe, tmp_path, monkeypatch, capsys):
    first = probe()
    assert " images/s; everything is in " in capsys.readouterr().out
    monkeypatch.setattr("vit.training.features.collect_logits", None)
    second = probe("seed=1")
    assert " s; everything is in " in capsys.readouterr().out
    assert (second.folder / "train.log").read_text().count("images: found in ") == 3
    assert second.metrics["test"] == first.metrics["test"]
    assert second.metrics["knn"] == first.metrics["knn"]
    assert len(list((tmp_path / "runs" / ".cache" / "features").glob("*.npz"))) == 3


def test_without_validation_data_the_middle_is_taken(probe):
    result = probe("data.val_fraction=0")
    assert result.metrics["penalty"] == 1e-2
    assert result.metrics["knn"]["k"] == 20
    assert "val" not in result.metrics["knn"]
    assert result.metrics["test"]["top1"] > 0.4


def test_two_heads_get_the_same_map(probe, tmp_path):
    result = probe(name=save(tmp_path / "two", network(distillation_token=True)))
    state = load_file(result.folder / "model" / "model.safetensors")
    assert torch.equal(state["head.weight"], state["head_dist.weight"])
    assert result.metrics["test"]["top1"] > 0.4


@pytest.mark.parametrize(
    "override",
    ["lora.rank=2", "ema.decay=0.9", "tune=true", "finetune.freeze=1", "distill.teacher=x", "trainer.devices=2"],
)
def test_what_trains_more_than_a_head_is_refused(probe, override, tmp_path):
    with pytest.raises(VitError, match="linear_probe"):
        probe(override)
    assert not (tmp_path / "runs").exists()


def test_a_probe_leaves_nothing_where_the_data_cannot_be_used(probe, tmp_path):
    with pytest.raises(VitError):
        probe("data=folder", f"data.root={tmp_path / 'nothing'}")
    assert not (tmp_path / "runs").exists()
