"""The figures that a run ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vit.training.folder import print_closing_lines


@pytest.mark.parametrize(("classes", "shown"), [(2, False), (4, False), (5, False), (6, True), (10, True)])
def test_top_5_is_a_figure_where_there_are_more_classes_than_five(classes, shown, capsys):
    block = {"top1": 0.5, "top5": 1.0, "loss": 0.25, "ece": 0.125}
    metrics = {"val": block, "test": block, "train_seconds": 1.0, "images_per_second": 2.0}
    metrics |= {"never_predicted": [], "chosen_on_validation": []}
    config = SimpleNamespace(run=SimpleNamespace(root="runs"))
    print_closing_lines(config, Path("runs/r"), metrics, classes)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [("top-5" in line) for line in lines[:2]] == [shown, shown]
    assert all("top-1 50.0%" in line and "loss 0.2500" in line for line in lines[:2])
