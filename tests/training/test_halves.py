"""The halves of a batch: the gradients of the whole, the same bits on one thread and two, and only where it may be."""

import dataclasses
import threading

import pytest
import torch
from torch.nn import functional as F

from vit.model import VisionTransformer
from vit.training.halves import Halves

DIGITS = ("data=digits", "data.batch_size=128")


def tiny(**options):
    torch.manual_seed(0)
    return VisionTransformer(
        num_classes=5, image_size=8, patch_size=4, in_channels=1, width=16, depth=2, heads=2, init="xavier", **options
    )


def batch(size, soft=False):
    draw = torch.Generator().manual_seed(size)
    images = torch.randn(size, 1, 8, 8, generator=draw)
    labels = torch.randint(5, (size,), generator=draw)
    return images, F.one_hot(labels, 5).float().lerp(torch.full((5,), 0.2), 0.3) if soft else labels


def gradients(model):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def computed(model, halves, images, targets, factor=1.0):
    def compute(images, targets):
        logits = model(images)
        return logits, F.cross_entropy(logits, targets)

    logits, loss = halves.forward(compute, images, targets)
    halves.backward(loss * factor, model)
    return logits, loss.detach()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_halves_give_the_loss_and_gradients_of_the_whole_batch(size, soft, threads):
    model, (images, targets) = tiny().double(), batch(size, soft)
    images, targets = images.double(), targets.double() if soft else targets
    logits, loss = computed(model, Halves(threads), images, targets, factor=0.25)
    found = gradients(model)
    model.zero_grad()
    expected = F.cross_entropy(model(images), targets)
    (expected * 0.25).backward()
    torch.testing.assert_close(logits, model(images).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    for ours, theirs in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_are_added_to_those_that_are_there_and_frozen_weights_get_none():
    model, halves = tiny(), Halves(2)
    model.patch_embed.requires_grad_(False)
    computed(model, halves, *batch(9))
    once = gradients(model)
    computed(model, halves, *batch(9))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("patch_embed")
    for one, two in zip(once, gradients(model), strict=True):
        assert one is None or torch.equal(two, one + one)


def test_threads_change_no_bit(run):
    """Three whole epochs, in turn and at once; each number of threads twice, as chance decides which half is first."""
    found = []
    for threads in (1, 2, 2, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS", raising=False)
            patch.setattr("vit.training.halves.count_cpus", lambda threads=threads: threads)
            result = run(*DIGITS, "model.patch_size=4", "trainer.max_epochs=3", "optim.accumulate=2", "trainer=cpu")
        saved = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
        said = (result.folder / "train.log").read_text()
        assert ("a thread of its own" in said) == (threads == 2)
        found.append(saved["state_dict"])
    for other in found[1:]:
        assert all(torch.equal(tensor, other[key]) for key, tensor in found[0].items())


def test_two_halves_are_computed_at_once():
    meet = threading.Barrier(2)

    def compute(images, targets):
        meet.wait(30)  # fails where one half waits for the other
        return images, images.sum()

    images = torch.ones(4, 1, requires_grad=True)
    logits, loss = Halves(2).forward(compute, images, torch.zeros(4))
    assert (logits.shape, float(loss.detach())) == ((4, 1), 2.0)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_half_is_the_callers(half, threads):
    def compute(images, targets):
        if bool(targets[0] == half):
            raise MemoryError("a half")
        return images, images.sum()

    with pytest.raises(MemoryError, match="a half"):
        Halves(threads).forward(compute, torch.ones(4, 1), torch.tensor([0, 0, 1, 1]))


@pytest.fixture
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vit.training.halves.count_cpus", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        ([], 2),
        (["trainer.threads=1"], 1),
        (["trainer.precision=bf16"], None),
        (["trainer=ddp_cpu"], None),
        (["trainer.strategy=ddp"], None),
        (["model.dropout=0.1"], None),
        (["model.drop_path=0.1"], None),
        (["model.attention_dropout=0.1"], None),
        (["model.patch_dropout=0.5"], None),
        (["model.reduction=keep"], None),
        (["data.batch_size=65536"], None),
    ],
)
def test_which_runs_compute_in_halves(one_thread, overrides, threads):
    from hydra import compose, initialize_config_dir

    from vit.training.app import CONF, resolve_config
    from vit.training.config import load_config

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = load_config(resolve_config(compose("train", ["trainer=cpu", *overrides])))
    model = VisionTransformer(**config.model.arguments(10))
    found = Halves.create_for_run(config, model)
    assert (None if found is None else found.threads) == threads
    torch.set_num_threads(2)
    assert Halves.create_for_run(dataclasses.replace(config), model) is None
