"""LoRA: a pretrained model learns through thin changes to its matrices, W + (alpha / rank) B A (Hu et al. 2022).

Notable:
- `peft` puts the changes into the model, which stays a `VisionTransformer`, so attention is recorded and explained;
- only the changes and the head learn; the head learns fully;
- checkpoints keep the changes apart, so that a run goes on from them; whoever reads one (`vit.inference.weights`) gets
  them merged, as plain weights, without peft; the bundle has plain weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.training.optim import HEADS

if TYPE_CHECKING:
    from vit.training.sections import LoraConfig

PLACES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""What `lora.targets` calls a block's matrices, and where they are."""


def add_lora(model: VisionTransformer, config: LoraConfig) -> None:
    """Give the blocks' matrices their changes, which start at nothing, and freeze all but these and the head.

    Raises `VitError` when peft is not installed or the blocks have no such matrices.
    """
    assert config.rank is not None
    try:
        import peft
    except ImportError:
        raise VitError('lora.rank needs peft, which is not installed: pip install "vit-classifier[lora]"') from None
    inside = {name for name, _ in model.named_modules()}
    for target in config.targets:
        if f"blocks.0.{PLACES[target]}" not in inside:
            here = [name for name, place in PLACES.items() if f"blocks.0.{place}" in inside]
            raise VitError(f"lora.targets: the blocks of this model have no {target}; they have {', '.join(here)}")
    places = "|".join(PLACES[target].replace(".", r"\.") for target in config.targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]  # any number does
            lora_dropout=config.dropout,
            target_modules=rf"blocks\.\d+\.({places})",
        ),
        model,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(HEADS))


def num_parameters(model: VisionTransformer) -> int:
    """How many numbers the model is made of when its changes are merged."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)
