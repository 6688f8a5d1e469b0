"""What docs/python.md shows runs and prints what it says; docs/notebook.ipynb runs in a kernel."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_python_runs(tmp_path, monkeypatch):
    """In order, in one process; figures depend on the machine, the rest does not."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # fewer epochs: what is trained is not looked at
            exec(code.replace("epochs=5", "epochs=1").replace('epochs": 5', 'epochs": 1'), names)
        found = printed.getvalue().split("\n\n")[-1] if "metrics" in code else printed.getvalue()
        if shown and "epochs=5" not in code and "%" not in shown:
            assert found.splitlines()[-1] == shown.splitlines()[-1]
        elif shown:
            assert _without_figures(found.splitlines()[-1]) == _without_figures(shown.splitlines()[-1])


def _without_figures(line: str) -> str:
    """A line without its figures, the run's folder and the class that is seen."""
    line = re.sub(r"/\S*/runs/digits/[\d_-]+", "FOLDER", line)
    return re.sub(r"'?\b\d+(\.\d+)?'?%?", "#", line)


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "the notebook is kept without outputs"
    for cell in code:
        cell.source = cell.source.replace("epochs=5", "epochs=1").replace('epochs": 5', 'epochs": 1')
    NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def outputs(word: str) -> list:
        (cell,) = (cell for cell in code if word in cell.source)
        return cell.outputs

    trained = outputs('vit.train("digits"')
    assert "epoch 1/1" in _text(trained, "display_data")
    assert re.search(r"test top-1 \d", _text(trained, "execute_result"))
    assert "<table>" in trained[-1].data["text/html"]
    assert "image/png" in outputs('method="relevance"')[-1].data
    assert outputs("map.shape")[-1].data["text/plain"].startswith("((4, 4), ")
    assert "'even'" in _text(outputs("per_class"), "execute_result")
    assert not [each for each in trained if each.output_type == "error"]


def _text(outputs: list, kind: str) -> str:
    return "\n".join(each.data["text/plain"] for each in outputs if each.output_type == kind)


def test_a_notebooks_line_is_replaced(monkeypatch):
    pytest.importorskip("IPython")
    from vit.training import progress

    calls = []

    class Handle:
        def update(self, line):
            calls.append(("update", line.data))

    def display(line, display_id):
        calls.append(("display", line.data))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    line = progress._NotebookLine()
    line.show("epoch 1/2", 0.25, ["loss 1.0", ""])
    line.show("epoch 2/2", 0.75, ["0:01 left"])
    line.close()
    assert calls == [("display", "epoch 1/2  25%  loss 1.0"), ("update", "epoch 2/2  75%  0:01 left")]
    assert not progress.in_notebook()
