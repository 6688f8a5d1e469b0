"""`vit classify` as a person or a script runs it: real processes, real files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def vit(*arguments, stdin: bytes = b"", cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vit", *map(os.fsencode, arguments)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        timeout=300,
    )


@pytest.fixture
def photos(photographs, tmp_path) -> Path:
    """A folder with twelve good files and, between them, every kind of bad one."""
    folder = tmp_path / "photos"
    shutil.copytree(photographs[0].parent, folder)
    (folder / "03-broken.jpg").write_bytes(photographs[3].read_bytes()[:-60])
    (folder / "05-empty.png").touch()
    (folder / "07-text.jpg").write_text("no image\n")
    return folder


def test_jsonl_is_the_contract(small_bundle, photos):
    done = vit("classify", small_bundle, photos, "--format", "jsonl", "--top-k", "3", "--batch-size", "4")
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["path"] for row in rows] == sorted(str(path) for path in photos.iterdir())
    good = [row for row in rows if "error" not in row]
    assert len(good) == 12
    for row in good:
        assert list(row) == ["path", "label", "index", "probability", "top"]
        assert len(row["top"]) == 3
        assert row["top"][0] == {key: row[key] for key in ("label", "index", "probability")}
        assert row["probability"] == max(one["probability"] for one in row["top"])
    for row in rows:
        if "error" in row:
            assert list(row) == ["path", "error"]
    errors = {Path(row["path"]).name: row["error"] for row in rows if "error" in row}
    assert errors["03-broken.jpg"].startswith("truncated JPEG: ")
    assert errors["05-empty.png"] == "empty file"
    assert done.stderr.decode() == "vit: 3 of 15 inputs could not be used; their rows say why\n"


def test_what_a_folder_holds_beside_images_is_counted_on_standard_error(small_bundle, photographs, tmp_path):
    folder = tmp_path / "photos"
    (folder / "@eaDir").mkdir(parents=True)
    shutil.copy(photographs[0], folder / "scraped.JPG_large")
    shutil.copy(photographs[0], folder / "@eaDir" / "small.jpg")
    (folder / "README.txt").write_text("words")
    done = vit("classify", small_bundle, folder, "--format", "jsonl")
    assert done.returncode == 0
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == [str(folder / "scraped.JPG_large")]
    assert done.stderr == b"vit: passed over: 1 @eaDir, 1 text file\n"
    for name in ("1.jxl", "2.jxl"):
        (folder / name).write_bytes(b"\xff\x0a\xfa")
    done = vit("classify", small_bundle, folder, "--format", "jsonl")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr.decode().splitlines()[1] == (
        "vit: 2 of 3 inputs could not be used; their rows say why (of 2: JPEG XL file; convert it to JPEG or PNG)"
    )


def test_a_long_walk_says_so_and_takes_ctrl_c(small_bundle, tmp_path):
    code = (
        "import sys\nfrom vit.data import walk\nfrom vit.cli import main\nwalk._REPORT_AFTER = 0.01\nsys.exit(main())"
    )
    arguments = [sys.executable, "-c", code, "classify", small_bundle, "/", "--output", tmp_path / "all.jsonl"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path)
    try:
        assert process.stderr.readline().startswith(b"vit: still looking for images in /: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_both_backends_and_every_kind_of_model_give_the_same_rows(small_bundle, photos, tmp_path):
    assert vit("export", small_bundle, tmp_path / "x.onnx").returncode == 0
    tables = []
    for model, backend in [(small_bundle, "onnx"), (small_bundle, "torch"), (tmp_path / "x.onnx", "auto")]:
        done = vit("classify", model, photos, "--format", "csv", "--backend", backend, "--device", "cpu")
        assert done.returncode == 1
        tables.append(list(csv.DictReader(done.stdout.decode().splitlines())))
    assert list(tables[0][0]) == ["path", "label", "index", "probability", "error"]
    for rows in zip(*tables, strict=True):
        assert len({(row["path"], row["label"], row["index"], row["error"]) for row in rows}) == 1
        probabilities = [float(row["probability"] or 0) for row in rows]
        assert max(probabilities) - min(probabilities) < 1e-4


def test_csv_keeps_odd_labels_and_paths_in_their_cells(small_bundle, photographs, tmp_path):
    names = ["plain.jpg", 'quo"te, comma.jpg', "new\nline.jpg", "\x1b[31mred.jpg", "größe.jpg"]
    for name in names:
        shutil.copy(photographs[0], tmp_path / name)
    done = vit("classify", small_bundle, *names, "--format", "csv", cwd=tmp_path)
    assert done.returncode == 0
    text = done.stdout.decode()
    assert "\x1b" not in text
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert [row["path"] for row in rows] == [name.replace("\x1b", "\\x1b") for name in names]
    assert all(row["error"] == "" and float(row["probability"]) <= 1 for row in rows)


def test_names_that_are_not_utf8_come_back_whole(small_bundle, photographs, tmp_path):
    name = b"odd\xff\x1b[2J\xc2\x9b\nname.jpg"
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(photographs[0].read_bytes())
    for sources, stdin in [(["."], b""), ([os.fsdecode(name)], b"")]:
        done = vit("classify", small_bundle, *sources, "--format", "jsonl", cwd=tmp_path, stdin=stdin)
        assert done.returncode == 0
        (line,) = done.stdout.decode("utf-8", "strict").splitlines()  # valid, and one line
        assert "\x1b" not in line
        assert "\x9b" not in line
        assert os.fsencode(json.loads(line)["path"]).endswith(name)
    for form in ("csv", "table"):
        done = vit("classify", small_bundle, ".", "--format", form, cwd=tmp_path)
        assert b"\x1b" not in done.stdout
        assert "\x9b" not in done.stdout.decode("utf-8", "strict")
    assert done.stdout.count(b"\n") == 2


def test_table_is_for_reading(small_bundle, photos):
    done = vit("classify", small_bundle, photos, "--top-k", "2")
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 16
    assert lines[0].split() == ["LABEL", "PROB", "PATH"]
    assert sum("ERROR" in line for line in lines) == 3
    assert sum("%" in line for line in lines) == 12


@pytest.mark.parametrize("form", ["list", "stdin", "glob"])
def test_other_sources(small_bundle, photographs, tmp_path, form):
    folder, stdin = photographs[0].parent, b""
    if form == "list":
        (tmp_path / "list.txt").write_text("\n\n".join(map(str, photographs)))
        source = tmp_path / "list.txt"
    elif form == "stdin":
        source, stdin = "-", "\n".join(map(str, photographs)).encode()
    else:
        source = f"{folder}/*.jpg"
    done = vit("classify", small_bundle, source, "--format", "jsonl", stdin=stdin)
    assert done.returncode == 0
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == [str(path) for path in photographs]
    assert done.stderr == b""


def test_no_recursive(small_bundle, photographs, tmp_path):
    (tmp_path / "inner").mkdir()
    shutil.copy(photographs[0], tmp_path / "a.jpg")
    shutil.copy(photographs[0], tmp_path / "inner" / "b.jpg")
    for option, count in (("--recursive", 2), ("--no-recursive", 1)):
        done = vit("classify", small_bundle, ".", option, "--format", "jsonl", cwd=tmp_path)
        assert len(done.stdout.splitlines()) == count


def test_an_answer_comes_before_the_next_question(small_bundle, photographs):
    process = subprocess.Popen(
        [sys.executable, "-m", "vit", "classify", small_bundle, "-", "--format", "jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    for path in photographs[:3]:
        process.stdin.write(f"{path}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["path"] == str(path)  # with the input still open
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_many_paths_in_little_memory(small_bundle, photographs):
    """Ten times the inputs take no more memory: the peak is read from the process itself."""
    code = (
        "import resource, sys; from vit.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    peaks = []
    for count in (300, 3000):
        done = subprocess.run(
            [sys.executable, "-c", code, "classify", small_bundle, "-", "--format", "jsonl"],
            input=f"{photographs[0]}\n".encode() * count,
            capture_output=True,
            env=ENVIRONMENT,
            check=True,
            timeout=300,
        )
        assert done.stdout.count(b"\n") == count
        peaks.append(int(done.stderr))
    assert peaks[1] < 1.25 * peaks[0] + 10_000


def test_output_is_whole_or_absent(small_bundle, photos, tmp_path):
    done = vit("classify", small_bundle, photos, "--output", "rows.csv", cwd=tmp_path)  # the name tells the format
    assert done.stdout == b""
    assert len(list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))) == 15
    (tmp_path / "kept.jsonl").write_text("old\n")
    done = vit("classify", small_bundle, tmp_path / "none", "--output", "kept.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "kept.jsonl").read_text() == "old\n"
    assert sorted(os.listdir(tmp_path)) == ["kept.jsonl", "photos", "rows.csv"]


def test_output_to_a_device_does_not_replace_the_device(small_bundle, photographs):
    assert vit("classify", small_bundle, photographs[0], "--output", "/dev/null").returncode == 0
    assert not Path("/dev/null").is_file()
    done = vit("classify", small_bundle, photographs[0], "--output", "-", "--format", "jsonl")
    assert json.loads(done.stdout)["path"] == str(photographs[0])


def test_decoders_add_nothing_to_standard_error(small_bundle, tmp_path):
    """Pillow logs what it dislikes about a TIFF's samples a pixel; the row says it already."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    tag = struct.pack("<HHI", 277, 3, 1)  # SamplesPerPixel, one SHORT
    assert tag + b"\3" in buffer.getvalue()
    (tmp_path / "odd.tif").write_bytes(buffer.getvalue().replace(tag + b"\3", tag + b"\x91"))
    done = vit("classify", small_bundle, tmp_path / "odd.tif")
    assert done.returncode == 1
    assert done.stderr == b"vit: 1 of 1 inputs could not be used; their rows say why\n"


