"""Every command takes a name of timm's for MODEL: straight from the hub, offline from its cache, or from a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
LABELS = ["cat", "dog", "größe"]


def run(environment: dict[str, str], *arguments: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vit", *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(ROOT), **changes},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_all(environment: dict[str, str], calls: list[tuple[object, ...]], cwd: Path) -> list[tuple[int, str, str]]:
    """Several calls in one process, each (exit status, standard output, standard error)."""
    program = textwrap.dedent(
        """
        import contextlib, io, json, sys
        from vit.cli import main
        from vit.training.eval_app import eval_main
        for call in json.loads(sys.argv[1]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = eval_main(call[1:]) if call[0] == "eval" else main(call)
            print(json.dumps([status, out.getvalue(), err.getvalue()]))
        """
    )
    asked = json.dumps([[str(word) for word in call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", program, asked],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of three classes, as timm saves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, patch_size=8, num_classes=3
        )
        with torch.no_grad():
            model.head.weight.normal_()
    place = tmp_path_factory.mktemp("timm") / "small"
    save_for_hf(model, str(place), safe_serialization=True, model_config={"label_names": LABELS})
    return place


def test_classify_a_photograph_straight_from_the_hub(hub, hub_environment, photographs, tmp_path):
    done = run(hub_environment, "classify", NAME, *photographs[:3], "--format", "jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vit:" not in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    model = timm.create_model(f"local-dir:{hub.folder}", pretrained=True).eval()
    prepare = create_transform(**resolve_data_config({}, pretrained_cfg=model.pretrained_cfg))
    names = timm.data.ImageNetInfo().label_descriptions()
    for row, path in zip(rows, photographs, strict=False):
        with torch.inference_mode():
            expected = model(prepare(Image.open(path).convert("RGB"))[None]).softmax(1)[0].numpy()
        best = np.argsort(-expected)[:5]
        assert [entry["index"] for entry in row["top"]] == best.tolist()
        assert row["probability"] == pytest.approx(expected[best[0]], abs=1e-4)
        assert row["label"].split(" (n")[0] == names[best[0]]
    again = run(
        hub_environment, "classify", NAME, *photographs[:3], "--format", "jsonl", cwd=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def test_info_needs_no_weights(hub_environment, tmp_path):
    unplugged = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run(hub_environment, "info", "vit_base_patch16_224.augreg_in1k", cwd=tmp_path, **unplugged)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "vit_base_patch16_224.augreg_in1k: timm model",
        "parameters       86,567,656",
        "timm/vit_base_patch16_224.augreg_in1k on the hub, not in the cache: fetched when they are first used",
        "license          apache-2.0",
        "mean           0.5, 0.5, 0.5",
        "0            tench, Tinca tinca",
        "1000 in all",
    ):
        assert line in done.stdout
    done = run(hub_environment, "info", "vit_small_patch14_dinov2", "--format", "json", cwd=tmp_path, **unplugged)
    told = json.loads(done.stdout)
    assert (told["kind"], told["parameters"], told["grid"], told["class_names"]) == (
        *("timm model", 22_056_192, [37, 37], []),
    )
    assert told["preprocessing"]["image_size"] == [518, 518]


def test_export_explain_and_eval_follow(folder, hub_environment, photographs, tmp_path):
    photos = tmp_path / "photos"
    for label in LABELS[:2]:
        (photos / label).mkdir(parents=True)
        for path in photographs[:6]:
            shutil.copy(path, photos / label)
    model, photograph = f"local-dir:{folder}", photographs[0]
    forms = (model, folder, "x.onnx", "bundle")
    answers = {form: f"{number}.jsonl" for number, form in enumerate(forms)}
    done = run_all(
        hub_environment,
        [
            ("export", model, "x.onnx"),
            ("export", model, "bundle"),
            *(("classify", form, photograph, "--output", answers[form]) for form in forms),
            ("explain", model, photograph, "--output", "maps"),
            ("eval", f"checkpoint={model}", "data=folder", f"data.root={photos}", "output=evaluation"),
        ],
        cwd=tmp_path,
    )
    assert [status for status, _, _ in done] == [0] * len(done), done
    rows = [json.loads((tmp_path / answers[form]).read_text()) for form in forms]
    assert all(row["label"] == rows[0]["label"] in LABELS for row in rows)
    assert all(row["probability"] == pytest.approx(rows[0]["probability"], abs=1e-4) for row in rows)
    told = json.loads((tmp_path / "bundle" / "config.json").read_text())["vit"]
    assert told["training"]["pretrained"] == {"name": model}
    assert told["preprocessing"]["crop_pct"] == 0.9
    assert (tmp_path / "maps" / "00.png").stat().st_size > 0
    assert 0 <= json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["test"]["top1"] <= 1


def test_what_cannot_be_is_one_line_and_writes_nothing(hub_environment, photographs, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    name, uncached = "vit_small_patch16_224", "is not in the cache, and HF_HUB_OFFLINE is set"
    calls = {
        ("export", "vit_smal_patch16_224", "out"): "did you mean 'vit_small_patch16_224'",
        ("export", "vit_small_patch14_dinov2", "out"): "is a backbone, it has no classifier: fine-tune it first",
        ("explain", "vit_base_patch16_clip_224.openai", "x.jpg", "--output", "maps"): "its 512 outputs are no classes",
        ("classify", "hf-hub:someone/model", "x.jpg"): uncached,
        ("classify", "local-dir:nowhere", "x.jpg"): "there is no folder nowhere",
        ("info", "hf-hub:someone"): "is no name on the hub",
        ("classify", name, photographs[0], "--output", "rows.csv"): uncached,
        ("export", name, "out.onnx"): uncached,
        ("export", name, "bundle"): uncached,
        ("explain", name, photographs[0], "--output", "maps"): uncached,
        ("eval", f"checkpoint={name}", "data=digits"): uncached,
    }
    done = run_all({**hub_environment, "HF_HUB_OFFLINE": "1"}, list(calls), cwd=work)
    for (call, match), (status, out, error) in zip(calls.items(), done, strict=True):
        assert (status, out) == (2, ""), call
        assert error.count("\n") == 1, error
        assert match in error
    assert os.listdir(work) == []
