"""Learning from a teacher: losses and gradients against the formulas written out, and what the teacher is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.training.distill import Distillation, Teacher, distillation_loss, forward_both_heads

NAMES = ["cat", "dog", "owl"]
OURS = Preprocessing(image_size=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def softmax(rows):
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def save(folder, names=NAMES, preprocessing=OURS, **options):
    torch.manual_seed(1)
    size = {"image_size": preprocessing.image_size, "patch_size": 8, "in_channels": preprocessing.channels}
    model = VisionTransformer(**size, num_classes=len(names), width=16, depth=1, heads=2, **options).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)
    description = Description(model.architecture, list(names), preprocessing)
    write_bundle(folder, model, description, onnx=False)
    return model


def student(**options):
    torch.manual_seed(2)
    return VisionTransformer(image_size=16, patch_size=8, num_classes=3, width=16, depth=1, heads=2, **options)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_gradient_is_the_difference_of_the_softened_probabilities(temperature):
    """d/dz T² KL(p || q) = T (q - p), with p, q the softened probabilities; a mean over images (Hinton et al. 2015)."""
    torch.manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 4, dtype=torch.float64)
    loss = distillation_loss(z, t, "soft", temperature)
    loss.backward()
    q, p = softmax(z.detach().numpy() / temperature), softmax(t.numpy() / temperature)
    assert loss.item() == pytest.approx(temperature**2 * (p * np.log(p / q)).sum() / 5, rel=1e-12)
    np.testing.assert_allclose(z.grad.numpy(), temperature * (q - p) / 5, rtol=1e-10)


def test_the_hard_gradient_is_that_of_the_cross_entropy_with_the_teachers_choice():
    torch.manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 4, dtype=torch.float64)
    distillation_loss(z, t, "hard", 7.0).backward()
    q, chosen = softmax(z.detach().numpy()), np.eye(4)[t.numpy().argmax(1)]
    np.testing.assert_allclose(z.grad.numpy(), (q - chosen) / 5, rtol=1e-10)


class Fixed:
    """A teacher that always says the same."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, images):
        return self.logits


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_without_a_token_one_head_learns_a_mixture(kind):
    net, images = student().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    targets = torch.tensor([[0.9, 0.1, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5]]).double()
    answers = torch.randn(4, 3).double()
    logits, loss = Distillation(Fixed(answers), kind=kind, alpha=0.3, temperature=2.0)(net, images, targets)
    torch.testing.assert_close(logits, net(images))
    z = logits.detach().numpy()
    labels = -(targets.numpy() * np.log(softmax(z))).sum(1).mean()
    p, q = softmax(answers.numpy() / 2), softmax(z / 2)
    soft = 4 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(z)[np.arange(4), answers.numpy().argmax(1)]).mean()
    assert loss.item() == pytest.approx(0.7 * labels + 0.3 * (soft if kind == "soft" else hard), rel=1e-12)


def test_with_a_token_each_head_learns_from_its_own_source():
    """Touvron et al. 2021, equation 3: labels reach the class head only, the teacher the token's head only."""
    net, images = student(distillation_token=True).double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    targets, answers = torch.tensor([0, 1, 2, 0]), torch.randn(4, 3).double()
    logits, loss = Distillation(Fixed(answers), kind="hard", alpha=0.5, temperature=1.0)(net, images, targets)
    torch.testing.assert_close(logits, net(images))  # the mean of both, as it answers later
    first, second = forward_both_heads(net, images)
    torch.testing.assert_close((first + second) / 2, logits)
    found = torch.autograd.grad(loss, [net.head.bias, net.head_dist.bias], retain_graph=True)
    q1, q2 = softmax(first.detach().numpy()), softmax(second.detach().numpy())
    np.testing.assert_allclose(found[0], 0.5 * (q1 - np.eye(3)[targets]).mean(0), rtol=1e-9)
    np.testing.assert_allclose(found[1], 0.5 * (q2 - np.eye(3)[answers.argmax(1)]).mean(0), rtol=1e-9)


