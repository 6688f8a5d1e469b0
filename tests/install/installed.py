"""Use an installed package as somebody new does, in an empty folder: train, classify, evaluate, see the Attention tab.

    python tests/install/installed.py ENVIRONMENT/bin/python EMPTY_FOLDER [overrides of the training]

Standard library only.  Ends with status 0 when all went well, and says what it did; every wait has a limit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PHOTOGRAPH = """
from PIL import Image

Image.radial_gradient("L").resize((640, 480)).convert("RGB").save("photo.jpg")
"""


def main(python: str, place: str, *overrides: str) -> None:
    folder = Path(place).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    assert not list(folder.iterdir()), f"{folder} is not empty"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str, seconds: float = 300) -> str:
        print("$", *command[1:], flush=True)
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def vit(*arguments: str, seconds: float = 300) -> str:
        return run(str(Path(python).with_name("vit")), *arguments, seconds=seconds)

    where = Path(run(python, "-c", "import vit; print(vit.__file__)").strip())
    assert CHECKOUT not in where.parents, f"{where} is the checkout"
    assert re.fullmatch(r"vit \d+\.\d+\.\d+\S*\n", vit("--version"))
    assert vit("train", "--version") == vit("--version")
    trained = vit("train", *overrides, seconds=1800)
    match = re.search(r"^evaluate +vit eval checkpoint=(\S+)$", trained, re.M)
    assert match, trained
    model = match[1]
    run(python, "-c", PHOTOGRAPH)
    row = json.loads(vit("classify", model, "photo.jpg", "--format", "jsonl"))
    assert row["label"] in list("0123456789"), row
    evaluated = vit("eval", model)
    assert "top-1" in evaluated, evaluated
    block = json.loads((folder / model / "evaluation" / "metrics.json").read_text("utf-8"))["test"]
    before = json.loads((folder / model / "metrics.json").read_text("utf-8"))["test"]
    assert abs(block["top1"] - before["top1"]) < 0.005, (block["top1"], before["top1"])
    assert attention_tab(python, folder, environment), "TensorBoard does not list the Attention tab"
    print("all is well:", json.dumps(before))


def attention_tab(python: str, folder: Path, environment: dict[str, str], seconds: float = 180) -> bool:
    """Whether a real TensorBoard lists the plugin, and that there is data for it."""
    command = [python, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0", "--host", "127.0.0.1"]
    print("$", *command[1:], flush=True)
    log = folder / "tensorboard.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and server.poll() is None:
            address = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text("utf-8"))
            if address:
                with urllib.request.urlopen(f"{address[0]}data/plugins_listing", timeout=60) as answer:
                    if json.load(answer).get("vit_attention", {}).get("enabled"):
                        return True
            time.sleep(0.5)
        print(log.read_text("utf-8"), file=sys.stderr)
        return False
    finally:
        server.kill()
        server.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
