"""Train and evaluate from Python: `vit.train` and `vit.evaluate`, the commands as functions.

Notable:
- They use the same `conf/` and the same checks, and raise the same one-line messages as `VitError`.
- The caller's random state, environment, warnings, log levels, Hydra, torch threads and precision are restored after
  the call.  `sys.argv` is not read.  The module loads without torch.
- Only one run at a time: a call from a second thread waits, since both would draw from the same random generators.
- Only one process: Lightning would start further ones by running the caller's script again.
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
from vit.training.app import resolve_config, start_training
from vit.training.config import CONF, Config, EvalConfig
from vit.training.eval_app import start_evaluation
from vit.training.first_argument import expand_data_argument
from vit.training.messages import ConfigNames, explain_error

if TYPE_CHECKING:
    from vit.inference.classifier import Classifier

log = logging.getLogger("vit")

Overrides = str | Mapping[str, Any]
Model = str | os.PathLike[str]
ReturnType = TypeVar("ReturnType")

_run_lock = threading.Lock()


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run; it can be passed as MODEL.

    Attributes:
        folder: the run folder.
        metrics: the content of its `metrics.json`.
    """

    folder: Path
    metrics: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run; `vit.train(data, f"resume={run.folder}")` continues it."""
        return bool(self.metrics.get("interrupted"))

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The trained model, loaded on first access.  Raises `VitError`."""
        from vit.inference.loading import load

        return load(self.folder)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def _format_metrics(self) -> dict[str, str]:
        from vit.training.folder import format_metrics

        return {
            name: format_metrics(self.metrics[name], classes=0) for name in ("val", "test") if self.metrics.get(name)
        }

    def __repr__(self) -> str:
        rows = [f"{name} {text}" for name, text in self._format_metrics().items()]
        state = ["interrupted"] * self.interrupted
        return f"Run({'; '.join([printable(self.folder), *state, *rows])})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in self._format_metrics().items())
        state = ", interrupted" if self.interrupted else ""
        return f"<table><caption><code>{html.escape(printable(self.folder))}</code>{state}</caption>{rows}</table>"


def train(data: Any = None, *overrides: Overrides) -> Run:
    """Train a model like `vit train`, and return the run.

    Args:
        data: the name of a data set ("digits"), a folder, a list of (path, label), (images, labels) with an array or
            tensor (N, H, W), (N, H, W, C) or (N, C, H, W), a torch `Dataset` of (image, label), a Hugging Face
            `Dataset` or `DatasetDict`, or a dict with one of these for each of train, val and test.  None: as the
            overrides say.
        overrides: "key=value" as on the command line, or a mapping, nested or with dotted keys.

    Ctrl-C ends training after the current step, writes a checkpoint and returns the run.

    Raises:
        VitError: a mistake of the caller, with the message of the command.
    """
    override_texts = _format_overrides(overrides)
    gathered, data_overrides = _parse_data(data, override_texts)
    call = ", ".join(["data" if gathered else repr(data), *map(repr, override_texts)])
    values = _compose("train", Config, data_overrides, override_texts, gathered)
    # a resumed run has data settings of its own; `data_overrides` are those of a new run
    passed_overrides = (
        override_texts if gathered is not None and values.get("resume") else [*data_overrides, *override_texts]
    )
    from vit.training.run import Call

    with _hold_run_lock(), _restore_process_state():
        result = _with_explained_errors(
            Config,
            passed_overrides,
            lambda: start_training(
                _require_one_process(values), passed_overrides, Call(f"vit.train({call})", gathered)
            ),
        )
    return Run(result.folder.absolute(), result.metrics)


def evaluate(model: Model, *overrides: Overrides, data: Any = None) -> dict[str, Any]:
    """Evaluate a model like `vit eval`, and return the content of its `metrics.json`.

    Args:
        model: any MODEL, or a `Run`.
        overrides: such as "split=val" or "output=results"; or a mapping.
        data: as for `train`; None: the data that the model was trained on.  Images from Python are all evaluated as
            the test split.  If the model was trained on the same images, only its own test split is evaluated.

    Raises:
        VitError: a mistake of the caller.
    """
    override_texts = _format_overrides(overrides)
    gathered, data_overrides = _parse_data(data, override_texts)
    if gathered is not None:
        data_overrides = []
    override_texts = [f"checkpoint={quote_for_hydra(os.fspath(model))}", *override_texts]
    values = _compose("eval", EvalConfig, data_overrides, override_texts, None)
    with _hold_run_lock(), _restore_process_state():
        return _with_explained_errors(EvalConfig, override_texts, lambda: start_evaluation(values, gathered))


