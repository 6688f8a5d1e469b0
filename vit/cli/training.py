"""Run `vit train` and `vit eval` with the functions of `train.py` and `eval.py`."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> int:
    """Run the command, which reports its errors itself; return its exit status."""
    if arguments.command == "train":
        from vit.training.app import train_main

        return train_main(arguments.arguments)
    from vit.training.eval_app import eval_main

    return eval_main(arguments.arguments)
