#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Learn a deformable layer on a photograph, run it with a kernel built for this machine, check it, draw it.

The layer removes noise. Its input is what a fixed plain convolution sees in the noisy photograph; its offsets
and its mask come from that input, each by a plain convolution with the taps of the deformable one, as in the
paper::

    y(p) = sum_k  w(p_k) * x(p + p_k + dp_k) * dm(p_k)

All weights are learned from the one photograph on small crops of it, in float32 on torch, without tvmdcn.
Then the whole photograph, a size that no one tuned for, goes through ``tvmdcn.deform_conv2d``, and the result
is compared with the float64 reference. ``scripts/demo`` runs this file in an environment with all it needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torch.nn import functional

import tvmdcn
from tvmdcn.reference import deform_conv2d_reference

matplotlib.use("Agg")  # a file, also where there is no screen
from matplotlib import pyplot

CHANNELS = 256  # of ResNet-50's fourth stage, whose layer scripts/demo tunes
TAPS = 9
PATCH, STRIDE = 8, 4  # of the plain convolution that sees the photograph
NOISE = 0.3  # standard deviation, of pixel values in 0..1
CROP = 128  # pixels: 32 x 32 places
TOLERANCE = 1e-4  # of the largest output; float32 against float64


class Stem:
    """A fixed plain convolution and ReLU: 128 principal components of the photograph's patches, by sign.

    Positive and negative responses are channels of their own, so that a plain convolution after it can ask
    how strong a response is, and not only of which sign.
    """

    def __init__(self, photo: Tensor) -> None:
        patches = functional.unfold(photo, PATCH, stride=STRIDE)[0].T
        centred = patches - patches.mean(0)
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        keep = CHANNELS // 2
        self.filters = directions.flip(1)[:, :keep].T.reshape(keep, 3, PATCH, PATCH).contiguous()
        spread = variance.flip(0)[:keep].clamp(min=0) + (NOISE / 2) ** 2
        self.scale = spread.sqrt().view(1, -1, 1, 1)
        self.padding = (PATCH - STRIDE) // 2

    def __call__(self, image: Tensor) -> Tensor:
        """Return what the filters see: (N, 3, H, W) to (N, 256, H / 4, W / 4)."""
        seen = functional.conv2d(image - 0.5, self.filters, stride=STRIDE, padding=self.padding) / self.scale
        return torch.cat([seen.relu(), (-seen).relu()], 1)

    def image(self, features: Tensor) -> Tensor:
        """Return the image that features stand for: overlapping patches, averaged."""
        positive, negative = features.chunk(2, 1)
        where = {"stride": STRIDE, "padding": self.padding}
        total = functional.conv_transpose2d((positive - negative) * self.scale, self.filters, **where)
        one = torch.ones(1, 1, *features.shape[2:])
        return total / functional.conv_transpose2d(one, torch.ones(1, 1, PATCH, PATCH), **where) + 0.5


