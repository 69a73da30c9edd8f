# SPDX-License-Identifier: Apache-2.0
"""Packs: prebuilt kernels of named layers for several targets, which need no compiler where they run."""
