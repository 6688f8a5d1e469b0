"""Makes something happen at a moment of a run that a test starts: this folder is on its PYTHONPATH.

VIT_TEST_MOMENT in the environment is a JSON object: before the process of `rank` calls `hook` of its `TrainingModule`
with `step` steps done or more, it sends the signal `send` to `whom` ("self", "leader", "all"), or raises an error.
"""

import importlib.util
import json
import os
import signal
import sys
from types import ModuleType
from typing import Any

MODULE = "vit.training.module"


class Finder:
    """Changes the module when it is imported, and nothing before."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            load(module)
            change(module.TrainingModule)

        spec.loader.exec_module = execute
        return spec


def change(cls: type) -> None:
    moment, done = json.loads(os.environ["VIT_TEST_MOMENT"]), []
    original = getattr(cls, moment["hook"])

    def hook(self: Any, *arguments: Any) -> Any:
        trainer = self.trainer
        if not done and trainer.global_rank == moment["rank"] and trainer.global_step >= moment["step"]:
            done.append(True)
            if "send" not in moment:
                raise ValueError(f"a fault of process {trainer.global_rank}")
            send(signal.Signals[moment["send"]], moment["whom"])
        return original(self, *arguments)

    setattr(cls, moment["hook"], hook)


def send(number: int, whom: str) -> None:
    if whom == "all":
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid() if whom == "self" else os.getpgrp(), number)


if "VIT_TEST_MOMENT" in os.environ:
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
