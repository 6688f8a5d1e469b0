"""Define the options of the `vit` command.  Imports argparse and a table; each command is imported when it runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from vit.errors import VitError
from vit.map_methods import BY_CLASS, MAP_METHODS

MODEL = "run folder, .ckpt, bundle folder, exported .onnx file or name of timm's (vit_small_patch16_224.augreg_in1k)"
SOURCE = "image file, folder, glob, .txt list with one path a line, or - for paths on standard input"


_PATHS = ("MODEL", "SOURCE", "BUNDLE", "FILE", "DIR", "OUT")


class _Parser(argparse.ArgumentParser):
    """Parses arguments with errors of one line, `--version`, and `~` as the home folder in paths."""

    def __init__(self, **options: Any) -> None:
        from vit import __version__

        super().__init__(**options)
        if "-" in self.prefix_chars:
            self.add_argument("--version", action="version", version=f"vit {__version__}")

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("metavar") in _PATHS:
            options.setdefault("type", _path)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise VitError(f"{message} (`{self.prog} --help` explains)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.  The result's `run(arguments)` runs the command and returns its exit status.

    Raises `VitError` for a wrong call; `--help` and `--version` print and raise SystemExit(0).
    """
    parser = _make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from vit.cli.completion import complete

        complete(parser)
    return parser.parse_args(argv)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vit", description="Train, evaluate and use a Vision Transformer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _hydra(commands, "train", "train a model: vit train photos, vit train --help")
    _hydra(commands, "eval", "measure a model on images whose classes are known: vit eval MODEL")
    _classify(commands)
    _explain(commands)
    _export(commands)
    _push(commands)
    _info(commands)
    _tune_reduction(commands)
    return parser


def _hydra(commands: Any, name: str, help: str) -> None:
    # no options here: Hydra parses everything, --help and --multirun too
    command = commands.add_parser(name, help=help, add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=_lazy_run("training"), command=name)


