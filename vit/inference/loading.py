"""Load a model from a run folder, a checkpoint, a bundle folder, an exported ONNX file or a timm name.

Notes:
- `locate` finds out what a MODEL is, in one place, so every command takes the same models.  An existing path is always
  a path; only a text of the form of a timm name is one, so a path does not import timm.
- On a CPU an ONNX file is preferred, without torch: a fresh process classifies in half a second.  The files of the
  driver show whether there may be a GPU; only then is torch asked.
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
from vit.processors import may_have_gpu

if TYPE_CHECKING:
    from vit.inference.description import Description
    from vit.model import VisionTransformer

BACKENDS = ("auto", "onnx", "torch")
EXPECTED = "a run folder, a .ckpt, a bundle folder, an .onnx file or a name of timm's"
SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of timm names for models outside its registry."""
_NAME = re.compile(r"(timm/)?[a-z0-9]+(_[a-z0-9]+)+(\.\w*)?(@\S+)?", re.IGNORECASE)
_FAMILY = re.compile(r"vit|deit|_patch\d", re.IGNORECASE)


@dataclass(frozen=True)
class ResolvedModel:
    """Describes what a MODEL is.

    Attributes:
        path: the path as given.
        kind: "run", "bundle", "checkpoint", "onnx" or "timm".
        bundle, checkpoint: the weights for torch; at most one is set, none for an ONNX file.
        onnx: the ONNX file, if there is one.
        name: the name of a timm model, as `vit.pretrained.create.load_pretrained` takes it.
    """

    path: Path
    kind: str
    bundle: Path | None = None
    checkpoint: Path | None = None
    onnx: Path | None = None
    name: str | None = None


