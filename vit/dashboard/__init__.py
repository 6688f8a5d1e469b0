"""Define the records of the Attention tab, serve them in TensorBoard, build its web page.  Imports no torch."""