def _classify(commands: Any) -> None:
    command = commands.add_parser(
        "classify",
        help="label images",
        description="Label images. Results go to standard output, progress and messages to standard error. "
        "Exit status: 0 all were labelled; 1 some could not be used (their rows say why); 2 the call was wrong.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("sources", metavar="SOURCE", nargs="+", help=SOURCE)
    command.add_argument("--top-k", type=_count, default=5, metavar="K", help="likeliest classes to give (5)")
    command.add_argument(
        "--format",
        choices=("table", "jsonl", "csv"),
        help="table (default), jsonl (one object a line, full precision) or csv; taken from the name of --output",
    )
    command.add_argument("--output", metavar="FILE", help="write results there, whole or not at all")
    command.add_argument(
        "--batch-size", type=_count, metavar="N", help="images computed together (a few by each processor, 32 by torch)"
    )
    _reduction(command, "needs torch; `vit export --reduction` puts it into an ONNX file")
    command.add_argument(
        "--explain", metavar="DIR", help="also write an attention rollout over each image there (needs torch)"
    )
    _device(command)
    command.add_argument(
        "--backend",
        choices=("auto", "onnx", "torch"),
        default="auto",
        help="auto takes the model's ONNX file on a CPU, where it has one; the answers are the same",
    )
    _recursive(command)
    command.set_defaults(run=_lazy_run("classify"))


def _explain(commands: Any) -> None:
    command = commands.add_parser(
        "explain",
        help="show what a model looks at: overlays, and a page to explore",
        description="Show what a model looks at in images. Writes an overlay an image and index.html, the viewer of "
        "TensorBoard's Attention tab as one file, into a folder. Exit status: 0 all were explained; 1 some could not "
        "be used (messages say why); 2 the call was wrong.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("sources", metavar="SOURCE", nargs="+", help=SOURCE)
    command.add_argument("--output", metavar="DIR", required=True, help="the folder to write to; made if need be")
    command.add_argument(
        "--method",
        choices=tuple(MAP_METHODS),
        default="rollout",
        metavar="METHOD",
        help=f"{', '.join(MAP_METHODS)} (rollout; docs/explain.md tells them apart)",
    )
    command.add_argument(
        "--target",
        metavar="LABEL",
        help="the class to explain, by name or number (the predicted one), for "
        f"{', '.join(BY_CLASS[:-1])} and {BY_CLASS[-1]}",
    )
    command.add_argument(
        "--layer", type=_integer, metavar="N", help="raw: this layer; others: no higher than it; from 0, or -1 the last"
    )
    command.add_argument("--save-maps", action="store_true", help="also write each map as .npz")
    command.add_argument(
        "--index", type=_number, default=32, metavar="N", help="images in index.html at most (32); 0 writes none"
    )
    command.add_argument("--batch-size", type=_count, default=8, metavar="N", help="images computed at once (8)")
    _reduction(command, "maps are of the image's own patches all the same")
    _device(command)
    _recursive(command)
    command.set_defaults(run=_lazy_run("explain"))


def _export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a model as one ONNX file, as a .pt2 program or as a bundle",
        description="Write a model as one ONNX file, which needs nothing else to classify; as a .pt2 program of "
        "torch.export; or as a bundle: a folder with weights, configuration and model card that timm loads as well. "
        "Verified against torch before it takes its name, on images of the data it was trained on where that is here.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("output", metavar="OUT", help="a name ending in .onnx or .pt2, or a folder to make")
    command.add_argument(
        "--with-rollout", action="store_true", help="a second output: attention rollout, a map on the patch grid"
    )
    command.add_argument(
        "--int8",
        action="store_true",
        help="an ONNX file in 8-bit integers, fitted to images; what that costs is measured, shown and stored",
    )
    command.add_argument(
        "--calibration",
        metavar="SOURCE",
        nargs="+",
        help="images to fit integers to and to compare on, instead of the data that the model was trained on: "
        + SOURCE,
    )
    _reduction(command, "the file computes so, and says so of itself")
    command.set_defaults(run=_lazy_run("export"))


def _push(commands: Any) -> None:
    command = commands.add_parser(
        "push",
        help="put a bundle on the Hugging Face hub",
        description="Put a bundle, or the bundle of a run, on the Hugging Face hub, with a model card that states "
        "data, recipe, figures, calibration, intended use and limits. Takes the token of `hf auth login`, or HF_TOKEN.",
    )
    command.add_argument("model", metavar="BUNDLE", help="bundle folder or run folder")
    command.add_argument("repo", metavar="REPO", help="ORG/NAME on the hub; made if need be")
    command.add_argument("--private", action="store_true", help="for its owners only")
    command.add_argument("--revision", metavar="BRANCH", help="a branch (main); made if need be")
    command.add_argument("--message", help="of the commit")
    command.add_argument(
        "--dry-run", action="store_true", help="send nothing: show the files, their sizes and the card; no network"
    )
    command.set_defaults(run=_lazy_run("push"))


def _info(commands: Any) -> None:
    command = commands.add_parser(
        "info",
        help="what a model is: architecture, classes, preprocessing, data, figures",
        description="What a model is: architecture, classes, preprocessing, temperature, data, figures, recipe.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    command.set_defaults(run=_lazy_run("info"))


def _tune_reduction(commands: Any) -> None:
    command = commands.add_parser(
        "tune-reduction",
        help="find which tokens a model can do without, under a budget",
        description="Find the schedule of token reduction that keeps most validation images right at a given share of "
        "the cost. Prints accuracy against cost, and writes a bundle that has the best of them.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument(
        "--budget", type=_fraction, required=True, metavar="SHARE", help="of the cost without reduction, such as 0.5"
    )
    command.add_argument(
        "--measure",
        choices=("flops", "latency"),
        default="flops",
        help="what cost is: operations, counted (default), or seconds, measured on this machine",
    )
    command.add_argument("--output", metavar="DIR", help="write the model with the best schedule there, as a bundle")
    command.add_argument(
        "--data",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="other validation images than those of the data that it was trained on, such as name=folder root=photos",
    )
    command.add_argument("--images", type=_count, default=1000, metavar="N", help="to judge by, at most (1000)")
    command.add_argument(
        "--trials", type=_number, default=32, metavar="N", help="schedules beyond those with names (32)"
    )
    command.add_argument("--seed", type=_number, default=0, metavar="N", help="of the search (0)")
    _device(command)
    command.set_defaults(run=_lazy_run("tune_reduction"))


def _reduction(command: argparse.ArgumentParser, note: str) -> None:
    command.add_argument(
        "--reduction",
        metavar="LINE",
        help=f"fewer tokens: keep or merge with a share, such as merge:0.5, or none (as the model has it); {note}",
    )


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")


def _recursive(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recursive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look into subfolders (default)",
    )


def _path(text: str) -> str:
    if not text.startswith(("~", "local-dir:~")):
        return text
    from vit.options import expand_path

    return expand_path(text)


def _count(text: str, minimum: int = 1) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {minimum}, not {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share over 0 and under 1, not {text!r}")
    return value


def _number(text: str) -> int:
    return _count(text, minimum=0)


def _integer(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9):
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


def _lazy_run(name: str) -> Any:
    """Make a function that imports `vit.cli.<name>` and calls its `run`."""

    def run(arguments: argparse.Namespace) -> int:
        return int(import_module(f"vit.cli.{name}").run(arguments))

    return run
