#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search the best schedule of a layer for this machine; the same as ``tvmdcn tune``."""

from tvmdcn.tuning.command import tune_command

if __name__ == "__main__":
    tune_command()
