"""Schedules against their formulas, and the end of training at the end of each kind of budget."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit.errors import VitError
from vit.training.schedule import SCHEDULES, Schedule, lr_factor

SHARES = st.floats(0, 1)


@given(SHARES)
def test_cosine_is_half_a_cosine_after_a_linear_warmup(p):
    expected = max(p / 0.1, 1e-3) if p < 0.1 else 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (p - 0.1) / 0.9))
    assert lr_factor(p, name="cosine", warmup=0.1, final=0.2) == pytest.approx(expected)


@given(SHARES)
def test_linear_falls_along_a_line(p):
    assert lr_factor(p, name="linear", final=0.1) == pytest.approx(0.1 + 0.9 * (1 - p))


@given(SHARES)
def test_wsd_stays_until_the_cooldown(p):
    expected = 1.0 if p <= 0.7 else 0.05 + 0.95 * (1 - p) / 0.3
    assert lr_factor(p, name="wsd", cooldown=0.3, final=0.05) == pytest.approx(expected)


@given(SHARES, st.sampled_from(SCHEDULES), st.floats(0, 0.5), st.floats(0, 0.5), SHARES)
def test_every_schedule_stays_between_nothing_and_the_peak(p, name, warmup, cooldown, final):
    value = lr_factor(p, name=name, warmup=warmup, cooldown=cooldown, final=final)
    assert 0 <= value <= 1


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.05, 1.0])
def test_a_schedule_ends_at_its_final_share(name, warmup):
    assert lr_factor(1.0, name=name, warmup=warmup, final=0.01) == pytest.approx(0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_progress_outside_of_training_counts_as_its_start_or_end(name):
    options = {"name": name, "warmup": 0.1, "cooldown": 0.2, "final": 0.3}
    assert lr_factor(1.5, **options) == lr_factor(1.0, **options)
    assert lr_factor(-0.5, **options) == lr_factor(0.0, **options)


def test_wsd_without_a_cooldown_stays():
    assert lr_factor(0.5, name="wsd") == lr_factor(1.0, name="wsd", final=0.5) == 1.0


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(VitError, match="did you mean 'cosine'"):
        lr_factor(0.5, name="cosin")


def _trainer(**values):
    defaults = {"current_epoch": 0, "num_training_batches": 10, "global_step": 0, "world_size": 1}
    return SimpleNamespace(**(defaults | values))


def test_progress_by_epochs_steps_and_time_is_the_budget_that_is_spent_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vit.training.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(schedule={"name": "linear"}, max_epochs=4, max_steps=100, max_time=50.0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    schedule.on_train_start(_trainer(optimizers=[optimizer]), None)
    assert schedule.progress(_trainer(current_epoch=1), 5) == pytest.approx(1.5 / 4)
    assert schedule.progress(_trainer(current_epoch=1, global_step=80), 5) == pytest.approx(0.8)
    now[0] += 45.0
    assert schedule.progress(_trainer(current_epoch=1, global_step=80), 5) == pytest.approx(0.9)


def test_a_time_budget_leaves_room_for_the_last_validation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit.training.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0)
    now[0] = 10.0
    schedule.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    schedule.on_validation_start(None, None)
    now[0] += 5.0
    schedule.on_validation_end(None, None)
    trainer = _trainer(should_stop=False)
    now[0] = 10.0 + 44.0
    schedule.on_train_batch_end(trainer, None, None, None, 3)
    assert not trainer.should_stop
    now[0] = 10.0 + 45.5
    schedule.on_train_batch_end(trainer, None, None, None, 4)
    assert trainer.should_stop


def test_time_already_spent_counts_after_a_resume(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit.training.schedule.time.monotonic", lambda: now[0])
    first = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0)
    now[0] = 1.0
    first.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    now[0] = 21.0
    second = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0)
    second.load_state_dict(first.state_dict())
    now[0] = 500.0
    second.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    now[0] = 505.0
    assert second.progress(_trainer(), 0) == pytest.approx(0.5)


@pytest.mark.parametrize("batches", [1, 7, 100])
def test_the_clock_of_several_processes_is_the_first_ones_also_where_epochs_are_short(batches, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit.training.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0)
    strategy = SimpleNamespace(root_device="cpu", broadcast=lambda clock, source: clock)
    trainer = _trainer(world_size=2, strategy=strategy, should_stop=False)
    now[0] = 1.0
    schedule.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    for step in range(400):
        epoch, batch = divmod(step, batches)
        trainer.current_epoch, trainer.global_step = epoch, step
        if batch == 0:
            now[0] += 0.3  # the validation before it
        assert schedule.progress(trainer, batch) == pytest.approx(min(1, (now[0] - 1) / 50), abs=0.05)
        now[0] += 0.25
        trainer.global_step = step + 1
        schedule.on_train_batch_end(trainer, None, None, None, batch)
        if trainer.should_stop:
            break
    assert now[0] - 1 == pytest.approx(50, abs=2.5)


def test_learning_rates_follow_the_schedule_from_each_groups_own_peak():
    schedule = Schedule(schedule={"name": "linear"}, max_epochs=2, max_steps=None, max_time=None)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}, {"lr": 0.02}])
    trainer = _trainer(optimizers=[optimizer], current_epoch=1)
    module = SimpleNamespace(progress=0.0)
    schedule.on_train_start(trainer, module)
    schedule.on_train_batch_start(trainer, module, None, 0)
    assert module.progress == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.01])


def test_what_the_start_took_counts_in_the_time_and_not_in_the_progress(monkeypatch):
    now = [1.0]
    monkeypatch.setattr("vit.training.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0, spent=30.0)
    schedule.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    assert schedule.progress(_trainer(), 0) == 0
    now[0] += 5.0
    assert schedule.progress(_trainer(), 0) == pytest.approx(0.25)  # of the 20 seconds that were left
    resumed = Schedule(schedule={"name": "linear"}, max_epochs=None, max_steps=None, max_time=50.0)
    resumed.load_state_dict(schedule.state_dict())
    resumed.on_train_start(_trainer(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]), None)
    assert resumed.progress(_trainer(), 0) == pytest.approx(0.25)
    trainer = _trainer(should_stop=False)
    now[0] += 15.5
    resumed.on_train_batch_end(trainer, None, None, None, 3)
    assert trainer.should_stop
    assert resumed.spent() == pytest.approx(50.5)
