"""The command line that the benchmarks of trained networks share."""

import argparse
from pathlib import Path


def of_checkpoints(documentation: str, several: bool = False) -> argparse.Namespace:
    """The checkpoint (or checkpoints), data_dir and cache_dir of the command line; its help is the documentation."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    if several:
        parser.add_argument("checkpoints", type=Path, nargs="+")
        parser.add_argument("--alone", action="store_true", help="leave the neighbours' vote out")
    else:
        parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cache-dir", default="")
    return parser.parse_args()
