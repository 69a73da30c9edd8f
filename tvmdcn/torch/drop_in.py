# SPDX-License-Identifier: Apache-2.0
"""Layers of torchvision, mmcv and detectron2 in an existing model, made to compute with tvmdcn.

Layers are known by the name and the module of their class, so none of those packages is imported for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tvmdcn.api import deform_conv2d
from tvmdcn.errors import SpecError, SpecTypeError
from tvmdcn.torch.layer import Layer, Pack, check_channels
from tvmdcn.torch.modules import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from tvmdcn.validation import DTYPES, dtype_name, shown

__all__ = ["LayerReport", "ReplacementReport", "replace_modules"]

_Forward = Callable[..., Any]

# Classes of others for which there is no class of ours: they keep theirs, and only compute otherwise.


def _forward_of_mmcv(self: Any, x: Any, offset: Any, mask: Any = None) -> Any:
    """Compute a layer of mmcv that is given its offsets.

    mmcv converts everything to the dtype of the offset. It also pads images smaller than the kernel, and crops the
    output by as much, for the sake of a check in its own kernels; the values are those without.
    """
    dtype = offset.dtype if isinstance(offset, torch.Tensor) else None
    given = (x, mask, self.weight, getattr(self, "bias", None))
    x, mask, weight, bias = (a.to(dtype) if isinstance(a, torch.Tensor) else a for a in given)
    check_channels(self, weight, x, offset, mask)
    geometry = self.stride, self.padding, self.dilation
    return deform_conv2d(x, offset, weight, bias, *geometry, mask, border=self.border)


def _forward_of_detectron2(self: Any, x: Any, offset: Any, mask: Any = None) -> Any:
    """Compute a layer of detectron2, which may carry a normalisation and an activation."""
    check_channels(self, self.weight, x, offset, mask)
    geometry = self.stride, self.padding, self.dilation
    x = deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask, border=self.border)
    if self.norm is not None:
        x = self.norm(x)
    if self.activation is not None:
        x = self.activation(x)
    return x


@dataclass(frozen=True)
class _Ours:
    """What becomes of a class: one of ours, or the same with another forward; and whose border gradient it has."""

    layer: type[Layer] | None
    forward: _Forward
    border: str

    @classmethod
    def of(cls, layer: type[Layer]) -> _Ours:
        return cls(layer, layer.forward, layer.border)


_MMCV, _DETECTRON2 = "mmcv.ops", "detectron2.layers.deform_conv"
_KNOWN = {
    "torchvision.ops.deform_conv.DeformConv2d": _Ours.of(DeformConv2d),
    f"{_MMCV}.deform_conv.DeformConv2d": _Ours(None, _forward_of_mmcv, "mmcv"),
    f"{_MMCV}.deform_conv.DeformConv2dPack": _Ours.of(DeformConv2dPack),
    f"{_MMCV}.modulated_deform_conv.ModulatedDeformConv2d": _Ours(None, _forward_of_mmcv, "mmcv"),
    f"{_MMCV}.modulated_deform_conv.ModulatedDeformConv2dPack": _Ours.of(ModulatedDeformConv2dPack),
    f"{_DETECTRON2}.DeformConv": _Ours(None, _forward_of_detectron2, "mmcv"),
    f"{_DETECTRON2}.ModulatedDeformConv": _Ours(None, _forward_of_detectron2, "mmcv"),
}
_OURS = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack)
# What copies of those layers are called in other packages.
_LOOKALIKES = {name.rpartition(".")[2] for name in _KNOWN} | {
    *("DCN", "DCNv2", "DeformConvPack", "ModulatedDeformConvPack"),
}
_DEVICES = ("cpu", "cuda", "meta")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    names : tuple of str
        Its names in the model, several if it is shared; "" is the model itself.
    was : str
        The class that it had.
    now : str
        The class that it has.
    reason : str
        Why it was left as it was; "" if it was replaced.
    """

    names: tuple[str, ...]
    was: str
    now: str
    reason: str = ""


