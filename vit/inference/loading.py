"""From a name to a model: a run folder, a checkpoint, a bundle folder, an exported ONNX file, or a name of timm's.

Notable
- `locate` decides what a MODEL is by looking, in one place, so every command takes the same things.  What exists is
  that; only what looks like a name of timm's is one, so a path costs no import of timm.
- On a CPU the ONNX file is taken where there is one, and torch is not imported: a fresh process answers in half a
  second.  Whether a GPU may exist is seen from its driver's files; only if it may is torch asked.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit.checksums import read_config
from vit.errors import VitError, command_name, did_you_mean, printable
from vit.inference.bundle import CONFIG, ONNX, WEIGHTS, is_bundle, read_bundle
from vit.inference.classifier import Classifier
from vit.processors import gpu_possible

if TYPE_CHECKING:
    from vit.inference.description import Description
    from vit.model import VisionTransformer

BACKENDS = ("auto", "onnx", "torch")
EXPECTED = "a run folder, a .ckpt, a bundle folder, an .onnx file or a name of timm's"
SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Fronts of names that timm has for models which are not in its registry."""
_NAME = re.compile(r"(timm/)?[a-z0-9]+(_[a-z0-9]+)+(\.\w*)?(@\S+)?", re.IGNORECASE)
_FAMILY = re.compile(r"vit|deit|_patch\d", re.IGNORECASE)


@dataclass(frozen=True)
class ResolvedModel:
    """What a MODEL turned out to be.

    Attributes
        path: as it was given.
        kind: "run", "bundle", "checkpoint", "onnx" or "timm".
        bundle, checkpoint: where the weights for torch are; at most one is set, none for an ONNX file.
        onnx: the ONNX file, if there is one.
        name: of a model of timm's, as `vit.pretrained.create.load_pretrained` takes it.
    """

    path: Path
    kind: str
    bundle: Path | None = None
    checkpoint: Path | None = None
    onnx: Path | None = None
    name: str | None = None


def locate(model: str | os.PathLike[str]) -> ResolvedModel:
    """Look what `model` is.  Of a run folder the best model is taken: its bundle, else the best, else the last
    checkpoint.

    Raises `VitError` when there is nothing of that name, naming what comes nearest, or when it is no model.
    """
    path = Path(model)
    if not os.fspath(model):
        raise VitError(f"the name of the model is empty: expected {EXPECTED}")
    try:
        if path.is_dir():
            return _locate_in(path)
        exists = os.path.lexists(path)
        other = path.exists() and not path.is_file()
    except (OSError, ValueError) as error:
        raise VitError(f"cannot read {printable(path)}: {error}") from None
    if not exists:
        return _named(os.fspath(model))
    if other:  # a pipe, a device: reading it might never end
        raise VitError(f"{printable(path)} is neither a file nor a folder: expected {EXPECTED}")
    if path.suffix.lower() == ".onnx":
        return ResolvedModel(path, "onnx", onnx=path)
    if path.suffix.lower() == ".pt2":
        raise VitError(
            f"{printable(path)} is a program for torch.export.load, which vit does not run: give what it was exported "
            f"from, {EXPECTED}"
        )
    if path.name in (WEIGHTS, CONFIG, ONNX) and is_bundle(path.parent):
        return _bundle(path, path.parent, "bundle")
    return ResolvedModel(path, "checkpoint", checkpoint=path)


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    backend: str = "auto",
    block: bool = True,
    throughput: bool = False,
    reduction: str | None = None,
) -> Classifier:
    """A classifier from any MODEL.

    Arguments
        device: "auto" (a GPU where torch finds one), "cpu", "cuda", "cuda:1", "mps".
        backend: "onnx" (ONNX Runtime, CPU only), "torch", or "auto": ONNX on a CPU where the model has such a file.
        throughput: whether there will be many images at a time: more of them a second, at the cost of each.
        block: whether to wait until the model is ready; if not, `Classifier.ready` and the first answer do, and raise
            what is wrong with its weights.
        reduction: fewer tokens, as one line, such as "merge:0.5" (see `vit.model.reduction.parse`), by torch; None: as
            the model has it.

    Both backends give the same results to 1e-4.  Raises `VitError` when the model, the device or the backend cannot
    be had.
    """
    if backend not in BACKENDS:
        raise VitError(f"no backend {backend!r}; {did_you_mean(backend, BACKENDS)}")
    if backend == "onnx" and device not in ("auto", "cpu"):
        raise VitError(f"the onnx backend runs on the CPU, not on {device!r}: use device cpu, or backend torch")
    if backend == "onnx" and reduction is not None:
        raise VitError(
            f"an ONNX file computes what it was exported to: `vit export MODEL X.onnx --reduction {reduction}` writes "
            "one; or use backend torch"
        )
    found = locate(model)
    if backend == "onnx" and found.onnx is None:
        raise VitError(f"{printable(found.path)} has no {ONNX}: `vit export` writes one; or use backend torch")
    wants_cpu = device == "cpu" or (device == "auto" and (found.kind == "onnx" or not _gpu_here()))
    if reduction is None and found.onnx is not None and (backend == "onnx" or (backend == "auto" and wants_cpu)):
        from vit.inference.onnx_backend import OnnxBackend

        description = read_bundle(found.bundle) if found.bundle else None
        classifier = Classifier(OnnxBackend(found.onnx, description, throughput=throughput))
        if block:
            classifier.ready()
        return classifier
    from vit.inference.torch_backend import TorchBackend

    return Classifier(TorchBackend(*load_torch(model, device=device, reduction=reduction)))


