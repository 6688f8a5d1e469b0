"""Run the `vit` command: train, eval, classify, explain, export, push, info.

It parses first and imports later, so `--help` and errors in the call are printed at once, and `vit classify` on an
ONNX file never imports torch.

Exit status: 0 success; 1 some inputs could not be used; 2 the call itself was wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vit.errors import VitError, printable
from vit.processors import set_passive_waiting
from vit.signals import interruptible


def command() -> NoReturn:
    """Run `main` as the process `vit`, and exit at once.

    Imports make many objects and little garbage, so the garbage collector runs more rarely.  The normal exit of an
    interpreter with NumPy and ONNX Runtime frees every object, which takes a tenth of a second, so it is skipped.
    Training and evaluation have threads and cycles of tensors and exit normally.
    """
    if sys.argv[1:] and sys.argv[1] in ("train", "eval"):
        sys.exit(main())
    import atexit
    import gc

    gc.set_threshold(100_000, 50, 50)
    try:
        status = main()
    except SystemExit as error:  # --help and --version
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process) and return the exit status.

    A user error prints one line on standard error, or a traceback with VIT_TRACEBACK=1 in the environment.
    """
    from vit.cli.parser import parse

    # on import, NumPy's OpenBLAS starts a thread for each processor, which is half of NumPy's start-up, and no command
    # multiplies matrices with NumPy
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    set_passive_waiting()
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # operations that a Mac's GPU lacks run on its CPU
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class name may not fit the locale
    try:
        with interruptible():
            arguments = parse(sys.argv[1:] if argv is None else argv)
            status = int(arguments.run(arguments))
            sys.stdout.flush()
            return status
    except VitError as error:
        if os.environ.get("VIT_TRACEBACK", "0") not in ("", "0"):
            raise
        # one line without control characters, whatever file names the message has
        print(f"vit: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        close_stdout()
        return 0
    except OSError as error:
        # an error of a file names the file; an error without a name is standard output's
        if error.filename is not None or os.environ.get("VIT_TRACEBACK", "0") not in ("", "0"):
            raise
        close_stdout()
        print(f"vit: cannot write to standard output: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vit: interrupted", file=sys.stderr)
        return 130


def close_stdout() -> None:
    """Replace standard output, so that the interpreter does not flush into a closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
