"""Run the command `vit` as `python -m vit`."""

from vit.cli import command

if __name__ == "__main__":
    command()
