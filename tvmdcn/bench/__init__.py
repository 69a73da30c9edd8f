# SPDX-License-Identifier: Apache-2.0
"""Measuring: layers beside other libraries, in turns, one process each."""
