"""From the command line to a checked configuration, with Hydra; shared by training and evaluation.

Notable:
- A first argument without "=" is the data to train on, or the model to evaluate (`vit.training.first_argument`).
- A slip costs under a second and one line: the key, what is allowed, the nearest that would work; exit status 2.
  Tracebacks are for faults of the program, and for `HYDRA_FULL_ERROR=1`.
- Hydra writes nothing: no outputs/ folder, no .hydra, no log lines of its own.
- `--multirun` gives every job a process of its own (`vit.training.sweep`).
- torch is not imported here, so `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vit import __version__, options
from vit.errors import VitError, one_line
from vit.files import ensure_home
from vit.processors import wait_passively
from vit.shell import quote_for_hydra
from vit.signals import Interruption, interruptible
from vit.training import resume, sweep
from vit.training.config import CONF, Config, check_model, load
from vit.training.first_argument import data_overrides
from vit.training.messages import Names, explain

if TYPE_CHECKING:
    from vit.training.run import Call

_FULL = "HYDRA_FULL_ERROR"

Task = Callable[[dict[str, Any], list[str]], Any]
FirstArgument = Callable[[str, Sequence[str]], list[str]]


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `python train.py`, or `vit train` where `argv` is given; returns the exit status."""
    return launch(start_training, "train", Config, argv, first=data_overrides)


def start_training(values: dict[str, Any], overrides: list[str], call: Call | None = None) -> Any:
    """Check the composed `values` and train; `call` is that of `vit.train`.  Raises `VitError`."""
    if values.get("resume"):
        options.convert("resume", values["resume"], str | None, options.Rule())
        values = resume.configuration(values, overrides)
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == "data.name":
            raise VitError(f"data.name: comes with the size and channels of its images: write data={value}")
    config = load(values)
    check_model(config)
    from vit.training.run import train

    return train(config, overrides, call)


def launch(
    task: Task,
    config_name: str,
    schema: type,
    argv: Sequence[str] | None = None,
    *,
    first: FirstArgument | None = None,
) -> int:
    """Compose `conf/<config_name>.yaml` with the overrides in `argv` and give the resolved values to `task`.

    Args:
        task: called with the plain nested values and the overrides as they were written; raises `VitError` for what
            is the caller's to mend.  Its result may have a `status` for this process to end with, and `metrics` and
            `folder` for the table of a sweep.
        config_name: a file in `conf`, and the name of the command.
        schema: the dataclass whose keys are the ones to suggest for a mistyped one.
        argv: the arguments; None: those of this process, a script that jobs of a sweep are started by as well.
        first: what a first argument without "=" stands for, given the choices of the group `data`.

    Returns:
        The exit status: 0; 2 when the call was wrong; 1 for a fault of the program; 130 when interrupted.
    """
    wait_passively()
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks runs on its CPU
    ensure_home()  # before libraries ask for it
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = Names(schema, CONF, arguments)
    jobs: sweep.Sweep | None = None
    status = 0
    with _Errors() as errors:
        try:
            with interruptible() as interruption:
                args = _parse(arguments)
                flags = _flags(arguments, args.overrides)
                names.folders = [Path(each) for each in (args.config_path or CONF, args.config_dir) if each]
                if first is not None:
                    args.overrides[:1] = _first(args.overrides[:1], first, names)
                if sweep.wanted(args):
                    program = [os.path.abspath(sys.argv[0])] if argv is None else ["-m", "vit", config_name]
                    jobs = sweep.Sweep(args, _sweep_folder(args, config_name), program)
                    args.overrides.insert(0, f"hydra.sweep.dir={quote_for_hydra(str(jobs.folder))}")
                session = _Session(task, schema, names, errors, jobs, list(sys.argv), interruption)
                main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
                with _argv([sys.argv[0], *args.overrides, *flags]):
                    main(session.job)()
                status = session.status
        except SystemExit as stop:  # Hydra's way out of --help
            status = stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        except BrokenPipeError:  # `--cfg job | head`: nobody reads on, and nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 141  # as the signal SIGPIPE has it
        except Exception as error:
            status = errors.report(error, names, composing=True)
    if jobs is None:
        return status
    failed = jobs.finish()
    if failed and not status and not jobs.rows():
        print("--multirun: nothing to run: a glob or a range matches nothing", file=sys.stderr)
    return status or failed


