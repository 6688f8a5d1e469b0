"""The field's weights: timm's registry and hub, checkpoints of every kind, resampling.

Importing this package imports nothing; timm is imported when it is asked for a name.
"""
