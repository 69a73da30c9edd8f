#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make a report of measured rows; see ``scripts/report.py --help``."""

from tvmdcn.report.page import main

if __name__ == "__main__":
    main()
