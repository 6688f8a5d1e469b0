"""Turn a command line into a checked configuration, with Hydra; shared by training and evaluation.

Notable:
- A first argument without "=" is the data to train on, or the model to evaluate (`vit.training.first_argument`).
- A mistake is reported in under a second, in one line, with exit status 2.  Tracebacks are for bugs and for
  `HYDRA_FULL_ERROR=1`.
- Hydra writes no outputs/ folder, no .hydra folder and no log lines.
- `--multirun` runs each job in a process of its own (`vit.training.sweep`).
- torch is not imported here, so `--help` and `--cfg job` are fast.
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
from vit.processors import set_passive_waiting
from vit.shell import quote_for_hydra
from vit.signals import Interruption, interruptible
from vit.training import resume, sweep
from vit.training.config import CONF, Config, check_model, load_config
from vit.training.first_argument import expand_data_argument
from vit.training.messages import ConfigNames, explain_error

if TYPE_CHECKING:
    from vit.training.run import Call

_FULL_ERROR = "HYDRA_FULL_ERROR"

Task = Callable[[dict[str, Any], list[str]], Any]
FirstArgument = Callable[[str, Sequence[str]], list[str]]


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `python train.py`, or `vit train` if `argv` is given; return the exit status."""
    return launch(start_training, "train", Config, argv, expand_first=expand_data_argument)


def start_training(values: dict[str, Any], overrides: list[str], call: Call | None = None) -> Any:
    """Check the composed `values` and train; `call` is given by `vit.train`.  Raises `VitError`."""
    if values.get("resume"):
        options.convert("resume", values["resume"], str | None, options.Rule())
        values = resume.resume_config(values, overrides)
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == "data.name":
            raise VitError(f"data.name: comes with the size and channels of its images: write data={value}")
    config = load_config(values)
    check_model(config)
    from vit.training.run import train

    return train(config, overrides, call)


def launch(
    task: Task,
    config_name: str,
    schema: type,
    argv: Sequence[str] | None = None,
    *,
    expand_first: FirstArgument | None = None,
) -> int:
    """Compose `conf/<config_name>.yaml` with the overrides in `argv` and give the resolved values to `task`.

    Args:
        task: called with the plain nested values and the overrides as written; raises `VitError` for mistakes of the
            user.  Its result may have a `status`, the exit status, and `metrics` and `folder` for the table of a sweep.
        config_name: a file in `conf`, and the name of the command.
        schema: the dataclass whose keys are suggested for a mistyped key.
        argv: the arguments; None: those of this process, whose script also runs the jobs of a sweep.
        expand_first: expands a first argument without "=", given the choices of the group `data`.

    Returns:
        The exit status: 0; 2 for a mistake of the user; 1 for a bug; 130 when interrupted.
    """
    set_passive_waiting()
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that a Mac's GPU lacks run on the CPU
    ensure_home()  # before libraries read it
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = ConfigNames(schema, CONF, arguments)
    jobs: sweep.Sweep | None = None
    status = 0
    with _ErrorReporter() as errors:
        try:
            with interruptible() as interruption:
                args = _parse_arguments(arguments)
                flags = _select_flags(arguments, args.overrides)
                names.folders = [Path(folder) for folder in (args.config_path or CONF, args.config_dir) if folder]
                if expand_first is not None:
                    args.overrides[:1] = _expand_first(args.overrides[:1], expand_first, names)
                if sweep.is_multirun(args):
                    program = [os.path.abspath(sys.argv[0])] if argv is None else ["-m", "vit", config_name]
                    jobs = sweep.Sweep(args, _sweep_folder(args, config_name), program)
                    args.overrides.insert(0, f"hydra.sweep.dir={quote_for_hydra(str(jobs.folder))}")
                runner = _JobRunner(task, schema, names, errors, jobs, list(sys.argv), interruption)
                main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
                with _replace_argv([sys.argv[0], *args.overrides, *flags]):
                    main(runner.run_job)()
                status = runner.status
        except SystemExit as stop:  # raised by Hydra after --help
            status = stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        except BrokenPipeError:  # `--cfg job | head`: the reader stopped, which is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 141  # as after the signal SIGPIPE
        except Exception as error:
            status = errors.report(error, names, composing=True)
    if jobs is None:
        return status
    failed = jobs.finish()
    if failed and not status and not jobs.rows():
        print("--multirun: nothing to run: a glob or a range matches nothing", file=sys.stderr)
    return status or failed


