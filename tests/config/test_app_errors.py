"""Mistakes on the command line: one line that names the key and what would work, exit status 2, no traceback."""

from __future__ import annotations

import string

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vit import options
from vit.errors import VitError
from vit.training import app
from vit.training.app import CONF, launch, train_main
from vit.training.config import Config
from vit.training.messages import ConfigNames, explain_error

KEYS = [key.name for key in options.list_keys(Config)]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        # keys
        ("optim.lrr=1", "optim.lrr: no such key; did you mean 'optim.lr'?"),
        ("modle.size=tiny", "modle.size: no such key; did you mean 'model.size'?"),
        ("lr=1", "lr: no such key; did you mean 'optim.lr'?"),
        ("+new.key=1", "new.key: no such key; there are data, augment, model"),
        ("++optim.foo=1", "optim.foo: no such key; optim has name, lr, matrix_lr"),
        ("+optim.lr=3", "optim.lr: is a key already: write it without the +"),
        ("model.size.x=1", "model.size.x: no such key; model.size is a value"),
        ("xyzzy=1", "xyzzy: no such key; there are augment, data, debug"),
        ("~optim.lr", "optim.lr: is missing"),
        ("~nope", "nope: no such key"),
        ("hydra.foo=1", "hydra.foo: Hydra has no such setting"),
        ("data.name=cifar10", "data.name: comes with the size and channels of its images: write data=cifar10"),
        # groups
        ("model=tinny", "model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?"),
        ("modl=tiny", "modl: no such key or group; did you mean model=tiny?"),
        ("modl=x", "modl: no such key or group; did you mean model=attention_pool|base|"),
        ("model=null", "model=null: expected one of attention_pool, base"),
        ("optim=3", "optim=3: expected one of adamw, muon, sgd"),
        ("+model=tiny", "model: is chosen already"),
        ("~model", "model: is missing"),
        ("data=mnist", "data=mnist: there is no conf/data/mnist.yaml; did you mean 'fashion_mnist'?"),
        ("experiment=fashion_cpu", "experiment=fashion_cpu: there is no conf/experiment/fashion_cpu.yaml; did you"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm: Hydra has no such choice; choose from basic"),
        ("model@foo=tiny", "model: cannot be set this way"),
        # values
        ("data=folder", "data=folder needs data.root=FOLDER"),
        ("model.depth=abc", "model.depth: expected a whole number of at least 1 or null, got 'abc'"),
        ("model.depth=2.5", "model.depth: expected a whole number of at least 1 or null, got 2.5"),
        ("trainer.precision=7", "trainer.precision: expected one of auto, 32, bf16, 16, got 7"),
        ("model.pool=tokn", "model.pool: expected one of token, mean, attention, got 'tokn'; did you mean 'token'?"),
        ("optim.lr=", "optim.lr: expected a number above 0, got ''"),
        ("optim.lr=-1", "optim.lr: expected a number above 0, got -1"),
        ("optim.lr=???", "optim.lr: needs a value: optim.lr=..."),
        ("optim.betas=0.9", "optim.betas: expected a list of 2 numbers from 0 to under 1, got 0.9"),
        ("optim={lr: 1", "'optim={lr: 1': cannot be read"),
        ("model.depth=[1,2]", "model.depth: expected a whole number of at least 1 or null, got [1, 2]"),
        ("augment.flip=2", "augment.flip: expected a number from 0 to 1, got 2"),
        ("data.batch_size=-1", "data.batch_size: expected a whole number"),
        ("data.mean=[0.5,0.5]", "data.mean: expected 1 number"),
        ("seed=-1", "seed: expected a whole number of at least 0, got -1"),
        ("trainer.max_epochs=null", "trainer.max_epochs, trainer.max_steps and trainer.max_time are all null"),
        ("model.heads=7", "model.heads: width "),
        # the language of overrides
        ("optim.lr=[1", "'optim.lr=[1': cannot be read"),
        ("a=b=c", "'a=b=c': cannot be read"),
        ("seed=0,1", "seed=0,1: several values: add --multirun to try each"),
        ("optim.lr", "'optim.lr': has no value; write optim.lr=VALUE"),
        ("optimlr", "optimlr: there is no folder, data set or .parquet file of that name; choose from cifar10"),
        ("fashion_mnits", "fashion_mnits: there is no folder, data set or .parquet file of that name; did you mean"),
        ("optim.lr=${nope}", "optim.lr: refers to ${...} nope: no such key"),
        ("optim.lr=${optim.lrr}", "optim.lr: refers to ${...} optim.lrr: no such key; did you mean 'optim.lr'?"),
        ("optim.lr=${optim.lr}", "optim.lr: Recursive interpolation"),
        ("optim.lr=${oops:1}", "optim.lr: Unsupported interpolation type oops"),
        ("=3", "a group was given something else than a name"),
        # Hydra's own arguments
        ("--hlep", "unrecognized arguments: --hlep"),
        ("--config-name=trian", "--config-name trian: no such file in conf/; did you mean 'train'?"),
        ("--config-dir=/no/such/folder", "Additional config directory '/no/such/folder' not found"),
        ("--cfg=jbo", "argument --cfg/-c: invalid choice: 'jbo'"),
    ],
)
def test_a_mistake_is_one_line(argument, told, refused):
    assert refused(argument).startswith(told)


