"""Printed commands: whatever a path holds, the line can be pasted, and Hydra reads the path that was meant."""

import os
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vit import shell

awkward = st.text(st.sampled_from(" '\"\\$é=(),{}[]-~#&;|<>*?!`\n\t:ab/%@+\udcff"), min_size=1, max_size=12)
anything = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
paths = (awkward | anything).filter(lambda text: text != "???")  # OmegaConf's word for a value that is missing


def read(override):
    """The value that Hydra takes from an override, interpolations resolved."""
    value = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"key": None})
    OmegaConf.update(config, "key", value)
    return OmegaConf.to_container(config, resolve=True)["key"]


@given(paths)
@example("runs/a\\${b}")
@example("a\\\\${b}\\")
@example("123")
@example("null")
def test_hydra_reads_the_path(path):
    assert read(shell.format_override("key", path)) == path


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_a_shell_passes_the_words_on():
    """Many lines in one shell, for speed."""
    lines: list[list[str]] = []

    @given(st.lists(paths, min_size=1, max_size=3))
    def collect(words):
        lines.append(words)

    collect()
    script = "".join(f"printf '%s\\0' {shell.join_command(*words)}\n" for words in lines)
    done = subprocess.run(["bash"], input=os.fsencode(script), stdout=subprocess.PIPE, check=True, timeout=60)
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == [word for words in lines for word in words]


def test_the_common_case_is_plain_and_a_dash_is_no_option():
    assert (
        shell.join_command("python", shell.format_override("checkpoint", "runs/digits/1"))
        == "python checkpoint=runs/digits/1"
    )
    assert shell.join_command("x", shell.format_override("resume", "my runs/1")) == "x \"resume='my runs/1'\""
    assert shell.format_path("-x/y") == "./-x/y"
