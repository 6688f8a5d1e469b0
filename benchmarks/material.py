"""What every contestant is given: the same weights in the formats of all, and the same photographs.

`python -m benchmarks.material DIR [--photographs DIR]` makes it; benchmarks do so when it is not there.

Notable
- ViT-Ti/16, ViT-S/16 and nano/16 at 224, and ViT-Ti/4 at 32 for small images, with random weights: speed does not
  depend on their values.  The head is scaled and shifted so that photographs differ in their answers; without that,
  all have one label, and a comparison of answers would not see a wrong image.
- Preprocessing that all tools have: the image squeezed to 224 x 224, bicubic.
- 100 photographs from a camera where a folder of them is at hand (VIT_IMAGE_SAMPLE, or the sample beside this
  project's checkout); else as many images drawn here, and the results say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = Path(os.environ.get("VIT_IMAGE_SAMPLE", ROOT.parent / "shared/data/imagenet_sample"))
MODELS = {
    "tiny": ("tiny", 16, 1000),
    "small": ("small", 16, 1000),
    "nano": ("nano", 16, 1000),
    "tiny32": ("tiny", 4, 10),
}
"""Size, patch and classes of each; the last one is for images of 32 x 32."""
GRAIN = 4.0
"""Standard deviation of the noise added to enlarged photographs: their files then have a camera's bytes a pixel."""


@dataclass(frozen=True)
class Material:
    """Where it is.  `model(name)` is a bundle; with "-transformers" behind its name, the same for transformers."""

    folder: Path

    def model(self, name: str) -> Path:
        return self.folder / name

    def photographs(self, count: int, pixels: str | None = None) -> Path:
        """A folder of `count` photographs; those that there are, again and again.

        With `pixels`, "1600x1200" say, each is enlarged to that and grained first.
        """
        there = self.folder / f"photographs-{count}{f'-{pixels}' if pixels else ''}"
        if not there.is_dir():
            originals = sorted(path for path in self._originals(pixels).iterdir())
            part = self.folder / f".{there.name}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for number in range(count):
                source = originals[number % len(originals)]
                shutil.copy(source, part / f"{number:05}_{source.stem}.jpg")
            part.rename(there)
        return there

    def _originals(self, pixels: str | None) -> Path:
        folder = self.folder / "originals"
        if pixels is None:
            return folder
        if not (there := self.folder / f"originals-{pixels}").is_dir():
            # in a process of its own: this one imports neither Pillow nor NumPy
            command = [sys.executable, "-m", "benchmarks.material", str(folder), "--enlarge", pixels]
            subprocess.run(command, check=True, cwd=ROOT)
        return there

    def flops(self, name: str) -> float:
        """Operations of an image's forward pass, as `vit.model.cost` counts them; written down since it loads torch."""
        return json.loads((self.folder / f"{name}.json").read_text("ascii"))["flops"]

    @property
    def drawn(self) -> bool:
        """Whether there were no photographs, so that images were drawn."""
        return (self.folder / "drawn").exists()


def material(folder: Path, size: int = 224) -> Material:
    """The material in `folder`, made by a process of its own where it is not there, or was made by other code.

    Of its own because this process measures others, whose peak of memory starts at this one's.
    """
    rules = hashlib.sha256(f"{SAMPLE} {size}".encode())
    for file in sorted([Path(__file__), *ROOT.glob("vit/model/*.py"), *ROOT.glob("vit/inference/*.py")]):
        rules.update(file.read_bytes())
    place = folder / f"material-{size}-{rules.hexdigest()[:12]}"
    if not (place / "complete").exists():
        for stale in folder.glob(f"material-{size}-*"):
            shutil.rmtree(stale)
        command = [sys.executable, "-m", "benchmarks.material", str(place), "--image-size", str(size)]
        subprocess.run(command, check=True, cwd=ROOT)
    return Material(place)


