"""Find pretrained weights, and read their configuration before they are loaded.

A source is one of

    vit_small_patch16_224.augreg_in1k     a name of timm's registry, tag or not, perhaps @REVISION
    hf-hub:ORG/NAME                       a model on the hub, perhaps @REVISION: timm's, or a bundle
    local-dir:FOLDER                      the same in a folder
    FOLDER, FILE                          a run, a bundle, a checkpoint; a file of weights, together with a name

An existing path is always that path.  `read_info` reads only configurations; `read_weights` fetches the weights.
Sizes in a foreign configuration are checked before a model of that size is built.  Imports torch; timm for a name.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.checksums import read_config
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained import hub
from vit.pretrained.convert import from_bundle, from_timm
from vit.pretrained.huggingface import to_timm_names, unwrap
from vit.pretrained.jax import from_jax
from vit.pretrained.labels import read_class_names
from vit.pretrained.locations import ENDINGS, PREFERRED, WeightsLocation, fetch_weights, find_weights_file, read_content
from vit.pretrained.native import (
    CONFIG,
    WEIGHTS,
    check_sizes,
    find_native,
    is_native_checkpoint,
    read_native,
    split_checkpoint,
)
from vit.pretrained.preprocessing import from_timm_cfg
from vit.pretrained.reading import read_pickled

EXPECTED = (
    "a name of timm's such as vit_small_patch16_224.augreg_in1k, hf-hub:ORG/NAME, local-dir:FOLDER, a run folder, a "
    "bundle, or a file of weights"
)
_CFG = (
    *("architecture", "tag", "input_size", "fixed_input_size", "num_classes"),
    *("interpolation", "crop_pct", "crop_mode", "mean", "std"),
)
"""Keys used from a foreign `pretrained_cfg`."""
_MAX_SIZES = {"depth": 1024, "num_classes": 10_000_000}
"""Largest numbers in a foreign architecture; 65,536 for other keys."""


@dataclass(frozen=True)
class ModelInfo:
    """Describes weights before they are loaded.

    Attributes:
        name: the usual name of the weights.
        architecture: the arguments of `vit.VisionTransformer` for the weights.
        preprocessing: the preprocessing of images for the weights.
        class_names: one name for each output; None if the meaning of the outputs is unknown.
        location: where the weights are; None for a timm architecture without weights.
        trusted: whether the information comes from timm itself, and not from anyone's configuration.
        license: the licence of the weights, if timm gives it.
        description: the description in a model of this project (`vit.inference.description`); None for others.
    """

    name: str
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    class_names: list[str] | None
    location: WeightsLocation | None
    trusted: bool = False
    license: str | None = None
    description: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Weights:
    """Holds weights under this project's names, and their source.

    Attributes:
        state: the tensors.
        label: the exact source.
        notes: decisions made while reading.
    """

    state: dict[str, Tensor]
    label: str
    notes: list[str] = field(default_factory=list)


def read_info(source: str | os.PathLike[str], revision: str | None = None) -> ModelInfo:
    """Read the information on a source's weights; a timm name needs no network.

    Raises `VitError` when there is no such source, it cannot be read, or it does not describe its model.
    """
    source = os.fspath(source)
    scheme, rest = _split_scheme(source)
    if scheme == "hf-hub":
        location, config = _read_hub(rest, revision)
        if config is None:
            raise VitError(f"{source} has no {CONFIG}: give the name of a model of timm's, and this as its weights")
        return _from_config(config, source, location)
    if scheme == "local-dir" or _exists(source):
        if revision is not None:
            raise VitError(f"{source}: only weights on the hub have revisions")
        path = Path(rest if scheme else source)
        return _read_file(path, source) if path.is_file() else _read_folder(path, source)
    return _read_registry(source, revision)


def find_weights(source: str | os.PathLike[str], revision: str | None = None) -> WeightsLocation:
    """Find the weights of a source, for any model.  Raises `VitError` when there is no such source."""
    source = os.fspath(source)
    scheme, rest = _split_scheme(source)
    if scheme == "hf-hub":
        return _read_hub(rest, revision)[0]
    if scheme == "local-dir" or _exists(source):
        path = Path(rest if scheme else source)
        if not path.exists():
            raise VitError(f"there is no folder {path}")
        if (native := find_native(path.parent if path.name == WEIGHTS else path)) is not None:
            return WeightsLocation("path", str(native), native=True)
        return WeightsLocation("path", str(find_weights_file(path) if path.is_dir() else path))
    location = _read_registry(source, revision).location
    if location is None:
        raise VitError(f"timm has no weights for {source}: give a name with a tag, or a file of weights")
    return location


def read_weights(location: WeightsLocation, info: ModelInfo) -> Weights:
    """Read the weights at `location` for the architecture of `info`, under this project's names.

    Raises `VitError` when they cannot be fetched or read, are refused, or hold no such model.
    """
    path, label = fetch_weights(location)
    notes: list[str] = []
    if location.native:
        state = from_bundle(read_native(path)[0], info.architecture)
    else:
        content = read_content(path)
        if is_native_checkpoint(content):
            state = split_checkpoint(content, path)[0]
        else:
            state, notes = _rename_weights(content, info.architecture, path)
    if not info.trusted and location == info.location:
        check_sizes(info.architecture, state, label)
    return Weights(state, label, notes)


def _split_scheme(source: str) -> tuple[str | None, str]:
    """Split "hf-hub:ORG/NAME" into "hf-hub" and "ORG/NAME"; None for a source without a scheme."""
    if not source:
        raise VitError(f"the name of the weights is empty: expected {EXPECTED}")
    for scheme in ("hf-hub", "hf_hub", "local-dir"):
        if source.startswith(f"{scheme}:"):
            return scheme.replace("_", "-"), source.removeprefix(f"{scheme}:")
    return None, source


def _exists(source: str) -> bool:
    if "\0" in source:
        raise VitError(f"cannot read {source!r}: no file has a name with a zero byte")
    return os.path.lexists(source)


def _read_hub(name: str, revision: str | None) -> tuple[WeightsLocation, dict[str, Any] | None]:
    """Locate the weights of a repository and read its configuration; None if it has none."""
    repo, revision = hub.split_revision(name, revision)
    fetched = hub.fetch(repo, [CONFIG], revision, optional=True)
    config = None if fetched is None else read_config(fetched.path)
    native = config is not None and isinstance(config.get("vit"), dict)
    return WeightsLocation("hub", repo, (WEIGHTS,) if native else PREFERRED, revision, native), config


def _read_registry(source: str, revision: str | None) -> ModelInfo:
    """Read the information on a timm name."""
    from vit.pretrained.registry import read_entry

    name, revision = hub.split_revision(source, revision)
    if re.search(r"[/\\]", name.removeprefix("timm/")) or name.endswith((*ENDINGS, ".ckpt")):
        raise VitError(f"no weights at {source}: expected {EXPECTED}")
    entry = read_entry(name)
    cfg, a = entry.pretrained_cfg, entry.architecture
    repo, url, file = cfg.get("hf_hub_id"), cfg.get("url"), cfg.get("hf_hub_filename")
    if revision is not None and not repo:
        raise VitError(f"{source}: the weights of {entry.name} are not on the hub, so they have no revisions")
    location = WeightsLocation("url", url) if url else None
    if repo:
        files = (f"{file.rpartition('.')[0]}.safetensors", file) if file else PREFERRED[:2]
        location = WeightsLocation("hub", repo, tuple(dict.fromkeys(files)), revision)
    preprocessing = from_timm_cfg(cfg, image_size=a["image_size"], channels=a["in_channels"], source=name)
    names = read_class_names({**cfg, "num_classes": a["num_classes"]}, name) if location is not None else None
    return ModelInfo(entry.name, a, preprocessing, names, location, trusted=True, license=cfg.get("license"))


def _read_folder(folder: Path, source: str) -> ModelInfo:
    native = find_native(folder)
    if native is not None:
        return _read_native_info(native, source)
    if not folder.exists():
        raise VitError(f"there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise VitError(f"{folder} is not a model: expected {EXPECTED}")
    return _from_config(read_config(folder / CONFIG), source, WeightsLocation("path", str(find_weights_file(folder))))


def _read_file(path: Path, source: str) -> ModelInfo:
    if path.name in (CONFIG, WEIGHTS) and (path.parent / CONFIG).is_file():
        return _read_folder(path.parent, source)
    if path.suffix not in (".safetensors", ".npz"):
        content = read_pickled(path)
        if is_native_checkpoint(content):
            return _read_native_info(path, source)
        # timm's training script stores the name of the model beside the weights
        name = content.get("arch") if isinstance(content, Mapping) else None
        if isinstance(name, str):
            location = WeightsLocation("path", str(path))
            return dataclasses.replace(_read_registry(name, None), name=source, location=location)
    raise VitError(
        f"{source} does not say what model it is for: give the model's name and this file as its weights, as in "
        f'load_pretrained("vit_small_patch16_224", weights="{path.name}")'
    )


def _read_native_info(path: Path, source: str) -> ModelInfo:
    """Read the information on a bundle folder or a checkpoint of this project."""
    table = read_config(path / CONFIG)["vit"] if path.is_dir() else read_native(path)[1]
    return _from_description(table, source, WeightsLocation("path", str(path), native=True))


def _from_description(table: Mapping[str, Any], source: str, location: WeightsLocation) -> ModelInfo:
    """Read the description of a model of this project (`vit.inference.description` explains it)."""
    architecture, names = table.get("architecture"), table.get("class_names")
    if not isinstance(architecture, dict):
        raise VitError(f"{source} does not say its architecture")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VitError(f"{source} does not say its class names")
    for key, value in architecture.items():  # before a model of that size is built
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= _MAX_SIZES.get(key, 65_536):
                raise VitError(f"{source}: architecture.{key} is {number}, which no model has")
    try:
        preprocessing = Preprocessing.from_dict(table.get("preprocessing"))
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    architecture = _complete_architecture(architecture, source)
    return ModelInfo(source, architecture, preprocessing, names, location, description=table)


def _complete_architecture(architecture: dict[str, Any], source: str) -> dict[str, Any]:
    """Add default arguments that did not exist when an older model was saved."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return VisionTransformer(**architecture).architecture
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{source}: its architecture cannot be built: {error}") from None


