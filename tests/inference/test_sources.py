"""What a source stands for: order, hidden files, lists, globs, streams, and names that are no text."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vit.errors import VitError
from vit.inference.classifier import Flush, InvalidInput
from vit.inference.sources import expand_sources

TREE = [
    "b.jpg",
    "a/z.PNG",
    "a-1.jpg",
    "a/deep/er/x.webp",
    "a.txt.jpg",
    "Z.jpeg",
    ".hidden.jpg",
    ".git/y.jpg",
    "notes.md",
]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*sources, **options) -> list:
    return [item for item in expand_sources(sources, **options) if not isinstance(item, Flush)]


def test_a_folder_gives_its_images_in_plain_order_of_full_paths(tree):
    images = ["Z.jpeg", "a-1.jpg", "a.txt.jpg", "a/deep/er/x.webp", "a/z.PNG", "b.jpg"]
    assert listed(".") == sorted(f"./{name}" for name in images)
    assert listed(str(tree)) == sorted(str(tree / name) for name in images)
    assert listed(f"{tree}/") == sorted(f"{tree}/{name}" for name in images)


def test_only_the_first_level_when_asked(tree):
    assert listed(".", recursive=False) == ["./Z.jpeg", "./a-1.jpg", "./a.txt.jpg", "./b.jpg"]


def test_named_files_are_always_tried(tree):
    assert listed("notes.md", ".hidden.jpg", "b.jpg", "b.jpg") == ["notes.md", ".hidden.jpg", "b.jpg", "b.jpg"]


def test_globs(tree):
    assert listed("*.jpg") == ["a-1.jpg", "a.txt.jpg", "b.jpg"]
    assert listed("**/*.[Pw]*") == ["a/deep/er/x.webp", "a/z.PNG"]
    assert listed("?*") == ["Z.jpeg", "a-1.jpg", "a.txt.jpg", "b.jpg", "notes.md"]  # files, not the folder


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tree):
    (tree / "x[1].jpg").touch()
    (tree / "x1.jpg").touch()
    assert listed("x[1].jpg") == ["x[1].jpg"]


def test_a_list_is_relative_to_the_current_folder(tree):
    (tree / "a" / "list.TXT").write_bytes(
        b"\xef\xbb\xbfb.jpg\r\n\r\n  \n./a/z.PNG\nnot there.jpg\n with spaces .jpg\nlast"
    )
    assert listed("a/list.TXT") == ["b.jpg", "./a/z.PNG", "not there.jpg", " with spaces .jpg", "last"]


def test_names_that_are_no_text(tree):
    name = os.fsdecode(b"odd\xff\n.jpg")
    (tree / name).touch()
    assert f"./{name}" in listed(".")
    assert listed(name) == [name]
    (tree / "list.txt").write_bytes(b"odd\xff.jpg\n")
    assert [os.fsencode(item) for item in listed("list.txt")] == [b"odd\xff.jpg"]


def test_what_is_missing_is_passed_on_in_its_place(tree):
    items = listed("no.jpg", "b.jpg", "nowhere/*.jpg", "a", "gone.txt")
    assert items == [
        InvalidInput("no.jpg", "no such file"),
        "b.jpg",
        InvalidInput("nowhere/*.jpg", "no file matches"),
        "a/deep/er/x.webp",
        "a/z.PNG",
        InvalidInput("gone.txt", "no such file"),
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "name files, folders"),
        (["no.jpg"], r"no\.jpg: no such file"),
        (["no.jpg", "nor this"], "and 1 more"),
        (["*.gif"], "no file matches"),
        (["empty"], "no images in this folder"),
        (["list.txt"], "no paths in this list"),
        (["nul\0byte"], "no such file"),
        ([""], "no such file"),
    ],
)
def test_it_is_an_error_when_nothing_is_there_at_all(tree, sources, message):
    (tree / "empty").mkdir()
    (tree / "list.txt").write_text("\n\n")
    with pytest.raises(VitError, match=message):
        listed(*sources)


def test_subfolders_left_out_are_mentioned(tree):
    (tree / "outer" / "inner").mkdir(parents=True)
    (tree / "outer" / "inner" / "a.jpg").touch()
    with pytest.raises(VitError, match="subfolders were left out"):
        listed("outer", recursive=False)


def test_links_in_a_circle_end(tree):
    (tree / "a" / "up").symlink_to(tree)
    (tree / "a" / "dangling.jpg").symlink_to("nowhere")
    names = listed("a")
    assert "a/z.PNG" in names
    assert "a/dangling.jpg" in names  # named, so that its row says what is wrong
    assert len(names) < 20


def test_each_folder_once_whatever_links_to_it(tree):
    for one in range(12):
        (tree / "net" / f"d{one}").mkdir(parents=True)
        for other in range(12):
            (tree / "net" / f"d{one}" / f"l{other}").symlink_to(f"../d{other}")
    (tree / "net" / "d7" / "x.jpg").touch()
    passed_over = Counter()
    assert len(listed("net", passed_over=passed_over)) == 1
    assert passed_over == {"folder linked a second time": 144}
    assert len(listed("net/**/*.jpg")) == len(listed(f"{tree}/net/**")) == 1


def test_folders_hold_images_by_content_and_the_rest_is_counted(tree):
    photo = io.BytesIO()
    Image.new("RGB", (4, 4)).save(photo, "JPEG")
    for name in ("c/scraped.JPG_large", "c/bare", "c/wrong.txt"):
        (tree / "c").mkdir(exist_ok=True)
        (tree / name).write_bytes(photo.getvalue())
    (tree / "c" / "words").write_text("words")
    (tree / "c" / "raw.CR2").write_bytes(b"II*\0" + bytes(99))
    for name in ("@eaDir", "$RECYCLE.BIN", ".thumbnails", "d"):
        (tree / "c" / name).mkdir()
        (tree / "c" / name / "x.jpg").touch()
    passed_over = Counter()
    items = listed("c", passed_over=passed_over)
    # an image that cannot be read here has a row, which says so
    assert items == ["c/bare", "c/d/x.jpg", "c/raw.CR2", "c/scraped.JPG_large", "c/wrong.txt"]
    assert passed_over == {"text file": 1, "@eaDir": 1, "$RECYCLE.BIN": 1, "hidden file or folder": 1}
    assert listed("c/@eaDir") == ["c/@eaDir/x.jpg"]
    assert listed("c/.thumbnails", "c/words") == ["c/.thumbnails/x.jpg", "c/words"]


def test_globs_pass_over_what_folders_pass_over(tree):
    for name in ("a/@eaDir", "a/ok"):
        (tree / name).mkdir()
        (tree / name / "t.jpg").touch()
    passed_over = Counter()
    for pattern in ("a/*/t.jpg", "a/**/t.jpg", "**/t.jpg", f"{tree}/**/t.jpg", "./**/t.jpg", "a/**/ok/*"):
        assert [os.path.normpath(path) for path in listed(pattern, passed_over=passed_over)] in (
            ["a/ok/t.jpg"],
            [f"{tree}/a/ok/t.jpg"],
        )
    assert passed_over["@eaDir"] == 6
    assert listed("a/@eaDir/*", "a/**/@eaDir/*", ".git/**/*.jpg") == ["a/@eaDir/t.jpg"] * 2 + [".git/y.jpg"]
    assert listed("**/.git/*") == [".git/y.jpg"]


def test_a_folder_without_images_says_what_it_holds(tree):
    (tree / "words").mkdir()
    (tree / "words" / "a").write_text("a")
    with pytest.raises(VitError, match=r"no images in this folder \(passed over: 1 text file\)"):
        listed("words")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_row(tree):
    (tree / "a").chmod(0)
    try:
        assert any(isinstance(item, InvalidInput) and "ermission" in item.reason for item in listed("."))
    finally:
        (tree / "a").chmod(0o755)


def test_standard_input_is_a_stream_with_pauses():
    reader, writer = os.pipe()
    stream = expand_sources(["-"], stdin=reader)
    os.write(writer, b"a.jpg\nb.jp")
    assert next(stream) == "a.jpg"
    assert isinstance(next(stream), Flush)
    threading.Timer(0.2, lambda: (os.write(writer, b"g\n"), os.close(writer))).start()
    start = time.monotonic()
    assert next(item for item in stream if not isinstance(item, Flush)) == "b.jpg"
    assert time.monotonic() - start < 30
    assert [item for item in stream if not isinstance(item, Flush)] == []
    os.close(reader)


def test_empty_standard_input_is_an_error():
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(VitError, match="standard input: no paths came"):
        listed("-", stdin=reader)
    os.close(reader)


def test_endless_lines_are_refused_in_bounded_memory(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"x" * 1_000_000)
    with pytest.raises(VitError, match="64 kB"):
        listed(str(tmp_path / "list.txt"))