class DeformableLayer(nn.Module):
    """A DCNv2 layer in plain torch with gradients, slow and independent of tvmdcn; starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(CHANNELS, 2 * TAPS, 3, padding=1)
        self.mask = nn.Conv2d(CHANNELS, TAPS, 3, padding=1)
        for convolution in (self.offset, self.mask):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        weight = 0.002 * torch.randn(CHANNELS, CHANNELS, 3, 3)
        weight[range(CHANNELS), range(CHANNELS), 1, 1] += 2  # the mask starts at one half
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; its offsets and mask are learned with it."""
        return self.deform(x, self.offset(x), self.mask(x).sigmoid())

    def deform(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Sample the taps with grid_sample, whose zero padding is a deformable convolution's border rule."""
        batch, channels, height, width = x.shape
        tap_row = torch.arange(TAPS).view(1, TAPS, 1, 1) // 3 - 1
        tap_column = torch.arange(TAPS).view(1, TAPS, 1, 1) % 3 - 1
        row = torch.arange(height).view(1, 1, height, 1) + tap_row + offset[:, 0::2]
        column = torch.arange(width).view(1, 1, 1, width) + tap_column + offset[:, 1::2]
        grid = torch.stack([2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1], -1)
        samples = functional.grid_sample(x, grid.flatten(1, 2), padding_mode="zeros", align_corners=True)
        samples = samples.view(batch, channels, TAPS, height, width) * mask[:, None]
        product = torch.einsum("ock,nckp->nop", self.weight.flatten(2), samples.flatten(3))
        return product.view(batch, -1, height, width) + self.bias.view(1, -1, 1, 1)


def load_photograph(name: str) -> Tensor:
    """Return a photograph that scikit-image ships, (1, 3, H, W) in 0..1, cut to whole places of the stem."""
    photo = getattr(data, name)()
    height, width = (size - size % (2 * PATCH) for size in photo.shape[:2])
    pixels = np.ascontiguousarray(photo[:height, :width, :3].transpose(2, 0, 1))
    return torch.from_numpy(pixels).float().div(255)[None]


def learn(layer: nn.Module, stem: Stem, photo: Tensor, steps: int) -> float:
    """Teach a layer to undo noise on crops of the photograph; return the seconds it took."""
    started = time.perf_counter()
    random = torch.Generator().manual_seed(1)
    # Offsets follow more slowly: large early steps carry the samples away before the weights mean anything.
    slow = [value for name, value in layer.named_parameters() if name.startswith(("offset", "mask"))]
    fast = [value for name, value in layer.named_parameters() if not name.startswith(("offset", "mask"))]
    groups, rates = [{"params": fast}], [2e-3]
    if slow:
        groups, rates = [*groups, {"params": slow}], [*rates, 4e-4]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    for _ in range(steps):
        top, left = (
            STRIDE * int(torch.randint((size - CROP) // STRIDE + 1, (1,), generator=random)) for size in photo.shape[2:]
        )
        clean = photo[:, :, top : top + CROP, left : left + CROP]
        if torch.rand(1, generator=random) < 0.5:
            clean = clean.flip(3)
        noisy = clean + NOISE * torch.randn(clean.shape, generator=random)
        loss = functional.mse_loss(stem.image(layer(stem(noisy))), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - started


def decibels(image: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio of an image with values in 0..1."""
    return float(-10 * torch.log10(functional.mse_loss(image, truth)))


@dataclass
class Result:
    """What the demonstration shows."""

    photo: Tensor
    noisy: Tensor
    output: Tensor
    offset: np.ndarray
    mask: np.ndarray


def draw(result: Result, path: Path) -> None:
    """Draw input, output and where the layer looked, and save the picture."""
    offset = result.offset[0].reshape(TAPS, 2, *result.offset.shape[2:])  # tap, (y, x), row, column
    mask = result.mask[0]
    length = np.hypot(offset[:, 0], offset[:, 1]).mean(0)
    size = 24  # places shown close up, per side
    top, left = _busiest_window(length, size)
    box = (left * STRIDE, top * STRIDE, size * STRIDE, size * STRIDE)

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.6), constrained_layout=True)
    pictures = (
        (result.noisy, "Input: the photograph with noise"),
        (result.output, "Output of the deformable layer"),
    )
    for axis, (image, title) in zip(axes[0], pictures, strict=True):
        clean, photo = image.clamp(0, 1), result.photo
        axis.imshow(clean[0].permute(1, 2, 0))
        axis.set_title(f"{title} ({decibels(image, photo):.1f} dB)")
        axis.add_patch(pyplot.Rectangle(box[:2], *box[2:], fill=False, color="white", linewidth=1.5))

    close = axes[1, 0]
    close.imshow(result.photo[0].permute(1, 2, 0))
    close.set_xlim(box[0], box[0] + box[2])
    close.set_ylim(box[1] + box[3], box[1])
    for row in range(top + 2, top + size, 4):
        for column in range(left + 2, left + size, 4):
            _draw_taps(close, row, column, offset[:, :, row, column], mask[:, row, column])
    close.set_title("Where it looks: taps (white), samples (orange, size = mask)")

    shown = axes[1, 1].imshow(length * STRIDE, cmap="magma", interpolation="nearest")
    figure.colorbar(shown, ax=axes[1, 1], shrink=0.8, label="pixels")
    axes[1, 1].set_title("How far the taps moved, mean over nine")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85)
    pyplot.close(figure)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)  # smaller, and looks the same


def _busiest_window(length: np.ndarray, size: int) -> tuple[int, int]:
    """Return the top left place of the square window in which the taps moved farthest."""
    total = np.pad(length, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    window = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    top, left = np.unravel_index(window.argmax(), window.shape)
    return int(top), int(left)


def _draw_taps(axis: pyplot.Axes, row: int, column: int, offset: np.ndarray, mask: np.ndarray) -> None:
    """Draw the nine taps of one place, and lines to where they sampled."""
    centre = (STRIDE - 1) / 2  # pixel coordinate of the middle of place 0
    tap_row, tap_column = np.divmod(np.arange(TAPS), 3)
    y, x = STRIDE * (row + tap_row - 1) + centre, STRIDE * (column + tap_column - 1) + centre
    end_y, end_x = y + STRIDE * offset[:, 0], x + STRIDE * offset[:, 1]
    axis.plot(np.stack([x, end_x]), np.stack([y, end_y]), color="white", linewidth=0.8)
    axis.scatter(x, y, s=3, color="white")
    axis.scatter(end_x, end_y, s=60 * mask, color="darkorange", edgecolors="black", linewidths=0.4, zorder=3)


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; return 1 if the kernel's result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photograph", default="chelsea", choices=("astronaut", "chelsea", "coffee", "rocket"))
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--picture", type=Path, default=Path("demo_output/demo.png"), help="where the picture goes")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    photo = load_photograph(options.photograph)
    stem, layer, plain = Stem(photo), DeformableLayer(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    with torch.no_grad():
        plain.weight.copy_(layer.weight / 2)
        plain.bias.zero_()
    print(f"photograph: {options.photograph}, {photo.shape[3]}x{photo.shape[2]}, noise of sigma {NOISE}")
    for name, module in (("plain", plain), ("deformable", layer)):
        print(f"learned a {name} layer in {learn(module, stem, photo, options.steps):.1f} s", flush=True)

    noisy = photo + NOISE * torch.randn(photo.shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        features = stem(noisy)
        offset, mask = layer.offset(features), layer.mask(features).sigmoid()
        weight, bias = layer.weight.detach(), layer.bias.detach()
        started = time.perf_counter()
        output = tvmdcn.deform_conv2d(features, offset, weight, bias, padding=1, mask=mask)
        first = time.perf_counter() - started
        started = time.perf_counter()
        output = tvmdcn.deform_conv2d(features, offset, weight, bias, padding=1, mask=mask)
        again = time.perf_counter() - started
    sizes = "x".join(map(str, features.shape))
    print(f"tvmdcn.deform_conv2d on {sizes}: first call {first:.2f} s (it loads, or builds), then {again * 1e3:.1f} ms")

    expected = deform_conv2d_reference(
        features.numpy(),
        offset.numpy(),
        weight.numpy(),
        bias.numpy(),
        padding=1,
        mask=mask.numpy(),
        coordinate_dtype="float32",
    )
    error = float(np.abs(output.numpy() - expected).max() / np.abs(expected).max())
    print(f"largest difference from the float64 reference, relative to the largest output: {error:.1e}")
    if not error <= TOLERANCE:  # written so that NaN fails it
        print(f"error: that is more than {TOLERANCE:.0e}; the kernel is wrong", file=sys.stderr)
        return 1

    with torch.inference_mode():
        denoised, straight = stem.image(output), stem.image(plain(features))
    print(
        f"noisy {decibels(noisy, photo):.2f} dB, plain {decibels(straight, photo):.2f} dB, "
        f"deformable {decibels(denoised, photo):.2f} dB (learned and judged on the same photograph)"
    )
    draw(Result(photo, noisy, denoised, offset.numpy(), mask.numpy()), options.picture)
    print(f"picture: {options.picture.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
