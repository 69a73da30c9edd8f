#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make a report of measured rows, or compare two runs; see ``scripts/report.py --help``."""

from tvmdcn.report.command import main

if __name__ == "__main__":
    main()
