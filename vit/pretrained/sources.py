"""Where weights are, and what is known of them before they are read.

A source is one of

    vit_small_patch16_224.augreg_in1k     a name of timm's registry, tag or not, perhaps @REVISION
    hf-hub:ORG/NAME                       a model on the hub, perhaps @REVISION: timm's, or a bundle
    local-dir:FOLDER                      the same in a folder
    FOLDER, FILE                          a run, a bundle, a checkpoint; a file of weights, for a name to go with it

and what exists as a path is that path.  `look` reads configurations only; `read` fetches the weights.
What a stranger's configuration says is bounded before a model of that size is built.  Imports torch; timm for a name.
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
from vit.pretrained.huggingface import in_timms_names, unwrap
from vit.pretrained.jax import from_jax
from vit.pretrained.labels import class_names
from vit.pretrained.locations import ENDINGS, PREFERRED, WeightsLocation, content, local, weights_in
from vit.pretrained.native import (
    CONFIG,
    WEIGHTS,
    check_sizes,
    checkpoint_parts,
    describes_itself,
    find_in,
    read_own,
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
"""What is taken of a stranger's `pretrained_cfg`."""
_MOST = {"depth": 1024, "num_classes": 10_000_000}
"""The largest numbers in a stranger's account of an architecture; of others, 65,536."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of weights before they are read.

    Attributes
        name: how people call them.
        architecture: the arguments of `vit.VisionTransformer` that they are for.
        preprocessing: how images are prepared for them.
        class_names: one name an output; None where nobody says what the outputs mean.
        place: where they are; None where timm has an architecture but no weights.
        trusted: whether timm itself says so, or a configuration that somebody wrote.
        license: of the weights, where timm says it.
        own: the whole account that a model of this project gives of itself (`vit.inference.description`), None for
            others.
    """

    name: str
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    class_names: list[str] | None
    place: WeightsLocation | None
    trusted: bool = False
    license: str | None = None
    own: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Weights:
    """Weights under this project's names, and how they came.

    Attributes
        state: the tensors.
        label: where exactly they are from.
        notes: what was decided on the way.
    """

    state: dict[str, Tensor]
    label: str
    notes: list[str] = field(default_factory=list)


def look(source: str | os.PathLike[str], revision: str | None = None) -> ModelInfo:
    """What is known of a source's weights; of a name of timm's without a network.

    Raises `VitError` when there is no such source, it cannot be read, or it does not say what model it is for.
    """
    source = os.fspath(source)
    scheme, rest = _scheme(source)
    if scheme == "hf-hub":
        place, config = _on_hub(rest, revision)
        if config is None:
            raise VitError(f"{source} has no {CONFIG}: give the name of a model of timm's, and this as its weights")
        return _configured(config, source, place)
    if scheme == "local-dir" or _exists(source):
        if revision is not None:
            raise VitError(f"{source}: only weights on the hub have revisions")
        path = Path(rest if scheme else source)
        return _in_file(path, source) if path.is_file() else _in_folder(path, source)
    return _registered(source, revision)


def place_of(source: str | os.PathLike[str], revision: str | None = None) -> WeightsLocation:
    """Where a source's weights are, whatever they are for.  Raises `VitError` when there is no such source."""
    source = os.fspath(source)
    scheme, rest = _scheme(source)
    if scheme == "hf-hub":
        return _on_hub(rest, revision)[0]
    if scheme == "local-dir" or _exists(source):
        path = Path(rest if scheme else source)
        if not path.exists():
            raise VitError(f"there is no folder {path}")
        own = find_in(path.parent if path.name == WEIGHTS else path)
        return WeightsLocation("path", str(own or (weights_in(path) if path.is_dir() else path)), own=own is not None)
    place = _registered(source, revision).place
    if place is None:
        raise VitError(f"timm has no weights for {source}: give a name with a tag, or a file of weights")
    return place


def read(place: WeightsLocation, known: ModelInfo) -> Weights:
    """The weights at a place, for the architecture of `known`, under this project's names.

    Raises `VitError` when they cannot be had or read, are refused, or hold no such model.
    """
    path, label = local(place)
    notes: list[str] = []
    if place.own:
        state = from_bundle(read_own(path)[0], known.architecture)
    else:
        found = content(path)
        if describes_itself(found):
            state = checkpoint_parts(found, path)[0]
        else:
            state, notes = _renamed(found, known.architecture, path)
    if not known.trusted and place == known.place:
        check_sizes(known.architecture, state, label)
    return Weights(state, label, notes)


def _scheme(source: str) -> tuple[str | None, str]:
    """ "hf-hub:ORG/NAME" -> "hf-hub" and what is behind it; None for what has no scheme."""
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


def _on_hub(name: str, revision: str | None) -> tuple[WeightsLocation, dict[str, Any] | None]:
    """A repository, and its configuration; None where it has none."""
    repo, revision = hub.split_revision(name, revision)
    found = hub.fetch(repo, [CONFIG], revision, optional=True)
    config = None if found is None else read_config(found.path)
    own = config is not None and isinstance(config.get("vit"), dict)
    return WeightsLocation("hub", repo, (WEIGHTS,) if own else PREFERRED, revision, own), config


