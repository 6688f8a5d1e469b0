"""Training and evaluation from Python: `vit.train` and `vit.evaluate`, the commands as functions.

Notable:
- The same `conf/`, the same checks and the same line for each mistake, as a `VitError`.
- Nothing of the caller's is changed for longer than the call: its random numbers, environment, warnings, log levels,
  Hydra, torch's threads and precision.  `sys.argv` is not read.  The module itself loads without torch.
- One run at a time: a call from a second thread waits for the first, since both would draw from the same generators.
- One process: a script that trains must not be started anew by its own training.
"""

from __future__ import annotations

import contextlib
import functools
import html
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from vit.data.memory import EXPECTED, NAME, Gathered, gather
from vit.errors import VitError, one_line, printable
from vit.shell import quote_for_hydra
from vit.training.app import resolve, start_training
from vit.training.config import CONF, Config, EvalConfig
from vit.training.eval_app import start_evaluation
from vit.training.first_argument import data_overrides
from vit.training.messages import Names, explain

if TYPE_CHECKING:
    from vit.inference.classifier import Classifier

log = logging.getLogger("vit")

Overrides = str | Mapping[str, Any]
Model = str | os.PathLike[str]
T = TypeVar("T")

_alone = threading.Lock()


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run; stands for its folder wherever a MODEL is expected.

    Attributes
        folder: the run folder.
        metrics: what its `metrics.json` holds.
    """

    folder: Path
    metrics: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it; `vit.train(data, f"resume={run.folder}")` goes on."""
        return bool(self.metrics.get("interrupted"))

    @functools.cached_property
    def classifier(self) -> Classifier:
        """Its model, loaded when it is first asked for.  Raises `VitError`."""
        from vit.inference.loading import load

        return load(self.folder)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def _figures(self) -> dict[str, str]:
        from vit.training.folder import figures

        return {name: figures(self.metrics[name], classes=0) for name in ("val", "test") if self.metrics.get(name)}

    def __repr__(self) -> str:
        rows = [f"{name} {text}" for name, text in self._figures().items()]
        state = ["interrupted"] * self.interrupted
        return f"Run({'; '.join([printable(self.folder), *state, *rows])})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in self._figures().items())
        state = ", interrupted" if self.interrupted else ""
        return f"<table><caption><code>{html.escape(printable(self.folder))}</code>{state}</caption>{rows}</table>"


def train(data: Any = None, *overrides: Overrides) -> Run:
    """Train, as `vit train` does, and return the run.

    Args:
        data: the name of a data set ("digits"), a folder, a list of (path, label), (images, labels) with an array or
            tensor (N, H, W), (N, H, W, C) or (N, C, H, W), a torch `Dataset` of (image, label), a Hugging Face
            `Dataset` or `DatasetDict`, or a dict with one of these for each of train, val and test.  None: what the
            overrides say.
        overrides: "key=value" as on the command line, or a mapping, nested or with dots in its keys.

    Ctrl-C ends training after the step, with a checkpoint, and the run is returned.
    Raises `VitError` for anything that can be mended, with the line of the command.
    """
    typed = _overrides(overrides)
    given, chosen = _data(data, typed)
    call = ", ".join(["data" if given else repr(data), *map(repr, typed)])
    values = _composed("train", Config, chosen, typed, given)
    # what goes on has its own settings of the data, and `chosen` are those of a new run
    known = typed if given is not None and values.get("resume") else [*chosen, *typed]
    from vit.training.run import Call

    with _in_turn(), _nothing_lasts():
        result = _explained(
            Config, known, lambda: start_training(_one_process(values), known, Call(f"vit.train({call})", given))
        )
    return Run(result.folder.absolute(), result.metrics)


def evaluate(model: Model, *overrides: Overrides, data: Any = None) -> dict[str, Any]:
    """Evaluate a model, as `vit eval` does, and return what its `metrics.json` holds.

    Args:
        model: any MODEL, or a `Run`.
        overrides: such as "split=val" or "output=results"; or a mapping.
        data: as for `train`; None: the data that the model was trained on.  Images from Python are all evaluated, as
            the test split, unless they are the ones that the model was trained on: then its own test split is.

    Raises `VitError`.
    """
    typed = _overrides(overrides)
    given, chosen = _data(data, typed)
    if given is not None:
        chosen = []
    typed = [f"checkpoint={quote_for_hydra(os.fspath(model))}", *typed]
    values = _composed("eval", EvalConfig, chosen, typed, None)
    with _in_turn(), _nothing_lasts():
        return _explained(EvalConfig, typed, lambda: start_evaluation(values, given))


