"""What logging costs, as a share of training: attention, and the rest of what TensorBoard is given.

Each run is a process of its own, with and without attention in turn.  Two figures come of it: the time inside the
callbacks as a share of the training they are in, which a busy machine hardly moves; and the difference between the
runs, which is the proof of the first, and moves with everything else that the machine does.  Both in seconds of the
clock and of the processor.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.results import parser, report, spread

CASES = {
    "digits": ["export.onnx=false"],
    "tiny16": [
        *("data=shapes", "data.image_size=224", "data.patch_size=16", "data.batch_size=32", "model.size=tiny"),
        *("data.train_images=512", "data.val_images=64", "data.test_images=32", "trainer.validate_every=1000"),
        *("export.onnx=false", "trainer.max_epochs=null", "trainer.max_time=600"),
    ],
}
ABOUT = {"digits": "`python train.py`, the default", "tiny16": "ViT-Ti/16 at 224 on shapes"}


def main(arguments: list[str]) -> int:
    options = parser("logging", "What logging costs, as a share of training.")
    options.add_argument("--cases", default="digits", help="digits, tiny16, which takes an hour (%(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="of runs with and without attention")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    options.add_argument("--one", help="run this case in this process and print its figures")
    options.add_argument("--attention", type=int, default=16)
    given = options.parse_args(arguments)
    if given.one:
        print(json.dumps(run(given.one, given.attention, given.set)))
        return 0
    rows = [
        ["case", "training, s", "attention", "of the processor", "other logging", "steps", "without, s", "file, MB"]
    ]
    figures: dict[str, Any] = {}
    for case in given.cases.split(","):
        found: dict[int, list[dict[str, float]]] = {0: [], given.attention: []}
        for round_ in range(given.rounds):
            for count in (given.attention, 0) if round_ % 2 else (0, given.attention):
                found[count].append(apart(case, count, given.set))
                print(case, count, found[count][-1], file=sys.stderr, flush=True)
        with_, without = found[given.attention], found[0]
        rows.append(
            [
                ABOUT[case],
                spread([each["seconds"] for each in with_], 1),
                spread([100 * each["attention_seconds"] / each["seconds"] for each in with_], 2, "%"),
                spread([100 * each["attention_cpu"] / each["cpu"] for each in with_], 2, "%"),
                spread([100 * each["monitor_seconds"] / each["seconds"] for each in with_], 2, "%"),
                f"{statistics.median(each['steps'] for each in with_):.0f}",
                spread([each["seconds"] for each in without], 1),
                f"{statistics.median(each['megabytes'] for each in with_):.1f}",
            ]
        )
        figures[case] = {"with": with_, "without": without}
    report("logging", "The cost of logging", rows, figures, given)
    return 0


def apart(case: str, attention: int, overrides: list[str]) -> dict[str, float]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "logging", "--one", case, "--attention", str(attention)]
    for each in overrides:
        command += ["--set", each]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def run(case: str, attention: int, overrides: list[str]) -> dict[str, float]:
    """Train, and time what the callbacks take: seconds of the clock, and of the processor."""
    import hydra

    from vit.dashboard.format import STEPS
    from vit.training.app import CONF, resolve_config
    from vit.training.attention import AttentionLog
    from vit.training.config import load_config
    from vit.training.monitor import Monitor
    from vit.training.run import train

    taken: dict[str, float] = {}
    whole = [0.0, 0.0]

    def timed(kind: type, name: str) -> None:
        for hook in (
            "on_train_start",
            "on_train_batch_end",
            "on_validation_batch_end",
            "on_validation_end",
            "on_train_end",
        ):
            if hook not in vars(kind):
                continue
            real = vars(kind)[hook]

            def replaced(*given: Any, real: Any = real, hook: str = hook, **more: Any) -> None:
                clock, cpu = time.perf_counter(), time.process_time()
                if kind is AttentionLog and hook == "on_train_start":
                    whole[:] = clock, cpu
                real(*given, **more)
                taken[f"{name}_seconds"] = taken.get(f"{name}_seconds", 0.0) + time.perf_counter() - clock
                taken[f"{name}_cpu"] = taken.get(f"{name}_cpu", 0.0) + time.process_time() - cpu
                if kind is AttentionLog and hook == "on_train_end":
                    whole[:] = time.perf_counter() - whole[0], time.process_time() - whole[1]

            setattr(kind, hook, replaced)

    timed(AttentionLog, "attention")
    timed(Monitor, "monitor")
    with tempfile.TemporaryDirectory() as folder:
        typed = [
            *CASES[case],
            f"run.root={folder}",
            "logging.progress=false",
            f"logging.attention={attention}",
            *overrides,
        ]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = load_config(resolve_config(hydra.compose("train", typed)))
        result = train(config, typed)
        assert result is not None
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        files = list(result.folder.glob("events*"))
        found = EventAccumulator(str(result.folder), size_guidance={"tensors": 0})
        found.Reload()
        steps = len(found.Tensors(STEPS)) if STEPS in found.Tags()["tensors"] else 0
        size = sum(file.stat().st_size for file in files) / 1e6
    return {"seconds": whole[0], "cpu": whole[1], "steps": steps, "megabytes": size, **taken}
