"""The `vit` command: train, eval, classify, explain, export, push, info.

Notable: it parses first and imports later, so `--help` and mistakes in the call answer at once, and `vit classify`
on an ONNX file never imports torch.

Exit status: 0 all went well; 1 some inputs could not be used; 2 the call itself was wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vit.errors import VitError, printable
from vit.processors import wait_passively
from vit.signals import interruptible


def command() -> NoReturn:
    """The process called `vit`: `main`, and then the end at once.

    Importing libraries makes much and little garbage, so it is looked for more rarely; and taking an interpreter with
    NumPy and ONNX Runtime in it apart, object by object, takes a tenth of a second that nobody has any use for.
    Training and evaluation, which have threads and cycles of tensors to look after, end as any program does.
    """
    if sys.argv[1:] and sys.argv[1] in ("train", "eval"):
        sys.exit(main())
    import atexit
    import gc

    gc.set_threshold(100_000, 50, 50)
    try:
        status = main()
    except SystemExit as leaving:  # --help and --version
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default) and return the exit status.

    A mistake of the user's is one line on standard error; with VIT_TRACEBACK=1 in the environment, a traceback.
    """
    from vit.cli.parser import parse

    # NumPy's OpenBLAS starts a thread for each processor when it is imported, which is half of NumPy's start-up, and no
    # command multiplies matrices with NumPy
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    wait_passively()
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks runs on its CPU
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
        # one line whatever file names it quotes, and no control character for the terminal to obey
        print(f"vit: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        close_stdout()
        return 0
    except OSError as error:
        # files say themselves that they cannot be written; an error of no file is standard output's
        if error.filename is not None or os.environ.get("VIT_TRACEBACK", "0") not in ("", "0"):
            raise
        close_stdout()
        print(f"vit: cannot write to standard output: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vit: interrupted", file=sys.stderr)
        return 130


def close_stdout() -> None:
    """Leave nothing for the interpreter to flush into a closed pipe when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
