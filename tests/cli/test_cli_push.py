"""`vit push`, as a process, to a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from vit.checksums import with_checksum
from vit.data.preprocess import Preprocessing
from vit.inference.bundle import write_bundle
from vit.inference.card import about_data, model_card
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.model import VisionTransformer

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "config.json", "model.onnx", "model.safetensors")


@pytest.fixture
def environment(hub, hub_environment) -> dict[str, str]:
    # hf-xet's own protocol is no HTTP that a test could stand in for
    return {**hub_environment, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run folder that tells where its data lay."""
    torch.manual_seed(3)
    model = VisionTransformer(image_size=32, patch_size=8, num_classes=3, width=48, heads=3, depth=2).eval()
    description = Description(
        architecture=model.architecture,
        class_names=["cat", "--- dog", "größe"],
        preprocessing=Preprocessing(image_size=(32, 32)),
        temperature=1.25,
        data={"name": "folder", "root": "/home/someone/photos", "split_seed": 4},
        metrics={"val": {"top1": 0.75}, "test": {"top1": 0.8125, "ece": 0.02}},
        training={"overrides": ["data.root=/home/someone/photos"], "pretrained": {"name": "vit_tiny_patch16_224.orig"}},
    )
    folder = tmp_path_factory.mktemp("runs") / "photos" / "2026-01-01_10-00-00"
    write_bundle(folder / "model", model, description)
    return folder


