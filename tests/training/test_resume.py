"""What a resumed run is configured with: its own values, and what is typed now."""

import pytest
import yaml

from vit.errors import VitError
from vit.training.resume import checkpoint_of, configuration, folder_of

DEFAULTS = {
    "data": {"name": "digits", "batch_size": 128},
    "optim": {"name": "muon", "lr": 2e-3},
    "trainer": {"max_epochs": 100},
    "seed": 0,
    "resume": None,
}


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    own = {"optim": {"name": "adamw", "lr": 1e-4}, "data": {"name": "cifar10", "batch_size": 64}, "seed": 7}
    saved = {**DEFAULTS, **own}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder


def test_the_runs_own_values_hold(run_folder):
    values = configuration({**DEFAULTS, "resume": str(run_folder)}, [f"resume={run_folder}"])
    assert values["optim"] == {"name": "adamw", "lr": 1e-4}
    assert values["data"]["name"] == "cifar10"
    assert values["seed"] == 7
    assert values["resume"] == str(run_folder)


def test_what_is_typed_wins_even_where_it_is_a_default(run_folder):
    typed = {**DEFAULTS, "trainer": {"max_epochs": 300}, "resume": str(run_folder)}
    values = configuration(typed, ["trainer.max_epochs=300", "seed=0", f"resume={run_folder}"])
    assert values["trainer"]["max_epochs"] == 300
    assert values["seed"] == 0
    assert values["optim"]["name"] == "adamw"


def test_a_group_replaces_the_whole_group(run_folder):
    values = configuration({**DEFAULTS, "resume": str(run_folder)}, ["optim=muon"])
    assert values["optim"] == DEFAULTS["optim"]
    assert values["data"]["name"] == "cifar10"


def test_a_key_that_is_newer_than_the_run_has_its_default(run_folder):
    newer = {**DEFAULTS, "optim": {**DEFAULTS["optim"], "clip": None}, "logging": {"every": 10}}
    values = configuration({**newer, "resume": str(run_folder)}, [])
    assert values["optim"] == {"name": "adamw", "lr": 1e-4, "clip": None}
    assert values["logging"] == {"every": 10}


@pytest.mark.parametrize("override", ["experiment=cifar10", "debug=fast"])
def test_another_recipe_is_refused(run_folder, override):
    with pytest.raises(VitError, match="leave out"):
        configuration({**DEFAULTS, "resume": str(run_folder)}, [override])


def test_a_checkpoint_outside_a_run_folder_takes_what_is_composed(tmp_path):
    path = tmp_path / "moved.ckpt"
    path.write_bytes(b"")
    assert folder_of(path) is None
    typed = {**DEFAULTS, "resume": str(path)}
    assert configuration(typed, []) == typed


def test_a_damaged_configuration_is_named(run_folder):
    (run_folder / "config.yaml").write_text("a: [")
    with pytest.raises(VitError, match=r"config\.yaml"):
        configuration({**DEFAULTS, "resume": str(run_folder)}, [])


def test_nothing_to_resume_says_what_is_expected(tmp_path):
    with pytest.raises(VitError, match=r"last\.ckpt"):
        checkpoint_of(str(tmp_path))
