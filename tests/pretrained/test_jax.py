"""The original `.npz` checkpoints: the same model as timm's own reader makes of them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from vit.errors import VitError
from vit.pretrained.create import load_pretrained
from vit.pretrained.jax import from_jax, read_npz


def split_heads(linear: nn.Linear, heads: int, parts: int) -> list[dict[str, np.ndarray]]:
    """A fused projection into heads as JAX keeps it: (D, H, d) and (H, d) each."""
    weights = linear.weight.detach().numpy().T.reshape(linear.in_features, parts, heads, -1)
    biases = linear.bias.detach().numpy().reshape(parts, heads, -1)
    return [{"kernel": weights[:, part], "bias": biases[part]} for part in range(parts)]


def as_jax(model: nn.Module, *, big_vision: bool = False, scanned: bool = False) -> dict[str, np.ndarray]:
    """timm's model under the names and in the layout of the original checkpoints."""
    a = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    number = {"attn": 0, "norm": 1, "mlp": 0} if big_vision else {"attn": 1, "norm": 2, "mlp": 3}

    def dense(name):
        return {"kernel": a[f"{name}.weight"].T, "bias": a[f"{name}.bias"]}

    def norm(name):
        return {"scale": a[f"{name}.weight"], "bias": a[f"{name}.bias"]}

    def out(name):
        kernel = a[f"{name}.weight"].T
        return {"kernel": kernel.reshape(heads, -1, kernel.shape[-1]), "bias": a[f"{name}.bias"]}

    flat: dict[str, np.ndarray] = {}

    def put(prefix, entries):
        flat.update({f"{prefix}/{key}": value for key, value in entries.items()})

    put("embedding", {"kernel": a["patch_embed.proj.weight"].transpose(2, 3, 1, 0), "bias": a["patch_embed.proj.bias"]})
    if "cls_token" in a:
        flat["cls"] = a["cls_token"]
    flat["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = a["pos_embed"]
    put("Transformer/encoder_norm", norm("norm"))
    if "head.weight" in a:
        put("head", dense("head"))
    blocks = []
    for i, block in enumerate(model.blocks):
        whole, flat = flat, {}
        put("LayerNorm_0", norm(f"blocks.{i}.norm1"))
        put(f"LayerNorm_{number['norm']}", norm(f"blocks.{i}.norm2"))
        attention = f"MultiHeadDotProductAttention_{number['attn']}"
        for name, part in zip(("query", "key", "value"), split_heads(block.attn.qkv, heads, 3), strict=True):
            put(f"{attention}/{name}", part)
        put(f"{attention}/out", out(f"blocks.{i}.attn.proj"))
        for layer in (0, 1):
            put(f"MlpBlock_{number['mlp']}/Dense_{layer}", dense(f"blocks.{i}.mlp.fc{layer + 1}"))
        blocks.append(flat)
        flat = whole
    for i, block in enumerate(blocks):
        if not scanned:
            put(f"Transformer/encoderblock_{i}", block)
    if scanned:
        put("Transformer/encoderblock", {key: np.stack([block[key] for block in blocks]) for key in blocks[0]})
    if "attn_pool.latent" in a:
        pool = "MAPHead_0/MultiHeadDotProductAttention_0"
        flat["MAPHead_0/probe"] = a["attn_pool.latent"]
        put(f"{pool}/query", split_heads(model.attn_pool.q, heads, 1)[0])
        for name, part in zip(("key", "value"), split_heads(model.attn_pool.kv, heads, 2), strict=True):
            put(f"{pool}/{name}", part)
        put(f"{pool}/out", out("attn_pool.proj"))
        put("MAPHead_0/LayerNorm_0", norm("attn_pool.norm"))
        for layer in (0, 1):
            put(f"MAPHead_0/MlpBlock_0/Dense_{layer}", dense(f"attn_pool.mlp.fc{layer + 1}"))
    return flat


@pytest.mark.parametrize(
    ("name", "root", "options"),
    [
        ("vit_tiny_patch16_224", "", {}),
        ("vit_tiny_patch16_224", "opt/target/", {}),
        ("vit_base_patch16_siglip_224", "params/img/", {"big_vision": True}),
        ("vit_base_patch16_siglip_224", "params/", {"big_vision": True, "scanned": True}),
    ],
)
@torch.no_grad()
def test_timms_own_reader_makes_the_same_model(timm_model, small, images, tmp_path, name, root, options):
    author = timm_model(name, **small)
    arrays = {root + key: value for key, value in as_jax(author, **options).items()}
    np.savez(tmp_path / "original.npz", **arrays)
    theirs = timm_model(name, seed=1, **small)
    theirs.load_pretrained(str(tmp_path / "original.npz"))
    assert torch.equal(theirs(images), author(images))
    state, heads = from_jax(read_npz(tmp_path / "original.npz"), "a file")
    assert heads == 3
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())


