"""Which checkpoint is best, when a run stops for want of a better one, and that both survive going on elsewhere."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vit.errors import VitError
from vit.training import logistic
from vit.training.checkpoints import Checkpoints, ranking_key

OLD_RUN = Path(__file__).parent / "old_run"  # three epochs on digits, written by the version of commit d451e4a
TINY = ("data.max_images=48", "model.width=8", "model.depth=1", "model.heads=1")


def load(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


class Recorder:
    """What `Checkpoints` needs of a trainer, and the order in which it saves."""

    def __init__(self, folder):
        self.folder, self.strategy, self.should_stop, self.saved = folder, self, False, []
        folder.mkdir(exist_ok=True)

    def broadcast(self, value):
        return value

    def save_checkpoint(self, path):
        Path(path).touch()
        self.saved.append(Path(path).stem)

    def validate(self, checkpoints, top1, loss):
        """The files that one validation with these figures writes."""
        self.saved, self.callback_metrics = [], {"val/top1": torch.tensor(top1), "val/loss": torch.tensor(loss)}
        checkpoints.on_validation_end(self, None)
        return self.saved


@pytest.mark.parametrize(
    ("monitor", "figures", "best"),
    [
        ("val/top1", [(0.5, 2.0), (0.9, 1.0), (0.9, 0.5), (0.9, 0.7), (0.8, 0.1)], [0, 1, 2]),
        ("val/top1", [(0.9, 0.5), (0.9, 0.5)], [0]),
        ("val/loss", [(0.5, 1.0), (0.7, 1.0), (0.6, 1.0), (0.1, 0.9), (0.1, 0.9)], [0, 1, 3]),
        ("val/loss", [(0.5, math.nan), (0.4, math.nan), (0.1, 3.0), (0.9, math.nan)], [0, 2]),
    ],
)
@pytest.mark.parametrize("resumed_after", [None, 0, 1, 2, 3])
def test_equal_figures_go_to_the_better_of_the_other_figure(tmp_path, monitor, figures, best, resumed_after):
    trainer, callback = Recorder(tmp_path / "a"), Checkpoints(tmp_path / "a", monitor)
    written = []
    for number, (top1, loss) in enumerate(figures):
        saved = trainer.validate(callback, top1, loss)
        assert saved[-1] == "last"
        written += [number] if "best" in saved else []
        if number == resumed_after:
            state = json.loads(json.dumps(callback.state_dict()))
            moved = tmp_path / "b"
            (tmp_path / "a").rename(moved)
            trainer, callback = Recorder(moved), Checkpoints(moved, monitor)
            callback.on_load_checkpoint(trainer, None, {"callbacks": {callback.state_key: state}})
    assert written == best


def test_another_monitor_is_compared_with_the_best_so_far_and_a_lost_file_is_written_again(tmp_path):
    trainer, callback = Recorder(tmp_path), Checkpoints(tmp_path, "val/top1")
    trainer.validate(callback, 0.9, 1.0)
    state = {"callbacks": {callback.state_key: callback.state_dict()}}
    for monitor, figures, better in (("val/loss", (0.1, 1.5), False), ("val/loss", (0.1, 0.5), True)):
        callback = Checkpoints(tmp_path, monitor)
        callback.on_load_checkpoint(trainer, None, state)
        assert ("best" in trainer.validate(callback, *figures)) is better
    (tmp_path / "best.ckpt").unlink()
    callback = Checkpoints(tmp_path, "val/top1")
    callback.on_load_checkpoint(trainer, None, state)
    assert "best" in trainer.validate(callback, 0.1, 9.0)


def test_patience_counts_validations_without_a_better_one_and_goes_on_counting(tmp_path):
    trainer, callback = Recorder(tmp_path), Checkpoints(tmp_path, "val/top1", patience=3)
    stops = []
    for top1, loss in [(0.4, 1.0), (0.4, 0.9), (0.5, 1.0), (0.5, 1.0), (0.5, 0.9)]:
        trainer.validate(callback, top1, loss)
        stops.append(trainer.should_stop)
    assert stops == [False] * 5
    again = Checkpoints(tmp_path, "val/top1", patience=3)
    again.on_load_checkpoint(trainer, None, {"callbacks": {callback.state_key: callback.state_dict()}})
    trainer.validate(again, 0.4, 1.0)
    assert trainer.should_stop
    for patience, stopped in ((3, True), (4, False), (None, False)):
        trainer, after = Recorder(tmp_path), Checkpoints(tmp_path, "val/top1", patience)
        after.on_load_checkpoint(trainer, None, {"callbacks": {again.state_key: again.state_dict()}})
        assert trainer.should_stop is stopped


def test_the_probe_chooses_by_the_same_order(run, monkeypatch):
    figures = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.6), (0.7, 0.8), (0.6, 0.1)]

    def heads(self):
        for number, (top1, loss) in enumerate(figures):
            head = self.model.head
            yield float(number), torch.zeros_like(head.weight), head.bias, {"val/loss": loss, "val/top1": top1}

    from vit.training.linear_probe import Probe

    monkeypatch.setattr(Probe, "_fit_heads", heads)
    for monitor, chosen in (("val/top1", 2), ("val/loss", 4)):
        assert run(*TINY, "augment=none", "method=linear_probe", f"monitor={monitor}").metrics["penalty"] == chosen
    assert len(logistic.PENALTIES) > len(figures)
    order = np.array([ranking_key({"val/top1": a, "val/loss": b}, "val/top1") for a, b in figures])
    assert order[:, 0].tolist() == [a for a, _ in figures]


class Killed(Exception):
    """A process that is gone: what it wrote is there, and nothing else happens."""


@pytest.mark.parametrize("monitor", ["val/top1", "val/loss"])
@pytest.mark.parametrize(
    ("end", "patience", "validate_every"), list(itertools.product(["patience", "max_epochs", "killed"], [2, 9], [1, 2]))
)
def test_a_run_with_patience_goes_on_wherever_it_ended(run, monkeypatch, monitor, end, patience, validate_every):
    if end == "patience" and patience == 9:
        patience = 1
    options = (*TINY, f"monitor={monitor}", f"trainer.validate_every={validate_every}", f"trainer.patience={patience}")
    still = ("optim=sgd", "optim.lr=1e-30")  # nothing changes, so nothing gets better
    last = {"patience": 20, "max_epochs": 2, "killed": 4}[end]
    if end == "killed":
        original, folders = Checkpoints.on_validation_end, []

        def kill(self, *args):
            original(self, *args)
            folders.append(self.folder.parent)
            raise Killed

        monkeypatch.setattr(Checkpoints, "on_validation_end", kill)
        with pytest.raises(Killed):
            run(*options, *still, f"trainer.max_epochs={last}")
        monkeypatch.undo()
        folder = folders[0]
    else:
        folder = run(*options, *still, f"trainer.max_epochs={last}").folder
    before = load(folder)["epoch"] + 1
    assert before == {"patience": (1 + patience) * validate_every, "max_epochs": 2, "killed": validate_every}[end]
    if end == "patience":
        with pytest.raises(VitError, match=r"trainer\.patience"):
            run(*options, *still, f"trainer.max_epochs={last}", f"resume={folder}")
    rest = run(*options, *still, "trainer.patience=50", f"trainer.max_epochs={before + 3}", f"resume={folder}")
    assert rest.metrics["epochs"] == before + 3
    assert load(folder, "best")["epoch"] + 1 == validate_every  # the first of equal ones


def strings(value):
    """Every text in nested plain values."""
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in strings(each)]
    if isinstance(value, list | tuple | set):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


def test_a_checkpoint_names_no_place_and_a_run_folder_can_be_moved(run, tmp_path):
    options = (*TINY, "monitor=val/loss", "trainer.patience=50")
    still = ("optim=sgd", "optim.lr=1e-30")
    done = run(*options, "trainer.max_epochs=4")
    for name in ("best", "last"):
        saved = load(done.folder, name)
        saved["vit"]["training"].pop("overrides")  # what was typed
        assert not [text for text in strings(saved) if str(tmp_path) in text or str(done.folder) in text]
    moved = tmp_path / "moved here"
    shutil.move(done.folder, moved)
    best = load(moved, "best")["global_step"], load(moved)["callbacks"]["Checkpoints(val/loss)"]["best"]
    worse = ("optim.lr=1.0", "optim.matrix_lr=1.0")
    run(*options, *worse, "trainer.max_epochs=6", f"resume={moved}")
    state = load(moved)["callbacks"]["Checkpoints(val/loss)"]
    assert (load(moved, "best")["global_step"], state["best"]) == best
    assert still


@pytest.mark.filterwarnings("error:.*callbacks used to create the checkpoint.*")
def test_a_run_of_the_version_before_goes_on_and_keeps_its_best(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    options = (
        "model.width=8",
        "model.depth=1",
        "model.heads=1",
        "ema.decay=0.9",
        "optim.accumulate=2",
        "augment=gentle",
    )
    still = ("optim.lr=1e-30", "optim.matrix_lr=1e-30", "trainer.patience=9")
    rest = run(*options, *still, "trainer.max_epochs=5", f"resume={folder}")
    assert rest.metrics["epochs"] == 5
    assert load(folder)["global_step"] == 50
    assert load(folder)["callbacks"]["Checkpoints(val/top1)"]["best_model_score"] >= 0.15555

    shutil.copytree(OLD_RUN, tmp_path / "again")
    place = tmp_path / "again" / "checkpoints"
    trainer, callback = Recorder(place), Checkpoints(place, "val/top1")
    callback.on_load_checkpoint(trainer, None, load(tmp_path / "again"))
    assert callback.since == 1
    assert trainer.validate(callback, 0.1555, 0.1) == ["last"]
    assert trainer.validate(callback, 0.1556, 9.0) == ["best", "last"]
