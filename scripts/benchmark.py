#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels with the peers; see ``scripts/benchmark.py --help``."""

from tvmdcn.bench.command import main

if __name__ == "__main__":
    main()
