# SPDX-License-Identifier: Apache-2.0
"""Searching: schedules, measured and checked, and the records of the best."""