@dataclass(frozen=True)
class ReplacementReport:
    """What :func:`replace_modules` did; printed, it is a table.

    Attributes
    ----------
    model : str
        The model's class.
    replaced, left : tuple of LayerReport
        In the order of ``model.named_modules()``.
    """

    model: str
    replaced: tuple[LayerReport, ...]
    left: tuple[LayerReport, ...]

    def __str__(self) -> str:
        """Return the counts, and a line for each layer."""
        some = "1 deformable layer" if len(self.replaced) == 1 else f"{len(self.replaced)} deformable layers"
        lines = [f"{self.model}: {some} replaced, {len(self.left)} left"]
        rows = [(layer, f"{layer.was} -> {layer.now}") for layer in self.replaced]
        rows += [(layer, f"{layer.was} left: {layer.reason}") for layer in self.left]
        names = [", ".join(name or "(the model itself)" for name in layer.names) for layer, _ in rows]
        width = max(map(len, names), default=0)
        lines += [f"  {name:<{width}}  {text}" for name, (_, text) in zip(names, rows, strict=True)]
        return "\n".join(lines)


def replace_modules(
    model: torch.nn.Module, *, also: Mapping[type[torch.nn.Module], type[Layer]] | None = None
) -> ReplacementReport:
    """Let the deformable layers of a model compute with tvmdcn, in place.

    Known are ``DeformConv2d`` of torchvision; ``DeformConv2d``, ``DeformConv2dPack``, ``ModulatedDeformConv2d`` and
    ``ModulatedDeformConv2dPack`` of mmcv; ``DeformConv`` and ``ModulatedDeformConv`` of detectron2.

    A layer stays the object it is, only its class changes: to :class:`DeformConv2d`, :class:`DeformConv2dPack` or
    :class:`ModulatedDeformConv2dPack` where one corresponds, else to a subclass of its own class with another
    ``forward``. So its parameters, buffers, hooks, ``training`` flag, dtype, device and names are what they were,
    optimizers and whatever else refers to it remain valid, a shared layer is replaced once for all its places, and
    the model itself can be the layer. Gradients at the border stay those of the package that the layer came from.

    Left as they are, and reported with the reason: subclasses with a ``forward`` of their own (see
    :func:`route_torchvision`), scripted and parametrized layers, layers on other devices than CPUs and NVIDIA GPUs,
    and classes that only bear such a name. Layers that are not registered as submodules are not found.

    Parameters
    ----------
    model : torch.nn.Module
    also : mapping from class to class, optional
        Further classes, such as a copy of mmcv's in another package, and which layer of tvmdcn does the same.

    Returns
    -------
    ReplacementReport
        Which layers were replaced, and which were left and why.

    Raises
    ------
    SpecError, SpecTypeError
        If `model` is no ``torch.nn.Module``, or `also` does not map classes of layers to layers of tvmdcn. Then
        nothing has been replaced.
    """
    if not isinstance(model, torch.nn.Module):
        raise SpecTypeError(f"model must be a torch.nn.Module, got {shown(model)} of type {type(model).__name__}.")
    further = _further({} if also is None else also)
    model_class = _class_name(type(model))
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found = [(module, _decide(module, further)) for module in names]
    replaced, left = [], []
    for module, decision in found:
        if decision is None:
            continue
        was = _class_name(type(module))
        if isinstance(decision, str):
            left.append(LayerReport(tuple(names[module]), was, was, decision))
        else:
            _replace(module, *decision)
            replaced.append(LayerReport(tuple(names[module]), was, _class_name(type(module))))
    return ReplacementReport(model_class, tuple(replaced), tuple(left))


def _class_name(cls: type) -> str:
    replaced = getattr(cls, "_replaced", None)
    if replaced is not None:
        return f"{_class_name(replaced)} with tvmdcn's forward"
    return f"tvmdcn.{cls.__name__}" if cls in _OURS else f"{cls.__module__}.{cls.__qualname__}"


