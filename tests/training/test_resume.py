"""What a resumed run is configured with: its own values, and what is typed now."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit import options
from vit.errors import VitError
from vit.training.config import Config
from vit.training.resume import FIXED_KEYS, find_checkpoint, find_run_folder, resume_config

HOLDS = frozenset(
    """
    data.root data.eval_batch_size data.max_bad_fraction data.resident data.workers data.cache data.cache_side
    data.cache_folder data.download
    augment.name augment.crop_padding augment.random_resized_crop augment.crop_scale augment.crop_ratio augment.flip
    augment.rotate augment.translate augment.scale augment.shear augment.border augment.rand_augment
    augment.rand_magnitude augment.color_jitter augment.erasing augment.mixup augment.cutmix augment.mix_prob
    augment.mix_off_epochs augment.label_smoothing
    model.dropout model.attention_dropout model.drop_path model.patch_dropout model.compile
    optim.lr optim.matrix_lr optim.weight_decay optim.momentum optim.betas optim.clip optim.accumulate
    schedule.name schedule.warmup schedule.cooldown schedule.final
    trainer.name trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy trainer.precision
    trainer.max_epochs trainer.max_steps trainer.max_time trainer.validate_every trainer.deterministic trainer.threads
    trainer.limit_train_batches trainer.limit_val_batches trainer.patience trainer.patch_dropout_off
    finetune.unfreeze lora.dropout distill.teacher distill.kind distill.alpha distill.temperature
    probe.cache probe.temperature logging.tensorboard logging.every logging.images logging.attention logging.progress
    export.onnx resume monitor
    """.split()  # noqa: SIM905
)

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
    values = resume_config({**DEFAULTS, "resume": str(run_folder)}, [f"resume={run_folder}"])
    assert values["optim"] == {"name": "adamw", "lr": 1e-4}
    assert values["data"]["name"] == "cifar10"
    assert values["seed"] == 7
    assert values["resume"] == str(run_folder)


def test_what_is_typed_wins_even_where_it_is_a_default(run_folder):
    typed = {**DEFAULTS, "trainer": {"max_epochs": 300}, "resume": str(run_folder)}
    values = resume_config(typed, ["trainer.max_epochs=300", "optim.lr=2e-3", f"resume={run_folder}"])
    assert values["trainer"]["max_epochs"] == 300
    assert values["optim"] == {"name": "adamw", "lr": 2e-3}


def test_a_group_replaces_the_whole_group(run_folder):
    composed = {**DEFAULTS, "optim": {"name": "adamw", "lr": 5e-4}}
    values = resume_config({**composed, "resume": str(run_folder)}, ["optim=adamw"])
    assert values["optim"] == composed["optim"]
    assert values["data"]["name"] == "cifar10"


@pytest.mark.parametrize("override", ["optim=muon", "data=digits", "seed=0", "data.batch_size=128"])
def test_what_cannot_hold_is_refused_and_named(run_folder, override):
    with pytest.raises(
        VitError, match=r"(optim\.name|data\.name|seed|data\.batch_size)=.* cannot hold in a run that has"
    ):
        resume_config({**DEFAULTS, "resume": str(run_folder)}, [override])


def test_every_key_holds_or_is_refused_beside_resume():
    """A new key has to be put into one of the two: `FIXED` of `vit.training.resume`, or `HOLDS` here."""
    keys = {key.name for key in options.list_keys(Config)}
    assert not FIXED_KEYS & HOLDS
    assert keys - FIXED_KEYS - HOLDS == set()


KEYS = sorted(FIXED_KEYS | HOLDS)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(0, 1), st.sampled_from(["auto", "adamw"]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(typed=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=6), data=st.data())
def test_what_is_typed_is_in_the_result_or_named_in_the_refusal(run_folder, typed, data):
    saved = nested({key: data.draw(VALUES) for key in KEYS if key != "resume"})
    (run_folder / "config.yaml").write_text(yaml.safe_dump(saved))
    values = copy.deepcopy(saved)
    typed["resume"] = str(run_folder)
    for key, value in typed.items():
        put(values, key, value)
    refused = [key for key in FIXED_KEYS & typed.keys() if differ(key, find(saved, key), typed[key])]
    overrides = [f"{key}={value}" for key, value in typed.items()]
    if refused:
        with pytest.raises(VitError) as caught:
            resume_config(values, overrides)
        assert any(f": {key}=" in str(caught.value) for key in refused)
    else:
        result = resume_config(values, overrides)
        assert {key: find(result, key) for key in KEYS} == {key: find(values, key) for key in KEYS}


def differ(key, before, after):
    return str(before) != str(after) and (key != "ema.decay" or None in (before, after))


def nested(flat):
    values = {}
    for key, value in flat.items():
        put(values, key, value)
    return values


def put(values, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def find(values, key):
    for part in key.split("."):
        values = values[part]
    return values


def test_a_key_that_is_newer_than_the_run_has_its_default(run_folder):
    newer = {**DEFAULTS, "optim": {**DEFAULTS["optim"], "clip": None}, "logging": {"every": 10}}
    values = resume_config({**newer, "resume": str(run_folder)}, [])
    assert values["optim"] == {"name": "adamw", "lr": 1e-4, "clip": None}
    assert values["logging"] == {"every": 10}


@pytest.mark.parametrize("override", ["experiment=cifar10", "debug=fast"])
def test_another_recipe_is_refused(run_folder, override):
    with pytest.raises(VitError, match="leave out"):
        resume_config({**DEFAULTS, "resume": str(run_folder)}, [override])


def test_a_checkpoint_outside_a_run_folder_takes_what_is_composed(tmp_path):
    path = tmp_path / "moved.ckpt"
    path.write_bytes(b"")
    assert find_run_folder(path) is None
    typed = {**DEFAULTS, "resume": str(path)}
    assert resume_config(typed, []) == typed


def test_a_damaged_configuration_is_named(run_folder):
    (run_folder / "config.yaml").write_text("a: [")
    with pytest.raises(VitError, match=r"config\.yaml"):
        resume_config({**DEFAULTS, "resume": str(run_folder)}, [])


def test_nothing_to_resume_says_what_is_expected(tmp_path):
    with pytest.raises(VitError, match=r"last\.ckpt"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(VitError, match="ended before its first checkpoint"):
        find_checkpoint(str(tmp_path))