def locate(model: str | os.PathLike[str]) -> ResolvedModel:
    """Find out what `model` is; a run folder gives its bundle, else its best, else its last checkpoint.

    Raises `VitError`, with the nearest name, when it does not exist, or when it is no model.
    """
    path = Path(model)
    if not os.fspath(model):
        raise VitError(f"the name of the model is empty: expected {EXPECTED}")
    try:
        if path.is_dir():
            return _locate_in_folder(path)
        exists = os.path.lexists(path)
        other = path.exists() and not path.is_file()
    except (OSError, ValueError) as error:
        raise VitError(f"cannot read {printable(path)}: {error}") from None
    if not exists:
        return _resolve_name(os.fspath(model))
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
        return _resolve_bundle(path, path.parent, "bundle")
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
    """Load a classifier from any MODEL.  Both backends give the same results to 1e-4.

    Args:
        model: a run folder, a checkpoint, a bundle folder, an ONNX file or a timm name.
        device: "auto" (a GPU if torch finds one), "cpu", "cuda", "cuda:1", "mps".
        backend: "onnx" (ONNX Runtime, CPU only), "torch", or "auto": ONNX on a CPU if the model has such a file.
        block: whether to wait until the model is loaded; else `Classifier.ready` and the first result wait, and raise
            errors of its weights.
        throughput: whether to optimise for many images at a time: more images per second, a longer time for each.
        reduction: token reduction by torch as one line, such as "merge:0.5" (see `vit.model.reduction.parse`); None:
            the model's own.

    Raises:
        VitError: if the model, the device or the backend is not available.
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
    resolved = locate(model)
    if backend == "onnx" and resolved.onnx is None:
        raise VitError(f"{printable(resolved.path)} has no {ONNX}: `vit export` writes one; or use backend torch")
    wants_cpu = device == "cpu" or (device == "auto" and (resolved.kind == "onnx" or not _has_gpu()))
    if reduction is None and resolved.onnx is not None and (backend == "onnx" or (backend == "auto" and wants_cpu)):
        from vit.inference.onnx_backend import OnnxBackend

        description = read_bundle(resolved.bundle) if resolved.bundle else None
        classifier = Classifier(OnnxBackend(resolved.onnx, description, throughput=throughput))
        if block:
            classifier.ready()
        return classifier
    from vit.inference.torch_backend import TorchBackend

    return Classifier(TorchBackend(*load_torch(model, device=device, reduction=reduction)))


def load_torch(
    model: str | os.PathLike[str], *, device: str = "auto", reduction: str | None = None
) -> tuple[VisionTransformer, Description]:
    """Load the torch module of any MODEL, in evaluation mode on `device`, and its description.

    `reduction` is as for `load`.  Raises `VitError` when the model cannot be read, the reduction is invalid, or there
    is no such device.
    """
    if reduction is None:
        return _load_torch(model, device)
    from vit.model.reduction import format_reduction, parse

    options = parse(reduction)
    network, description = _load_torch(model, device)
    network.reduce(**options)
    # figures are those of the model as it was
    same = format_reduction(network.architecture) == format_reduction(description.architecture)
    metrics = description.metrics if same else {}
    return network, dataclasses.replace(description, architecture=dict(network.architecture), metrics=metrics)


def _load_torch(model: str | os.PathLike[str], device: str) -> tuple[VisionTransformer, Description]:
    resolved = locate(model)
    if resolved.name is not None:
        return _load_named(resolved.name, device)
    from vit.inference.torch_backend import resolve_device
    from vit.inference.weights import build, load_checkpoint
    from vit.pretrained.convert import from_bundle
    from vit.pretrained.reading import load_safetensors

    torch_device = resolve_device(device)
    source: Path
    if resolved.bundle is not None and (resolved.bundle / WEIGHTS).is_file():
        description, source = read_bundle(resolved.bundle), resolved.bundle / WEIGHTS
        weights = from_bundle(load_safetensors(source), description.architecture)
    elif resolved.checkpoint is not None:
        source = resolved.checkpoint
        weights, description = load_checkpoint(source)
    else:
        from vit.inference.onnx_weights import load_onnx

        assert resolved.onnx is not None
        source = resolved.onnx
        weights, description = load_onnx(source)
        if resolved.bundle is not None:
            description = read_bundle(resolved.bundle)
    return build(description, weights, source).to(torch_device), description


def _resolve_name(name: str) -> ResolvedModel:
    """Resolve a timm name.  Raises `VitError` with the nearest runs and names when there is no such model."""
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
    """Load a published classifier by name.  Raises `VitError`, before it is fetched, when it is not a classifier."""
    from vit.inference.description import Description
    from vit.inference.torch_backend import resolve_device
    from vit.pretrained.create import load_pretrained, read_info

    torch_device = resolve_device(device)
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
        return loaded.model.to(torch_device), Description.from_dict(info.description, name)
    description = Description(
        architecture=loaded.architecture,
        class_names=list(loaded.class_names or ()),
        preprocessing=loaded.preprocessing,
        training={"pretrained": {"name": info.name}, "weights": loaded.source},
    )
    return loaded.model.to(torch_device), description


def _locate_in_folder(folder: Path) -> ResolvedModel:
    if _is_timm_folder(folder):
        return ResolvedModel(folder, "timm", name=f"local-dir:{folder}")
    if is_bundle(folder):
        return _resolve_bundle(folder, folder, "bundle")
    if is_bundle(folder / "model"):
        return _resolve_bundle(folder, folder / "model", "run")
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / name).is_file():
            return ResolvedModel(folder, "run", checkpoint=folder / "checkpoints" / name)
    if (folder / CONFIG).is_file():
        raise VitError(f"{printable(folder)} has a {CONFIG} but neither {WEIGHTS} nor {ONNX}: its weights are missing")
    if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
        raise VitError(f"{printable(folder)} is a run that has not saved a model (no model/, no checkpoints/last.ckpt)")
    inside = _find_runs(folder)
    hint = f"the newest run in it is {printable(inside[0])}" if inside else suggest(folder)
    raise VitError(f"{printable(folder)} is not a model: expected {EXPECTED}; {hint}")


def _resolve_bundle(path: Path, folder: Path, kind: str) -> ResolvedModel:
    onnx = folder / ONNX if (folder / ONNX).is_file() else None
    bundle = folder if (folder / WEIGHTS).is_file() or onnx is not None else None
    return ResolvedModel(path, kind, bundle=bundle, onnx=onnx)


def _is_timm_folder(folder: Path) -> bool:
    """Check whether timm wrote the folder, in the hub's format; a bundle has this project's description as well."""
    if not (folder / CONFIG).is_file():
        return False
    config = read_config(folder / CONFIG)
    return "architecture" in config and "vit" not in config


def suggest(path: Path | None = None, root: str = "runs") -> str:
    """Format a hint for the end of a message: the run nearest to `path`, or the newest one for None."""
    runs = _find_runs(Path(root))
    if not runs:
        return f"there is no run under ./{root} yet ({command_name('train')} makes one)"
    names = [printable(run) for run in runs]
    hint = "" if path is None else did_you_mean(printable(path), names, 1)
    return hint if hint.startswith("did you mean") else f"the newest run here is {names[0]}"


def _find_runs(folder: Path, limit: int = 200) -> list[Path]:
    """Find run folders under `folder`, up to two levels down, newest first."""
    try:
        runs = [
            run
            for pattern in ("*", "*/*")
            for run in folder.glob(pattern)
            if not run.name.startswith(".")
            and (is_bundle(run / "model") or (run / "checkpoints" / "last.ckpt").is_file())
        ]
        return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)[:limit]
    except OSError:
        return []


def _has_gpu() -> bool:
    if not may_have_gpu():
        return False
    from vit.inference.torch_backend import resolve_device

    return resolve_device("auto").type != "cpu"
