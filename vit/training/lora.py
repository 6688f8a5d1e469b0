"""Fine-tune with LoRA: low-rank updates of the weight matrices, W + (alpha / rank) B A (Hu et al. 2022).

Notable:
- `peft` adds the updates to the model, which stays a `VisionTransformer`, so attention can be recorded and explained;
- only the updates and the whole head are trained;
- checkpoints keep the updates apart, so that a run can be resumed; `vit.inference.weights` reads them merged, as plain
  weights, without peft; the bundle has plain weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.training.optim import HEAD_PREFIXES

if TYPE_CHECKING:
    from vit.training.sections import LoraConfig

TARGET_MODULES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""The matrices of a block by their names in `lora.targets`."""


def add_lora(model: VisionTransformer, config: LoraConfig) -> None:
    """Add LoRA updates, which start at zero, to the blocks' matrices; freeze all but these and the head.

    Raises:
        VitError: peft is not installed, or the blocks have no such matrices.
    """
    assert config.rank is not None
    try:
        import peft
    except ImportError:
        raise VitError('lora.rank needs peft, which is not installed: pip install "vit-classifier[lora]"') from None
    module_names = {name for name, _ in model.named_modules()}
    for target in config.targets:
        if f"blocks.0.{TARGET_MODULES[target]}" not in module_names:
            targets = [name for name, module in TARGET_MODULES.items() if f"blocks.0.{module}" in module_names]
            raise VitError(f"lora.targets: the blocks of this model have no {target}; they have {', '.join(targets)}")
    modules_pattern = "|".join(TARGET_MODULES[target].replace(".", r"\.") for target in config.targets)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]  # a float works too
            lora_dropout=config.dropout,
            target_modules=rf"blocks\.\d+\.({modules_pattern})",
        ),
        model,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(HEAD_PREFIXES))


def count_parameters(model: VisionTransformer) -> int:
    """Count the numbers of the model after its updates are merged."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)
