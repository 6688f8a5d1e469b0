"""Names of timm's registry, and what is behind them: architecture and the configuration of the weights.

    entry("vit_small_patch16_224.augreg_in21k").architecture   # arguments of vit.VisionTransformer

Notable: the hyperparameters are read off a model that timm builds on the meta device, in a few hundredths of a second
and without memory, so whatever timm has learned since is known here as well.  timm is imported by the functions.
"""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from dataclasses import dataclass
from typing import Any

from vit.errors import VitError, did_you_mean
from vit.pretrained.architecture import read_architecture

_MODULES = ("vision_transformer", "deit", "eva")
"""Where timm keeps its plain Vision Transformers; what they hold is looked at, name by name."""
_NAME = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)?")
_HUB = re.compile(r"(hf-hub:|hf_hub:)\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Entry:
    """One name of timm's registry.

    Attributes
        name: with the tag of its weights, such as "vit_small_patch16_224.augreg_in1k"; without where there are none.
        architecture: the arguments of `vit.VisionTransformer`; `num_classes` is 0 for a model without a head.
        pretrained_cfg: timm's own account of the weights, plain: where they are, input size, statistics, licence.
    """

    name: str
    architecture: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_name(text: str) -> bool:
    """Whether `text` says a model of timm's registry, tag or not, or a place on the hub ("hf-hub:ORG/NAME").

    "timm/NAME" counts as the registry's NAME.  A name of another shape, such as a path, costs no import of timm.
    """
    if _HUB.fullmatch(text):
        return True
    name = text.removeprefix("timm/")
    if not _NAME.fullmatch(name):
        return False
    import timm

    return timm.is_model(name)


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(name for name in _candidates() if _builds(name))


def names() -> list[str]:
    """Every architecture of timm's registry that this project builds, sorted; takes a few seconds the first time."""
    return list(_names())


def entry(name: str) -> Entry:
    """What is behind a name of timm's registry, with a tag or without, "timm/" in front or not.

    Raises `VitError` with the nearest names for one that does not exist, and with the reason for one that is no plain
    Vision Transformer.
    """
    import timm

    wanted = name.removeprefix("timm/")
    architecture, _, tag = wanted.partition(".")
    if not _NAME.fullmatch(wanted) or not timm.is_model(architecture):
        raise VitError(f"timm has no model called {name!r}; {_near(wanted)}")
    if tag and tag not in _tags(architecture):
        tags = _tags(architecture)
        near = did_you_mean(tag, tags) if tags else "it has none at all"
        raise VitError(f"timm has no weights {tag!r} of {architecture}; {near}")
    try:
        model = build(wanted)
        found = read_architecture(model)
    except VitError as error:
        raise VitError(f"{name} cannot be built here: {error}; {_near(architecture)}") from None
    cfg = {key: _plain(value) for key, value in model.pretrained_cfg.items() if value is not None}
    whole = ".".join(part for part in (cfg.get("architecture", architecture), cfg.get("tag")) if part)
    return Entry(whole, found, cfg)


def build(name: str, **changes: Any) -> Any:
    """timm's model of that name, without memory and without weights; `changes` are arguments of `timm.create_model`.

    Raises `VitError` where timm cannot.
    """
    import timm
    from timm.models import is_model_in_modules

    if is_model_in_modules(name.partition(".")[0], ("vision_transformer", "deit")):
        changes["weight_init"] = "skip"  # drawing weights that have no memory takes longest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that timm has renamed
        try:
            return timm.create_model(name, device="meta", **changes)
        except Exception as error:  # whatever timm's layers raise for arguments that they do not know
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            raise VitError(f"timm cannot build it without memory ({reason})") from None


def _candidates() -> list[str]:
    import timm

    return sorted({name for module in _MODULES for name in timm.list_models(module=module)})


@functools.cache
def _builds(name: str) -> bool:
    try:
        read_architecture(build(name, depth=1))
    except VitError:
        return False
    return True


def _near(name: str) -> str:
    """The nearest names that would work, as a phrase; only some are looked at, which takes no time to speak of."""
    close = difflib.get_close_matches(name, _candidates(), 12, 0.5)
    works = [candidate for candidate in close if _builds(candidate)]
    return did_you_mean(name, works or ["vit_small_patch16_224", "vit_base_patch16_224", "deit3_small_patch16_224"])


def _tags(architecture: str) -> list[str]:
    from timm.models import get_arch_pretrained_cfgs

    return [name.partition(".")[2] for name in get_arch_pretrained_cfgs(architecture) if "." in name]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
