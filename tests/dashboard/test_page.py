"""The viewer in one file: modules put together, data that stays data, and a content policy that holds."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vit.dashboard.page import bundle_modules, render_page

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> \u2028 é"
MODULES = {
    "index.js": 'import { mount } from "./viewer.js";\nexport function render() { mount(document.body, {}, {}); }\n',
    "viewer.js": (
        'import {a, b} from "./a.js";\nimport { c } from "./c.js";\n\n'
        "export function mount(root, source, options) { root.textContent = a + b() + new c().x; }\n"
    ),
    "a.js": 'import {c} from "./c.js";\nexport const a = 1;\nexport async function b() { return c; }\nlet own = 2;\n',
    "c.js": "export class c { x = 3; }\n",
}


class Parts(HTMLParser):
    """What a browser's parser makes of a page: elements with their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = tag, attributes, text + data

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", {}, ""))

    def of(self, tag: str, **attributes: str) -> list[tuple[dict[str, Any], str]]:
        found = ((has, text) for name, has, text in self.found if name == tag)
        return [(has, text) for has, text in found if attributes.items() <= has.items()]


@pytest.fixture
def static(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "viewer.css").write_text("body { margin: 0; }\n")
    return tmp_path


def test_modules_are_joined_in_the_order_they_need(static: Path) -> None:
    script = bundle_modules(static)
    assert re.findall(r"^// (\S+)$", script, re.MULTILINE) == ["c.js", "a.js", "viewer.js"]
    assert "import" not in script
    assert "export" not in script
    assert "render" not in script, "the page starts by itself; TensorBoard's start stays out"
    assert "async function b() { return c; }" in script
    assert "class c { x = 3; }" in script


def test_the_page_holds_all_and_its_policy_lets_nothing_else_in(static: Path) -> None:
    data = {"runs": {"version": 1, "runs": [{"run": HOSTILE}]}, "probe": {f"{HOSTILE}\n0": 1}, "pairs": {}}
    text = render_page(HOSTILE, data, static=static)
    parts = Parts(text)
    assert json.loads(parts.of("script", type="application/json")[0][1]) == data
    assert [has.get("type") for has, _ in parts.of("script")] == ["application/json", "module"]
    assert not parts.of("img")
    assert parts.of("title")[0][1].strip() == HOSTILE
    assert not [has for _, has, _ in parts.found if {"src", "href", "style"} & has.keys()]
    policy = parts.of("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind, inside in (("script", parts.of("script", type="module")[0][1]), ("style", parts.of("style")[0][1])):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    # the policy stands before everything that it is for
    assert text.index("Content-Security-Policy") < min(text.index("<style"), text.index("<script"))


def test_no_less_than_sign_of_the_data_reaches_the_page(static: Path) -> None:
    text = render_page("t", {"runs": "<" * 10, "<k>": 1}, static=static)
    block = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)
    assert block is not None
    assert "<" not in block[1]
    assert html.unescape(block[1]) == block[1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"a.js": "export const a = 1;\nexport const b = 2;\nconst mount = 3;\n"}, "mount is a name of the top level"),
        ({"a.js": 'import {mount} from "./viewer.js";\nexport const a = 1;\nexport const b = 1;\n'}, "circle: viewer"),
        ({"a.js": "export const a = 1;\n"}, "viewer.js imports b, which a.js does not export"),
        (
            {"a.js": "export const a = 1;\nexport const b = 2;\nexport default 3;\n"},
            "cannot be put into a page: export",
        ),
        ({"a.js": 'export const a = 1;\nexport const b = () => import("./c.js");\n'}, "cannot be put into a page"),
        ({"c.js": "export class c { x = '</script>'; }\n"}, "end tag"),
        ({"viewer.css": "a::after { content: '</style>'; }"}, "end tag"),
        ({"viewer.js": 'import {x} from "./gone.js";\nexport function mount() {}\n'}, "gone.js, which is not there"),
        ({"viewer.js": "function mount() {}\n"}, "one module that exports mount, there are 0"),
        ({"c.js": "export function mount() {}\n"}, "there are 2: c.js, viewer.js"),
    ],
)
def test_what_cannot_be_joined_is_said(static: Path, changes: dict[str, str], match: str) -> None:
    for name, text in changes.items():
        (static / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        render_page("t", {}, static=static)


def test_data_that_is_no_json_is_refused(static: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        render_page("t", {"runs": float("nan")}, static=static)


def test_the_real_viewer_becomes_a_page() -> None:
    text = render_page("Attention", {"runs": {"version": 1, "runs": []}, "probe": {}, "pairs": {}})
    assert len(Parts(text).of("script")) == 2
    assert len(text) < 400_000
