"""A name whose ending says another format than what would be written is refused in one line, before any work."""

from __future__ import annotations

import pytest

from vit.cli import main
from vit.cli.output import choose_format
from vit.errors import VitError
from vit.files import check_folder_name
from vit.training.eval_app import eval_main

PLAIN = [
    (["classify", "MODEL", "a.jpg", "--output", "x.xlsx"], ".xlsx is no format of the results: what --format table"),
    (["classify", "MODEL", "a.jpg", "--output", "x.csv", "--format", "jsonl"], "--format jsonl goes into .jsonl, .ndj"),
    (["classify", "MODEL", "a.jpg", "--output", "x.json"], ".jsonl, .ndjson, .csv say their format themselves"),
    (["classify", "MODEL", "a.jpg", "--explain", "x.html"], "--explain x.html: no .html file is written here"),
    (["explain", "MODEL", "a.jpg", "--output", "x.png"], "--output x.png: no .png file is written here: expected the"),
    (["export", "MODEL", "x.tflite"], "expected a name that ends in .onnx or .pt2, or that of a folder, such as x.tfl"),
    (["export", "MODEL", "x.TFLITE", "--int8"], "export x.TFLITE: no .TFLITE file is written here"),
    (["export", "MODEL", "x.safetensors"], "export x.safetensors: no .safetensors file is written here"),
    (["tune-reduction", "MODEL", "--budget", "0.5", "--output", "x.onnx"], "--output x.onnx: no .onnx file is written"),
]


@pytest.mark.parametrize(("arguments", "told"), PLAIN, ids=lambda each: each[-1] if isinstance(each, list) else "")
def test_an_ending_of_another_format_is_refused(arguments, told, small_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(small_bundle) if each == "MODEL" else each for each in arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluation_writes_a_folder(small_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert eval_main([f"checkpoint={small_bundle}", "output=figures.csv"]) == 2
    assert capsys.readouterr().err.startswith("output figures.csv: no .csv file is written here: expected the name of")


@pytest.mark.parametrize("name", ["maps", "maps.v2", "model-1.5", "2026-01-01.10", "x.onnx/", ".hidden", "a.b/c"])
def test_names_of_folders_pass(name):
    check_folder_name(name, "--output")


def test_a_folder_that_is_there_passes(tmp_path):
    (tmp_path / "x.html").mkdir()
    check_folder_name(tmp_path / "x.html", "--output")
    with pytest.raises(VitError):
        check_folder_name(tmp_path / "y.html", "--output")


@pytest.mark.parametrize(
    ("path", "wanted", "written"),
    [
        (None, None, "table"), ("-", "csv", "csv"), ("x", None, "table"), ("x.txt", None, "table"),
        ("x.CSV", None, "csv"), ("x.ndjson", "jsonl", "jsonl"), ("x.txt", "jsonl", "jsonl"),
        ("/dev/stdout", None, "table"),
    ],
)  # fmt: skip
def test_endings_that_fit(path, wanted, written):
    assert choose_format(path, wanted) == written