def make(folder: Path, image_size: int) -> None:
    """Write everything into `folder`."""
    (folder / "originals").mkdir(parents=True)
    files = sorted(SAMPLE.glob("*.JPEG"))[:100] if SAMPLE.is_dir() else []
    for file in files:
        shutil.copy(file, folder / "originals" / f"{file.stem}.jpg")
    if not files:
        draw(folder / "originals")
        (folder / "drawn").touch()
    for name in MODELS:
        _model(folder, name, 32 if name.endswith("32") else image_size)
    (folder / "complete").touch()


def draw(folder: Path, count: int = 100) -> None:
    """Images of a photograph's usual size, smooth with some grain, each another."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        grained = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grained).save(folder / f"drawn{number:03}.jpg", quality=90)


def enlarge(folder: Path, pixels: str) -> None:
    """Write the photographs of `folder`, enlarged to `pixels` and grained, to a folder beside it."""
    import numpy as np
    from PIL import Image

    width, height = (int(side) for side in pixels.split("x"))
    random, there = np.random.default_rng(0), folder.with_name(f"{folder.name}-{pixels}")
    part = there.with_name(f".{there.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for file in sorted(folder.iterdir()):
        image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        values = np.asarray(image, dtype=np.float32)
        values = (values + random.normal(0, GRAIN, values.shape)).clip(0, 255)
        Image.fromarray(values.astype(np.uint8)).save(part / file.name, quality=90)
    part.rename(there)


def _model(folder: Path, name: str, image_size: int) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from vit.data.preprocess import Preprocessing
    from vit.inference.bundle import write_bundle
    from vit.inference.description import Description
    from vit.model import VisionTransformer
    from vit.model.cost import flops

    torch.manual_seed(0)
    size, patch, classes = MODELS[name]
    model = VisionTransformer(image_size=image_size, patch_size=patch, num_classes=classes, size=size).eval()
    preprocessing = Preprocessing(image_size=(image_size, image_size), crop_pct=1.0, crop_mode="squash")
    with torch.inference_mode():
        seen = []
        for path in sorted((folder / "originals").iterdir()):
            pixels = preprocessing(Image.open(path).convert("RGB"))
            seen.append(model(torch.from_numpy(pixels[None])).numpy()[0])
        logits = np.stack(seen)
    with torch.no_grad():
        scale = 3 / float(logits.std(axis=0).mean())
        model.head.weight.mul_(scale)
        model.head.bias.copy_(torch.from_numpy(-logits.mean(axis=0) * scale))
    description = Description(
        architecture=model.architecture,
        class_names=[f"class {number:03}" for number in range(classes)],
        preprocessing=preprocessing,
        training={"weights": "random, for measurements of speed"},
    )
    write_bundle(folder / name, model, description)
    (folder / f"{name}.json").write_text(json.dumps({"flops": flops(model.architecture)}), "ascii")
    _for_transformers(folder / f"{name}-transformers", model.state_dict(), description)


def _for_transformers(folder: Path, state: dict, description) -> None:  # type: ignore[no-untyped-def, type-arg]
    """The same model as transformers' `ViTForImageClassification` reads it from a folder, in the hub's names."""
    from safetensors.torch import save_file

    a, preprocessing = description.architecture, description.preprocessing
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    places = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm"}
    places |= {"head": "classifier"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}
    inner |= {"mlp.fc2": "output.dense", "attn.proj": "attention.output.dense"}
    for layer in range(a["depth"]):
        places |= {f"blocks.{layer}.{ours}": f"vit.encoder.layer.{layer}.{theirs}" for ours, theirs in inner.items()}
    weights = {}
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        if place.endswith("attn.qkv"):
            layer = place.split(".")[1]
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                weights[f"vit.encoder.layer.{layer}.attention.attention.{part}.{kind}"] = third.contiguous()
        else:
            weights[names.get(name) or f"{places[place]}.{kind}"] = value.contiguous()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    labels = dict(enumerate(description.class_names))
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "intermediate_size": 4 * a["width"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": a["image_size"][0],
        "patch_size": a["patch_size"][0],
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    height, width = preprocessing.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--enlarge", metavar="WxH", help="enlarge the photographs of the folder instead")
    given = options.parse_args()
    if given.enlarge:
        enlarge(given.folder, given.enlarge)
    else:
        make(given.folder, given.image_size)