def load_torch(
    model: str | os.PathLike[str], *, device: str = "auto", reduction: str | None = None
) -> tuple[VisionTransformer, Description]:
    """The torch module of any MODEL, in evaluation mode on `device`, and its description.

    `reduction` is as for `load`.  Raises `VitError` when the model cannot be read, the reduction cannot be, or the
    device is not there.
    """
    if reduction is None:
        return _load_torch(model, device)
    from vit.model.reduction import parse, spell

    options = parse(reduction)
    network, description = _load_torch(model, device)
    network.reduce(**options)
    # figures are those of the model as it was
    same = spell(network.architecture) == spell(description.architecture)
    metrics = description.metrics if same else {}
    return network, dataclasses.replace(description, architecture=dict(network.architecture), metrics=metrics)


def _load_torch(model: str | os.PathLike[str], device: str) -> tuple[VisionTransformer, Description]:
    found = locate(model)
    if found.name is not None:
        return _load_named(found.name, device)
    from vit.inference.torch_backend import resolve_device
    from vit.inference.weights import build, load_checkpoint
    from vit.pretrained.convert import from_bundle
    from vit.pretrained.reading import load_safetensors

    place = resolve_device(device)
    source: Path
    if found.bundle is not None and (found.bundle / WEIGHTS).is_file():
        description, source = read_bundle(found.bundle), found.bundle / WEIGHTS
        weights = from_bundle(load_safetensors(source), description.architecture)
    elif found.checkpoint is not None:
        source = found.checkpoint
        weights, description = load_checkpoint(source)
    else:
        from vit.inference.onnx_weights import load_onnx

        assert found.onnx is not None
        source = found.onnx
        weights, description = load_onnx(source)
        if found.bundle is not None:
            description = read_bundle(found.bundle)
    return build(description, weights, source).to(place), description


def _named(name: str) -> ResolvedModel:
    """A name of timm's, or nothing at all.  Raises `VitError` with the runs and the names that come nearest."""
    if name.startswith(SCHEMES):
        return ResolvedModel(Path(name), "timm", name=name)
    if not _NAME.fullmatch(name) or not _FAMILY.search(name):
        raise VitError(f"no model at {printable(name)}: expected {EXPECTED}; {suggest(Path(name))}")
    from vit.pretrained.registry import is_model_name, read_entry

    if is_model_name(name.partition("@")[0].partition(".")[0]):
        return ResolvedModel(Path(name), "timm", name=name)
    try:
        read_entry(name)
    except VitError as error:
        raise VitError(f"no model at {printable(name)}: {error}; as for runs, {suggest(Path(name))}") from None
    return ResolvedModel(Path(name), "timm", name=name)