class _Session:
    """What Hydra calls for each job."""

    def __init__(
        self,
        task: Task,
        schema: type,
        names: Names,
        errors: _Errors,
        jobs: sweep.Sweep | None,
        argv: Sequence[str],
        interruption: Interruption,
    ) -> None:
        self.task, self.schema, self.names, self.errors, self.jobs = task, schema, names, errors, jobs
        self.argv, self.interruption = argv, interruption
        self.status = 0

    def job(self, composed: DictConfig) -> float | None:
        """Run one job, or hand it to a process of its own; what it raises is reported here, not by Hydra."""
        composing = True
        # Lightning starts the other processes of a distributed run by the arguments of this one
        with self.errors.of_the_program(), _argv(self.argv):
            try:
                settings = HydraConfig.get()
                # not resolved: an interpolation among them is resolved where it stands in the configuration
                overrides = [str(text) for text in OmegaConf.to_container(settings.overrides.task) or ()]
                if self.jobs is not None:
                    return self.jobs.run(overrides, int(settings.job.num), OmegaConf.select(composed, "monitor"))
                values = resolve(composed)
                composing = False
                self.interruption.check()
                result = self.task(options.expand_paths(self.schema, values), overrides)
                sweep.report(result)
                self.status = getattr(result, "status", 0)
            except Exception as error:
                self.interruption.check()
                self.status = self.errors.report(error, self.names, composing=composing)
        return None


class _Errors:
    """Who prints errors: this module, never Hydra; as tracebacks where the user has set HYDRA_FULL_ERROR=1.

    Hydra prints an error and exits with status 1 unless that variable is set; so it is set while Hydra works, and is
    as the user had it while the program does.
    """

    def __enter__(self) -> _Errors:
        self.users = os.environ.get(_FULL)
        os.environ[_FULL] = "1"
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        if self.users is None:
            os.environ.pop(_FULL, None)
        else:
            os.environ[_FULL] = self.users

    @contextlib.contextmanager
    def of_the_program(self) -> Iterator[None]:
        self._restore()
        try:
            yield
        finally:
            os.environ[_FULL] = "1"

    def report(self, error: Exception, names: Names, *, composing: bool = False) -> int:
        """Print `error` as one line, or its traceback for a fault of the program; returns the exit status."""
        line = explain(error, names, composing=composing)
        if line is not None:
            line = one_line(line)
        if line is None or self.users == "1":
            traceback.print_exception(error)
        else:
            rank = os.environ.get("LOCAL_RANK", "0")
            print(f"[process {rank}] {line}" if rank != "0" else line, file=sys.stderr, flush=True)
        sweep.report(None, line or f"{type(error).__name__}: {error}")
        return 1 if line is None else getattr(error, "status", 2)


def resolve(composed: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain nested values, interpolations filled in."""
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own parser, with a line instead of its usage for what it does not know."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise VitError(
            f"{message}: what is to be changed is written key=value, such as trainer.max_epochs=20; "
            "--help shows the commonest"
        )

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if action.dest == "version":
            action.version = f"vit {__version__}"  # type: ignore[attr-defined]
    return parser.parse_intermixed_args(arguments)


def _first(overrides: Sequence[str], first: FirstArgument, names: Names) -> list[str]:
    """Return what the first override stands for, where it has no key."""
    if not overrides or overrides[0].startswith("~") or "=" in overrides[0]:
        return list(overrides)
    if overrides[0] in names.all:
        raise VitError(f"{overrides[0]!r}: has no value; write {overrides[0]}=VALUE")
    return first(overrides[0], names.groups.get("data", []))


def _flags(arguments: list[str], overrides: list[str]) -> list[str]:
    """The arguments that are no overrides: argparse does not take those on both sides of -m, people do."""
    rest, flags = list(overrides), []
    for text in arguments:
        if rest and text == rest[0]:
            rest.pop(0)
        else:
            flags.append(text)
    return flags


def _sweep_folder(args: argparse.Namespace, config_name: str) -> Path:
    """Where the results of a sweep go: what `hydra.sweep.dir` comes to with this `run.root`.

    Hydra composes a sweep's own configuration without the overrides of its jobs, so `run.root` would be lost.
    """
    first = [text for text in args.overrides if text.startswith("hydra.") and not text.startswith("hydra.mode")]
    root = [text for text in args.overrides if text.startswith("run.root=") and "," not in text]
    folder = str(args.config_path or CONF)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=os.path.abspath(folder)):
        composed = hydra.compose(args.config_name or config_name, [*first, *root], return_hydra_config=True)
    return Path(options.expand_path(composed.hydra.sweep.dir))


@contextlib.contextmanager
def _argv(arguments: Sequence[str]) -> Iterator[None]:
    """Make these the `sys.argv` of this process, where Hydra and Lightning read theirs."""
    before = sys.argv
    sys.argv = list(arguments)
    try:
        yield
    finally:
        sys.argv = before
