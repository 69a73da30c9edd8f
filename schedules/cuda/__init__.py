# SPDX-License-Identifier: Apache-2.0
"""Design spaces for NVIDIA GPUs."""
