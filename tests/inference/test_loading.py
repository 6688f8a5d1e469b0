"""What a MODEL may be, which part of it is taken, and what is said when it is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import onnx
import pytest
import torch

from vit import processors
from vit.errors import VitError
from vit.inference import loading
from vit.inference.loading import load, load_torch, locate
from vit.inference.torch_backend import resolve_device


@pytest.fixture
def checkpoint(small_bundle, tmp_path):
    """A checkpoint file of the small model; its temperature, 4, tells it from the bundle (1.5)."""
    model, description = load_torch(small_bundle, device="cpu")
    description.temperature = 4.0
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "saved.ckpt"
    torch.save({"state_dict": state, "vit": {**description.to_dict(), "weights_prefix": "model."}}, path)
    return path


def test_a_run_folder_gives_its_bundle_then_best_then_last(small_bundle, checkpoint, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(VitError, match="has not saved a model"):
        load(run)
    shutil.copy(checkpoint, run / "checkpoints" / "last.ckpt")
    assert locate(run).checkpoint == run / "checkpoints" / "last.ckpt"
    shutil.copy(checkpoint, run / "checkpoints" / "best.ckpt")
    assert locate(run).checkpoint == run / "checkpoints" / "best.ckpt"
    assert load(run, device="cpu").backend == "torch"
    shutil.copytree(small_bundle, run / "model")
    assert load(run, device="cpu").backend == "onnx"
    assert load(run, device="cpu").description.temperature == 1.5
    assert load(run, device="cpu", backend="torch").backend == "torch"
    assert load(run / "checkpoints" / "last.ckpt", device="cpu").description.temperature == 4.0


def test_a_bundle_by_its_folder_or_a_file_in_it(small_bundle):
    for name in ("", "config.json", "model.safetensors"):
        assert load(small_bundle / name, device="cpu").description.temperature == 1.5
    assert load(small_bundle / "model.onnx").backend == "onnx"


def test_a_bundle_of_one_kind_of_weights(small_bundle, tmp_path):
    shutil.copytree(small_bundle, tmp_path / "a", ignore=shutil.ignore_patterns("*.onnx"))
    shutil.copytree(small_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors"))
    assert load(tmp_path / "a", device="cpu").backend == "torch"
    assert load(tmp_path / "b", device="cpu").backend == "onnx"
    with pytest.raises(VitError, match=r"has no model\.onnx"):
        load(tmp_path / "a", backend="onnx")
    assert load(tmp_path / "b", backend="torch").backend == "torch"
    (tmp_path / "b" / "model.onnx").unlink()
    with pytest.raises(VitError, match="its weights are missing"):
        load(tmp_path / "b")


def test_all_forms_answer_alike(small_bundle, checkpoint, photographs):
    answers = [
        load(model, device="cpu", backend=backend)
        for model, backend in [(small_bundle, "onnx"), (small_bundle, "torch"), (checkpoint, "torch")]
    ]
    labels = [[result.label for result in classifier.classify(photographs)] for classifier in answers]
    assert labels[0] == labels[1] == labels[2]


def test_an_onnx_file_is_a_whole_model_for_torch_too(small_bundle, photographs):
    model, description = load_torch(small_bundle / "model.onnx")
    twin, told = load_torch(small_bundle)
    assert description == told
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items())
    ours, theirs = (load(small_bundle / "model.onnx", backend=name) for name in ("torch", "onnx"))
    assert (ours.backend, theirs.backend) == ("torch", "onnx")
    pairs = zip(ours.classify(photographs), theirs.classify(photographs), strict=True)
    assert all(a.label == b.label and abs(a.probability - b.probability) < 1e-4 for a, b in pairs)


def test_a_bundle_without_safetensors_gives_torch_the_weights_of_its_onnx_file(small_bundle, tmp_path):
    shutil.copytree(small_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors"))
    model, _ = load_torch(tmp_path / "b")
    twin, _ = load_torch(small_bundle)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items())


def test_the_onnx_backend_runs_on_the_cpu_alone(small_bundle):
    with pytest.raises(VitError, match="runs on the CPU"):
        load(small_bundle, device="cuda", backend="onnx")


def test_nothing_of_that_name_lists_what_comes_nearest(small_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitError, match=r"no model at rums/digits: .*no run under \./runs yet"):
        load("rums/digits")
    for name in ("digits/2026-01-01_10-00-00", "digits/2026-01-02_10-00-00", "flowers/2026-01-01_10-00-00"):
        shutil.copytree(small_bundle, tmp_path / "runs" / name / "model")
    os.utime("runs/flowers/2026-01-01_10-00-00", (0, 0))
    with pytest.raises(VitError, match="did you mean 'runs/digits/2026-01-02_10-00-00'"):
        load("runs/digit/2026-01-02_10-00-0")
    with pytest.raises(VitError, match="the newest run here is runs/digits"):
        load("nothing_like_it")
    with pytest.raises(VitError, match="the newest run in it is runs/digits"):
        load("runs/digits")


def test_a_name_of_timms_that_is_none_lists_names_and_runs(small_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_bundle, tmp_path / "runs" / "digits" / "2026-01-01_10-00-00" / "model")
    with pytest.raises(VitError, match=r"did you mean 'vit_small_patch16_224'.*the newest run here is runs/digits"):
        load("vit_smal_patch16_224")
    with pytest.raises(VitError, match="timm has no weights 'augreg' of vit_small_patch16_224; did you mean"):
        load("vit_small_patch16_224.augreg")
    with pytest.raises(VitError, match="vit_base_r50_s16_384 cannot be built here: its patches come from a convol"):
        load("vit_base_r50_s16_384")


def test_a_path_that_exists_wins_over_a_name(small_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_bundle, tmp_path / "vit_small_patch16_224")
    assert locate("vit_small_patch16_224").kind == "bundle"
    assert load("vit_small_patch16_224", device="cpu").description.temperature == 1.5


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch16_clip_224.openai"])
def test_a_backbone_classifies_nothing_and_is_not_fetched_to_find_out(name, monkeypatch):
    monkeypatch.setattr("vit.pretrained.hub.fetch", None)
    with pytest.raises(
        VitError, match=rf"is a backbone, .*fine-tune it first \((python -m vit|vit|python) train.* model\.name={name} "
    ):
        load(name, device="cpu")
    with pytest.raises(VitError, match=r"has no model\.onnx"):
        load(name, backend="onnx")


@pytest.mark.parametrize(("name", "kind"), [("hf-hub:someone/model@main", "timm"), ("local-dir:somewhere", "timm")])
def test_places_that_timm_names(name, kind):
    assert (locate(name).kind, locate(name).name) == (kind, name)


def test_what_does_not_look_like_a_name_costs_no_import_of_timm():
    code = (
        "import sys; from vit.inference.loading import locate; from vit.errors import VitError\n"
        "for name in ('nothing', 'runs/vit_small', 'photo.jpg', 'a_b.ckpt', 'small_bundle', 'patch'):\n"
        "    try: locate(name)\n    except VitError as error: assert 'expected a run folder' in str(error), error\n"
        "print(*{'timm', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["", "nul\0byte", "x" * 5000, "new\nline"])
def test_impossible_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitError) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_folders_and_files_that_are_no_model(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(VitError, match="is not a model"):
        load(tmp_path / "photos")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(VitError, match="not a checkpoint"):
        load(tmp_path / "photo.jpg")


@pytest.mark.parametrize("name", ["model.ckpt", "model.onnx"])
def test_a_pipe_is_no_model_and_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(VitError, match="is neither a file nor a folder: expected a run folder"):
        load(tmp_path / name, device="cpu")


def test_unknown_backends_and_devices(small_bundle):
    with pytest.raises(VitError, match="did you mean 'onnx'"):
        load(small_bundle, backend="onx")
    with pytest.raises(VitError, match="no device 'gpu'"):
        load(small_bundle, device="gpu")
    with pytest.raises(VitError, match="no device 'cuda:x'"):
        resolve_device("cuda:x")
    with pytest.raises(VitError, match="is not on this machine"):
        resolve_device("cuda:99")


def test_a_gpu_is_asked_of_torch_only_where_its_driver_shows(small_bundle, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vit.inference.torch_backend.resolve_device", lambda name: asked.append(name) or torch.device("cpu")
    )
    monkeypatch.setattr(loading, "may_have_gpu", lambda: False)
    assert load(small_bundle).backend == "onnx"
    assert asked == []
    monkeypatch.setattr(loading, "may_have_gpu", lambda: True)
    assert load(small_bundle).backend == "onnx"
    assert asked == ["auto"]


def test_hidden_gpus_are_not_there(monkeypatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not processors.may_have_gpu()


def test_processors_are_at_least_one_and_at_most_what_may_be_used():
    assert 1 <= processors.count_cpus() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert processors.count_cpus() <= len(os.sched_getaffinity(0))


def test_a_model_may_be_waited_for_later(small_bundle, photographs, tmp_path):
    """What is wrong with its weights is raised then, and always before an answer, of whatever input."""
    classifier = load(small_bundle, device="cpu", block=False)
    assert classifier.classify(photographs[:1])[0].error is None
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    whole = (bundle / "model.onnx").read_bytes()
    message = onnx.load_model_from_string(whole)
    message.graph.node[3].op_type = "NoSuchOperator"
    del message.metadata_props[-1]  # its checksum
    (bundle / "model.onnx").write_bytes(message.SerializeToString())
    with pytest.raises(VitError, match=r"model\.onnx is damaged or not an ONNX model"):
        load(bundle, device="cpu")
    classifier = load(bundle, device="cpu", block=False)
    for _ in range(2):
        with pytest.raises(VitError, match=r"model\.onnx is damaged or not an ONNX model"):
            classifier.ready()
    with pytest.raises(VitError, match="damaged"):
        classifier.classify([tmp_path / "none.jpg"])