def _overrides(given: tuple[Overrides, ...]) -> list[str]:
    """Overrides as strings, of strings and mappings."""
    found: list[str] = []
    for each in given:
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, Mapping):
            found += [f"{key}={_value(key, value)}" for key, value in _leaves(each, "")]
        else:
            raise VitError(f"{each!r}: an override is a text such as 'model.size=tiny', or a mapping")
    return found


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _value(key: str, value: Any) -> str:
    """A value as Hydra reads it."""
    if hasattr(value, "item") and not isinstance(value, str) and getattr(value, "ndim", 0) == 0:
        value = value.item()  # NumPy's and torch's numbers
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        return quote_for_hydra(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(key, each) for each in value)}]"
    raise VitError(f"{key}: expected text, a number, true or false, None or a list, got {type(value).__name__}")


def _data(data: Any, typed: list[str]) -> tuple[Gathered | None, list[str]]:
    """Images from Python, if `data` is such, and the overrides that choose the data set."""
    if data is None:
        return None, []
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if isinstance(data, str):
        groups = Names(Config, CONF).groups["data"]
        if not data or ("=" in data and not os.path.exists(os.path.expanduser(data))):
            raise VitError(f"{data!r} is no data: the first argument is {EXPECTED}; None: what the overrides say")
        return None, data_overrides(data, groups)
    keys = dict(text.lstrip("+").split("=", 1) for text in typed if "=" in text)
    columns = {key: keys.get(f"data.{key}") for key in ("image_column", "label_column")}
    return gather(data, **columns), [f"data={NAME}"]


def _composed(name: str, schema: type, chosen: list[str], typed: list[str], given: Gathered | None) -> dict[str, Any]:
    """The values of `conf/<name>.yaml` with the overrides, as the command line composes them."""
    before, callers = VersionBase.instance().getbase(), GlobalHydra.instance().hydra

    def compose() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            first = []
            if given is not None:  # its settings are a file of conf/data, so an experiment and what is typed win
                (Path(folder) / "data").mkdir()
                (Path(folder) / "data" / f"{NAME}.yaml").write_text(yaml.safe_dump(given.settings()), encoding="utf-8")
                first = [f"hydra.searchpath=[{quote_for_hydra(f'file://{folder}')}]"]
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
                return resolve(hydra.compose(name, [*first, *chosen, *typed]))

    with _in_turn():
        try:
            return _explained(schema, [*chosen, *typed], compose, composing=True)
        finally:
            VersionBase.instance().version_base = before
            GlobalHydra.instance().hydra = callers


def _explained(schema: type, typed: list[str], work: Callable[[], T], *, composing: bool = False) -> T:
    """What `work` returns; what it raises, where a person can mend it, as a `VitError` with the command's line."""
    try:
        return work()
    except VitError:
        raise
    except Exception as error:
        line = explain(error, Names(schema, CONF, typed), composing=composing)
        if line is None:
            raise
        raise VitError(one_line(line)) from None


def _one_process(values: dict[str, Any]) -> dict[str, Any]:
    trainer = dict(values["trainer"])
    if trainer["devices"] == "auto":
        trainer["devices"] = 1
    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    several = {key: trainer[key] for key, one in alone.items() if trainer[key] != one}
    for key, value in several.items():
        raise VitError(f"trainer.{key}={value}: vit.train is one process; several are started by the command vit train")
    return {**values, "trainer": trainer}


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    if not _alone.acquire(blocking=False):
        log.warning("waiting for the run in another thread to end")
        _alone.acquire()
    try:
        yield
    finally:
        _alone.release()


@contextlib.contextmanager
def _nothing_lasts() -> Iterator[None]:
    """Put back what training sets for its process; what importing a library does stays, as it does anywhere."""
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    environment = dict(os.environ)
    with warnings.catch_warnings():
        names = ("lightning.pytorch", "lightning.fabric", "vit")
        levels = {name: logging.getLogger(name).level for name in names}
        cudnn = torch.backends.cudnn
        flags = cudnn.benchmark, cudnn.deterministic
        strict = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        try:
            with isolate_rng():
                yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            cudnn.benchmark, cudnn.deterministic = flags
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(threads)
            for key in {*os.environ} - {*environment}:
                del os.environ[key]
            os.environ.update(environment)
