"""Record what a checkout gives: python record_state.py CHECKOUT OUT.json [--whole] [--only PART,PART]

`python -m benchmarks compare` runs this.  It uses what the project promises and nothing else: commands, names of
`vit` and `vit.explain`, and files.  So one version of this program can record commits whose code is built differently.

The record is JSON: {part: {item: entry}}.  An array becomes its SHA-256 and a few of its values, so that a difference
can be put in figures.  Text is kept, with folders, dates and speeds masked.  Weights are set from their own names, not
drawn by the model, so that the order in which a model creates its layers plays no part; how it draws them is an item
of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Items = Iterator[tuple[str, Any]]

NAMES = (
    *("vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch16_gap_224", "vit_base_patch16_plus_240"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "eva_large_patch14_196", "beit3_base_patch16_224"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "test_vit4"),
    *("vit_small_plus_patch16_dinov3_qkvb", "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"),
    *("vit_so150m_patch16_reg4_map_256", "vit_little_patch16_reg4_gap_256", "vit_so150m2_patch16_reg1_gap_256"),
    *("aimv2_large_patch14_224", "vit_base_patch16_radio_v3"),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "dot product": {"attention": "dot_product"},
    "scaled dot product": {"attention": "scaled_dot_product"},
    "post-norm": {"norm": "post"},
    "rotary": {"position": "rotary"},
    "sincos, SwiGLU, LayerScale": {"position": "sincos", "mlp": "swiglu", "layer_scale": 0.1},
    "keep": {"reduction": "keep"},
    "merge": {"reduction": "merge"},
}
METHODS = ("rollout", "raw", "relevance", "gradient_rollout", "legrad", "random")
COMMANDS = ("train", "eval", "classify", "explain", "export", "push", "info", "tune-reduction")
SMALL = ("model.size=nano", "model.depth=2", "data.image_size=32", "data.patch_size=8", "data.batch_size=8")
VARYING = re.compile(r"^(model|.*seconds|.*per_second|versions|speed/.*)$")
"""Figures that no two runs share."""
SUMMED = 1e-6
"""Relative: a logged loss is a mean whose parts are summed when there is time, so that its last bit varies."""
MASKS = (
    (r"\d{4}-\d\d-\d\d[ _T]\d\d[-:]\d\d[-:]\d\d([,.]\d+)?", "DATE"),
    (r"events\.out\.tfevents\.\S+", "EVENTS"),
    (r"[\d,.]+k? (img|images)/s", "RATE"),
    (r"\bin [\d.,]+ (ms|s|min)\b", "in TIME"),
    (r"\d+:\d\d (left|in all)", r"TIME \1"),
    (r"[\d.]+ [KMGT]iB free", "SPACE free"),
    (r"cache/[0-9a-f]{16}", "cache/KEY"),  # with the dates of the files
    (r"(?m)^epoch .* TIME left\n", ""),  # how many there are depends on the time
)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("checkout", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--whole", action="store_true")
    options.add_argument("--only", default=",".join(PARTS))
    given = options.parse_args()
    import vit

    if not Path(vit.__file__).is_relative_to(given.checkout):
        sys.exit(f"{vit.__file__} is not of {given.checkout}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw_images(Path("photos"))
        work = Work(given.checkout, given.whole)
        found: dict[str, dict[str, Any]] = {}
        for part in given.only.split(","):
            print(part, file=sys.stderr, flush=True)
            found[part] = dict(PARTS[part](work))
    given.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


class Work:
    """A checkout, and the run that several parts need, made once."""

    def __init__(self, checkout: Path, whole: bool) -> None:
        self.checkout, self.whole = checkout, whole
        self._run: Path | None = None

    def command(self, *arguments: str, script: str | None = None) -> dict[str, Any]:
        """Run `vit` or a script of the checkout: exit status, standard output, standard error."""
        start = ["-m", "vit"] if script is None else [str(self.checkout / script)]
        done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, timeout=3600)
        return {"status": done.returncode, "out": self.masked(done.stdout), "err": self.masked(done.stderr)}

    def masked(self, text: str) -> str:
        for path, name in ((os.getcwd(), "FOLDER"), (str(self.checkout), "CHECKOUT"), (sys.executable, "PYTHON")):
            text = text.replace(path, name)
        for pattern, name in MASKS:
            text = re.sub(pattern, name, text)
        return text

    def train(self, root: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        """Train; returns the run folder and what was printed."""
        printed = self.command(*overrides, f"run.root={root}", script="train.py")
        runs = sorted(Path(root).glob("*/*/metrics.json"))
        if not runs:
            raise RuntimeError(f"python train.py {' '.join(overrides)} made no run:\n{printed['err']}")
        return runs[0].parent, printed

    @property
    def run(self) -> Path:
        """The run folder of digits, seed 0: five epochs, or with --whole the default."""
        if self._run is None:
            self._run, self.printed = self.train("runs", *([] if self.whole else ["trainer.max_epochs=5"]))
        return self._run


def digits(work: Work) -> Items:
    """The default run."""
    yield from of_run(work.run, work.printed)
    yield "evaluated", work.command(f"checkpoint={work.run}", "output=evaluation", script="eval.py")
    yield "evaluation", figures(Path("evaluation/metrics.json"))


def folder(work: Work) -> Items:
    """Runs on image files: streamed with everything switched on, and decoded once."""
    own = ("data=folder", "data.root=photos", "data.max_bad_fraction=0.1", "trainer.max_epochs=2", *SMALL)
    streamed = ("data.resident=false", "augment=strong", "model.pool=attention", "model.reduction=merge")
    streamed += ("model.drop_path=0.1", "model.registers=2", "optim=adamw", "ema.decay=0.9", "export.onnx=false")
    cached = ("data.cache=true", "data.cache_folder=cache", "augment=crop", "model.reduction=keep", "export.onnx=false")
    for name, overrides in (("streamed", streamed), ("cached", cached)):
        for item, entry in of_run(*work.train(f"runs_{name}", *own, *overrides)):
            yield f"{name} {item}", entry


def of_run(run: Path, printed: dict[str, Any]) -> Items:
    import torch
    from safetensors.numpy import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    yield "final weights", {key: array(value) for key, value in sorted(state.items())}
    yield "bundle", {key: array(value) for key, value in sorted(load_file(run / "model/model.safetensors").items())}
    yield "metrics.json", figures(run / "metrics.json")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 1, "images": 1}).Reload()
    scalars = {tag: [each.value for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    yield "loss", {"figures": scalars.pop("train/loss"), "tolerance": SUMMED}
    yield "figures logged", {tag: values for tag, values in scalars.items() if not VARYING.search(tag)}
    yield "pictures and tensors logged", [events.Tags()["images"], events.Tags()["tensors"]]
    yield "files", sorted(re.sub(*MASKS[1], str(path.relative_to(run))) for path in run.rglob("*") if path.is_file())
    yield "printed", printed


def logits(work: Work) -> Items:
    """Of timm's names and of this project's variants, two blocks each, and how weights are drawn."""
    import torch

    import vit

    for name in NAMES:
        model = with_weights(vit.create_model(name, depth=2))
        with torch.inference_mode():
            yield name, array(model(pixels(model)))
    for name, arguments in VARIANTS.items():
        model = with_weights(small(**arguments))
        with torch.inference_mode():
            yield name, array(model(pixels(model)))
    torch.manual_seed(0)
    yield "weights drawn", {key: array(value) for key, value in sorted(small().state_dict().items())}


def maps(work: Work) -> Items:
    """Every method, on a model of each kind of pooling, with and without token reduction."""
    import torch

    import vit
    from vit.explain import explain

    for pool in ("token", "mean", "attention"):
        for reduction in ("none", "keep", "merge"):
            model = with_weights(small(pool=pool, registers=1, reduction=reduction))
            images = pixels(model)
            entry = {method: array(explain(model, images, method)) for method in METHODS}
            entry["relevance of class 3"] = array(explain(model, images, "relevance", target=3))
            entry["raw of head 1 in layer 0"] = array(explain(model, images, "raw", layer=0, head=1))
            yield f"{pool}, {reduction}", entry
    model = with_weights(small())
    with torch.inference_mode(), vit.record_attention(model) as record:
        model(pixels(model))
    yield "weights recorded", [array(each) for each in record.weights]
    yield "vit.rollout", array(vit.rollout(record.weights, prefix_tokens=model.num_prefix_tokens, grid=model.grid))


def exported(work: Work) -> Items:
    """What ONNX files say, run by onnxruntime."""
    import onnxruntime

    for name, options in (("plain", ()), ("with rollout", ("--with-rollout",))):
        yield f"{name}, printed", work.command("export", str(work.run), f"{len(options)}.onnx", *options)
        session = onnxruntime.InferenceSession(f"{len(options)}.onnx", providers=["CPUExecutionProvider"])
        shape = session.get_inputs()[0].shape[1:]
        images = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
        outputs = session.run(None, {session.get_inputs()[0].name: images})
        names = [each.name for each in session.get_outputs()]
        yield f"{name}, outputs", dict(zip(names, map(array, outputs), strict=True))
        yield f"{name}, metadata", sorted(session.get_modelmeta().custom_metadata_map)


def config(work: Work) -> Items:
    """`--cfg job` of train, of eval and of every experiment."""
    yield "train", work.command("--cfg", "job", script="train.py")
    yield "eval", work.command("--cfg", "job", script="eval.py")
    for file in sorted((work.checkout / "conf/experiment").glob("*.yaml")):
        yield file.stem, work.command(f"experiment={file.stem}", "--cfg", "job", script="train.py")


def commands(work: Work) -> Items:
    """What each prints and writes on a folder of images, a damaged one among them."""
    run = str(work.run)
    for form in ("table", "jsonl", "csv"):
        yield f"classify --format {form}", work.command("classify", run, "photos", "--format", form)
    yield "classify, torch", work.command("classify", run, "photos", "--format", "jsonl", "--backend", "torch")
    for method in METHODS:
        out = f"maps_{method}"
        printed = work.command("explain", run, "photos", "--output", out, "--save-maps", "--method", method)
        yield f"explain --method {method}", {"printed": printed, "files": files(Path(out), {".npz", ".png"})}
    yield "info", work.command("info", run)
    yield "export to a folder", {"printed": work.command("export", run, "out"), "files": files(Path("out"), {".json"})}
    yield "classify, bundle", work.command("classify", "out", "photos", "--format", "jsonl")
    for name in ("", *COMMANDS):
        yield f"vit {name}".strip() + " --help", work.command(*([name] if name else []), "--help")
    for name, wrong in {
        "a mistyped key": ("train", "model.szie=tiny"),
        "a mistyped value": ("train", "model.size=tinny"),
        "no such model": ("classify", "nothing", "photos"),
        "no such file": ("classify", run, "nothing.jpg"),
        "no such method": ("explain", run, "photos", "--output", "m", "--method", "rolout"),
        "no such command": ("clasify",),
    }.items():
        yield name, work.command(*wrong)


def small(**arguments: Any) -> Any:
    import vit

    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 5, "depth": 3, "width": 32, "heads": 2}
    return vit.create_model("vit_nano", **{**shape, **arguments})


def with_weights(model: Any) -> Any:
    """Set every weight from its name: gains around 1, matrices that keep the size of what they map, small others."""
    import torch

    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        gain = tensor.ndim == 1 and name.endswith(("weight", "gamma"))
        tensor.copy_(drawn * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1 + 0.3 * drawn if gain else 0.3 * drawn)
    return model.eval()


def pixels(model: Any) -> Any:
    import torch

    shape = (2, model.patch_embed.proj.in_channels, *model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def array(value: Any) -> dict[str, Any]:
    """Its hash, and at most 16 of its values."""
    value = np.ascontiguousarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    places = np.linspace(0, value.size - 1, min(16, value.size)).astype(int)
    kind = f"{value.dtype}{list(value.shape)}"
    return {"sha256": hashlib.sha256(value.tobytes()).hexdigest(), "array": kind, "values": value.flat[places].tolist()}


def figures(path: Path) -> dict[str, Any]:
    """A file of figures without times and versions."""
    return {key: value for key, value in json.loads(path.read_text("utf-8")).items() if not VARYING.match(key)}


def files(folder: Path, kinds: set[str]) -> dict[str, Any]:
    """The names in a folder, with the content of those that end in one of `kinds`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = None
        if path.suffix == ".npz" and ".npz" in kinds:
            with np.load(path) as arrays:
                found[path.name] = {key: array(arrays[key]) if arrays[key].ndim else str(arrays[key]) for key in arrays}
        elif path.suffix in kinds:
            found[path.name] = array(np.asarray(Image.open(path))) if path.suffix == ".png" else _json(path)
    return found


def _json(path: Path) -> Any:
    return json.loads(re.sub(MASKS[0][0], "DATE", path.read_text("utf-8")))


def draw_images(folder: Path) -> None:
    """Two classes of smooth images of several sizes and kinds of file; a damaged one, and one that is no image."""
    random = np.random.default_rng(0)
    for number in range(32):
        kind = ("light", "dark")[number % 2]
        path = folder / kind / f"{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        low, high = ((96, 256), (0, 160))[number % 2]
        coarse = Image.fromarray(random.integers(low, high, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + 3 * number, 90 - number), Image.Resampling.BICUBIC).save(path)
    (folder / "light/broken.jpg").write_bytes((folder / "light/00.jpg").read_bytes()[:300])
    (folder / "dark/notes.txt").write_text("no image", "ascii")


PARTS: dict[str, Callable[[Work], Items]] = {
    each.__name__: each for each in (digits, folder, logits, maps, exported, config, commands)
}

if __name__ == "__main__":
    main()
