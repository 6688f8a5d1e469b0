"""`vit explain` and `vit classify --explain` as a person runs them: real files, and real processes where it matters."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit.cli import main
from vit.data.preprocess import Preprocessing
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.inference.loading import load, load_torch
from vit.model import VisionTransformer

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
EVIL = "<img src=x onerror=alert(1)>"
CHROMIUM = "/usr/bin/chromium"


def vit(*arguments, stdin: bytes = b"", cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vit", *map(os.fsencode, arguments)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        timeout=300,
    )


def here(*arguments) -> int:
    """The same in this process."""
    return main([str(argument) for argument in arguments])


def bundle(folder: Path, names=("cat", "dog", EVIL), channels=3, preprocessing=None, scale=20.0, **options) -> Path:
    """A bundle of a small model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments = {"image_size": 32, "patch_size": 8, "size": "nano", "depth": 2, **options}
        model = VisionTransformer(num_classes=len(names), in_channels=channels, **arguments).eval()
    with torch.no_grad():
        model.head.weight.mul_(scale)
    description = Description(
        architecture=model.architecture,
        class_names=list(names),
        preprocessing=preprocessing or Preprocessing(image_size=model.image_size, channels=channels),
        temperature=1.5,
    )
    write_bundle(folder, model, description, onnx=False)
    return folder


def data_of(page: Path) -> dict[str, Any]:
    """What an index.html holds."""
    found = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    assert found is not None
    return json.loads(found[1])


def records_of(page: Path) -> dict[str, Any]:
    """The one run of an index.html, after every record has passed the check that TensorBoard's side makes."""
    from vit.dashboard.check import check

    data = data_of(page)
    (run,) = data["runs"]["runs"]
    check("attention/run", run["info"])
    for record in run["steps"]:
        check("attention/steps", record)
    for i in range(len(run["info"]["probes"])):
        (record,) = data["probe"][f"{run['run']}\n{i}"]["steps"]
        check(f"attention/probe/{i:02}", record)
    for key, record in data["pairs"].items():
        assert key.endswith("\n0")
        check("attention/pairs/00", record)
    return run


