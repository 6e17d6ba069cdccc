"""What the benches' options are read by: mistakes are told before anything is measured."""

import argparse
from pathlib import Path


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them; 5e6 is one."""
    try:
        found = tuple(int(part) if part.isdigit() else int(float(part)) for part in text.split(","))
    except (ValueError, OverflowError):
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2 or 5e6")
    return found


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the figures here too")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that is there")
    return path