def _load_named(name: str, device: str) -> tuple[VisionTransformer, Description]:
    """A classifier that somebody published, by name.  Raises `VitError`, before it is fetched, when it is none."""
    from vit.inference.description import Description
    from vit.inference.torch_backend import resolve_device
    from vit.pretrained.create import load_pretrained, read_info

    place = resolve_device(device)
    info = read_info(name)
    if info.class_names is None:
        outputs = info.architecture["num_classes"]
        what = f"its {outputs} outputs are no classes" if outputs else "it has no classifier"
        raise VitError(
            f"{info.name} is a backbone, {what}: fine-tune it first "
            f"({command_name('train')} experiment=finetune model.name={name} data.root=FOLDER)"
        )
    loaded = load_pretrained(name)
    if info.description is not None:  # a bundle of this project, with its temperature and history
        return loaded.model.to(place), Description.from_dict(info.description, name)
    description = Description(
        architecture=loaded.architecture,
        class_names=list(loaded.class_names or ()),
        preprocessing=loaded.preprocessing,
        training={"pretrained": {"name": info.name}, "weights": loaded.source},
    )
    return loaded.model.to(place), description


def _locate_in(folder: Path) -> ResolvedModel:
    if _of_timm(folder):
        return ResolvedModel(folder, "timm", name=f"local-dir:{folder}")
    if is_bundle(folder):
        return _bundle(folder, folder, "bundle")
    if is_bundle(folder / "model"):
        return _bundle(folder, folder / "model", "run")
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / name).is_file():
            return ResolvedModel(folder, "run", checkpoint=folder / "checkpoints" / name)
    if (folder / CONFIG).is_file():
        raise VitError(f"{printable(folder)} has a {CONFIG} but neither {WEIGHTS} nor {ONNX}: its weights are missing")
    if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
        raise VitError(f"{printable(folder)} is a run that has not saved a model (no model/, no checkpoints/last.ckpt)")
    inside = _runs(folder)
    hint = f"the newest run in it is {printable(inside[0])}" if inside else suggest(folder)
    raise VitError(f"{printable(folder)} is not a model: expected {EXPECTED}; {hint}")


def _bundle(path: Path, folder: Path, kind: str) -> ResolvedModel:
    onnx = folder / ONNX if (folder / ONNX).is_file() else None
    bundle = folder if (folder / WEIGHTS).is_file() or onnx is not None else None
    return ResolvedModel(path, kind, bundle=bundle, onnx=onnx)


def _of_timm(folder: Path) -> bool:
    """Whether timm wrote the folder, as it does for the hub; a bundle has this project's own account beside timm's."""
    if not (folder / CONFIG).is_file():
        return False
    config = read_config(folder / CONFIG)
    return "architecture" in config and "vit" not in config


def suggest(path: Path | None = None, root: str = "runs") -> str:
    """Which run may be meant by `path`, as a phrase to end a message with; None: the newest."""
    runs = _runs(Path(root))
    if not runs:
        return f"there is no run under ./{root} yet ({command_name('train')} makes one)"
    names = [printable(run) for run in runs]
    near = "" if path is None else did_you_mean(printable(path), names, 1)
    return near if near.startswith("did you mean") else f"the newest run here is {names[0]}"


def _runs(folder: Path, most: int = 200) -> list[Path]:
    """Run folders under `folder`, up to two levels down, newest first."""
    try:
        found = [
            run
            for pattern in ("*", "*/*")
            for run in folder.glob(pattern)
            if not run.name.startswith(".")
            and (is_bundle(run / "model") or (run / "checkpoints" / "last.ckpt").is_file())
        ]
        return sorted(found, key=lambda run: run.stat().st_mtime, reverse=True)[:most]
    except OSError:
        return []


def _gpu_here() -> bool:
    if not gpu_possible():
        return False
    from vit.inference.torch_backend import resolve_device

    return resolve_device("auto").type != "cpu"
