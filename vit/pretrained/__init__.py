"""Load pretrained weights: from timm's registry, the hub and checkpoints of every kind, with resampling.

Importing this package imports nothing; timm is imported for a timm name.
"""
