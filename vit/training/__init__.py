"""Train models.  The only package that imports lightning."""
