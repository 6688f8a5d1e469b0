"""The hub as people meet it: fetched once, then from the cache, offline too; pinned; every failure one line.

A stand-in answers on this machine; the code that asks it is `huggingface_hub`'s own, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vit.errors import VitError
from vit.pretrained.hub import fetch, split_revision
from vit.pretrained.locations import WeightsLocation, fetch_weights

NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def ask(environment: dict[str, str], sources: list[str], **changes: str) -> list[dict[str, Any]]:
    """Load each source in one new process; what came of it, or the error."""
    program = textwrap.dedent(
        """
        import json, sys, torch
        from vit.errors import VitError
        from vit.pretrained.create import load_pretrained
        for source in json.loads(sys.argv[1]):
            try:
                loaded = load_pretrained(**source) if isinstance(source, dict) else load_pretrained(source)
                image = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
                with torch.inference_mode():
                    logits = loaded.model(image)[0, :5].tolist()
                print(json.dumps({"source": loaded.source, "logits": logits, "names": len(loaded.class_names or [])}))
            except VitError as error:
                print(json.dumps({"error": str(error)}))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(sources)],
        env={**environment, **changes},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


@pytest.fixture
def others(hub, small_bundle, tmp_path) -> None:
    """More repositories: a bundle of this project's, and some that cannot be used."""
    config = json.loads((hub.folder / "config.json").read_text())
    for name in ("evil", "foreign", "empty", "greedy", "reader"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        hub.add(f"someone/{name}", tmp_path / name)
    torch.save({"weight": Evil()}, tmp_path / "evil" / "pytorch_model.bin")
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    greedy = {**config, "model_args": {"depth": 10**9}}
    (tmp_path / "greedy" / "config.json").write_text(json.dumps(greedy))
    reader = {**config, "model_args": {"checkpoint_path": "/etc/passwd"}}
    (tmp_path / "reader" / "config.json").write_text(json.dumps(reader))
    hub.add("someone/bundle", small_bundle)
    hub.add("someone/gated", hub.folder)
    hub.gated.add("someone/gated")


def test_fetched_once_then_offline_and_pinned(hub, hub_environment, others):
    with torch.inference_mode():
        model = timm.create_model(f"local-dir:{hub.folder}", pretrained=True).eval()
        expected = model(torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224))[0, :5].tolist()
    hub.requests.clear()
    asked: list[Any] = [NAME, f"{NAME}@{hub.commit}", {"source": NAME, "revision": "main"}, f"hf-hub:timm/{NAME}"]
    first = ask(hub_environment, asked)
    for answer in first:
        assert answer["names"] == 1000
        assert answer["logits"] == pytest.approx(expected, abs=1e-4)
        assert answer["source"] == f"timm/{NAME} on the hub (model.safetensors, commit {hub.commit[:12]})"
    downloads = [line for line in hub.requests if line.startswith("GET") and "resolve" in line]
    assert [line.rpartition("/")[2] for line in downloads] == ["model.safetensors", "config.json"]  # each once
    hub.requests.clear()
    uncached = "vit_tiny_patch16_224.augreg_in21k"
    *offline, missing = ask(hub_environment, [*asked, uncached], HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert offline == first
    folder = f"{hub_environment['HF_HOME']}/hub"
    assert "is not in the cache, and HF_HUB_OFFLINE is set: fetch it once with a network, or put" in missing["error"]
    assert f"models--timm--{uncached} into {folder}, or give local-dir:FOLDER" in missing["error"]

    *unplugged, missing = ask(hub_environment, [*asked, uncached], HF_ENDPOINT="http://127.0.0.1:9")
    assert unplugged == first
    assert "the hub does not answer (" in missing["error"]


def test_a_bundle_on_the_hub_and_what_cannot_be_used(hub, hub_environment, others, tmp_path):
    answers = ask(
        hub_environment,
        [
            "hf-hub:someone/evil",
            "hf-hub:someone/foreign",
            "hf-hub:someone/empty",
            "hf-hub:someone/greedy",
            "hf-hub:someone/reader",
            "hf-hub:someone/gated",
            "hf-hub:someone/nobody",
            f"{NAME}@2020",
            {"source": "hf-hub:someone/bundle", "num_classes": 0, "image_size": 224, "patch_size": 16},
        ],
    )
    *errors, bundle = answers
    matches = [
        "pytorch_model.bin was refused: loading it would run code (posix.system)",
        "is not a model of timm's (its config.json names no architecture)",
        "someone/empty on the hub has no file model.safetensors or pytorch_model.bin",
        "model_args.depth is 1000000000, which no model has",
        "model_args has 'checkpoint_path', which is no argument of a Vision Transformer",
        "someone/gated is gated: accept its terms",
        "the hub has no model someone/nobody, or it is private",
        f"timm/{NAME} has no revision '2020' on the hub",
    ]
    for answer, match in zip(errors, matches, strict=True):
        assert match in answer["error"]
    assert bundle["source"].startswith("someone/bundle on the hub (model.safetensors")
    assert len(bundle["logits"]) == 5
    assert not list(tmp_path.rglob("owned"))


def test_a_copied_cache_is_enough(hub, hub_environment, tmp_path):
    """What the message says: the folder of the cache, taken from another machine."""
    assert "error" not in ask(hub_environment, [NAME])[0]
    there = tmp_path / "other" / "hub"
    shutil.copytree(tmp_path / "hf_home" / "hub", there, symlinks=True)
    answer = ask(hub_environment, [NAME], HF_HOME=str(tmp_path / "other"), HF_HUB_OFFLINE="1")[0]
    assert answer["names"] == 1000


def test_revisions_are_split_off_names():
    assert split_revision("a@b") == ("a", "b")
    assert split_revision("a", "b") == ("a", "b")
    assert split_revision("a@refs/pr/1") == ("a", "refs/pr/1")
    assert split_revision("a@b", "b") == ("a", "b")
    with pytest.raises(VitError, match="names its revision already"):
        split_revision("a@b", "c")
    for wrong in ("a@", "a@b c", "a@..//x"):
        with pytest.raises(VitError, match="no revision"):
            split_revision(wrong)


@pytest.mark.parametrize("name", ["x", "a/b/c", "../etc", "a b/c", ""])
def test_impossible_repositories(name):
    with pytest.raises(VitError, match="is no name on the hub"):
        fetch(name, ["config.json"])


def test_a_file_by_its_address_is_kept_where_timm_keeps_it(hub, tmp_path, monkeypatch):
    """Weights that timm knows by an address only (I-JEPA's) go to torch's cache, and are there offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    location = WeightsLocation("url", f"{hub.url}/timm/{NAME}/resolve/main/model.safetensors")
    path, label = fetch_weights(location)
    assert path == tmp_path / "hub" / "checkpoints" / "model.safetensors"
    assert path.read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert label == location.address
    hub.requests.clear()
    assert fetch_weights(location)[0] == path
    assert hub.requests == []
    for address in (f"{hub.url}/timm/{NAME}/resolve/main/none.pth", "http://127.0.0.1:9/none.pth"):
        with pytest.raises(VitError, match=r"none\.pth is not in .*/checkpoints, and http.* cannot be fetched"):
            fetch_weights(WeightsLocation("url", address))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.safetensors"]