def _from_config(config: dict[str, Any], source: str, location: WeightsLocation) -> ModelInfo:
    """Read a `config.json`: of timm, or of a bundle, which has this project's description as well."""
    if isinstance(config.get("vit"), dict):
        return _from_description(config["vit"], source, location)
    from vit.pretrained.architecture import read_architecture
    from vit.pretrained.registry import build_timm, is_model_name

    name, source_cfg = config.get("architecture"), config.get("pretrained_cfg", config)  # older ones are not nested
    if not isinstance(name, str) or not isinstance(source_cfg, dict):
        raise VitError(
            f"{source} is not a model of timm's (its {CONFIG} names no architecture): give the name of one, and this "
            "as its weights"
        )
    if not is_model_name(name) or not name.isidentifier():
        raise VitError(f"{source} is a {name!r}, which timm does not have")
    cfg = {key: source_cfg[key] for key in _CFG if key in source_cfg}
    if "num_classes" in config:
        cfg["num_classes"] = config["num_classes"]
    arguments = _check_model_args(config.get("model_args") or {}, cfg, source)
    try:
        architecture = read_architecture(build_timm(name, pretrained_cfg=cfg, **arguments))
    except VitError as error:
        raise VitError(f"{source} cannot be built here: {error}") from None
    cfg["label_names"] = config.get("label_names", source_cfg.get("label_names", source_cfg.get("labels")))
    cfg["label_descriptions"] = config.get("label_descriptions", source_cfg.get("label_descriptions"))
    cfg["num_classes"] = architecture["num_classes"]
    size, channels = architecture["image_size"], architecture["in_channels"]
    preprocessing = from_timm_cfg(cfg, image_size=size, channels=channels, source=source)
    return ModelInfo(source, architecture, preprocessing, read_class_names(cfg, source), location)


