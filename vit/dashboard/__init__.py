"""The Attention tab: what training writes for it, how TensorBoard serves it, its web page.  Loads without torch."""
