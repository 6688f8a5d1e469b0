"""What the outputs of somebody's weights are called: names that come with them, or ImageNet's where they say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vit.errors import VitError

_IMAGENET_TAG = re.compile(r"in(1|12|21|22)k(?![a-z0-9])")
"""How timm's tags name the part of ImageNet: "augreg_in21k_ft_in1k"."""


def class_names(cfg: Mapping[str, Any], source: str = "the weights") -> list[str] | None:
    """One name an output, for a `pretrained_cfg` of timm's; None where nobody says what the outputs mean.

    Names in the configuration come first, described in words where it does that.  Weights whose tag says ImageNet have
    the classes of the part of it that has as many, in words (WordNet's, "tench, Tinca tinca"; where two have the same,
    with their number).  Outputs of others, such as the space that CLIP shares with texts, are no classes.
    Raises `VitError`, naming `source`, when the configuration has another number of names than outputs.
    """
    count = cfg.get("num_classes") or 0
    given = _given(cfg.get("label_names"), cfg.get("label_descriptions"), count)
    if given is not None:
        if len(given) != count:
            raise VitError(f"{source}: {len(given)} label_names for {count} outputs")
        return given
    if not count or not _IMAGENET_TAG.search(str(cfg.get("tag") or "")):
        return None
    return imagenet_names(count)


def imagenet_names(count: int) -> list[str] | None:
    """The classes of the part of ImageNet that has `count`, in the order of the field's models; None for no part."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    synsets, words = info.label_names(), info.label_descriptions()
    often = Counter(words)
    return [f"{word} ({synset})" if often[word] > 1 else word for synset, word in zip(synsets, words, strict=True)]


def _given(names: Any, descriptions: Any, count: int) -> list[str] | None:
    if isinstance(names, Mapping):  # index to name
        names = [names.get(str(index), names.get(index)) for index in range(count)]
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    words = descriptions if isinstance(descriptions, Mapping) else {}
    return [str(words.get(name, name)) for name in names]