@pytest.fixture
def photos(photographs, tmp_path) -> Path:
    """Four good files and, between them, some that cannot be used."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photographs[:4]:
        shutil.copy(path, folder)
    (folder / "01-broken.jpg").write_bytes(photographs[3].read_bytes()[:-60])
    (folder / "02-empty.png").touch()
    (folder / "02-text.jpg").write_text("no image\n")
    return folder


def test_the_contract(small_bundle, photos, tmp_path):
    done = vit("explain", small_bundle, photos, "--output", "maps", "--save-maps", cwd=tmp_path)
    assert done.returncode == 1
    stems = ["00", "01", "02", "03"]
    made = [f"{stem}.{ending}" for stem in stems for ending in ("npz", "png")] + ["index.html"]
    assert sorted(os.listdir(tmp_path / "maps")) == made
    classifier = load(small_bundle, backend="torch")
    for stem, result in zip(stems, classifier.classify([photos / f"{stem}.jpg" for stem in stems]), strict=True):
        with np.load(tmp_path / "maps" / f"{stem}.npz", allow_pickle=False) as held:
            assert set(held.files) == {"map", "label", "probability", "method"}
            assert (held["map"].shape, held["map"].dtype) == ((4, 4), np.float32)
            assert held["map"].sum() == pytest.approx(1, abs=1e-5)
            assert str(held["label"]) == result.label
            assert float(held["probability"]) == pytest.approx(result.probability, abs=1e-5)
            assert str(held["method"]) == "rollout"
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["LABEL", "PROB", "PATH", "->", "OVERLAY"]
    assert [line.split("  ")[-1] for line in lines[1:]] == [f"{photos / stem}.jpg -> maps/{stem}.png" for stem in stems]
    messages = done.stderr.decode().splitlines()
    assert [message.split(": ")[1] for message in messages[:3]] == [
        str(photos / name) for name in ("01-broken.jpg", "02-empty.png", "02-text.jpg")
    ]
    assert "truncated JPEG" in messages[0]
    assert messages[3:] == ["vit: 3 of 7 inputs could not be used", "vit: open maps/index.html in a browser"]


@pytest.mark.parametrize("method", ["rollout", "raw", "relevance", "gradient_rollout", "legrad"])
def test_map_and_overlay_are_those_of_the_models_own_input(small_bundle, photographs, tmp_path, method):
    from vit.explain.methods import explain
    from vit.explain.render import enlarge, overlay

    model, description = load_torch(small_bundle, device="cpu")
    for layer in (None, 0, -2):
        options = [] if layer is None else ["--layer", layer]
        arguments = ["--output", tmp_path, "--method", method, "--save-maps", "--index", 0, *options]
        assert here("explain", small_bundle, photographs[5], "--target", "größe", *arguments) == 0
        pixels = description.preprocessing.resize(Image.open(photographs[5]))
        images = torch.from_numpy(description.preprocessing.normalise(pixels[None]))
        expected = explain(model, images, method, target=2, layer=layer)[0].numpy()
        with np.load(tmp_path / f"{photographs[5].stem}.npz") as held:
            assert np.abs(held["map"] - expected).max() < 1e-6
            assert str(held["label"]) == "größe"
            assert float(held["probability"]) == pytest.approx(
                load(small_bundle).probabilities(images.numpy())[0, 2], abs=1e-5
            )
        picture = Image.open(tmp_path / f"{photographs[5].stem}.png")
        assert picture.tobytes() == overlay(enlarge(Image.fromarray(pixels)), expected).tobytes()


@pytest.mark.parametrize(
    ("names", "channels", "options"),
    [
        (("cat", "dog"), 1, {}),
        (("cat", "dog"), 4, {}),
        (("cat", "dog"), 3, {"image_size": (24, 40), "patch_size": (8, 4)}),
        (("cat", "dog"), 3, {"pool": "mean"}),
        (("cat", "dog"), 3, {"pool": "attention", "registers": 2}),
        (("cat", "dog"), 3, {"registers": 4, "position": "rotary"}),
        (("only",), 3, {}),
        ([f"class {k}" for k in range(40)], 3, {"attention": "dot_product"}),
        (("cat", "dog"), 3, {"norm": "post", "depth": 1}),
        (("cat", "dog"), 3, {"patch_size": 32}),
    ],
    ids=[
        "grey",
        "four_bands",
        "not_square",
        "mean",
        "attention_registers",
        "rotary",
        "one_class",
        "many",
        "post",
        "one_patch",
    ],
)
@pytest.mark.parametrize("method", ["rollout", "relevance"])
def test_every_kind_of_model(photographs, tmp_path, names, channels, options, method):
    model = bundle(tmp_path / "model", names, channels, **options)
    images = photographs[:3]
    if channels == 4:
        images = [tmp_path / f"{k}.npy" for k in range(3)]
        for k, path in enumerate(images):
            np.save(path, np.random.default_rng(k).integers(0, 256, (50, 40, 4), dtype=np.uint8))
    out = tmp_path / "maps"
    assert here("explain", model, *images, "--output", out, "--method", method, "--save-maps") == 0
    run = records_of(out / "index.html")
    assert [probe["name"] for probe in run["info"]["probes"]] == [str(path) for path in images]
    rows, columns = run["info"]["grid"]
    for image, probe, step in zip(images, run["info"]["probes"], run["steps"][0]["probes"], strict=True):
        with np.load(out / f"{image.stem}.npz") as held:
            assert held["map"].shape == (rows, columns)
            assert held["map"].sum() == pytest.approx(1, abs=1e-4)
            assert str(held["label"]) == names[step["predicted"]]
            assert float(held["probability"]) == pytest.approx(step["probability"], abs=1e-5)
        assert set(step["faithfulness"]) == {method, "random"}
        shown = Image.open(io.BytesIO(base64.b64decode(probe["png"])))
        assert shown.size == tuple(run["info"]["image"][::-1])
        overlaid = Image.open(out / f"{image.stem}.png")
        assert overlaid.width / overlaid.height == shown.width / shown.height


def test_the_page_holds_what_the_model_gave(small_bundle, photographs, tmp_path):
    from vit.dashboard.format import unpack

    here("explain", small_bundle, *photographs[:3], "--output", tmp_path, "--save-maps", "--method", "relevance")
    run, data = records_of(tmp_path / "index.html"), data_of(tmp_path / "index.html")
    assert data["start"] == "method=relevance"
    results = load(small_bundle).classify(photographs[:3])
    for i, (path, result) in enumerate(zip(photographs[:3], results, strict=True)):
        step = run["steps"][0]["probes"][i]
        assert step["predicted"] == result.index
        assert [index for index, _ in step["top"]] == [one["index"] for one in result.top]
        assert [p for _, p in step["top"]] == pytest.approx([one["probability"] for one in result.top], abs=1e-5)
        (probe,) = data["probe"][f"{run['run']}\n{i}"]["steps"]
        assert probe["targets"] == [result.index, None]
        with np.load(tmp_path / f"{path.stem}.npz") as held:
            shown = unpack(probe["relevance"])
            assert np.abs(shown[0] - held["map"].ravel()).max() <= held["map"].max() / 255 + 1e-6
        pairs = data["pairs"][f"{run['run']}\n{i}\n0"]
        assert pairs["per_head"] is True
        assert np.abs(unpack(pairs["attention"]).sum(axis=-1) - 1).max() < 0.05


def test_results_do_not_depend_on_the_batch(small_bundle, photographs, tmp_path):
    for method in ("rollout", "relevance", "random"):
        for size in (1, 5):
            out = tmp_path / f"{method}{size}"
            arguments = ["--method", method, "--batch-size", size, "--save-maps", "--index", 0, "--output", out]
            assert here("explain", small_bundle, photographs[0].parent, *arguments) == 0
            for path in out.glob("*.npz"):
                with np.load(path) as one, np.load(tmp_path / f"{method}1" / path.name) as other:
                    assert np.abs(one["map"] - other["map"]).max() < 1e-6
        assert len(list(out.glob("*.npz"))) == 12
    with np.load(out / "00.npz") as one, np.load(out / "01.npz") as other:
        assert np.abs(one["map"] - other["map"]).max() > 1e-3  # a draw of its own for each image


def test_little_memory_for_attention_means_smaller_parts(small_bundle, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("vit.explain.maps._MEMORY", 1)
    assert here("explain", small_bundle, *photographs, "--output", tmp_path, "--method", "legrad") == 0
    assert len(records_of(tmp_path / "index.html")["info"]["probes"]) == 12


# names


def test_images_of_one_name_do_not_overwrite_each_other(small_bundle, photographs, tmp_path, capsys):
    names = ["a/x.jpg", "b/x.png", "c/X.jpg", "c/x-2.jpg", "d/x.jpg", "e/.jpg", "e/y.tar.jpg", "e/y", "e/index.jpg"]
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(photographs[k]).save(tmp_path / name, "PNG")
    sources = [tmp_path / name for name in names]
    out = tmp_path / "maps"
    assert here("explain", small_bundle, *sources, "--output", out, "--save-maps") == 0
    written = [line.split(" -> ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    stems = [Path(path).stem for path in written]
    assert stems == ["x", "x-2", "X-3", "x-2-2", "x-4", ".jpg", "y.tar", "y", "index"]
    assert len({path.casefold() for path in written}) == len(names)
    assert len(list(out.glob("*.npz"))) == len(names)
    model = load(small_bundle)
    for source, path in zip(sources, written, strict=True):
        with np.load(f"{path.removesuffix('.png')}.npz") as held:
            assert float(held["probability"]) == pytest.approx(model.classify(source)[0].probability, abs=1e-5)


def test_odd_names_come_back_as_they_are(small_bundle, photographs, tmp_path):
    stems = [b"odd\xff\x1b[2J\nname", "größe".encode(), b"-dash", "😀".encode() * 62, b"x" * 251, b'"quo<te>&']
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for stem in stems:
        with open(os.path.join(folder, stem + b".jpg"), "wb") as file:
            file.write(photographs[0].read_bytes())
    done = vit("explain", small_bundle, "in", "--output", "maps", "--save-maps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stem in stems:
        whole = [stem[:240] + ending for ending in (b".png", b".npz")]
        assert all(os.path.isfile(os.path.join(os.fsencode(tmp_path), b"maps", name)) for name in whole)
    assert len(os.listdir(tmp_path / "maps")) == 2 * len(stems) + 1
    for stream in (done.stdout, done.stderr):
        assert b"\x1b" not in stream
        stream.decode("utf-8", "strict")
    assert done.stdout.count(b"\n") == len(stems) + 1
    names = [probe["name"] for probe in records_of(tmp_path / "maps" / "index.html")["info"]["probes"]]
    assert any("\\xff\\x1b" in name for name in names)


def test_a_second_call_replaces_its_own_files_and_explains_none_of_them(small_bundle, photos, tmp_path, capsys):
    out = photos / "maps"  # inside of what is read
    for method in ("rollout", "raw"):
        assert here("explain", small_bundle, photos, "--output", out, "--method", method, "--save-maps") == 1
        assert capsys.readouterr().out.count("\n") == 5
        with np.load(out / "00.npz") as held:
            assert str(held["method"]) == method
    assert len(os.listdir(out)) == 9


@pytest.mark.parametrize("name", ["00.png", "00.npz", "index.html"])
def test_a_file_of_somebody_else_is_never_replaced(small_bundle, photographs, tmp_path, capsys, name):
    theirs = tmp_path / name
    if name == "00.png":
        Image.open(photographs[1]).save(theirs)
    elif name == "00.npz":
        np.savez(theirs, map=np.zeros(3))
    else:
        theirs.write_text("<title>mine</title>")
    before = theirs.read_bytes()
    assert here("explain", small_bundle, photographs[0], "--output", tmp_path, "--save-maps") == 2
    assert f"{theirs} is there already" in capsys.readouterr().err
    assert theirs.read_bytes() == before


def test_the_folder_of_the_images_themselves(small_bundle, photographs, tmp_path):
    """A photograph x.png whose overlay would take its name survives."""
    Image.open(photographs[0]).save(tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    assert here("explain", small_bundle, tmp_path, "--output", tmp_path) == 2
    assert (tmp_path / "x.png").read_bytes() == before


# what is asked for


def test_a_class_by_name_or_number(tmp_path, photographs, capsys):
    model = bundle(tmp_path / "model", ["1", "crane", "crane", "dog", "\udcff"])
    out = tmp_path / "maps"

    def label(target) -> tuple[str, float]:
        arguments = ["--output", out, "--save-maps", "--index", 0, "--method", "relevance", "--target", target]
        assert here("explain", model, photographs[0], *arguments) == 0
        with np.load(out / "00.npz") as held:
            return str(held["label"]), float(held["probability"])

    probabilities = [
        one["probability"] for one in sorted(load(model).classify(photographs[0])[0].top, key=lambda o: o["index"])
    ]
    for target, expected in {"dog": 3, "3": 3, "1": 0, "2": 2, "0": 0, "\udcff": 4}.items():
        assert label(target) == (
            ["1", "crane", "crane", "dog", "\udcff"][expected],
            pytest.approx(probabilities[expected], abs=1e-5),
        )
    capsys.readouterr()
    for target, message in {
        "crane": "2 classes are called 'crane': give the number (1, 2)",
        "crne": "did you mean 'crane'?",
        "5": "numbers go from 0 to 4",
        "-1": "no class '-1'",
        "": "no class ''",
    }.items():
        assert here("explain", model, photographs[0], "--output", out, f"--target={target}") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_class_for_a_method_without_classes_is_said(small_bundle, photographs, tmp_path, capsys):
    assert here("explain", small_bundle, photographs[0], "--output", tmp_path, "--target", "dog") == 0
    assert "rollout does not depend on the class" in capsys.readouterr().err


def test_the_table_of_methods_is_that_of_the_functions_and_the_tab():
    """The table has a line for each function, and the Attention tab has the table."""
    from vit.explain.methods import METHODS
    from vit.map_methods import MAP_METHODS, SCRIPT, script

    assert list(MAP_METHODS) == list(METHODS)
    assert SCRIPT.read_text("utf-8") == script(), "run python -m vit.map_methods"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "PHOTO"], "--output"),
        (["MODEL", "--output", "maps"], "SOURCE"),
        (["nowhere", "PHOTO", "--output", "maps"], "no model at nowhere"),
        (["MODEL", "nowhere.jpg", "--output", "maps"], "no input: nowhere.jpg: no such file"),
        (["MODEL", "hollow", "--output", "maps"], "no images in this folder"),
        (["MODEL", "PHOTO", "--output", "maps", "--method", "rolout"], "--method"),
        (["MODEL", "PHOTO", "--output", "maps", "--layer", "2"], "layers 0 to 1"),
        (["MODEL", "PHOTO", "--output", "maps", "--layer", "-3"], "layers 0 to 1"),
        (["MODEL", "PHOTO", "--output", "maps", "--layer", "last"], "--layer"),
        (["MODEL", "PHOTO", "--output", "maps", "--index", "-1"], "--index"),
        (["MODEL", "PHOTO", "--output", "maps", "--batch-size", "0"], "--batch-size"),
        (["MODEL", "PHOTO", "--output", "maps", "--device", "gpu"], "device"),
        (["MODEL", "PHOTO", "--output", "maps", "--backend", "onnx"], "--backend"),
        (["MODEL", "PHOTO", "--output", "file"], "file: it is not a folder"),
        (["MODEL", "PHOTO", "--output", "file/maps"], "cannot write file/maps"),
        (["MODEL", "PHOTO", "--output", ""], "is empty"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(
    small_bundle, photographs, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "file").touch()
    words = {"MODEL": small_bundle, "PHOTO": photographs[0]}
    assert here("explain", *(words.get(word, word) for word in arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("vit: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not (tmp_path / "maps").exists()


def test_all_inputs_bad(small_bundle, photos, tmp_path, capsys):
    bad = [photos / "02-empty.png", photos / "02-text.jpg"]
    assert here("explain", small_bundle, *bad, "--output", tmp_path / "maps") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "vit: 2 of 2 inputs could not be used"
    assert not (tmp_path / "maps").exists()


def test_a_model_whose_weights_are_no_numbers(photographs, tmp_path, capsys):
    model = bundle(tmp_path / "model", scale=float("nan"))
    assert here("explain", model, *photographs[:2], "--output", tmp_path / "maps", "--method", "legrad") == 1
    said = capsys.readouterr()
    assert said.err.count("the model gives no number for this image") == 2
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("form", ["list", "glob", "flat"])
def test_other_sources(small_bundle, photographs, tmp_path, capsys, form):
    source, options = f"{photographs[0].parent}/*.jpg", []
    if form == "list":
        source = tmp_path / "list.txt"
        source.write_text("\n\n".join(map(str, photographs)))
    elif form == "flat":
        source, options = tmp_path / "in", ["--no-recursive"]
        (source / "deeper").mkdir(parents=True)
        shutil.copy(photographs[0], source / "deeper")
        for path in photographs:
            shutil.copy(path, source / f"f{path.name}")
    assert here("explain", small_bundle, source, "--output", tmp_path / "maps", "--index", 0, *options) == 0
    assert len(os.listdir(tmp_path / "maps")) == 12
    assert capsys.readouterr().err == ""


# the page's size


def test_the_page_takes_so_many_images_and_says_so(small_bundle, photographs, tmp_path, capsys):
    assert here("explain", small_bundle, *photographs, "--output", tmp_path, "--index", 3, "--batch-size", 2) == 0
    run = records_of(tmp_path / "index.html")
    assert len(run["info"]["probes"]) == 3
    assert run["problems"] == ["9 more images did not fit this page: the overlays are beside it"]
    assert (
        "shows the first 3 images (--index N changes that); the other 9 have overlays only" in capsys.readouterr().err
    )
    assert len(list(tmp_path.glob("*.png"))) == 12


def test_the_page_stays_small(small_bundle, photographs, tmp_path, monkeypatch):
    from vit.cli import viewer

    each = -(-2 * 17**2 * 4 // 3)  # layers, tokens, base64
    heads = load_torch(small_bundle, device="cpu")[0].blocks[0].attn.heads
    sizes = {}
    for name, pairs in {"heads": 12 * heads * each, "means": 12 * each, "some": 5 * each, "none": 1}.items():
        monkeypatch.setattr(viewer, "_MAX_PAIR_BYTES", pairs)
        assert here("explain", small_bundle, *photographs, "--output", tmp_path / name, "--batch-size", 5) == 0
        run, data = records_of(tmp_path / name / "index.html"), data_of(tmp_path / name / "index.html")
        assert {record["per_head"] for record in data["pairs"].values()} <= {name == "heads"}
        assert len(data["pairs"]) == {"some": 5, "none": 0}.get(name, 12)
        assert run["pairs"] == ([] if name == "none" else [0])
        sizes[name] = (tmp_path / name / "index.html").stat().st_size
    assert sizes["heads"] > sizes["means"] > sizes["some"] > sizes["none"]
    monkeypatch.setattr(viewer, "_MAX_BYTES", 1)
    assert here("explain", small_bundle, *photographs, "--output", tmp_path / "full", "--batch-size", 2) == 0
    assert len(records_of(tmp_path / "full" / "index.html")["info"]["probes"]) == 2  # what it takes to find out


def test_many_bad_inputs_do_not_fill_the_page(small_bundle, photographs, tmp_path):
    missing = [tmp_path / f"none{k}.jpg" for k in range(30)]
    assert here("explain", small_bundle, photographs[0], *missing, "--output", tmp_path / "maps") == 1
    problems = records_of(tmp_path / "maps" / "index.html")["problems"]
    assert len(problems) == 21
    assert problems[0] == f"{missing[0]}: no such file"
    assert problems[-1] == "and 10 more inputs that could not be used"


def test_many_images_in_little_memory(small_bundle, photographs, tmp_path):
    code = (
        "import resource, sys; from vit.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    peaks = []
    for count in (60, 600):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "explain",
                small_bundle,
                "-",
                "--output",
                tmp_path / str(count),
                "--index",
                "4",
            ],
            input=f"{photographs[0]}\n".encode() * count,
            capture_output=True,
            env=ENVIRONMENT,
            check=True,
            timeout=300,
        )
        assert len(os.listdir(tmp_path / str(count))) == count + 1
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0] + 10_000


# processes


def test_a_reader_that_leaves_early_still_gets_its_files(small_bundle, photographs, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vit", "explain", small_bundle, photographs[0].parent, "--output", tmp_path / "maps"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 0
    assert errors.count(b"\n") == 1
    assert len(os.listdir(tmp_path / "maps")) == 13


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_an_interrupt_leaves_whole_files_only(small_bundle, photographs, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vit", "explain", small_bundle, "-", "--output", "maps"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    process.stdin.write(f"{photographs[0]}\n".encode())
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not (tmp_path / "maps" / "00.png").exists():  # with the input still open
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"vit: interrupted\n")
    assert os.listdir(tmp_path / "maps") == ["00.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_standard_output(small_bundle, photographs, tmp_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vit", "explain", small_bundle, photographs[0], "--output", tmp_path / "maps"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            timeout=300,
        )
    assert done.returncode == 2
    assert done.stderr == b"vit: cannot write the results: No space left on device\n"


# vit classify --explain


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_maps_along_with_labels_change_no_row(small_bundle, photos, tmp_path, backend):
    arguments = ["classify", small_bundle, photos, "--format", "jsonl", "--backend", backend, "--device", "cpu"]
    plain, both = vit(*arguments), vit(*arguments, "--explain", "maps", cwd=tmp_path)
    assert (plain.returncode, plain.stdout, plain.stderr) == (both.returncode, both.stdout, both.stderr)
    assert both.returncode == 1
    assert sorted(os.listdir(tmp_path / "maps")) == ["00.png", "01.png", "02.png", "03.png"]
    assert here("explain", small_bundle, photos, "--output", tmp_path / "same", "--index", 0) == 1
    for path in (tmp_path / "maps").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()


def test_classify_leaves_its_earlier_overlays_as_they_are(small_bundle, photographs, tmp_path, capsys):
    shutil.copy(photographs[0], tmp_path / "00.jpg")
    arguments = ["classify", small_bundle, tmp_path, "--explain", tmp_path, "--format", "csv"]
    assert here(*arguments) == 0
    assert here(*arguments) == 0
    assert sorted(os.listdir(tmp_path)) == ["00.jpg", "00.png"]


def test_an_onnx_file_is_explained_as_the_bundle_is(small_bundle, photographs, tmp_path, capsys):
    shutil.copy(small_bundle / "model.onnx", tmp_path / "x.onnx")
    shutil.copytree(small_bundle, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, model in (("a", small_bundle), ("b", tmp_path / "x.onnx"), ("c", tmp_path / "light")):
        assert here("explain", model, photographs[0], "--output", tmp_path / name, "--save-maps") == 0
    a, b, c = (np.load(tmp_path / name / "00.npz")["map"] for name in "abc")
    assert np.array_equal(a, b)
    assert np.array_equal(a, c)
    assert here("classify", tmp_path / "x.onnx", photographs[0], "--explain", tmp_path / "d") == 0
    assert (tmp_path / "d" / "00.png").read_bytes() == (tmp_path / "a" / "00.png").read_bytes()


def test_classify_explains_into_folders_only(small_bundle, photographs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert here("classify", small_bundle, photographs[0], "--explain", tmp_path / "file") == 2
    assert "not a folder" in capsys.readouterr().err


# in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        started = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.mark.parametrize("name", ["plain.jpg", f"{EVIL.replace('/', '')}.jpg", "odd\udcff.jpg"])
def test_the_page_opens_in_a_browser_and_names_stay_text(browser, photographs, tmp_path, name):
    evil = f"</script><script>alert(2)</script>{EVIL}"
    model = bundle(tmp_path / EVIL, [EVIL, evil, "cat"])
    shutil.copy(photographs[0], tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "maps"
    sources = [tmp_path / name, photographs[1], tmp_path / "broken.jpg"]
    assert (
        main(["explain", str(model), *map(str, sources), "--output", str(out), "--method", "raw", "--layer", "0"]) == 1
    )
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda r: trouble.append(r.url) if not r.url.startswith((out.as_uri(), "data:")) else None)
    page.goto((out / "index.html").as_uri())
    page.get_by_text("What the model answers").wait_for()
    answers = page.locator(".top .name").all_inner_texts()
    assert set(answers) == {EVIL, evil, "cat"}
    assert page.locator("img[src='x']").count() == 0
    assert page.locator(".thumb").count() == 2
    text = page.inner_text("body")
    assert "broken.jpg: not an image" in text
    assert "in layer 1" in text  # method and layer that were asked for
    assert "random" in page.locator(".measures").inner_text()
    assert page.title() == f"vit explain: {tmp_path / EVIL}"
    assert trouble == []
    page.close()


def test_the_page_shows_a_class_that_was_asked_for(browser, photographs, tmp_path):
    model = bundle(tmp_path / "model")
    out = tmp_path / "maps"
    arguments = ["--method", "relevance", "--target", EVIL, "--output", str(out)]
    assert main(["explain", str(model), *map(str, photographs[:3]), *arguments]) == 0
    run = records_of(out / "index.html")
    assert run["info"]["asked"] == 2
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto((out / "index.html").as_uri())
    page.locator(".meaning:not(:empty)").wait_for()
    assert f"for the class “{EVIL}” (" in page.locator(".meaning").inner_text()
    assert "asked for" in page.locator(".meaning").inner_text()
    assert "slider" not in page.inner_text("body")
    assert "true class" not in page.inner_text("article").lower()
    wrong = next(i for i, step in enumerate(run["steps"][0]["probes"]) if step["predicted"] != 2)
    page.locator(".thumb").nth(wrong).click()
    page.get_by_role("radio", name="Difference").check()
    page.wait_for_function("document.querySelector('.meaning').textContent.includes('speak for')")
    assert f"blue ones for “{EVIL}”, the class asked for" in page.locator(".meaning").inner_text()
    assert trouble == []
    page.close()
