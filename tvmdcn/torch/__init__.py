# SPDX-License-Identifier: Apache-2.0
"""What PyTorch sees of tvmdcn: operators of the dispatcher, autograd, and what is built on them.

Importing it defines ``torch.ops.tvmdcn.deform_conv2d`` and its backward. :func:`tvmdcn.deform_conv2d` does so by
itself; who loads an exported program, or calls ``torch.ops`` first, imports ``tvmdcn.torch``.
"""

from __future__ import annotations

from tvmdcn.torch import ops

__all__ = ["ops"]
