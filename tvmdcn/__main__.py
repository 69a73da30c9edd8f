# SPDX-License-Identifier: Apache-2.0
"""``python -m tvmdcn``, and the command ``tvmdcn``: as :mod:`tvmdcn.cli`, also where its packages are missing."""

from __future__ import annotations

import sys

from tvmdcn.extras import explain

__all__ = ["main"]


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        from tvmdcn.cli import main as command
    except ModuleNotFoundError as error:
        message = explain(error, "the command tvmdcn")
        if message is None:
            raise
        sys.exit(f"Error: {message}")
    command(prog_name="tvmdcn")


if __name__ == "__main__":
    main()
