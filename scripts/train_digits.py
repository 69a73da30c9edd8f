#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train one small network with plain, DCNv1 and DCNv2 layers, side by side, and draw where DCNv2 looks.

The images are scikit-learn's digits, 8 x 8 pixels, each put into a 32 x 32 image at a random place, size, angle and
slant. Training and test images come from different originals. The networks differ in the kind of two layers; they
start from the same weights and see the same images in the same order. Two more plain networks run beside them, to
tell what deforming gives from what comes with it: one has wider layers, because a deformable layer has more weights
and takes more time; one has its taps three places apart, because offsets let a layer see more of the image.

    python scripts/train_digits.py --quick                                        # a minute, to see it run
    python scripts/train_digits.py --output docs/training --readme README.md      # what the README shows

Offsets start at 0, where a deformable layer is a plain one, and follow at a tenth of the learning rate. Test images
are looked at once, after the last epoch: network, learning rate and number of epochs were chosen on the originals
VALIDATION (--validation), which are in neither part, and with other seeds than the default ones.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sampling_picture import draw, offset_lengths
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import tvmdcn
from tvmdcn.bench.machine import identify_machine, identify_versions
from tvmdcn.bench.statistics import percentile
from tvmdcn.bench.turns import turn_order
from tvmdcn.threads import thread_count

SIZE = 32  # pixels of an image, per side
DIGIT = (12.0, 28.0)  # pixels that a digit takes, per side
ANGLE, SLANT, SHIFT = 60.0, 0.2, 0.7  # degrees, shear, share of the room beside the digit
BATCH, RATE, OFFSET_RATE = 64, 2e-3, 0.1
TRAINING, VALIDATION, TEST = slice(0, 1000), slice(1000, 1297), slice(1297, None)  # of the shuffled originals
TEST_VIEWS = 4  # of each test image
SHOWN = ((12.0, 0.0), (20.0, 0.0), (28.0, 0.0), (20.0, -60.0), (20.0, 60.0))  # in the picture: pixels, degrees
BASE = "conv2d"  # what the others are compared with
WIDTHS = (32, 64, 128)


@dataclass(frozen=True)
class Kind:
    """What the third and fourth layer of a network are."""

    title: str
    layer: Callable[..., nn.Module]
    widths: tuple[int, int, int] = WIDTHS
    dilation: int = 1


KINDS = {
    BASE: Kind("plain", nn.Conv2d),
    "conv2d-wide": Kind("plain, all layers 1.25 times as wide", nn.Conv2d, widths=(40, 80, 160)),
    "conv2d-dilated": Kind("plain, dilation 3", nn.Conv2d, dilation=3),
    "v1": Kind("DCNv1", tvmdcn.DeformConv2dPack),
    "v2": Kind("DCNv2", tvmdcn.ModulatedDeformConv2dPack),
}


# --- images ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Originals:
    """Digits as scikit-learn ships them: images (N, 8, 8) in 0..1, and what they show."""

    images: Tensor
    labels: Tensor

    @classmethod
    def part(cls, which: slice) -> Originals:
        """Return a part of the data set, which is always shuffled alike."""
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[which]
        return cls(torch.from_numpy(digits.images).float()[order] / 16, torch.from_numpy(digits.target)[order])


def place(digits: Tensor, size: Tensor, angle: Tensor, slant: Tensor, shift: Tensor) -> Tensor:
    """Return images (N, 1, 32, 32) of digits (N, 8, 8).

    `size` is in pixels per side, `angle` in degrees, clockwise, `slant` a shear, and `shift` (N, 2), x before y, a
    share of the room that there is on the side.
    """
    turn, one, zero = torch.deg2rad(angle), torch.ones_like(slant), torch.zeros_like(slant)
    back = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    upright = torch.stack([one, slant, zero, one], 1).view(-1, 2, 2)
    matrix = (SIZE / size).view(-1, 1, 1) * (upright @ back)  # from places in the image to places in the digit
    offset = -matrix @ (shift * (1 - size / SIZE).unsqueeze(1)).unsqueeze(2)
    grid = functional.affine_grid(torch.cat([matrix, offset], 2), [len(digits), 1, SIZE, SIZE], align_corners=False)
    return functional.grid_sample(digits.unsqueeze(1), grid, align_corners=False)


def random_views(digits: Tensor, random: torch.Generator) -> Tensor:
    """Return each digit once, randomly placed."""

    def draw_between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), *shape, generator=random)

    size = draw_between(math.log(DIGIT[0]), math.log(DIGIT[1])).exp()
    angle, slant = draw_between(-ANGLE, ANGLE), draw_between(-SLANT, SLANT)
    return place(digits, size, angle, slant, draw_between(-SHIFT, SHIFT, 2))


# --- networks -------------------------------------------------------------------------------------------------


