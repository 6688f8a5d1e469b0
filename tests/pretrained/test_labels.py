"""What outputs are called: names that come with the weights, ImageNet's where the tag says so, nothing otherwise."""

from __future__ import annotations

import pytest
import timm
from timm.data import ImageNetInfo

from vit.data import imagenet
from vit.errors import VitError
from vit.pretrained.labels import imagenet_names, read_class_names


@pytest.mark.parametrize(
    ("count", "subset"),
    [(1000, "imagenet-1k"), (11821, "imagenet-12k"), (21843, "imagenet-21k-goog"), (11221, "imagenet-21k-miil")],
)
def test_imagenets_names_are_timms_and_all_differ(count, subset):
    names, info = imagenet_names(count), ImageNetInfo(subset)
    assert names is not None
    assert len(names) == len(set(names)) == count
    for name, words, synset in zip(names, info.label_descriptions(), info.label_names(), strict=True):
        assert name in (words, f"{words} ({synset})")
    assert imagenet_names(count + 1) is None


def test_they_are_the_names_that_the_data_set_has():
    """So `eval.py checkpoint=NAME data=imagenet` matches classes by name."""
    assert imagenet_names(1000) == imagenet._readable_names(imagenet._standard_synsets())


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        *[(tag, True) for tag in ("augreg_in1k", "fb_in22k_ft_in1k", "in1k", "sbb_e200_in12k_ft_in1k")],
        *[(tag, False) for tag in ("openai", "laion2b", "in1ks", "mine", "", None)],
    ],
)
def test_a_thousand_outputs_are_imagenet_where_the_tag_says_so(tag, named):
    names = read_class_names({"num_classes": 1000, "tag": tag})
    assert (names is not None) == named
    assert read_class_names({"num_classes": 512, "tag": tag}) is None
    assert read_class_names({"num_classes": 0, "tag": tag}) is None


def test_names_that_come_with_the_weights():
    assert read_class_names({"num_classes": 2, "label_names": ["a", "b"], "tag": "in1k"}) == ["a", "b"]
    assert read_class_names({"num_classes": 2, "label_names": ("n1", "n2"), "label_descriptions": {"n2": "two"}}) == [
        "n1",
        "two",
    ]
    assert read_class_names({"num_classes": 2, "label_names": {"0": "a", "1": "b"}}) == ["a", "b"]
    assert (
        read_class_names({"num_classes": 2, "label_names": {"0": "a", "7": "b"}}) is None
    )  # with a gap, no name for each
    assert read_class_names({"num_classes": 2, "label_names": [1, 2]}) is None
    with pytest.raises(VitError, match="someone/model: 3 label_names for 2 outputs"):
        read_class_names({"num_classes": 2, "label_names": ["a", "b", "c"]}, "someone/model")


def test_every_plain_classifier_of_timms_has_names_and_no_embedding_has():
    checked = 0
    for name in timm.list_pretrained("vit_*") + timm.list_pretrained("deit*"):
        cfg = timm.get_pretrained_cfg(name).to_dict()
        outputs, names = cfg["num_classes"], read_class_names(cfg, name)
        if names is None:
            assert outputs in (0, 512, 640, 768, 1024, 1280, 115217), name  # CLIP's widths, and Bamboo
        else:
            assert len(names) == outputs
        checked += 1
    assert checked > 200
