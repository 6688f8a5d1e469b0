"""Read names of timm's registry: the architecture and the configuration of the weights.

    read_entry("vit_small_patch16_224.augreg_in21k").architecture   # arguments of vit.VisionTransformer

The hyperparameters are read from a model that timm builds on the meta device, in a few hundredths of a second and
without memory, so models of newer versions of timm work as well.  timm is imported by the functions.
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
"""timm's modules with plain Vision Transformers; each of their names is checked."""
_NAME = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)?")
_HUB = re.compile(r"(hf-hub:|hf_hub:)\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Entry:
    """Describes one name of timm's registry.

    Attributes:
        name: the name with the tag of its weights, such as "vit_small_patch16_224.augreg_in1k"; without weights, no
            tag.
        architecture: the arguments of `vit.VisionTransformer`; `num_classes` is 0 for a model without a head.
        pretrained_cfg: timm's configuration of the weights as plain values: location, input size, statistics, licence.
    """

    name: str
    architecture: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_model_name(text: str) -> bool:
    """Check whether `text` names a model of timm's registry, with or without a tag, or of the hub ("hf-hub:ORG/NAME").

    "timm/NAME" is the registry's NAME.  A text of another form, such as a path, does not import timm.
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
    return tuple(name for name in _candidates() if _is_supported(name))


def list_names() -> list[str]:
    """List the architectures of timm's registry that this project can build, sorted; the first call takes seconds."""
    return list(_names())


def read_entry(name: str) -> Entry:
    """Read a name of timm's registry, with or without a tag and the prefix "timm/".

    Raises `VitError` with the nearest names if the name does not exist, and with the reason if the model is not a plain
    Vision Transformer.
    """
    import timm

    timm_name = name.removeprefix("timm/")
    architecture, _, tag = timm_name.partition(".")
    if not _NAME.fullmatch(timm_name) or not timm.is_model(architecture):
        raise VitError(f"timm has no model called {name!r}; {_suggest(timm_name)}")
    if tag and tag not in _tags(architecture):
        tags = _tags(architecture)
        hint = did_you_mean(tag, tags) if tags else "it has none at all"
        raise VitError(f"timm has no weights {tag!r} of {architecture}; {hint}")
    try:
        model = build_timm(timm_name)
        arguments = read_architecture(model)
    except VitError as error:
        raise VitError(f"{name} cannot be built here: {error}; {_suggest(architecture)}") from None
    cfg = {key: _to_lists(value) for key, value in model.pretrained_cfg.items() if value is not None}
    full_name = ".".join(part for part in (cfg.get("architecture", architecture), cfg.get("tag")) if part)
    return Entry(full_name, arguments, cfg)


def build_timm(name: str, **changes: Any) -> Any:
    """Build timm's model of this name on the meta device, without weights.

    `changes` are arguments of `timm.create_model`.  Raises `VitError` when timm cannot build it.
    """
    import timm
    from timm.models import is_model_in_modules

    if is_model_in_modules(name.partition(".")[0], ("vision_transformer", "deit")):
        changes["weight_init"] = "skip"  # drawing weights takes longest, even without memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that timm has renamed
        try:
            return timm.create_model(name, device="meta", **changes)
        except Exception as error:  # timm's layers raise many kinds for unknown arguments
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            raise VitError(f"timm cannot build it without memory ({reason})") from None


def _candidates() -> list[str]:
    import timm

    return sorted({name for module in _MODULES for name in timm.list_models(module=module)})


@functools.cache
def _is_supported(name: str) -> bool:
    try:
        read_architecture(build_timm(name, depth=1))
    except VitError:
        return False
    return True


def _suggest(name: str) -> str:
    """Format a hint with the nearest supported names; only 12 candidates are checked, which is fast."""
    close = difflib.get_close_matches(name, _candidates(), 12, 0.5)
    supported = [candidate for candidate in close if _is_supported(candidate)]
    return did_you_mean(name, supported or ["vit_small_patch16_224", "vit_base_patch16_224", "deit3_small_patch16_224"])


def _tags(architecture: str) -> list[str]:
    from timm.models import get_arch_pretrained_cfgs

    return [name.partition(".")[2] for name in get_arch_pretrained_cfgs(architecture) if "." in name]


def _to_lists(value: Any) -> Any:
    return [_to_lists(item) for item in value] if isinstance(value, list | tuple) else value
