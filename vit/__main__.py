"""`python -m vit` is the command `vit`."""

from vit.cli import command

if __name__ == "__main__":
    command()
