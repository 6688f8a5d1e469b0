"""Load, run and export trained models.

Importing this package imports nothing heavy.  Classification with ONNX Runtime needs only NumPy and Pillow; torch is
imported only for the weights of a model (`weights`, `torch_backend`, `export`).
"""
