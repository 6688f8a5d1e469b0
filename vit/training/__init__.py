"""The training loop.  The only room that imports lightning."""
