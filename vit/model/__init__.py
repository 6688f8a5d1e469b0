"""What a Vision Transformer is.  Imports torch and nothing else."""

from vit.model.arguments import SIZES, Size
from vit.model.vision_transformer import VisionTransformer, create_model

__all__ = ["SIZES", "Size", "VisionTransformer", "create_model"]
