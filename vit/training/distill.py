"""Distil a trained model, the teacher: its outputs for the student's images are the targets.

Notable:
- the teacher gets the augmented, mixed images, resized and normalised for it, on the student's device;
- classes are matched by name; the teacher must know every class of the data;
- with a distillation token, the class head learns the labels and the token's head learns the teacher (Touvron et al.
  2021, "DeiT", section 4); without one, the only head learns a mixture of both (Hinton et al. 2015);
- the teacher is not part of the training module, so it is not in checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.data.assemble import quote_names
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.model import VisionTransformer

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, with which Pillow converts colours to grey."""


class Teacher:
    """A trained model that predicts the classes of the data.

    Args:
        source: any MODEL (see `vit.inference.loading`).
        class_names: classes of the data, which set the order of the logits.
        preprocessing: normalisation of the student's images.

    Raises:
        VitError: the teacher cannot be loaded, does not know a class, or takes another kind of image.
    """

    def __init__(self, source: str, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
        from vit.inference.loading import load_torch

        try:
            self.model, description = load_torch(source, device="cpu")
        except VitError as error:
            raise VitError(f"distill.teacher={source}: {error}") from None
        self.model.requires_grad_(False)
        self.classes = len(description.class_names)
        self._columns = _match_classes(source, description.class_names, class_names)
        self._theirs, self._ours = description.preprocessing, preprocessing
        if self._theirs.channels != self._ours.channels and {self._theirs.channels, self._ours.channels} != {1, 3}:
            raise VitError(
                f"distill.teacher={source}: takes images of {self._theirs.channels} channels, the data has "
                f"data.channels={self._ours.channels}"
            )

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Compute the logits (B, K) for the classes of the data from the student's normalised images."""
        if next(self.model.parameters()).device != images_BCHW.device:
            self.model.to(images_BCHW.device)
            self._columns = self._columns.to(images_BCHW.device)
        return self.model(self.convert_images(images_BCHW)).float()[:, self._columns]

    def convert_images(self, images_BCHW: Tensor) -> Tensor:
        """Convert the student's images to the teacher's channels, size, mean and deviation."""
        source, target = self._ours, self._theirs
        if dataclasses.replace(target, interpolation=source.interpolation, crop_pct=source.crop_pct,
                               crop_mode=source.crop_mode) == source:  # fmt: skip
            return images_BCHW
        x = images_BCHW.float() * _channel_tensor(source.std, images_BCHW) + _channel_tensor(source.mean, images_BCHW)
        if target.channels < source.channels:
            x = (x * _channel_tensor(_LUMA, x)).sum(dim=1, keepdim=True)
        x = x.expand(-1, target.channels, -1, -1)
        if target.image_size != source.image_size:
            x = F.interpolate(x, size=target.image_size, mode="bicubic", antialias=True, align_corners=False)
        return (x - _channel_tensor(target.mean, x)) / _channel_tensor(target.std, x)


def check_teacher(source: str) -> None:
    """Raise `VitError` if there is no such MODEL; this is fast and needs no data."""
    from vit.inference.loading import locate

    try:
        locate(source)
    except VitError as error:
        raise VitError(f"distill.teacher={source}: {error}") from None


class Distillation:
    """Compute the loss of a student with a teacher.

    Args:
        teacher: maps normalised images of the student to logits (B, K).
        kind: "soft", learn the teacher's probabilities, or "hard", learn its most likely class.
        alpha: weight of the teacher's loss; the loss of the labels has weight 1 - alpha.
        temperature: divides the logits of both, for "soft".
    """

    def __init__(self, teacher: Teacher, *, kind: str, alpha: float, temperature: float) -> None:
        self.teacher, self.kind, self.alpha, self.temperature = teacher, kind, alpha, temperature

    def __call__(self, model: VisionTransformer, images_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the student's logits (B, K), and the loss for targets (B,) or (B, K) and the teacher."""
        teacher_logits = self.teacher(images_BCHW)
        if model.head_dist is None:
            logits = from_labels = from_teacher = model(images_BCHW)
        else:
            from_labels, from_teacher = forward_both_heads(model, images_BCHW)
            logits = (from_labels + from_teacher) / 2
        loss = (1 - self.alpha) * F.cross_entropy(from_labels, targets)
        return logits, loss + self.alpha * distillation_loss(from_teacher, teacher_logits, self.kind, self.temperature)


def distillation_loss(student_BK: Tensor, teacher_BK: Tensor, kind: str, temperature: float) -> Tensor:
    """Compute the loss between the logits of student and teacher, averaged over images.

    "soft": T² KL(softmax(teacher / T) || softmax(student / T)); T² keeps the gradient's size whatever T is (Hinton et
    al. 2015, section 2).  "hard": the cross-entropy with the teacher's most likely class (Touvron et al. 2021,
    equation 3).
    """
    if kind == "hard":
        return F.cross_entropy(student_BK, teacher_BK.argmax(dim=1))
    student, teacher = ((x.float() if x.dtype != torch.float64 else x) for x in (student_BK, teacher_BK))
    student_log_probs, teacher_log_probs = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)


def forward_both_heads(model: VisionTransformer, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logits (B, K) of the class head and of the distillation head; the model returns their mean."""
    assert model.head_dist is not None
    class_BD, distilled_BD = model.forward_head(model.forward_features(images_BCHW), pre_logits=True).unbind(dim=1)
    return model.head(class_BD), model.head_dist(distilled_BD)


def _match_classes(source: str, teacher_classes: Sequence[str], data_classes: Sequence[str]) -> Tensor:
    """Return the index of the teacher's output for each class of the data."""
    if list(teacher_classes) == list(data_classes):
        return torch.arange(len(data_classes))
    if missing := [name for name in data_classes if name not in set(teacher_classes)]:
        raise VitError(
            f"distill.teacher={source}: does not know {quote_names(missing)}; a teacher has to know every class of the "
            f"data, by name, and this one knows {quote_names(list(teacher_classes), 5)}"
        )
    if duplicates := [
        name for name in dict.fromkeys(data_classes) if teacher_classes.count(name) > 1 or data_classes.count(name) > 1
    ]:
        raise VitError(
            f"distill.teacher={source}: has several classes called {quote_names(duplicates)}, and names match them"
        )
    index = {name: k for k, name in enumerate(teacher_classes)}
    return torch.tensor([index[name] for name in data_classes])


def _channel_tensor(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