def _registered(source: str, revision: str | None) -> ModelInfo:
    """A name of timm's."""
    from vit.pretrained.registry import entry

    name, revision = hub.split_revision(source, revision)
    if re.search(r"[/\\]", name.removeprefix("timm/")) or name.endswith((*ENDINGS, ".ckpt")):
        raise VitError(f"no weights at {source}: expected {EXPECTED}")
    found = entry(name)
    cfg, a = found.pretrained_cfg, found.architecture
    repo, url, file = cfg.get("hf_hub_id"), cfg.get("url"), cfg.get("hf_hub_filename")
    if revision is not None and not repo:
        raise VitError(f"{source}: the weights of {found.name} are not on the hub, so they have no revisions")
    place = WeightsLocation("url", url) if url else None
    if repo:
        files = (f"{file.rpartition('.')[0]}.safetensors", file) if file else PREFERRED[:2]
        place = WeightsLocation("hub", repo, tuple(dict.fromkeys(files)), revision)
    preprocessing = from_timm_cfg(cfg, image_size=a["image_size"], channels=a["in_channels"], source=name)
    names = class_names({**cfg, "num_classes": a["num_classes"]}, name) if place is not None else None
    return ModelInfo(found.name, a, preprocessing, names, place, trusted=True, license=cfg.get("license"))


def _in_folder(folder: Path, source: str) -> ModelInfo:
    own = find_in(folder)
    if own is not None:
        return _own(own, source)
    if not folder.exists():
        raise VitError(f"there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise VitError(f"{folder} is not a model: expected {EXPECTED}")
    return _configured(read_config(folder / CONFIG), source, WeightsLocation("path", str(weights_in(folder))))


def _in_file(path: Path, source: str) -> ModelInfo:
    if path.name in (CONFIG, WEIGHTS) and (path.parent / CONFIG).is_file():
        return _in_folder(path.parent, source)
    if path.suffix not in (".safetensors", ".npz"):
        content = read_pickled(path)
        if describes_itself(content):
            return _own(path, source)
        # timm's training script notes its model's name beside the weights
        name = content.get("arch") if isinstance(content, Mapping) else None
        if isinstance(name, str):
            return dataclasses.replace(_registered(name, None), name=source, place=WeightsLocation("path", str(path)))
    raise VitError(
        f"{source} does not say what model it is for: give the model's name and this file as its weights, as in "
        f'load_pretrained("vit_small_patch16_224", weights="{path.name}")'
    )


def _own(place: Path, source: str) -> ModelInfo:
    """A bundle's folder or a checkpoint of this project."""
    table = read_config(place / CONFIG)["vit"] if place.is_dir() else read_own(place)[1]
    return _described(table, source, WeightsLocation("path", str(place), own=True))


def _described(table: Mapping[str, Any], source: str, place: WeightsLocation) -> ModelInfo:
    """What a model of this project says about itself (`vit.inference.description` has the meaning)."""
    architecture, names = table.get("architecture"), table.get("class_names")
    if not isinstance(architecture, dict):
        raise VitError(f"{source} does not say its architecture")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VitError(f"{source} does not say its class names")
    for key, value in architecture.items():  # before anything of that size is built
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= _MOST.get(key, 65_536):
                raise VitError(f"{source}: architecture.{key} is {number}, which no model has")
    try:
        preprocessing = Preprocessing.from_dict(table.get("preprocessing"))
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    return ModelInfo(source, _completed(architecture, source), preprocessing, names, place, own=table)


def _completed(architecture: dict[str, Any], source: str) -> dict[str, Any]:
    """All arguments of the model: an older one does not say what it could not have."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return VisionTransformer(**architecture).architecture
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{source}: its architecture cannot be built: {error}") from None


def _configured(config: dict[str, Any], source: str, place: WeightsLocation) -> ModelInfo:
    """What a `config.json` says: timm's, or a bundle's, which has this project's own account beside timm's."""
    if isinstance(config.get("vit"), dict):
        return _described(config["vit"], source, place)
    from vit.pretrained.architecture import read_architecture
    from vit.pretrained.registry import build, is_name

    name, given = config.get("architecture"), config.get("pretrained_cfg", config)  # older ones are not nested
    if not isinstance(name, str) or not isinstance(given, dict):
        raise VitError(
            f"{source} is not a model of timm's (its {CONFIG} names no architecture): give the name of one, and this "
            "as its weights"
        )
    if not is_name(name) or not name.isidentifier():
        raise VitError(f"{source} is a {name!r}, which timm does not have")
    cfg = {key: given[key] for key in _CFG if key in given}
    if "num_classes" in config:
        cfg["num_classes"] = config["num_classes"]
    arguments = _bounded(config.get("model_args") or {}, cfg, source)
    try:
        architecture = read_architecture(build(name, pretrained_cfg=cfg, **arguments))
    except VitError as error:
        raise VitError(f"{source} cannot be built here: {error}") from None
    cfg["label_names"] = config.get("label_names", given.get("label_names", given.get("labels")))
    cfg["label_descriptions"] = config.get("label_descriptions", given.get("label_descriptions"))
    cfg["num_classes"] = architecture["num_classes"]
    size, channels = architecture["image_size"], architecture["in_channels"]
    preprocessing = from_timm_cfg(cfg, image_size=size, channels=channels, source=source)
    return ModelInfo(source, architecture, preprocessing, class_names(cfg, source), place)


def _bounded(arguments: Any, cfg: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A stranger's `model_args`, where they are arguments of a model and ask for nothing that would fill the memory."""
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
            if isinstance(part, int | float) and not 0 <= part <= _MOST.get(key, 65_536):
                raise VitError(f"{source}: model_args.{key} is {part}, which no model has")
    return {key: value for key, value in arguments.items() if value is not None}


def _renamed(content: Any, architecture: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What was read from a file, under this project's names, and remarks."""
    if path.suffix == ".npz":
        state, heads = from_jax(content, str(path))
        if heads not in (None, architecture["heads"]):
            raise VitError(f"{path} has attention of {heads} heads, the model of {architecture['heads']}")
        return state, []
    state, notes = unwrap(content, str(path))
    state, more = in_timms_names(state, architecture, str(path))
    return from_timm(state, architecture), [*notes, *more]