def _format_overrides(overrides: tuple[Overrides, ...]) -> list[str]:
    """Convert overrides, strings or mappings, to strings."""
    texts: list[str] = []
    for override in overrides:
        if isinstance(override, str):
            texts.append(override)
        elif isinstance(override, Mapping):
            texts += [f"{key}={_format_hydra_value(key, value)}" for key, value in _iter_leaves(override, "")]
        else:
            raise VitError(f"{override!r}: an override is a text such as 'model.size=tiny', or a mapping")
    return texts


def _iter_leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _iter_leaves(value, f"{name}.")
        else:
            yield name, value


def _format_hydra_value(key: str, value: Any) -> str:
    """Format a value for Hydra."""
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
        return f"[{','.join(_format_hydra_value(key, item) for item in value)}]"
    raise VitError(f"{key}: expected text, a number, true or false, None or a list, got {type(value).__name__}")


def _parse_data(data: Any, overrides: list[str]) -> tuple[Gathered | None, list[str]]:
    """Return the images, if `data` holds images from Python, and the overrides that choose the data set."""
    if data is None:
        return None, []
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if isinstance(data, str):
        groups = ConfigNames(Config, CONF).groups["data"]
        if not data or ("=" in data and not os.path.exists(os.path.expanduser(data))):
            raise VitError(f"{data!r} is no data: the first argument is {EXPECTED}; None: what the overrides say")
        return None, expand_data_argument(data, groups)
    keys = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
    columns = {key: keys.get(f"data.{key}") for key in ("image_column", "label_column")}
    return gather(data, **columns), [f"data={NAME}"]


def _compose(
    name: str, schema: type, data_overrides: list[str], overrides: list[str], gathered: Gathered | None
) -> dict[str, Any]:
    """Compose the values of `conf/<name>.yaml` and the overrides, as the command line does."""
    version_base, callers_hydra = VersionBase.instance().getbase(), GlobalHydra.instance().hydra

    def compose() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            searchpath = []
            if gathered is not None:  # as a file of conf/data, so that experiments and overrides take precedence
                (Path(folder) / "data").mkdir()
                (Path(folder) / "data" / f"{NAME}.yaml").write_text(
                    yaml.safe_dump(gathered.settings()), encoding="utf-8"
                )
                searchpath = [f"hydra.searchpath=[{quote_for_hydra(f'file://{folder}')}]"]
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
                return resolve_config(hydra.compose(name, [*searchpath, *data_overrides, *overrides]))

    with _hold_run_lock():
        try:
            return _with_explained_errors(schema, [*data_overrides, *overrides], compose, composing=True)
        finally:
            VersionBase.instance().version_base = version_base
            GlobalHydra.instance().hydra = callers_hydra


def _with_explained_errors(
    schema: type, overrides: list[str], function: Callable[[], ReturnType], *, composing: bool = False
) -> ReturnType:
    """Call `function`; convert errors that the user can correct to a `VitError` with the message of the command."""
    try:
        return function()
    except VitError:
        raise
    except Exception as error:
        line = explain_error(error, ConfigNames(schema, CONF, overrides), composing=composing)
        if line is None:
            raise
        raise VitError(one_line(line)) from None


def _require_one_process(values: dict[str, Any]) -> dict[str, Any]:
    trainer = dict(values["trainer"])
    if trainer["devices"] == "auto":
        trainer["devices"] = 1
    required = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    different = {key: trainer[key] for key, value in required.items() if trainer[key] != value}
    for key, value in different.items():
        raise VitError(f"trainer.{key}={value}: vit.train is one process; several are started by the command vit train")
    return {**values, "trainer": trainer}


@contextlib.contextmanager
def _hold_run_lock() -> Iterator[None]:
    if not _run_lock.acquire(blocking=False):
        log.warning("waiting for the run in another thread to end")
        _run_lock.acquire()
    try:
        yield
    finally:
        _run_lock.release()


@contextlib.contextmanager
def _restore_process_state() -> Iterator[None]:
    """Restore the process-wide settings that training changes; side effects of imports stay."""
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
