# SPDX-License-Identifier: Apache-2.0
"""``InferenceSession``: onnxruntime runs a model, and tvmdcn's kernels its deformable convolutions."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.kernel import Kernel
from tvmdcn.onnx.node import LayerNode
from tvmdcn.onnx.runner import LayerCall, Runner
from tvmdcn.onnx.split import Split
from tvmdcn.runtime import load
from tvmdcn.spec import DeformConv2dSpec
from tvmdcn.validation import shown

__all__ = ["InferenceSession", "load_model"]

_log = logging.getLogger(__name__)


def load_model(model: Any) -> onnx.ModelProto:
    """Return a model given as path, as bytes or as it is.

    Raises
    ------
    SpecError, SpecTypeError
        If it is none, or lies in files that are missing.
    """
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, (str, os.PathLike, bytes)):
        raise SpecTypeError(
            f"model must be a path, bytes or an onnx.ModelProto, got {shown(model)} of type {type(model).__name__}."
        )
    try:
        read = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load_model(Path(model))
    except FileNotFoundError as error:
        raise SpecError(f"model: {error}") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise SpecError(f"model: {shown(model)} cannot be read: {error}") from error
    if not read.graph.output:
        raise SpecError(f"model: {shown(model)} is no model of ONNX: it has no outputs.")
    return read


class InferenceSession(Runner):
    """A model with ``DeformConv`` nodes, which tvmdcn's kernels compute; everything else is left to onnxruntime.

    The model is cut at these nodes. The parts between them are sessions of onnxruntime, which are handed arrays
    without a copy; the nodes' constant weights are packed once. Kernels are found or built when the session is made
    (see TVMDCN_BUILD), with the records of ``tvmdcn tune --model model.onnx`` if there are any. What onnxruntime itself
    can do with ``DeformConv`` does not matter: it never sees one.

    Parameters
    ----------
    path_or_bytes : str, Path, bytes or onnx.ModelProto
        ONNX opset 19 or newer; with external data only as a path.
    sess_options : onnxruntime.SessionOptions, optional
        Of every part. Kernels run on `intra_op_num_threads` threads if that is set, else see TVMDCN_NUM_THREADS.
        By default the threads of a part stop spinning when it is done, so that the next has the processors to
        itself (``session.force_spinning_stop``).
    providers, provider_options : optional
        Of every part, as onnxruntime's. Kernels run on the CPU.
    **options
        Others of ``onnxruntime.InferenceSession``.

    Attributes
    ----------
    layers : list of LayerNode
        The nodes that kernels compute.

    Raises
    ------
    MissingExtra
        If onnx or onnxruntime is not installed.
    SpecError, SpecTypeError
        If it is no model, a node is no layer that there are kernels for, or stands in a subgraph (If, Loop, Scan).
    ArtifactError, BuildError
        If there is no kernel, and none can be built.

    Notes
    -----
    Each part has threads of its own, which sleep while it does not run. On a machine with many processors let them
    share some: ``onnxruntime.set_global_thread_pool_sizes(threads, 1)`` at the start of the program, and
    ``sess_options.use_per_session_threads = False``.
    """

    def __init__(
        self,
        path_or_bytes: Any,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[Any, Any]] | None = None,
        **options: Any,
    ) -> None:
        split = Split(load_model(path_or_bytes))
        if sess_options is None:
            sess_options = onnxruntime.SessionOptions()
            sess_options.add_session_config_entry("session.force_spinning_stop", "1")
        if sess_options.optimized_model_filepath and len(split.steps) > 1:
            raise SpecError(
                "sess_options.optimized_model_filepath is set, and every part of the model would be written to "
                f"{sess_options.optimized_model_filepath}. Leave it empty."
            )
        if not split.layers:
            _log.warning("the model has no DeformConv node: all of it is run by onnxruntime")
        threads = sess_options.intra_op_num_threads or None

        def layer(node: LayerNode, weight: np.ndarray | None, bias: np.ndarray | None) -> LayerCall:
            return _Layer(node, weight, bias, threads).call

        arguments = {"providers": providers, "provider_options": provider_options, **options}
        super().__init__(split, layer, sess_options, arguments)


class _Layer:
    """A layer with its kernel: found once, the weight packed once, if the weight is constant."""

    def __init__(
        self, node: LayerNode, weight: np.ndarray | None, bias: np.ndarray | None, threads: int | None
    ) -> None:
        self._node, self._threads, self._bias = node, threads, bias
        self._kernels: dict[DeformConv2dSpec, Kernel] = {}
        self._kernel: Kernel | None = None
        if weight is not None:
            kernel = self._kernel = self._kernel_for(weight)
            with node.named():
                self._weight = kernel.pack(weight)

    def _kernel_for(self, weight: np.ndarray) -> Kernel:
        spec = self._node.spec(weight.shape, weight.dtype)
        kernel = self._kernels.get(spec)
        if kernel is None:
            kernel = self._kernels[spec] = load(spec, threads=self._threads)
        return kernel

    def call(self, input: Any, weight: Any, offset: Any, bias: Any, mask: Any) -> Any:
        """Compute the layer; what is None is constant, or left out."""
        bias = self._bias if bias is None else bias
        kernel = self._kernel
        with self._node.named():
            if kernel is None:
                return self._kernel_for(weight)(input, offset, weight, bias, mask)
            return kernel(input, offset, self._weight, bias, mask)
