# SPDX-License-Identifier: Apache-2.0
"""Tuning records shipped with the package: one directory per target tag (see README.md beside this file)."""