def test_alpha_one_needs_no_labels():
    net, images, answers = student(), torch.randn(2, 3, 16, 16), torch.randn(2, 3)
    made = Distillation(Fixed(answers), kind="soft", alpha=1.0, temperature=1.0)
    assert made(net, images, torch.tensor([0, 1]))[1] == made(net, images, torch.tensor([2, 2]))[1]


def test_a_teacher_of_the_same_preprocessing_sees_the_very_same_images(tmp_path):
    model = save(tmp_path / "t")
    teacher, images = Teacher(str(tmp_path / "t"), NAMES, OURS), torch.randn(2, 3, 16, 16)
    assert teacher.convert_images(images) is images
    torch.testing.assert_close(teacher(images), model(images).detach())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_the_teacher_gets_its_own_size_and_normalisation(tmp_path):
    theirs = Preprocessing(image_size=(32, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    save(tmp_path / "t", preprocessing=theirs)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
    shown = Teacher(str(tmp_path / "t"), NAMES, OURS).convert_images(
        torch.from_numpy(OURS.normalise(np.asarray(smooth)[None]))
    )
    expected = theirs.normalise(np.asarray(smooth.resize((24, 32), Image.Resampling.BICUBIC))[None])
    assert shown.shape == (1, 3, 32, 24)
    assert float(np.abs(shown.numpy() - expected).max()) < 3 / 255 / 0.5  # Pillow rounds to whole bytes, twice


@pytest.mark.parametrize(("student_channels", "teacher_channels"), [(1, 3), (3, 1)])
def test_grey_and_colour_are_made_of_each_other(tmp_path, student_channels, teacher_channels):
    ours, theirs = (Preprocessing(image_size=(16, 16), channels=n) for n in (student_channels, teacher_channels))
    save(tmp_path / "t", preprocessing=theirs)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    given, expected = (grey, np.repeat(grey, 3, axis=2)) if student_channels == 1 else (pixels, grey)
    shown = Teacher(str(tmp_path / "t"), NAMES, ours).convert_images(torch.from_numpy(ours.normalise(given[None])))
    assert shown.shape == (1, teacher_channels, 16, 16)
    assert float(np.abs(shown.numpy() - theirs.normalise(expected[None])).max()) < 1 / 255 / 0.5


def test_classes_are_matched_by_name(tmp_path):
    model = save(tmp_path / "t", names=["owl", "cow", "cat", "dog"])
    images = torch.randn(2, 3, 16, 16)
    teacher = Teacher(str(tmp_path / "t"), NAMES, OURS)
    torch.testing.assert_close(teacher(images), model(images).detach()[:, [2, 3, 0]])
    assert teacher.classes == 4


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (["cat", "dog"], NAMES, r"does not know 'owl'; .* by name, and this one knows 'cat', 'dog'$"),
        (["cat", "cat", "dog", "owl"], NAMES, "has several classes called 'cat'"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(tmp_path, theirs, ours, told):
    save(tmp_path / "t", names=theirs)
    with pytest.raises(VitError, match=told) as error:
        Teacher(str(tmp_path / "t"), ours, OURS)
    assert str(error.value).startswith(f"distill.teacher={tmp_path / 't'}: ")


def test_names_that_repeat_are_no_matter_where_both_have_the_same_list(tmp_path):
    names = ["crane", "dog", "crane"]
    model = save(tmp_path / "t", names=names)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(Teacher(str(tmp_path / "t"), names, OURS)(images), model(images).detach())


def test_a_teacher_of_other_channels_is_refused(tmp_path):
    save(tmp_path / "t", preprocessing=Preprocessing(image_size=(16, 16), channels=5))
    with pytest.raises(VitError, match=r"takes images of 5 channels, the data has data\.channels=3"):
        Teacher(str(tmp_path / "t"), NAMES, OURS)