def test_two_commands_at_once(refused):
    assert refused("--multirun", "--cfg", "job").startswith("Only one of --run, --multirun, --cfg")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# @package _global_\noptim:\n  lrr: 1\n", "optim.lrr: no such key; did you mean 'optim.lr'?"),
        ("optim:\n  lr: 1\n", "experiment: a file of conf/experiment has to begin with the line '# @package _global_'"),
        ("# @package _global_\noptim: [1\n", "mine.yaml, line 3: not valid YAML: expected ',' or ']'"),
        ("# @package _global_\na: b: c\n", "mine.yaml, line 2: not valid YAML: mapping values are not allowed here"),
        (
            "# @package _global_\ndefaults:\n  - data: cifar10\n",
            "OWN/experiment/data/cifar10.yaml, which OWN/experiment/mine.yaml asks for; in a file of conf/experiment "
            "write 'override /data: cifar10'",
        ),
        (
            "# @package _global_\ndefaults:\n  - override /data: cifar11\n",
            "data=cifar11: there is no conf/data/cifar11.yaml or OWN/data/cifar11.yaml; did you mean 'cifar10'",
        ),
        ("# @package _global_\noptim:\n  lr: ${optim.lr}\n", "optim.lr: Recursive interpolation"),
        ("# @package _global_\noptim: 3\n", "optim: expected a section with keys such as optim.name, optim.lr"),
        (b"# @package _global_\n# caf\xe9\n", "a file of conf/ or OWN/ is not text in UTF-8"),
    ],
)
def test_a_mistake_in_a_file(text, told, refused, tmp_path):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused("--config-dir", str(tmp_path / "own"), "experiment=mine")
    assert told.replace("OWN", str(tmp_path / "own")) in line


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("experiment=mien", "no conf/experiment/mien.yaml or OWN/experiment/mien.yaml; did you mean 'mine'?"),
        ("data=mien", "data=mien: there is no conf/data/mien.yaml or OWN/data/mien.yaml; did you mean 'mine'?"),
        ("optim=3", "optim=3: expected one of adamw, lion, muon, sgd"),
        ("optm=lion", "optm: no such key or group; did you mean optim=lion?"),
        ("--config-name=mien", "--config-name mien: no such file in conf/ or OWN/; did you mean 'mine'?"),
        ("mien", "mien: there is no folder, data set or .parquet file of that name; did you mean 'mine'?"),
    ],
)
def test_names_of_a_persons_own_folder_are_suggested(argument, told, refused, tmp_path):
    for name in ("mine", "experiment/mine", "data/mine", "optim/lion"):
        file = tmp_path / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert told.replace("OWN", str(tmp_path / "own")) in refused("--config-dir", str(tmp_path / "own"), argument)