def test_output_that_cannot_be_written(small_bundle, photographs, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "x.csv"):
        done = vit("classify", small_bundle, photographs[0], "--output", output)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert b"cannot write" in done.stderr
    assert b"file is not a folder" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_standard_output(small_bundle, photographs):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vit", "classify", small_bundle, photographs[0]],
            stdout=full,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            timeout=300,
        )
    assert done.returncode == 2
    assert done.stderr == b"vit: cannot write the results: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["clasify"], "choose from"),
        (["classify"], "MODEL, SOURCE"),
        (["classify", "MODEL"], "SOURCE"),
        (["classify", "nowhere", "x.jpg"], "no model at nowhere"),
        (["classify", "MODEL", "nowhere.jpg"], "no input: nowhere.jpg: no such file"),
        (["classify", "MODEL", "."], "no images in this folder"),
        (["classify", "MODEL", "x.jpg", "--top-k", "0"], "--top-k"),
        (["classify", "MODEL", "x.jpg", "--top-k", "many"], "--top-k"),
        (["classify", "MODEL", "x.jpg", "--batch-size", "-3"], "--batch-size"),
        (["classify", "MODEL", "x.jpg", "--format", "xml"], "--format"),
        (["classify", "MODEL", "x.jpg", "--backend", "tpu"], "--backend"),
        (["classify", "MODEL", "x.jpg", "--device", "gpu"], "device"),
        (["classify", "MODEL", "x.jpg", "--frobnicate"], "--frobnicate"),
        (["export", "MODEL"], "OUT"),
        (["info", "nowhere"], "no model at nowhere"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(small_bundle, tmp_path, arguments, message):
    arguments = [small_bundle if word == "MODEL" else word for word in arguments]
    done = vit(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"vit: ")
    assert done.stderr.count(b"\n") == 1
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_damaged_model_is_reported_before_any_row(small_bundle, tmp_path):
    """Though it is found out while the first inputs, here not one of which can be used, are looked at."""
    import onnx

    message = onnx.load(small_bundle / "model.onnx")
    message.graph.node[3].op_type = "NoSuchOperator"
    del message.metadata_props[-1]  # its checksum
    onnx.save(message, tmp_path / "x.onnx")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for stdin, source in ((b"", tmp_path / "broken.jpg"), (os.fsencode(tmp_path / "broken.jpg"), "-")):
        done = vit("classify", tmp_path / "x.onnx", source, "--output", tmp_path / "rows.csv", stdin=stdin)
        assert done.returncode == 2
        assert done.stdout == b""
        assert done.stderr.count(b"\n") == 1
        assert b"x.onnx is damaged or not an ONNX model" in done.stderr
        assert not (tmp_path / "rows.csv").exists()


def test_a_traceback_when_asked_for(tmp_path):
    done = vit("info", "nowhere", cwd=tmp_path, VIT_TRACEBACK="1")
    assert b"Traceback" in done.stderr


def test_a_missing_file_among_others_is_a_row(small_bundle, photographs):
    done = vit("classify", small_bundle, "nowhere.jpg", photographs[0], "--format", "jsonl")
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {"path": "nowhere.jpg", "error": "no such file"}
    assert second["path"] == str(photographs[0])


def test_a_reader_that_leaves_early_is_no_error(small_bundle, photographs):
    process = subprocess.Popen(
        [sys.executable, "-m", "vit", "classify", small_bundle, "-", "--format", "jsonl", "--batch-size", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdin.write(f"{photographs[0]}\n".encode())
    process.stdin.flush()
    assert process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(f"{photographs[0]}\n".encode() * 50, timeout=60)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_keeps_nothing_partial(small_bundle, photographs, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "vit", "classify", small_bundle, "-", "--output", "rows.jsonl"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    process.stdin.write(f"{photographs[0]}\n".encode())
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.iterdir()):  # until the first row is in the hidden file
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"vit: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_real_photographs(small_bundle, real_photographs):
    done = vit("classify", small_bundle, real_photographs[0].parent, "--format", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [row["path"] for row in rows] == [str(path) for path in real_photographs]
    assert all(0 < row["probability"] <= 1 for row in rows)
