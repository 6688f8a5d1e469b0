"""One changed byte in any file of a model: it is refused in one line, or the answers are the same."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import load_model, save_model

import vit
from vit.checksums import KEY, check_onnx, check_safetensors, read_config
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.bundle import CONFIG, ONNX, WEIGHTS, write_bundle
from vit.inference.description import Description
from vit.inference.program import export_program, load_program
from vit.inference.push import gather
from vit.model import VisionTransformer

IMAGES = [np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(3)]
KINDS = {
    # file: what is loaded, by which backend
    f"model/{WEIGHTS}": ("model", "torch"),
    f"model/{CONFIG}": ("model", "onnx"),
    f"model/{ONNX}": ("model", "onnx"),
    "last.ckpt": ("last.ckpt", "torch"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model in every form."""
    torch.manual_seed(0)
    options = {"image_size": 16, "patch_size": 8, "in_channels": 1, "num_classes": 3, "width": 16, "depth": 1}
    model = VisionTransformer(**options, heads=1).eval()
    preprocessing = Preprocessing(image_size=(16, 16), channels=1, mean=(0.5,), std=(0.5,))
    description = Description(model.architecture, ["a", "b", "c"], preprocessing, temperature=0.5)
    folder = tmp_path_factory.mktemp("whole")
    write_bundle(folder / "model", model, description)
    export_program(folder / "model.pt2", model, description)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "vit": description.to_dict()}, folder / "last.ckpt")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def answers(model: Path, backend: str) -> list[list[tuple[str, float]]]:
    results = vit.load(model, backend=backend, device="cpu").classify(IMAGES, top_k=3)
    assert not any(result.error for result in results)
    return [[(each["label"], round(each["probability"], 5)) for each in result.top] for result in results]


def places(size: int, count: int) -> list[int]:
    """Of a file of this size, the first bytes, the last, and others anywhere."""
    draw = random.Random(size)
    ends = [*range(min(300, size)), *range(size - min(40, size), size)]
    return [*draw.choices(ends, k=count // 2), *draw.choices(range(size), k=count - count // 2)]


def flip(file: Path, count: int):
    """The file with one bit changed, `count` times."""
    data, draw = file.read_bytes(), random.Random(7)
    for place in places(len(data), count):
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        yield place
    file.write_bytes(data)


def flipped(copy: Path, name: str, count: int) -> None:
    model, backend = KINDS[name]
    before, refused = answers(copy / model, backend), 0
    for place in flip(copy / name, count):
        try:
            assert answers(copy / model, backend) == before, f"other answers with byte {place} changed"
        except VitError:
            refused += 1
    assert refused > count / 3
    assert answers(copy / model, backend) == before


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_byte_is_refused_or_harmless(copy, name):
    flipped(copy, name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_hundred_changed_bytes(copy, name):
    flipped(copy, name, 200)


def test_a_changed_byte_of_a_program_is_refused(copy):
    load_program(copy / "model.pt2")
    with zipfile.ZipFile(copy / "model.pt2") as archive:
        assert archive.testzip() is None
    for _ in flip(copy / "model.pt2", 200):
        with pytest.raises(VitError, match="is damaged"):
            load_program(copy / "model.pt2")


@pytest.mark.parametrize("checked", [check_onnx, check_safetensors])
def test_every_byte_is_covered(copy, checked):
    """All bits of the beginning and the end, and one of each byte between."""
    file = copy / "model" / (ONNX if checked is check_onnx else WEIGHTS)
    data, missed = file.read_bytes(), []
    length = int.from_bytes(data[:8], "little") if checked is check_safetensors else 0
    key = data.index(KEY.encode())
    for place in [*range(0, len(data), max(1, len(data) // 500)), *range(len(data) - 40, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            checked(file)
        except VitError:
            continue
        missed.append(place)
    # without its name a header's checksum is not seen, but then nothing else changed; and without its length
    assert all(length and (place < 8 or key - 1 <= place <= key + len(KEY)) for place in missed)


def test_files_without_checksums_load(copy):
    before = answers(copy / "model", "torch"), answers(copy / "model", "onnx")
    config = json.loads((copy / "model" / CONFIG).read_text())
    del config[KEY]
    (copy / "model" / CONFIG).write_text(json.dumps(config))
    message = load_model(copy / "model" / ONNX)
    assert message.metadata_props[-1].key == KEY
    del message.metadata_props[-1]
    save_model(message, copy / "model" / ONNX)
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model" / WEIGHTS)
    save_file(weights, copy / "model" / WEIGHTS)
    assert (answers(copy / "model", "torch"), answers(copy / "model", "onnx")) == before


def test_an_edited_configuration_says_how_to_accept_it(copy):
    path = copy / "model" / CONFIG
    config = json.loads(path.read_text())
    config["vit"]["class_names"] = ["x", "y", "z"]
    path.write_text(json.dumps(config, indent=4))
    with pytest.raises(VitError, match=f"was changed after it was written.* delete the line '{KEY}' to accept"):
        vit.load(copy / "model")
    del config[KEY]
    path.write_text(json.dumps(config))
    assert {label for row in answers(copy / "model", "onnx") for label, _ in row} == {"x", "y", "z"}


def test_other_spacing_and_order_are_no_change(copy):
    path = copy / "model" / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(config.items())), ensure_ascii=False))
    assert read_config(path) == config


def test_what_is_pushed_has_checksums_of_its_own(copy, tmp_path):
    (tmp_path / "pushed").mkdir()
    for name, content in gather(copy / "model", "me/model").items():
        (tmp_path / "pushed" / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    assert answers(tmp_path / "pushed", "onnx") == answers(copy / "model", "onnx")
    assert answers(tmp_path / "pushed", "torch") == answers(copy / "model", "torch")
    data = bytearray((tmp_path / "pushed" / ONNX).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "pushed" / ONNX).write_bytes(data)
    with pytest.raises(VitError, match="is damaged"):
        gather(tmp_path / "pushed", "me/model")