def block(layer: Callable[..., nn.Module], inputs: int, outputs: int, stride: int, dilation: int = 1) -> nn.Module:
    """Return a layer of 3 x 3 taps with what follows it."""
    convolution = layer(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def network(kind: Kind) -> nn.Sequential:
    """Return a network."""
    first, second, third = kind.widths
    return nn.Sequential(
        block(nn.Conv2d, 1, first, 1),  # 32 x 32
        block(nn.Conv2d, first, second, 2),  # 16 x 16
        block(kind.layer, second, second, 1, kind.dilation),
        block(kind.layer, second, third, 2, kind.dilation),  # 8 x 8
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 10),
    )


def networks(seed: int) -> dict[str, nn.Sequential]:
    """Return a network of each kind, those of one width with the same weights."""
    torch.manual_seed(seed)
    models = {name: network(kind) for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        if kind.widths == WIDTHS:  # a deformable layer has a plain one's keys, and those of its offsets
            models[name].load_state_dict(models[BASE].state_dict(), strict=False)
    return models


# --- training -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One network's training from one seed."""

    name: str
    seed: int
    model: nn.Sequential
    epochs: int
    steps: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def __post_init__(self) -> None:
        """Make the optimizer."""
        parameters: dict[bool, list[Tensor]] = {False: [], True: []}
        for key, value in self.model.named_parameters():
            parameters["conv_offset" in key].append(value)
        rates = {False: RATE, True: RATE * OFFSET_RATE}
        groups = [{"params": values, "lr": rates[slow]} for slow, values in parameters.items() if values]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        peaks = [group["lr"] for group in groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, peaks, total_steps=self.epochs * self.steps)

    def train(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Train for an epoch, and note how long it took."""
        total = 0.0
        started = time.perf_counter()
        for images, labels in batches:
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(total / len(batches))

    def judge(self, images: Tensor, labels: Tensor) -> None:
        """Note the share of images that are recognized."""
        self.model.eval()
        with torch.inference_mode():
            found = torch.cat([self.model(batch).argmax(1) for batch in images.split(128)])
        self.accuracy = float((found == labels).double().mean())

    def to_json(self) -> dict[str, Any]:
        """Return what was found, as JSON types."""
        return {
            "network": self.name,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "loss_by_epoch": [round(loss, 5) for loss in self.losses],
            "seconds_by_epoch": [round(seconds, 5) for seconds in self.seconds],
        }


def train(seed: int, epochs: int, training: Originals, judged: Originals, say: Callable[[str], object]) -> list[Run]:
    """Train all networks from a seed, an epoch of each in turn, and judge them at the end.

    Which network comes first changes from epoch to epoch, so that slow moments of the machine fall on all alike.
    """
    steps = len(training.images) // BATCH
    runs = {name: Run(name, seed, model, epochs, steps) for name, model in networks(seed).items()}
    random = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(training.images), generator=random)[: steps * BATCH]
        views = random_views(training.images[order], random)
        batches = list(zip(views.split(BATCH), training.labels[order].split(BATCH), strict=True))
        for name in turn_order(list(runs), epoch):
            runs[name].train(batches)
        losses = ", ".join(f"{name} {run.losses[-1]:.3f}" for name, run in runs.items())
        say(f"seed {seed}, epoch {epoch + 1} of {epochs}: loss {losses}")
    random = torch.Generator().manual_seed(0)  # the same images for all seeds
    images = random_views(judged.images.repeat(TEST_VIEWS, 1, 1), random)
    for run in runs.values():
        run.judge(images, judged.labels.repeat(TEST_VIEWS))
    return list(runs.values())


def warm_up(training: Originals) -> None:
    """Let kernels be built, or loaded, before anything is timed."""
    batch = random_views(training.images[:BATCH], torch.Generator().manual_seed(0)), training.labels[:BATCH]
    for name, model in networks(0).items():
        Run(name, 0, model, 2, 2).train([batch, batch])


# --- what came out --------------------------------------------------------------------------------------------


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return what the runs of each network have in common."""
    summary = {}
    base = [seconds for run in runs if run.name == BASE for seconds in run.seconds]
    for name, kind in KINDS.items():
        mine = [run for run in runs if run.name == name]
        accuracies = [run.accuracy for run in mine]
        seconds = [each for run in mine for each in run.seconds]
        summary[name] = {
            "layer": kind.title,
            "parameters": sum(value.numel() for value in mine[0].model.parameters()),
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if len(mine) > 1 else None,
            "accuracy_lowest": min(accuracies),
            "accuracy_highest": max(accuracies),
            "epoch_seconds_median": percentile(seconds, 0.5),
            "epoch_seconds_p10": percentile(seconds, 0.1),
            "epoch_seconds_p90": percentile(seconds, 0.9),
            "step_ms_median": percentile(seconds, 0.5) / mine[0].steps * 1e3,
            # Each epoch beside the plain network's of the same round: what slows the machine down slows both.
            "relative_time_median": percentile([a / b for a, b in zip(seconds, base, strict=True)], 0.5),
        }
    return summary


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    settings, machine, versions = results["settings"], results["machine"], results["versions"]
    lines = [
        "| third and fourth layer | parameters | test accuracy | lowest to highest | step, ms | epoch, s | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in results["networks"].values():
        spread = "" if entry["accuracy_deviation"] is None else f" ± {100 * entry['accuracy_deviation']:.1f}"
        lines.append(
            f"| {entry['layer']} | {entry['parameters']:,} | {100 * entry['accuracy_mean']:.1f}{spread} % "
            f"| {100 * entry['accuracy_lowest']:.1f} to {100 * entry['accuracy_highest']:.1f} % "
            f"| {entry['step_ms_median']:.1f} | {entry['epoch_seconds_median']:.2f} "
            f"| {entry['relative_time_median']:.2f} |"
        )
    seeds = settings["seeds"]
    lines += [
        "",
        f"Mean ± standard deviation over {len(seeds)} seed{'s' * (len(seeds) > 1)}; {settings['epochs']} epochs of "
        f"{settings['steps']} steps with {settings['batch']} images; {settings['test_images']:,} "
        f"{settings['judged_by']} images; times are medians over all epochs, the last in units of the first row's. "
        f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}, {machine['cpu']}, {machine['target']}, "
        f"torch {versions['torch']}, tvmdcn {versions['tvmdcn']}, {results['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between a page's marks ``training:begin`` and ``training:end``."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- training:begin")
    _, end, after = rest.partition("<!-- training:end -->")
    if not end:
        raise SystemExit(f"{page} has no line <!-- training:begin ... --> with a line <!-- training:end --> after it.")
    page.write_text(f"{before}{begin}{rest.partition('-->')[0]}-->\n{text}{end}{after}", encoding="utf-8")


def draw_views(model: nn.Sequential, judged: Originals, path: Path) -> None:
    """Draw where a DCNv2 network looks on the first of the images it is judged by, in several sizes and angles."""
    size, angle = (torch.tensor(values) for values in zip(*SHOWN, strict=True))
    digits = judged.images[:1].expand(len(SHOWN), 8, 8)
    images = place(digits, size, angle, torch.zeros_like(size), torch.zeros(len(SHOWN), 2))
    titles = [f"{pixels:.0f} pixels, " + (f"{degrees:+.0f}°" if degrees else "upright") for pixels, degrees in SHOWN]
    draw(model, images, titles, 2, path)  # the first deformable layer samples a map of every second pixel


# --- the command ----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; ends with a message if one is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: 30)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one training each (0 1 2 3 4)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of tvmdcn (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("demo_output/training"), help="folder for what is found")
    parser.add_argument("--readme", type=Path, help="page to put the table into, between its marks")
    parser.add_argument("--validation", action="store_true", help="judge by the originals set aside for choices")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 epochs, few images: to see it run")
    options = parser.parse_args(arguments)
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must differ from one another, got {' '.join(map(str, options.seeds))}")
    if options.quick:
        options.epochs, options.seeds = 2, options.seeds[:1]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; write results.json, table.md and sampling.png; print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if thread_count() != options.threads:
        raise SystemExit(f"TVMDCN_NUM_THREADS says {thread_count()} threads, --threads {options.threads}: unset it.")
    training, judged = Originals.part(TRAINING), Originals.part(VALIDATION if options.validation else TEST)
    if options.quick:
        training, judged = (Originals(part.images[:128], part.labels[:128]) for part in (training, judged))
    print("loading kernels, or building them", flush=True)
    warm_up(training)
    runs: list[Run] = []
    for seed in options.seeds:
        runs += train(seed, options.epochs, training, judged, functools.partial(print, flush=True))

    shown = next(run.model for run in runs if run.name == "v2")
    words = sys.argv[1:] if arguments is None else arguments
    results = {
        "schema": 1,
        "command": shlex.join(["python", "scripts/train_digits.py", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": identify_machine(),
        "versions": {**identify_versions(), "scikit-learn": version("scikit-learn")},
        "settings": {
            "epochs": options.epochs,
            "steps": runs[0].steps,
            "batch": BATCH,
            "seeds": options.seeds,
            "threads": options.threads,
            "training_images": len(training.images),
            "test_images": len(judged.images) * TEST_VIEWS,
            "judged_by": "validation" if options.validation else "test",
        },
        "networks": summarize(runs),
        "offset_lengths": offset_lengths(shown, random_views(judged.images, torch.Generator().manual_seed(0))),
        "runs": [run.to_json() for run in runs],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "table.md").write_text(table(results), encoding="utf-8")
    draw_views(shown, judged, options.output / "sampling.png")
    if options.readme:
        put_between_marks(options.readme, table(results))
    print(f"\n{table(results)}\n{options.output.resolve()}: results.json, table.md, sampling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
