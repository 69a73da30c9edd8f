# SPDX-License-Identifier: Apache-2.0
"""Showing: rows of measurements and tuning records as pages and tables."""
