# SPDX-License-Identifier: Apache-2.0
"""The picture that scripts/train_digits.py writes: where two stacked deformable layers look for one place."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

import tvmdcn

matplotlib.use("Agg")  # a file, also where there is no screen
from matplotlib import pyplot

TAPS = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))  # y, x


@dataclass(frozen=True)
class Field:
    """Where a deformable layer of 3 x 3 taps samples for one image: offset (9, 2, H, W), y, x, and mask (9, H, W)."""

    offset: Tensor
    mask: Tensor
    stride: int

    def samples(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions (N, 9, 2) in the map that is sampled, and modulations (N, 9), for output places (N, 2).

        A sample between four places is made of all of them; their offsets are those of the nearest. A place outside
        is 0 and samples nothing: its modulation is 0, and its offsets are those of the nearest place inside.
        """
        height, width = self.mask.shape[1:]
        rows, columns = places.round().long().unbind(1)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        offset = self.offset[:, :, rows, columns].permute(2, 0, 1)
        return places.unsqueeze(1) * self.stride + TAPS + offset, self.mask[:, rows, columns].T * inside.unsqueeze(1)

    def plain(self) -> Field:
        """Return where a plain layer samples."""
        return Field(torch.zeros_like(self.offset), torch.ones_like(self.mask), self.stride)


def fields_of(model: nn.Module, images: Tensor) -> list[list[Field]]:
    """Return where the DCNv2 layers of a model sample, a list of its layers for each image."""
    fields: list[list[Field]] = [[] for _ in images]

    def note(layer: Any, given: tuple[Tensor, ...], output: Tensor, stride: int) -> None:
        for found, channels in zip(fields, output, strict=True):
            found.append(Field(channels[:18].unflatten(0, (9, 2)), channels[18:].sigmoid(), stride))

    hooks = [
        module.conv_offset.register_forward_hook(functools.partial(note, stride=module.stride[0]))
        for module in model.modules()
        if isinstance(module, tvmdcn.ModulatedDeformConv2dPack)
    ]
    model.eval()
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return fields


def offset_lengths(model: nn.Module, images: Tensor) -> list[dict[str, float]]:
    """Return how far a model's layers look from their taps, in places of the map sampled, a dict for each layer.

    ``mean`` is over images, taps and places; ``deviation`` the root mean square distance of the offsets from the mean
    of their tap, which is what depends on the image and the place.
    """
    lengths = []
    for layer in zip(*fields_of(model, images), strict=True):
        offset = torch.stack([field.offset for field in layer])  # image, tap, (y, x), row, column
        varying = offset - offset.mean((0, 3, 4), keepdim=True)
        deviation = varying.square().sum(2).mean().sqrt()
        lengths.append({"mean": float(offset.norm(dim=2).mean()), "deviation": float(deviation)})
    return lengths


def draw(model: nn.Module, images: Tensor, titles: list[str], step: int, path: Path) -> None:
    """Draw the samples of the middle place of the output of two stacked layers, and save the picture.

    Parameters
    ----------
    model : torch.nn.Module
        With two layers :class:`tvmdcn.ModulatedDeformConv2dPack`.
    images : (N, 1, H, W)
        A column each.
    titles : list of str
    step : int
        Pixels of an image from one place to the next in the map that the first of the two layers samples.
    path : Path
        Of a .png.
    """
    names = (
        "plain: 81 samples through\ntwo layers, at 25 places",
        "DCNv2: 9 samples of the\nlast layer, and its taps",
        "DCNv2: 81 samples through\ntwo layers",
    )
    figure, axes = pyplot.subplots(3, len(images), figsize=(2.3 * len(images), 7.1), constrained_layout=True)
    for column, (first, last) in enumerate(fields_of(model, images)):
        middle = torch.tensor([[size // 2 for size in last.mask.shape[1:]]])
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(images[column, 0].numpy(), cmap="gray", vmin=0, vmax=1.4)
            below, above = (first, last) if row else (first.plain(), last.plain())
            points, share = (found.flatten(0, 1) for found in above.samples(middle))
            if row == 1:
                _draw_moves(axis, last.plain().samples(middle)[0][0] * step, points * step)
            else:
                points, factor = below.samples(points)
                points, share = points.flatten(0, 1), (share.unsqueeze(1) * factor).flatten()
            shown = _draw_samples(axis, points * step, share, 36 if row == 1 else 14)
            axis.plot(
                *(middle[0].flip(0) * last.stride * step).tolist(), "+", color="cyan", markersize=9, markeredgewidth=1.6
            )
            axis.set(xlim=(-0.5, images.shape[3] - 0.5), ylim=(images.shape[2] - 0.5, -0.5), xticks=[], yticks=[])
            if row == 0:
                axis.set_title(titles[column])
            if column == 0:
                axis.set_ylabel(names[row])
    figure.colorbar(shown, ax=axes, shrink=0.5, aspect=30, label="modulation (through two layers: the product)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_moves(axis: Any, taps: Tensor, points: Tensor) -> None:
    """Draw where the taps of a plain layer are, and lines to where they moved."""
    for tap, point in zip(taps, points, strict=True):
        axis.plot(*torch.stack([tap, point]).T.flip(0).numpy(), color="white", linewidth=0.7)
    axis.scatter(*taps.T.flip(0).numpy(), s=7, color="white", linewidths=0)


def _draw_samples(axis: Any, points: Tensor, share: Tensor, size: float) -> Any:
    """Draw samples, those that count most on top; return what a colour bar needs."""
    order = share.argsort()
    style = {"cmap": "YlOrRd", "vmin": 0, "vmax": 1, "edgecolors": "black", "linewidths": 0.3, "zorder": 3}
    return axis.scatter(*points[order].T.flip(0).numpy(), c=share[order].numpy(), s=size, **style)
