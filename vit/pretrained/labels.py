"""Find the class names of pretrained weights: their own, or ImageNet's if their tag names it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vit.errors import VitError

_IMAGENET_TAG = re.compile(r"in(1|12|21|22)k(?![a-z0-9])")
"""The subset of ImageNet in a timm tag such as "augreg_in21k_ft_in1k"."""


def read_class_names(cfg: Mapping[str, Any], source: str = "the weights") -> list[str] | None:
    """Read one name for each output from a `pretrained_cfg` of timm; None if the meaning of the outputs is unknown.

    Names in the configuration come first, with their descriptions if it has them.  Weights whose tag names ImageNet
    have the classes of the subset of that size, in WordNet's words ("tench, Tinca tinca"; equal ones with their synset
    number).  Other outputs, such as CLIP's embedding, are not classes.
    Raises `VitError`, naming `source`, when the configuration has another number of names than outputs.
    """
    count = cfg.get("num_classes") or 0
    given = _config_names(cfg.get("label_names"), cfg.get("label_descriptions"), count)
    if given is not None:
        if len(given) != count:
            raise VitError(f"{source}: {len(given)} label_names for {count} outputs")
        return given
    if not count or not _IMAGENET_TAG.search(str(cfg.get("tag") or "")):
        return None
    return imagenet_names(count)


def imagenet_names(count: int) -> list[str] | None:
    """List the classes of the ImageNet subset with `count` classes, in the usual order; None if there is none."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    synsets, words = info.label_names(), info.label_descriptions()
    counts = Counter(words)
    return [f"{word} ({synset})" if counts[word] > 1 else word for synset, word in zip(synsets, words, strict=True)]


def _config_names(names: Any, descriptions: Any, count: int) -> list[str] | None:
    if isinstance(names, Mapping):  # index to name
        names = [names.get(str(index), names.get(index)) for index in range(count)]
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    words = descriptions if isinstance(descriptions, Mapping) else {}
    return [str(words.get(name, name)) for name in names]
