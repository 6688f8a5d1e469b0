"""A trained model as a thing you call: loading, preprocessing, batching, export.

Importing this package imports nothing heavy.  Classification through ONNX Runtime needs NumPy and Pillow only; torch
is imported where a model's weights are (`weights`, `torch_backend`, `export`), when one is asked for.
"""