def vit(*arguments, environment, cwd=None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


def same_tensors(file: Path, other: Path) -> bool:
    first, second = ({each.name: each for each in onnx.load(path).graph.initializer} for path in (file, other))
    return first == second


def test_a_run_arrives_byte_by_byte_and_is_used_from_there(hub, environment, run_folder, tmp_path, photographs):
    done = vit("push", run_folder, "me/arrives", "--message", "First", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    *files, last = done.stdout.splitlines()
    assert last.startswith(f"pushed to {hub.url}/me/arrives/commit/")
    assert last.endswith("; try: vit classify hf-hub:me/arrives photo.jpg")
    got = hub.repositories["me/arrives"]["main"]
    assert sorted(each.name for each in got.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert any(line.split()[:2] == [name, f"{(got / name).stat().st_size:,}"] for line in files)
    assert hub.messages[-1] == "First"

    bundle = run_folder / "model"
    assert (got / "model.safetensors").read_bytes() == (bundle / "model.safetensors").read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)  # the way of large files
    assert same_tensors(got / "model.onnx", bundle / "model.onnx")
    # all is told but the folders of this machine
    here = json.loads((bundle / "config.json").read_bytes())
    here["vit"]["data"]["root"] = None
    here["vit"]["training"]["overrides"] = ["data.root=photos"]
    assert json.loads((got / "config.json").read_bytes()) == with_checksum(here)
    metadata = {entry.key: entry.value for entry in onnx.load(got / "model.onnx").metadata_props}
    assert json.loads(metadata["vit"]) == here["vit"]
    assert not [name for name in NAMES if b"someone" in (got / name).read_bytes()]

    rows = [
        vit("classify", model, *photographs[:3], "--format", "jsonl", environment=environment).stdout
        for model in (bundle, "hf-hub:me/arrives")
    ]
    ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in rows)
    assert len(ours) == 3
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    np.testing.assert_allclose(*([row["probability"] for row in each] for each in (ours, theirs)), atol=1e-4)

    code = (
        "import timm, torch, sys\n"
        "model = timm.create_model('hf-hub:me/arrives', pretrained=True).eval()\n"
        "torch.save(model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).detach(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "logits"], env=environment, check=True, timeout=300)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    model, _ = load_torch(bundle, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), model(images), rtol=0, atol=1e-5)


def test_the_card_is_what_the_hub_reads_and_says_how_to_get_the_model(hub, environment, run_folder):
    assert vit("push", run_folder / "model", "me/card", environment=environment).returncode == 0
    text = (hub.repositories["me/card"]["main"] / "README.md").read_text("utf-8")
    assert hub.cards[-1] == text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-classification"
    assert front["metrics"] == ["accuracy"]
    assert front["base_model"] == "timm/vit_tiny_patch16_224.orig"
    # as the hub's own library reads it
    (figure,) = ModelCard(text).data.eval_results
    assert (figure.task_type, figure.dataset_name, figure.metric_type) == ("image-classification", "folder", "accuracy")
    assert figure.metric_value == 0.8125
    for part in (
        "vit classify hf-hub:me/card photo.jpg",
        'timm.create_model("hf-hub:me/card", pretrained=True)',
        'hf_hub_download("me/card", "model.onnx")',
        "## Data",
        "## Recipe",
        "81.25%",
        "softmax(logits / 1.2500)",
        "## Intended use and limits",
    ):
        assert part in text
    assert "FOLDER" not in text.split("## Intended use")[0]


def test_a_card_that_a_person_wrote_goes_as_it_is(hub, environment, run_folder, tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes((run_folder / "model" / name).read_bytes())
    text = (tmp_path / "README.md").read_text("utf-8").replace("## Use", "Better on weekdays.\n\n## Use")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert vit("push", tmp_path, "me/own-card", environment=environment).returncode == 0
    assert (hub.repositories["me/own-card"]["main"] / "README.md").read_text("utf-8") == text


def test_of_the_settings_only_those_of_the_data_set_are_told():
    whole = {"name": "folder", "split_seed": 4, "objects": 1, "train_images": 10_000, "image_column": None}
    assert about_data(whole) == {"name": "folder", "split_seed": 4}
    assert about_data({**whole, "name": "shapes"})["train_images"] == 10_000
    assert about_data({**whole, "name": "parquet", "label_column": "label"})["label_column"] == "label"


@pytest.mark.parametrize(
    ("pretrained", "base"),
    [
        ({"name": "vit_tiny_patch16_224.orig@main", "weights": None}, "timm/vit_tiny_patch16_224.orig"),
        ({"name": "vit_tiny_patch16_224.orig", "weights": "hf-hub:me/mine"}, "me/mine"),
        ({"name": "vit_tiny_patch16_224.orig", "weights": "mine.pth"}, None),
        ({"name": "vit_tiny_patch16_224"}, None),  # no repository is called so
        ({"name": "local-dir:mine"}, None),
        ("vit_tiny_patch16_224.orig", None),
    ],
)
def test_the_card_names_the_repository_whose_weights_were_the_start(pretrained, base):
    model = VisionTransformer(image_size=32, patch_size=8, num_classes=1, width=48, heads=3, depth=1)
    described = Description(model.architecture, ["a"], Preprocessing((32, 32)), training={"pretrained": pretrained})
    front = yaml.safe_load(model_card(described, parameters=1, onnx=False).split("---\n")[1])
    assert front.get("base_model") == base


def test_a_dry_run_shows_everything_and_needs_neither_network_nor_token(hub, environment, run_folder):
    before = len(hub.requests)
    alone = {key: value for key, value in environment.items() if key != "HF_TOKEN"}
    options = ("--dry-run", "--private", "--revision", "tried")
    done = vit("push", run_folder, "me/dry", *options, environment={**alone, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("would push to me/dry (private, branch tried); nothing was sent\n")
    for name in NAMES:
        assert f"  {name} " in done.stdout
    assert f"{(run_folder / 'model' / 'model.safetensors').stat().st_size:,} bytes" in done.stdout
    assert "## Intended use and limits" in done.stdout
    assert "vit classify hf-hub:me/dry photo.jpg" in done.stdout
    assert len(hub.requests) == before


def test_private_and_on_a_branch(hub, environment, run_folder):
    options = ("--private", "--revision", "tried/it")
    done = vit("push", run_folder, "me/private", *options, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("try: vit classify hf-hub:me/private@tried/it photo.jpg\n")
    assert "me/private" in hub.private
    assert "main" not in hub.repositories["me/private"]
    # again, where all is there already
    assert vit("push", run_folder, "me/private", *options, environment=environment).returncode == 0


def test_private_is_not_promised_where_the_repository_is_public(hub, environment, run_folder):
    assert vit("push", run_folder, "me/public", environment=environment).returncode == 0
    commits = len(hub.commits)
    done = vit("push", run_folder, "me/public", "--private", environment=environment)
    assert done.returncode == 2
    assert done.stderr == (
        "vit: me/public is there already, and public: push without --private, or to another repository\n"
    )
    assert len(hub.commits) == commits


@pytest.mark.parametrize(
    ("change", "repo", "message"),
    [
        ({"HF_TOKEN": None}, "me/x", "there is no Hugging Face token"),
        ({"HF_TOKEN": "hf_OfSomebodyElse"}, "me/x", "the hub does not accept the token"),
        ({}, "else/x", "the token may not write to else/x"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/x", "the hub does not answer, so no files were pushed"),
        ({"HF_HUB_OFFLINE": "1"}, "me/x", "while HF_HUB_OFFLINE is set"),
        ({}, "me/a b", "did you mean 'me/a-b'?"),
        ({}, "flowers", "did you mean 'YOU/flowers'?"),
        ({}, "https://huggingface.co/me/x", "did you mean 'me/x'?"),
    ],
)
def test_what_cannot_be_is_one_line_without_the_token(hub, environment, run_folder, change, repo, message):
    commits = len(hub.commits)
    changed = {key: value for key, value in {**environment, **change}.items() if value is not None}
    done = vit("push", run_folder, repo, environment=changed)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hf_" not in done.stderr
    assert len(hub.commits) == commits


def test_what_is_no_bundle(environment, run_folder, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"x")
    done = vit("push", tmp_path / "x.ckpt", "me/x", environment=environment)
    assert done.returncode == 2
    assert "is not a bundle: `vit export" in done.stderr
    (tmp_path / "damaged").mkdir()
    for name in NAMES:
        (tmp_path / "damaged" / name).write_bytes((run_folder / "model" / name).read_bytes()[:-3])
    done = vit("push", tmp_path / "damaged", "me/x", environment=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert os.listdir(tmp_path / "damaged")