def test_a_traceback_when_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert train_main(["model.depth=abc"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert train_main(["optim.lrr=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def run(task, *arguments):
    return launch(task, "train", Config, arguments)


def test_a_fault_of_the_program_shows_its_traceback(capsys):
    def task(values, overrides):
        raise RuntimeError("a fault")

    assert run(task) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: a fault" in error


def test_an_error_may_bring_its_own_status(capsys):
    class Failed(VitError):
        status = 1

    def task(values, overrides):
        raise Failed("the loss became NaN\nat step 3")

    assert run(task) == 1
    assert capsys.readouterr().err == "the loss became NaN at step 3\n"


def test_the_task_gets_values_and_overrides(monkeypatch):
    seen = []

    def task(values, overrides):
        seen.append((values["seed"], values["model"]["patch_size"], overrides))

    assert run(task, "seed=3", "data=cifar10") == 0
    assert seen == [(3, 4, ["seed=3", "data=cifar10"])]


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=3", "data=cifar10", "--config-name", "train"],
        ["seed=3", "--config-name", "train", "data=cifar10"],
        ["--config-name=train", "seed=3", "--run", "data=cifar10"],
    ],
)
def test_arguments_may_stand_in_any_order(arguments):
    seen = []
    assert run(lambda values, overrides: seen.append(overrides), *arguments) == 0
    assert seen == [["seed=3", "data=cifar10"]]


def test_the_result_decides_the_status():
    class Result:
        status = 130

    assert run(lambda values, overrides: Result()) == 130


def test_an_interruption_is_130(capsys):
    def task(values, overrides):
        raise KeyboardInterrupt

    assert run(task) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_helper_processes_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_main(["optim.lrr=1"]) == 2
    assert capsys.readouterr().err.startswith("[process 1] optim.lrr: no such key")


def test_the_arguments_of_the_process_are_as_before(monkeypatch):
    monkeypatch.setattr(app.sys, "argv", ["train.py", "kept"])
    train_main(["optim.lrr=1"])
    assert app.sys.argv == ["train.py", "kept"]


def test_errors_of_the_program_are_not_explained_away():
    names = ConfigNames(Config, CONF)
    for error in (ValueError("x"), OSError("x"), KeyError("x")):
        assert explain_error(error, names) is None


letters = st.sampled_from(string.ascii_lowercase)


@st.composite
def slips(draw):
    """A key with one letter of one part dropped, doubled, replaced, or swapped with the next."""
    key = draw(st.sampled_from(KEYS))
    places = [i for i, letter in enumerate(key) if letter.isalpha()]
    i = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["drop", "double", "replace", "swap"]))
    if kind == "drop":
        typed = key[:i] + key[i + 1 :]
    elif kind == "double":
        typed = key[:i] + key[i] + key[i:]
    elif kind == "replace":
        typed = key[:i] + draw(letters) + key[i + 1 :]
    else:
        assume(i + 1 in places)
        typed = key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    assume(typed not in KEYS and all(typed.split(".")))
    return key, typed


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slips())
def test_a_slip_of_the_hand_finds_its_key(pair):
    key, typed = pair
    line = options.unknown_key_message(typed, KEYS)
    # a short key can be one letter from several others; then it is among what is listed
    assert repr(key) in line or key.rpartition(".")[2] in line.partition(" has ")[2].split(", "), line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optim.lrr=1"], "optim.lrr: no such key; did you mean 'optim.lr'?\n"),
        (["model=tinny"], "model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?\n"),
        (["data.image_size=9"], "model.patch_size: an image height of 9 pixels does not divide into patches of "),
        (["-m", "model=tiny,tinny"], "model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?\n"),
        (["-m", "optim.lrr=1,2"], "optim.lrr: no such key; did you mean 'optim.lr'?\n"),
        (["-m", "data=glob(zz*)"], "--multirun: nothing to run: a glob or a range matches nothing\n"),
    ],
)
def test_a_real_command(arguments, told, script, tmp_path):
    result = script("train.py", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(told)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_slip_costs_no_torch(script):
    result = script("train.py", "optim.lrr=1", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "torchvision", "timm", "matplotlib"}