def _check_model_args(arguments: Any, cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check that foreign `model_args` are arguments of a model with sizes that fit into memory, and return them."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as Plain

    if not isinstance(arguments, dict):
        raise VitError(f"{source}: its model_args are no table of names and values")
    allowed = {name for model in (Plain, Eva) for name in inspect.signature(model).parameters}
    sizes = {key: cfg.get(key) for key in ("num_classes", "input_size")}
    for key, value in {**arguments, **sizes}.items():
        if key not in allowed and key not in sizes:
            raise VitError(f"{source}: model_args has {key!r}, which is no argument of a Vision Transformer")
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, str | int | float | None):
                raise VitError(f"{source}: model_args.{key} should be a plain value, not {type(part).__name__}")
            if isinstance(part, str) and not re.fullmatch(r"[\w-]*", part):  # timm imports what has a dot in its name
                raise VitError(f"{source}: model_args.{key} is {part[:60]!r}, which is no name of a layer of timm's")
            if isinstance(part, int | float) and not 0 <= part <= _MAX_SIZES.get(key, 65_536):
                raise VitError(f"{source}: model_args.{key} is {part}, which no model has")
    return {key: value for key, value in arguments.items() if value is not None}


def _rename_weights(content: Any, architecture: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the contents of a file to this project's names; return the weights and notes."""
    if path.suffix == ".npz":
        state, heads = from_jax(content, str(path))
        if heads not in (None, architecture["heads"]):
            raise VitError(f"{path} has attention of {heads} heads, the model of {architecture['heads']}")
        return state, []
    state, notes = unwrap(content, str(path))
    state, more = to_timm_names(state, architecture, str(path))
    return from_timm(state, architecture), [*notes, *more]
