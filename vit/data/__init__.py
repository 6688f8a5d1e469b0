"""From files to batches: what an image is (`decode`), what the model sees of it (`preprocess`), which data sets
there are (`catalogue`), and what one holds (`dataset`).

Importing this package imports nothing.  `decode` and `preprocess` need NumPy and Pillow only, because a trained
model classifies without torch.
"""