class _JobRunner:
    """Run the jobs that Hydra composes."""

    def __init__(
        self,
        task: Task,
        schema: type,
        names: ConfigNames,
        errors: _ErrorReporter,
        jobs: sweep.Sweep | None,
        argv: Sequence[str],
        interruption: Interruption,
    ) -> None:
        self.task, self.schema, self.names, self.errors, self.jobs = task, schema, names, errors, jobs
        self.argv, self.interruption = argv, interruption
        self.status = 0

    def run_job(self, composed: DictConfig) -> float | None:
        """Run one job here or in a process of its own; errors are reported here, not by Hydra."""
        composing = True
        # Lightning starts the other processes of a distributed run with the arguments of this one
        with self.errors.restore_user_variable(), _replace_argv(self.argv):
            try:
                settings = HydraConfig.get()
                # not resolved: interpolations are resolved as part of the configuration
                overrides = [str(text) for text in OmegaConf.to_container(settings.overrides.task) or ()]
                if self.jobs is not None:
                    return self.jobs.run(overrides, int(settings.job.num), OmegaConf.select(composed, "monitor"))
                values = resolve_config(composed)
                composing = False
                self.interruption.check()
                result = self.task(options.expand_paths(self.schema, values), overrides)
                sweep.write_job_result(result)
                self.status = getattr(result, "status", 0)
            except Exception as error:
                self.interruption.check()
                self.status = self.errors.report(error, self.names, composing=composing)
        return None


class _ErrorReporter:
    """Print errors in place of Hydra; as tracebacks if the user has set HYDRA_FULL_ERROR=1.

    Unless that variable is set, Hydra prints errors itself and exits with status 1.  So it is set while Hydra runs, and
    has the user's value while the task runs.
    """

    def __enter__(self) -> _ErrorReporter:
        self.user_value = os.environ.get(_FULL_ERROR)
        os.environ[_FULL_ERROR] = "1"
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        if self.user_value is None:
            os.environ.pop(_FULL_ERROR, None)
        else:
            os.environ[_FULL_ERROR] = self.user_value

    @contextlib.contextmanager
    def restore_user_variable(self) -> Iterator[None]:
        """Give HYDRA_FULL_ERROR the user's value in the body."""
        self._restore()
        try:
            yield
        finally:
            os.environ[_FULL_ERROR] = "1"

    def report(self, error: Exception, names: ConfigNames, *, composing: bool = False) -> int:
        """Print `error` as one line, or its traceback for a bug; return the exit status."""
        line = explain_error(error, names, composing=composing)
        if line is not None:
            line = one_line(line)
        if line is None or self.user_value == "1":
            traceback.print_exception(error)
        else:
            rank = os.environ.get("LOCAL_RANK", "0")
            print(f"[process {rank}] {line}" if rank != "0" else line, file=sys.stderr, flush=True)
        sweep.write_job_result(None, line or f"{type(error).__name__}: {error}")
        return 1 if line is None else getattr(error, "status", 2)


def resolve_config(composed: DictConfig) -> dict[str, Any]:
    """Convert the composed configuration to plain nested values, with interpolations resolved."""
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse arguments with Hydra's parser, but report errors in one line instead of its usage."""
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


def _expand_first(overrides: Sequence[str], expand: FirstArgument, names: ConfigNames) -> list[str]:
    """Replace the first override by what it stands for, if it has no key."""
    if not overrides or overrides[0].startswith("~") or "=" in overrides[0]:
        return list(overrides)
    if overrides[0] in names.all:
        raise VitError(f"{overrides[0]!r}: has no value; write {overrides[0]}=VALUE")
    return expand(overrides[0], names.groups.get("data", []))


def _select_flags(arguments: list[str], overrides: list[str]) -> list[str]:
    """Return the arguments that are no overrides; argparse accepts overrides only on one side of -m."""
    remaining, flags = list(overrides), []
    for text in arguments:
        if remaining and text == remaining[0]:
            remaining.pop(0)
        else:
            flags.append(text)
    return flags


def _sweep_folder(args: argparse.Namespace, config_name: str) -> Path:
    """Return the folder of a sweep's results: `hydra.sweep.dir`, resolved with the given `run.root`.

    Hydra composes the configuration of a sweep without the overrides of its jobs, so `run.root` would be lost.
    """
    hydra_overrides = [t for t in args.overrides if t.startswith("hydra.") and not t.startswith("hydra.mode")]
    root = [text for text in args.overrides if text.startswith("run.root=") and "," not in text]
    folder = str(args.config_path or CONF)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=os.path.abspath(folder)):
        composed = hydra.compose(args.config_name or config_name, [*hydra_overrides, *root], return_hydra_config=True)
    return Path(options.expand_path(composed.hydra.sweep.dir))


@contextlib.contextmanager
def _replace_argv(arguments: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv`, from which Hydra and Lightning read, in the body."""
    original = sys.argv
    sys.argv = list(arguments)
    try:
        yield
    finally:
        sys.argv = original
