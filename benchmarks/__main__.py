"""python -m benchmarks [NAME] [options]

    cold        one photograph in a fresh process, beside timm, transformers and a bare loop
    folder      100 and 1,000 photographs end to end, beside the same
    forward     a forward pass alone, beside timm, transformers, torchvision, vit-pytorch and the machine's limit
    preparing   decoding and preprocessing, beside timm, torchvision and transformers
    crops       random-resized crops of photographs, decoded once or again and again, beside timm's loader
    step        a step of training, beside timm, transformers and vit-pytorch
    epoch       an epoch of training on photographs, loading included, beside timm
    logging     what logging costs, as a share of training
    recording   what recording attention and rollout cost, as shares of a forward pass
    reduction   token reduction: accuracy against images a second, trained and untrained (trains: half an hour)
    race        training at equal wall-clock, beside timm, vit-pytorch and a plain Lightning loop (an hour)
    finetune    fine-tuning against training from scratch, in the same time (needs --weights and --data; half an hour)
    export      images a second and accuracy of torch, ONNX in float32 and ONNX in integers
    busy        training and classifying alone and beside 1, 2 and 4 busy programs, beside a plain timm loop
    compare     whether losses, weights, logits, maps and outputs are what they were before a change (3 minutes)
    mutate      whether the tests notice faults planted in a module
    peers       make the environment that the other tools are measured in (from PyPI, 0.5 GB)

Each but the last three prints a table and writes it, with machine and versions, as JSON; --record also appends it to
RESULTS.md.
Without a name, all are run, one after another; of the options then only --record and --peers DIR may be given.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

NAMES = {
    "cold": ("whole", "main_cold"),
    "folder": ("whole", "main_folder"),
    "forward": ("forward", "main"),
    "preparing": ("preparing", "main"),
    "crops": ("crops", "main"),
    "step": ("training_step", "main"),
    "epoch": ("epoch", "main"),
    "logging": ("logging_cost", "main"),
    "recording": ("recording", "main"),
    "reduction": ("reduction", "main"),
    "race": ("race", "main"),
    "finetune": ("finetune", "main"),
    "export": ("export", "main"),
    "busy": ("busy", "main"),
    "compare": ("compare", "main"),
    "mutate": ("mutate", "main"),
    "peers": ("peers", "main"),
}
BESIDE_PEERS = ("cold", "folder", "forward", "preparing", "crops", "step", "epoch")
ALL = (*BESIDE_PEERS, "logging", "recording", "reduction", "export", "busy")


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if arguments and arguments[0] in NAMES:
        module, function = NAMES[arguments[0]]
        return getattr(importlib.import_module(f"benchmarks.{module}"), function)(arguments[1:])
    if not arguments or arguments[0] in ("--record", "--peers"):
        return run_all(arguments)
    print(__doc__.strip(), file=sys.stderr)
    return 2


def run_all(arguments: list[str]) -> int:
    """Each in a process of its own, so that none starts with what another has loaded; 1 when any failed."""
    import argparse
    from pathlib import Path

    options = argparse.ArgumentParser(prog="python -m benchmarks")
    options.add_argument("--record", action="store_true")
    options.add_argument("--peers", type=Path)
    given = options.parse_args(arguments)
    failed = []
    for name in ALL:
        command = [sys.executable, "-m", "benchmarks", name, *(["--record"] if given.record else [])]
        command += ["--peers", str(given.peers)] if given.peers and name in BESIDE_PEERS else []
        print(f"\n{name}", file=sys.stderr, flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