@torch.no_grad()
def test_a_file_with_a_name_is_a_model_at_any_size(timm_model, local_dir, small_timm, images, tmp_path):
    arrays = as_jax(small_timm)
    arrays |= {"pre_logits/kernel": np.ones((48, 48), np.float32), "pre_logits/bias": np.ones(48, np.float32)}
    np.savez_compressed(tmp_path / "original.npz", **arrays)
    loaded = load_pretrained(f"local-dir:{local_dir}", weights=tmp_path / "original.npz")
    torch.testing.assert_close(loaded.model(images), small_timm(images), rtol=0, atol=1e-5)
    assert (loaded.report.head, loaded.report.unexpected) == ("kept", [])
    larger = load_pretrained(f"local-dir:{local_dir}", weights=tmp_path / "original.npz", image_size=96)
    assert [entry.name for entry in larger.report.resampled] == ["pos_embed"]


def test_bfloat16_arrives_as_bytes(tmp_path):
    values = torch.tensor([1.5, -2.0, 3.0e-5, 1e30]).bfloat16()
    np.savez(tmp_path / "a.npz", x=values.view(torch.int16).numpy().view("V2"))
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz")["x"], values.float().numpy())


def test_another_number_of_heads_is_another_model(timm_model, small, local_dir, tmp_path):
    np.savez(tmp_path / "a.npz", **as_jax(timm_model(**{**small, "num_heads": 2})))
    with pytest.raises(VitError, match=r"a\.npz has attention of 2 heads, the model of 3"):
        load_pretrained(f"local-dir:{local_dir}", weights=tmp_path / "a.npz")


def test_what_is_no_such_file(tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"PK\x03\x04" + b"\0" * 50, b"text", b"\x93NUMPY", b""):
        path.write_bytes(content)
        with pytest.raises(VitError, match=r"truncated or not an \.npz|is empty") as caught:
            read_npz(path)
        assert "\n" not in str(caught.value)
    np.savez(path, x=np.array([{"a": 1}], dtype=object))  # would be pickled
    with pytest.raises(VitError, match=r"not an \.npz file of arrays"):
        read_npz(path)
    np.savez(path, x=np.zeros(3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VitError, match="truncated"):
        read_npz(path)
    with pytest.raises(VitError, match="has no array embedding/kernel"):
        from_jax({"x": np.zeros(3)}, "a file")


def test_a_file_that_would_unpack_without_end(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\0" * 10_000_000)
    with pytest.raises(VitError, match="would unpack to over 20 times its size"):
        read_npz(tmp_path / "a.npz")


def test_an_array_that_says_it_is_larger_than_any_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(VitError, match=r"a\.npz holds an array that does not fit into memory"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["encoderblock_1/MlpBlock_3/Dense_0/kernel", "encoderblock_0/LayerNorm_2/bias"])
def test_a_part_that_is_missing(small_timm, name):
    arrays = as_jax(small_timm)
    del arrays[f"Transformer/{name}"]
    with pytest.raises(VitError, match="a file is no Vision Transformer as its authors save it"):
        from_jax(arrays, "a file")
