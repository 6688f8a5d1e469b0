"""Build the viewer as one HTML page with style, modules and data.

The page opens from a disk and sends nothing.  Its content policy allows only the scripts and styles with these hashes,
and images from the data.  The data is text from anyone's files, so it is in a block that is not a script, with every
"<" escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
STYLE = "viewer.css"

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w.-]+\.js)";[ \t]*\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function\b|const\b|let\b|class\b)", re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?:export )?(?:async )?(?:function\*?|const|let|var|class) +([\w$]+)", re.MULTILINE)
_MOUNT = re.compile(r"^export (?:async )?function mount\b", re.MULTILINE)

# does what index.js does in TensorBoard: the source reads the data in the page
_START = """
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const source = {
    runs: async () => data.runs,
    probe: async (run, i) => data.probe[`${run}\\n${i}`] ?? { steps: [], problems: [] },
    pairs: async (run, i, step) => {
      const record = data.pairs[`${run}\\n${i}\\n${step}`];
      if (!record) throw new Error("not in this page");
      return record;
    },
  };
  if (data.start && !location.hash) history.replaceState(null, "", `#${data.start}`);
  mount(document.body, source, { url: true });
}
"""


def render_page(title: str, data: Mapping[str, Any], *, static: Path = STATIC) -> str:
    """Build the HTML text of the viewer with its data.

    Args:
        title: the title of the window.
        data: plain JSON: {"runs": the response of the route /runs, "probe": {"RUN\\nPROBE": the response of /probe},
            "pairs": {"RUN\\nPROBE\\nSTEP": a pairs record}}; an optional "start" is the start view, as in the viewer's
            URLs after "#".
        static: folder of the viewer's modules and style.

    Raises:
        ValueError: if the data is not JSON, or a module cannot be put into a page.
    """
    style = (static / STYLE).read_text(encoding="utf-8")
    script = f"{bundle_modules(static)}{_START}"
    for name, text in (("the viewer's modules", script), (STYLE, style)):
        if re.search(r"</(script|style)|<!--", text, re.IGNORECASE):
            raise ValueError(f"{name} hold an end tag or a comment of HTML, which would end them early")
    policy = (
        "default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    title = title.encode("utf-8", "replace").decode()  # a file name may hold bytes that are not text
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
<script type="application/json" id="data">{content}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def bundle_modules(static: Path = STATIC) -> str:
    """Join the module that exports `mount` and all modules that it imports into one, dependencies first.

    A module imports with lines `import {a, b} from "./x.js";` and exports with `export` before a function, const, let
    or class; top-level names are unique over all modules.  Raises ValueError otherwise.
    """
    modules = {path.name: path.read_text(encoding="utf-8") for path in sorted(static.glob("*.js"))}
    starts = [name for name, text in modules.items() if _MOUNT.search(text)]
    if len(starts) != 1:
        raise ValueError(f"expected one module that exports mount, there are {len(starts)}: {', '.join(starts)}")
    order: list[str] = []
    _add_module(starts[0], modules, order, ())
    owners: dict[str, str] = {}
    for name in order:
        for identifier in _TOP_LEVEL.findall(modules[name]):
            if owners.setdefault(identifier, name) != name:
                raise ValueError(f"{identifier} is a name of the top level in {owners[identifier]} and in {name}")
    parts = []
    for name in order:
        text = _EXPORT.sub("", _IMPORT.sub("", modules[name]))
        if left := re.search(r"^(import|export)\b.*|\bimport\(.*", text, re.MULTILINE):
            raise ValueError(f"{name}: cannot be put into a page: {left[0]}")
        parts.append(f"// {name}\n{text.strip()}\n")
    return "\n".join(parts)


def _add_module(name: str, modules: Mapping[str, str], order: list[str], trail: tuple[str, ...]) -> None:
    """Append the imports of `name`, and then `name`, to `order`."""
    if name in trail:
        raise ValueError(f"modules import each other in a circle: {' -> '.join([*trail, name])}")
    if name not in modules:
        raise ValueError(f"{trail[-1]} imports {name}, which is not there")
    if name in order:
        return
    for names, target in _IMPORT.findall(modules[name]):
        _add_module(target, modules, order, (*trail, name))
        exported = set(_TOP_LEVEL.findall("\n".join(re.findall(r"^export .*", modules[target], re.MULTILINE))))
        if missing := {part.strip() for part in names.split(",") if part.strip()} - exported:
            raise ValueError(f"{name} imports {', '.join(sorted(missing))}, which {target} does not export")
    order.append(name)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
