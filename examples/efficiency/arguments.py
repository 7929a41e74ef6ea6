"""Types of command-line arguments: a fault is reported before anything is measured."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is given, but it must be at least 1")
    return number


def output(text: str) -> Path:
    """Read the name of a file to write, in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, but must be a file")
    return path


def picture(text: str) -> Path:
    """Read the name of a picture to write, of a kind that Matplotlib draws."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise argparse.ArgumentTypeError("it needs the package matplotlib: pip install matplotlib") from error
    path = output(text)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"{path} must end in one of .{', .'.join(sorted(kinds))}")
    return path
