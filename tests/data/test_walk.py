"""A walk meets every folder once and loses nothing: each file is given, or counted under a reason."""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vit.data.walk as walk_module
from vit.data.walk import SYSTEM, FoundFile, Walk, describe, system_name

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8ffff3f0300050001a5"
    "f645400000000049454e44ae426082"
)
odd_names = st.sampled_from(
    [
        "@eaDir",
        "#recycle",
        "$Recycle.Bin",
        "thumbs.db",
        ".git",
        "._a.jpg",
        "train",
        "Val",
        "\u00e9",
        "e\u0301",
        "Cat",
        "cat ",
        "-r",
    ]
)
names = odd_names | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=6
).filter(lambda name: name not in (".", ".."))
file_names = st.builds(
    lambda stem, ending: stem + ending, names, st.sampled_from(["", ".jpg", ".PNG", ".txt", ".JPG_large", ".heic"])
)
contents = st.sampled_from([PIXEL, PIXEL, b"", b"words", b"\x7fELF\0", b"\xff\x0a\xfa"])
trees = st.recursive(
    st.dictionaries(file_names, contents, max_size=4),
    lambda inner: st.dictionaries(names, inner | contents, max_size=4),
    max_leaves=12,
)


def build(folder: Path, tree: dict) -> list[Path]:
    """Make the files of `tree`; returns its folders."""
    made = [folder]
    for name, inside in tree.items():
        if isinstance(inside, dict):
            (folder / name).mkdir()
            made += build(folder / name, inside)
        else:
            (folder / name).write_bytes(inside)
    return made


def expected(root: Path) -> tuple[set[str], int]:
    """The real paths of all images to be found, and the number of other entries that are met, by a plain search."""
    images, others, todo, known = set(), 0, [root], {os.path.realpath(root)}
    while todo:
        for entry in sorted(todo.pop().iterdir()):
            if entry.name.startswith(".") or entry.name.casefold() in {name.casefold() for name in SYSTEM.values()}:
                others += 1
            elif entry.is_dir():
                if os.path.realpath(entry) in known:
                    others += 1
                else:
                    known.add(os.path.realpath(entry))
                    todo.append(entry)
            elif entry.name.lower().endswith((".jpg", ".png")) or entry.read_bytes() == PIXEL:
                images.add(os.path.join(os.path.realpath(entry.parent), entry.name))
            else:
                others += 1
    return images, others


def walked(root: Path, **options) -> tuple[list[str], Counter]:
    walk = Walk(**options)
    images = []
    for found in walk.files(str(root)):
        assert isinstance(found, FoundFile)
        if found.kind is None:
            images.append(found.path)
        else:
            walk.passed_over[found.kind] += 1
    return images, walk.passed_over


@settings(max_examples=150, deadline=None)
@given(trees, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), names), max_size=5))
def test_nothing_is_lost_and_nothing_comes_twice(tree, links):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = build(root, tree)
        for source, target, link in links:
            place = folders[source % len(folders)] / link
            if not os.path.lexists(place):
                place.symlink_to(folders[target % len(folders)], target_is_directory=True)
        images, passed_over = walked(root)
        found = [os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in images]
        wanted, others = expected(root)
        assert sorted(found) == sorted(wanted)
        assert passed_over.total() == others
        assert "\n" not in describe(passed_over)


def test_a_tree_without_links_comes_in_the_order_of_full_paths(tmp_path):
    for name in ("b.jpg", "a/z.jpg", "a-1.jpg", "a/deep/x", "a.jpg", "Z", "a b/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PIXEL)
    images, _ = walked(tmp_path)
    assert images == sorted(images)
    assert len(images) == 7


def test_folders_that_link_to_one_another_are_walked_once(tmp_path):
    for one in range(12):
        (tmp_path / f"d{one}").mkdir()
        for other in range(12):
            (tmp_path / f"d{one}" / f"l{other}").symlink_to(f"../d{other}")
    (tmp_path / "d0" / "a.png").write_bytes(PIXEL)
    images, passed_over = walked(tmp_path)
    assert len(images) == 1
    assert passed_over == {"folder linked a second time": 144}


@pytest.mark.skipif(shutil.which("rm") is None, reason="needs rm, which removes folders of any depth")
def test_a_very_deep_folder_is_no_recursion(tmp_path):
    depth, here = 1500, os.getcwd()  # Python recurses a thousand times
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").write_bytes(PIXEL)
        os.chdir(here)
        images, _ = walked(tmp_path)
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True, timeout=60)  # deeper than shutil.rmtree goes
    assert len(images) == 1


def test_only_files_of_other_endings_are_opened(tmp_path, monkeypatch):
    for k in range(300):
        (tmp_path / f"{k}.jpg").write_bytes(b"")
        (tmp_path / f"{k}").write_bytes(PIXEL)
    looked = []
    kind = "vit.data.filetype.file_kind"
    monkeypatch.setattr(kind, lambda path, channels: looked.append(os.path.basename(path)))
    images, _ = walked(tmp_path)
    assert len(images) == 600
    assert sorted(looked) == sorted(str(k) for k in range(300))


def test_where_a_walk_begins_is_taken_whatever_its_name(tmp_path):
    for name in ("@eaDir", ".hidden", "__MACOSX"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(PIXEL)
        assert len(walked(tmp_path / name)[0]) == 1
    assert walked(tmp_path) == ([], {"@eaDir": 1, "hidden file or folder": 1, "__MACOSX": 1})
    assert system_name("$Recycle.bin") == "$RECYCLE.BIN"
    assert system_name("eaDir") is None


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no /proc")
def test_what_the_kernel_shows_as_files_is_not_walked(tmp_path):
    (tmp_path / "kernel").symlink_to("/proc")
    (tmp_path / "a.jpg").write_bytes(PIXEL)
    images, passed_over = walked(tmp_path)
    assert len(images) == 1
    assert passed_over == {"folder of the kernel": 1}


def test_a_long_walk_says_so_ever_more_rarely(tmp_path, monkeypatch):
    for k in range(100):
        (tmp_path / str(k)).mkdir()
    clock = iter(range(10_000))
    monkeypatch.setattr(walk_module.time, "monotonic", lambda: next(clock))
    said = []
    walked(tmp_path, say=said.append)
    assert 4 <= len(said) <= 10  # about a second a folder: after 3, 7, 15, ... seconds
    assert all(line.startswith("still looking for images in ") for line in said)


def test_counts_as_words():
    counts = {"text file": 2, "HEIC file": 40, "@eaDir": 1, "hidden file or folder": 3}
    assert describe(counts) == (
        "40 HEIC files (to read them: pip install pillow-heif), 3 hidden files or folders, 2 text files, 1 @eaDir"
    )
    many = {f".{k:02} file": 1 for k in range(20)}
    assert describe(many).endswith(", 8 of other kinds")