def _further(also: Mapping[Any, Any]) -> dict[type, _Ours]:
    """Check the classes that the caller knows."""
    if not isinstance(also, Mapping):
        raise SpecTypeError(f"also must map classes to classes, got {shown(also)} of type {type(also).__name__}.")
    for theirs, ours in also.items():
        if not (isinstance(theirs, type) and issubclass(theirs, torch.nn.Module)):
            raise SpecTypeError(f"also must map subclasses of torch.nn.Module, got {shown(theirs)}.")
        if ours not in _OURS:
            allowed = ", ".join(map(_class_name, _OURS))
            raise SpecError(f"also must map {_class_name(theirs)} to one of {allowed}, got {shown(ours)}.")
    return {theirs: _Ours.of(ours) for theirs, ours in also.items()}


def _decide(module: Any, further: Mapping[type, _Ours]) -> tuple[type, _Ours] | str | None:
    """Return the known class of a layer and what becomes of it; why nothing does; None for another module."""
    cls = type(module)
    if isinstance(module, Layer) or hasattr(cls, "_replaced"):
        return "it is tvmdcn's already"
    if isinstance(module, torch.jit.ScriptModule):
        if getattr(module, "original_name", "") in _LOOKALIKES:
            return "it is scripted, and calls torch.ops by itself; replace first"
        return None
    for known in cls.__mro__:
        ours = further.get(known) or _KNOWN.get(f"{known.__module__}.{known.__qualname__}")
        if ours is not None:
            return _obstacle(module, known, ours) or (known, ours)
    if cls.__name__ in _LOOKALIKES and "weight" in module._parameters:
        return (
            f"a class of {cls.__module__} is not known; if it computes what one of tvmdcn's does, "
            f"name that one: also={{{cls.__name__}: tvmdcn...}}"
        )
    return None


def _obstacle(module: Any, known: Any, ours: _Ours) -> str:
    """Return why a layer of a known class cannot be replaced; "" if it can."""
    cls: Any = type(module)
    if cls.forward is not known.forward or cls.__call__ is not known.__call__:
        return f"its class has a forward of its own (it derives from {_class_name(known)})"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; replace first, then parametrize"
    pack = ours.layer is not None and issubclass(ours.layer, Pack)
    needed = ["weight", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
    missing = [name for name in (*needed, *(["conv_offset"] if pack else [])) if not hasattr(module, name)]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    weight = module.weight
    if weight.device.type not in _DEVICES:
        return f"it is on {weight.device}, and tvmdcn computes on CPUs and NVIDIA GPUs; move the model first"
    if dtype_name(weight.dtype) not in DTYPES:
        return f"its dtype is {dtype_name(weight.dtype)}, and tvmdcn's are {', '.join(DTYPES)}"
    return ""


def _replace(module: Any, known: type, ours: _Ours) -> None:
    """Change the class of a layer."""
    cls: Any = type(module)
    module.__class__ = ours.layer if cls is known and ours.layer is not None else _with_forward(cls, ours.forward)
    module.border = ours.border
    if not hasattr(module, "bias"):
        module.register_parameter("bias", None)
    if ours.layer is not None and issubclass(ours.layer, Pack) and not hasattr(module, "deform_groups"):
        taps = module.weight.shape[2] * module.weight.shape[3]
        module.deform_groups = module.conv_offset.out_channels // (ours.layer.per_tap * taps)


@functools.cache
def _with_forward(cls: Any, forward: _Forward) -> Any:
    """Return a subclass with another `forward`, whose instances can be pickled and copied."""
    members = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_replaced": cls,
    }
    return type(f"Tvmdcn{cls.__name__}", (cls,), members)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Describe an object of a class made by :func:`_with_forward`, which cannot be found by its name."""
    reduced: Any = object.__reduce_ex__(self, 2)
    return (_blank, (type(self)._replaced, type(self).forward), *reduced[2:])


def _blank(cls: Any, forward: _Forward) -> Any:
    made: Any = _with_forward(cls, forward)
    return made.__new__(made)
