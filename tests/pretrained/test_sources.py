"""What a source may be, what is known of it before its weights are read, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vit.errors import VitError
from vit.inference.bundle import read_bundle
from vit.inference.loading import load_torch
from vit.pretrained.create import load_pretrained, read_info
from vit.pretrained.locations import format_location

SIZES = {"embed_dim": 48, "num_heads": 3, "depth": 2, "img_size": 64}


@pytest.fixture
def folder(local_dir, tmp_path) -> Path:
    """A copy of timm's folder to spoil."""
    return Path(shutil.copytree(local_dir, tmp_path / "copy"))


def refused(source: object, match: str, **options) -> None:
    with pytest.raises(VitError, match=match) as caught:
        load_pretrained(source, **options)
    assert "\n" not in str(caught.value)


def configure(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config.pop("vit_checksum", None)  # changed on purpose
    path.write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_a_folder_of_timms(local_dir, small_timm, images):
    for source in (f"local-dir:{local_dir}", local_dir, local_dir / "model.safetensors", local_dir / "config.json"):
        loaded = load_pretrained(source)
        torch.testing.assert_close(loaded.model(images), small_timm(images), rtol=0, atol=1e-5)
        assert loaded.class_names is not None
        assert loaded.class_names[0] == "tench, Tinca tinca"
        assert loaded.preprocessing.crop_pct == 0.9
        assert loaded.preprocessing.image_size == (64, 64)


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.pth", "checkpoint.pth", "other.safetensors"])
@torch.no_grad()
def test_other_files_in_a_folder(folder, small_timm, images, kind):
    (folder / "model.safetensors").unlink()
    if kind.endswith(".safetensors"):
        save_file(small_timm.state_dict(), folder / kind)
    else:
        torch.save(small_timm.state_dict(), folder / kind)
    torch.testing.assert_close(load_pretrained(folder).model(images), small_timm(images), rtol=0, atol=1e-5)


def test_folders_without_one_file_of_weights(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, r"holds several files of weights \(a\.safetensors, b\.safetensors\): name one")
    for name in "ab":
        (folder / f"{name}.safetensors").unlink()
    refused(folder, r"holds no file of weights: expected model\.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "is not a model: expected a name of timm's")
    refused(folder / "none", "no weights at")
    refused(f"local-dir:{folder}/none", "there is no folder")


def test_names_of_classes_come_with_the_weights(folder):
    names = [f"class {i}" for i in range(1000)]
    configure(folder, label_names=names)
    assert read_info(folder).class_names == names
    configure(folder, label_names={str(i): name for i, name in enumerate(names)})
    assert read_info(folder).class_names == names
    configure(folder, label_names=names, label_descriptions={"class 0": "the first"})
    assert read_info(folder).class_names == ["the first", *names[1:]]
    configure(folder, label_names=names[:3], label_descriptions=None)
    refused(folder, "3 label_names for 1000 outputs")
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    configure(folder, label_names=None, pretrained_cfg={**cfg, "tag": "my_data"})
    assert read_info(folder).class_names is None  # a thousand outputs alone do not make it ImageNet


def test_an_older_folder_is_not_nested(folder):
    config = json.loads((folder / "config.json").read_text())
    names = [f"class {i}" for i in range(1000)]
    old = {**config["pretrained_cfg"], "architecture": config["architecture"], "labels": names}
    (folder / "config.json").write_text(json.dumps({**old, "model_args": config["model_args"]}))
    known = read_info(folder)
    assert known.class_names == names
    assert known.preprocessing.crop_pct == 0.9
    assert load_pretrained(folder).report.head == "kept"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": None}, "names no architecture"),
        ({"architecture": "resnet18"}, "cannot be built here"),
        ({"architecture": "vit_none_patch16_224"}, "which timm does not have"),
        ({"architecture": "../../etc/passwd"}, "which timm does not have"),
        ({"architecture": "hf-hub:someone/model"}, "which timm does not have"),
        ({"model_args": []}, "head.weight has shape .1000, 48., its description says .1000, 192."),
        ({"model_args": [1]}, "model_args are no table"),
        ({"model_args": {"depth": 10**9}}, "model_args.depth is 1000000000, which no model has"),
        ({"model_args": {"embed_dim": 10**7}}, "which no model has"),
        ({"model_args": {"img_size": [10**7, 16]}}, "which no model has"),
        ({"model_args": {"depth": -1}}, "which no model has"),
        ({"model_args": {"depth": {"a": 1}}}, "should be a plain value, not dict"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "'checkpoint_path', which is no argument"),
        ({"model_args": {"pretrained": True}}, "'pretrained', which is no argument"),
        ({"model_args": {"cache_dir": "/tmp"}}, "'cache_dir', which is no argument"),
        (
            {"model_args": {"embed_dim": 48, "num_heads": 3, "depth": 3, "img_size": 64}},
            "2 blocks, its description says 3",
        ),
        ({"model_args": {"embed_dim": 96, "num_heads": 3, "depth": 2, "img_size": 64}}, "its description says"),
        ({"num_classes": 10**9}, "which no model has"),
        ({"pretrained_cfg": {"interpolation": "spline"}}, "interpolation='spline'"),
        ({"pretrained_cfg": 3}, "names no architecture"),
        ({"vit": {}}, "does not say its architecture"),
        ({"vit": {"architecture": {}, "class_names": 3}}, "does not say its class names"),
    ],
)
def test_a_configuration_that_lies_or_asks_for_the_world(folder, changes, match):
    refused(configure(folder, **changes), match)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "is not valid JSON|is not the configuration of a model")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_would_run_code_are_refused_and_run_none(local_dir, tmp_path):
    bad = tmp_path / "bad.pth"
    for write in (
        lambda evil: torch.save({"model": evil}, bad),
        lambda evil: torch.save({"model": evil}, bad, _use_new_zipfile_serialization=False),
        lambda evil: bad.write_bytes(pickle.dumps(evil)),
    ):
        write(Evil(tmp_path / "owned"))
        for match in (r"bad\.pth was refused: loading it would run code \((posix|nt)\.system\)",):
            refused(bad, match)
            refused(local_dir, match, weights=bad)
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_program_is_no_weights(local_dir, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    refused(local_dir, r"program\.pt was refused: it is a program \(TorchScript\)", weights=tmp_path / "program.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "w.npz"])
def test_damaged_files(local_dir, small_timm, tmp_path, name):
    path = tmp_path / name
    refused(local_dir, "no weights at", weights=path)
    path.write_bytes(b"")
    refused(local_dir, "is empty", weights=path)
    for content in (b"hello world", bytes(range(256)) * 9, b"PK\x03\x04" + b"\0" * 99):
        path.write_bytes(content)
        refused(local_dir, "truncated or not|damaged|was refused", weights=path)
    if name == "w.safetensors":
        save_file(small_timm.state_dict(), path)
    elif name != "w.npz":
        torch.save(small_timm.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(local_dir, "truncated or not|damaged", weights=path)
    path.unlink()
    path.mkdir()
    refused(local_dir, "holds no file of weights", weights=path)
    path.rmdir()
    os.mkfifo(path)
    refused(local_dir, "is not a file", weights=path)


def test_a_file_alone_does_not_say_its_model(small_timm, tmp_path):
    save_file(small_timm.state_dict(), tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", 'give the model.s name and this file as its weights.*weights="w.safetensors"')


def test_timms_training_script_notes_the_name(tmp_path, timm_model):
    model = timm_model("vit_tiny_patch16_224")
    torch.save(
        {"arch": "vit_tiny_patch16_224", "state_dict": model.state_dict(), "epoch": 1}, tmp_path / "last.pth.tar"
    )
    loaded = load_pretrained(tmp_path / "last.pth.tar")
    assert torch.equal(loaded.model.head.weight, model.head.weight)
    torch.save({"arch": "resnet18", "state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    refused(tmp_path / "last.pth.tar", "resnet18 cannot be built here")


@torch.no_grad()
def test_this_projects_own_models(small_bundle, tmp_path):
    own, description = load_torch(small_bundle, device="cpu")
    state = {f"model.{name}": tensor for name, tensor in own.state_dict().items()}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, "vit": description.to_dict()}, run / "checkpoints" / "last.ckpt")
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "saved.pth")
    images = torch.randn(2, 3, 32, 32)
    for source in (
        small_bundle,
        f"local-dir:{small_bundle}",
        small_bundle / "model.safetensors",
        run,
        run / "checkpoints" / "last.ckpt",
        tmp_path / "saved.pth",
    ):
        loaded = load_pretrained(source)
        torch.testing.assert_close(loaded.model(images), own(images))
        assert loaded.class_names == description.class_names
        assert loaded.preprocessing == read_bundle(small_bundle).preprocessing
        assert loaded.report.head == "kept"
    shutil.copytree(small_bundle, run / "model")
    assert read_info(run).location.address == str(run / "model")
    refused(small_bundle, "only weights on the hub have revisions", revision="main")


def test_own_weights_for_another_architecture_of_the_same_shape(small_bundle, tmp_path):
    """A bundle as `weights`: its names are this project's, wherever it is."""
    folder = configure(Path(shutil.copytree(small_bundle, tmp_path / "bundle")))
    loaded = load_pretrained(folder, weights=small_bundle)
    assert loaded.report.head == "kept"
    assert loaded.class_names is None  # whose classes they are is not known
    assert torch.equal(loaded.model.head.weight, load_file(small_bundle / "model.safetensors")["head.weight"])


def test_an_older_model_does_not_say_what_it_could_not_have(small_bundle, tmp_path):
    folder = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    told = json.loads((folder / "config.json").read_text())["vit"]
    old = {key: value for key, value in told["architecture"].items() if key not in ("mlp", "activation", "final_norm")}
    configure(folder, vit={**told, "architecture": old})
    assert read_info(folder).architecture == read_info(small_bundle).architecture
    assert load_pretrained(folder, activation="gelu").report.head == "kept"


def test_a_description_that_lies_takes_no_memory(small_bundle, tmp_path):
    folder = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    told = json.loads((folder / "config.json").read_text())["vit"]
    for key, value in (("width", 10**5), ("depth", 10**8), ("num_classes", 10**9), ("mlp_ratio", 1e12), ("heads", 7)):
        configure(folder, vit={**told, "architecture": {**told["architecture"], key: value}})
        refused(folder, "its description says|width .* does not divide|which no model has")
    configure(folder, vit={**told, "architecture": {**told["architecture"], "colour": "red"}})
    refused(folder, "its architecture cannot be built")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("", "the name of the weights is empty"),
        ("nul\0byte", "cannot read"),
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("vit_small_patch16_224.augreg_in2k", "did you mean"),
        ("runs/none", "no weights at runs/none"),
        ("weights.pth", r"no weights at weights\.pth"),
        ("vit_base_r50_s16_384", "cannot be built here: its patches come from a convolutional network"),
        ("hf-hub:name", "is no name on the hub"),
        ("hf-hub:", "is no name on the hub"),
        ("vit_tiny_patch16_224@a@b", "no revision 'a@b'"),
    ],
)
def test_sources_that_are_none(source, match):
    refused(source, match)


def test_architectures_without_weights_say_so():
    known = read_info("vit_medium_patch16_gap_240")
    assert known.location is None or known.location.kind == "hub"
    bare = read_info("vit_base_patch32_plus_256")
    assert bare.location is None
    assert bare.class_names is None
    assert format_location(bare.location) == "none: timm has the architecture only"
    refused("vit_base_patch32_plus_256", "timm has no weights for vit_base_patch32_plus_256")


def test_what_timm_says_of_a_name_needs_no_network():
    known = read_info("vit_small_patch16_224")
    assert known.name == "vit_small_patch16_224.augreg_in21k_ft_in1k"
    assert known.license == "apache-2.0"
    assert len(known.class_names) == len(set(known.class_names)) == 1000
    assert read_info("timm/vit_small_patch16_224.augreg_in1k@main").location.revision == "main"
    assert len(read_info("vit_tiny_patch16_224.augreg_in21k").class_names) == 21843
    assert read_info("vit_small_patch14_dinov2").class_names is None
    assert read_info("vit_base_patch16_clip_224.openai").class_names is None  # 512 outputs that are no classes
    assert "not in the cache" in format_location(read_info("vit_giant_patch14_dinov2").location)


def test_saved_by_timm_with_other_sizes(timm_model, small, tmp_path):
    model = timm_model(**{**small, "img_size": (32, 48), "in_chans": 1, "num_classes": 3, "patch_size": 8})
    save_for_hf(model, str(tmp_path / "m"), safe_serialization=True, model_config={"label_names": ["a", "b", "c"]})
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.preprocessing.image_size == (32, 48)
    assert loaded.preprocessing.channels == 1
    assert loaded.class_names == ["a", "b", "c"]
    images = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=0, atol=1e-5)
