"""Rows as text: whatever a path or a label holds, a row is a row and no terminal is told anything."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit.cli.output import Csv, JsonLines, Table, make_formatter, open_output
from vit.errors import VitError
from vit.inference.classifier import Result

# what os.fsdecode can give: any text but lone surrogates other than those of undecodable bytes
TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff\n\r\t\x1b\x07\x9b\u2028\u202e,\"'|")
)


def answer(path: str, label: str) -> Result:
    top = [{"label": label, "index": 0, "probability": 0.1 + 0.2}, {"label": "b", "index": 1, "probability": 0.25}]
    return Result(path, **top[0], top=top)


def is_tame(text: str) -> bool:
    return not any(char < " " or "\x7f" <= char < "\xa0" or char in "\u2028\u2029" for char in text if char != "\n")


@given(TEXT, TEXT)
def test_jsonl_is_one_line_of_strict_json_that_gives_everything_back(path, label):
    for result in (answer(path, label), Result(path, error=label)):
        line = JsonLines().row(result)
        assert line.encode("utf-8", "strict").count(b"\n") == 1
        assert len(line.splitlines()) == 1
        assert is_tame(line)
        assert json.loads(line) == result.to_dict()


@given(TEXT, TEXT)
def test_csv_is_five_cells_that_any_reader_reads(path, label):
    for result in (answer(path, label), Result(path, error=label)):
        text = Csv().head() + Csv().row(result)
        text.encode("utf-8", "strict")
        assert is_tame(text.replace("\t", ""))
        head, row = csv.reader(io.StringIO(text, newline=""))
        assert head == ["path", "label", "index", "probability", "error"]
        assert len(row) == 5
        assert row[3] in ("", repr(0.1 + 0.2))  # full precision
        if path.isprintable() and path.isascii():
            assert row[0] == path


@given(TEXT, TEXT)
def test_table_is_one_tame_line_a_row(path, label):
    table = Table([label])
    for result in (answer(path, label), Result(path, error=label)):
        line = table.row(result)
        line.encode("utf-8", "strict")
        assert line.count("\n") == 1
        assert is_tame(line)


def test_paths_that_are_text_stay_readable():
    for name in ("jsonl", "csv", "table"):
        assert "größe/猫.jpg" in make_formatter(name, ["a"]).row(answer("größe/猫.jpg", "naïve"))


def test_a_file_appears_when_it_is_whole(tmp_path):
    def fail():
        with open_output(str(tmp_path / "x.csv")) as file:
            file.write(b"half")
            assert not (tmp_path / "x.csv").exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []
    with open_output(str(tmp_path / "x.csv")) as file:
        file.write(b"whole")
    assert (tmp_path / "x.csv").read_bytes() == b"whole"
    (tmp_path / "link.csv").symlink_to("x.csv")
    with open_output(str(tmp_path / "link.csv")) as file:
        file.write(b"again")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "x.csv").read_bytes() == b"again"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(VitError, match="it is a folder"), open_output(str(tmp_path)):
        pass


def test_a_count_is_shown_to_a_person_and_only_on_standard_error(small_bundle, photographs):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "vit", "classify", small_bundle, photographs[0].parent, "--format", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"},
        check=True,
        timeout=300,
    )
    os.close(theirs)
    seen = os.read(ours, 100_000)
    os.close(ours)
    assert b"images" in seen
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 12
