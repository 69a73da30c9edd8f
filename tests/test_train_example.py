# SPDX-License-Identifier: Apache-2.0
"""scripts/train_digits.py: its images, its networks, its picture, what it writes, and that a seed repeats itself."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torch

from tvmdcn import DeformConv2dPack, ModulatedDeformConv2dPack

ROOT = Path(__file__).resolve().parents[1]
TOLERANCES = {
    "images": 1e-6,  # of pixels in 0..1
    "turned images": 2e-5,  # cosines of 90 degrees are not quite 0
    "equal networks": 1e-3,  # batch norms undo the mask of one half, but for their epsilon
}


def script(name: str) -> Any:
    """Import a script; a run of it has its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module(name)


train_digits = script("train_digits")
sampling_picture = script("sampling_picture")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- images -------------------------------------------------------------------------------------------------


def placed(digits: Any, size: float, angle: float = 0, slant: float = 0, shift: tuple[float, float] = (0, 0)) -> Any:
    count = len(digits)
    values = [torch.full((count,), float(value)) for value in (size, angle, slant)]
    return train_digits.place(digits, *values, torch.tensor([shift] * count, dtype=torch.float32))


def centre(images: Any) -> tuple[float, float]:
    """Return the centre of mass of the first image, y and x from its middle."""
    image = images[0, 0] / images[0, 0].sum()
    middle = (image.shape[0] - 1) / 2
    at = torch.arange(image.shape[0]) - middle
    return float((image.sum(1) * at).sum()), float((image.sum(0) * at).sum())


def test_parts_share_no_original() -> None:
    parts = [range(1797)[part] for part in (train_digits.TRAINING, train_digits.VALIDATION, train_digits.TEST)]
    assert [len(part) for part in parts] == [1000, 297, 500]
    assert sorted(index for part in parts for index in part) == list(range(1797))
    first, again = train_digits.Originals.part(parts[0]), train_digits.Originals.part(slice(0, 1000))
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (1000, 8, 8)
    assert (float(first.images.min()), float(first.images.max())) == (0, 1)
    assert sorted(set(first.labels.tolist())) == list(range(10))


def test_upright_digit_fills_the_image() -> None:
    digits = train_digits.Originals.part(slice(0, 3)).images
    whole = torch.nn.functional.interpolate(digits[:, None], size=32, mode="bilinear", align_corners=False)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # at the border, samples outside are 0
    torch.testing.assert_close(placed(digits, 32)[inside], whole[inside], rtol=0, atol=TOLERANCES["images"])


def test_digit_is_turned_clockwise() -> None:
    digits = train_digits.Originals.part(slice(0, 3)).images
    turned = torch.rot90(placed(digits, 20), -1, (2, 3))
    torch.testing.assert_close(placed(digits, 20, angle=90), turned, rtol=0, atol=TOLERANCES["turned images"])


def test_digit_is_moved_and_slanted() -> None:
    digits = torch.zeros(1, 8, 8)
    digits[0, 3:5, 3:5] = 1
    y, x = centre(placed(digits, 16, shift=(0.5, -0.25)))
    assert (y, x) == pytest.approx((-0.25 * 8, 0.5 * 8), abs=0.05)  # of 8 pixels of room on a side
    digits = torch.zeros(1, 8, 8)
    digits[0, 0:2, 3:5] = 1  # three pixels of the digit above its middle, so 6 of the image, when 16 wide
    y, x = centre(placed(digits, 16, slant=0.2))
    assert (y, x) == pytest.approx((-6, 0.2 * 6), abs=0.1)


def test_views_are_those_of_the_seed() -> None:
    digits = train_digits.Originals.part(slice(0, 40)).images
    first, again, other = (train_digits.random_views(digits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    widths = [int((image[0] > 0.02).any(0).sum()) for image in first]
    assert min(widths) < 12
    assert max(widths) > 20


# --- networks -----------------------------------------------------------------------------------------------


def test_networks_start_as_one_function() -> None:
    models = train_digits.networks(3)
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = {name: model(images) for name, model in models.items()}
    for name in ("v1", "v2"):
        torch.testing.assert_close(outputs[name], outputs["conv2d"], rtol=0, atol=TOLERANCES["equal networks"])
    for name in ("conv2d-wide", "conv2d-dilated"):
        assert not torch.allclose(outputs[name], outputs["conv2d"], atol=0.01)
    kinds = [type(models[name][index][0]) for name in ("conv2d", "v1", "v2") for index in (2, 3)]
    plain = torch.nn.Conv2d
    assert kinds == [plain, plain, *[DeformConv2dPack] * 2, *[ModulatedDeformConv2dPack] * 2]


def test_offsets_follow_more_slowly() -> None:
    run = train_digits.Run("v2", 0, train_digits.networks(0)["v2"], epochs=1, steps=4)
    fast, slow = run.optimizer.param_groups
    slow_ones = {id(value) for key, value in run.model.named_parameters() if "conv_offset" in key}
    assert {id(value) for value in slow["params"]} == slow_ones
    assert len(slow_ones) == 4
    assert slow["max_lr"] == pytest.approx(0.1 * fast["max_lr"])


# --- the picture --------------------------------------------------------------------------------------------


def test_samples_of_a_plain_layer_are_its_taps() -> None:
    field = sampling_picture.Field(torch.randn(9, 2, 4, 5), torch.rand(9, 4, 5), stride=2).plain()
    points, share = field.samples(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert points[0].tolist() == [[2 + y, 4 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert points[1, 0].tolist() == [-1, -1]
    assert torch.equal(share, torch.ones(2, 9))


def test_samples_are_moved_by_the_nearest_offsets() -> None:
    field = sampling_picture.Field(torch.zeros(9, 2, 4, 5), torch.zeros(9, 4, 5), stride=1)
    field.offset[5, 0, 2, 3], field.offset[5, 1, 2, 3], field.mask[5, 2, 3] = 0.5, -2.0, 0.25
    (points,), (share,) = field.samples(torch.tensor([[2.3, 2.6]]))
    assert points[5].tolist() == pytest.approx([2.3 + 0 + 0.5, 2.6 + 1 - 2.0])
    assert points[4].tolist() == pytest.approx([2.3, 2.6])
    assert share.tolist() == [0.25 if tap == 5 else 0 for tap in range(9)]


def test_places_outside_sample_nothing() -> None:
    field = sampling_picture.Field(torch.zeros(9, 2, 4, 5), torch.ones(9, 4, 5), stride=1)
    _, share = field.samples(torch.tensor([[-0.6, 2.0], [3.6, 0.0], [1.0, 4.6], [3.4, 4.4]]))
    assert share.sum(1).tolist() == [0, 0, 0, 9]


def hand_made(offset: float) -> Any:
    """Return a DCNv2 network in which the last layer's fourth tap is moved down, and masked by 3/4."""
    model = train_digits.networks(0)["v2"]
    with torch.no_grad():
        model[3][0].conv_offset.bias[2 * 4] = offset
        model[3][0].conv_offset.bias[18 + 4] = math.log(3)
    return model


def test_fields_are_those_of_the_layers() -> None:
    model = hand_made(1.5)
    (first, last), _ = sampling_picture.fields_of(model, torch.rand(2, 1, 32, 32))
    assert (first.stride, last.stride) == (1, 2)
    assert (first.offset.shape, last.mask.shape) == ((9, 2, 16, 16), (9, 8, 8))
    assert not first.offset.any()
    assert torch.equal(first.mask, torch.full((9, 16, 16), 0.5))
    expected = torch.zeros(9, 2)
    expected[4, 0] = 1.5
    assert torch.equal(last.offset[:, :, 3, 6], expected)
    assert last.mask[:, 0, 7].tolist() == pytest.approx([0.75 if tap == 4 else 0.5 for tap in range(9)])


def test_lengths_of_offsets() -> None:
    first, last = sampling_picture.offset_lengths(hand_made(1.8), torch.rand(3, 1, 32, 32))
    assert first == {"mean": 0, "deviation": 0}
    assert last["mean"] == pytest.approx(0.2)  # 1.8 at one tap of nine
    assert last["deviation"] == pytest.approx(0, abs=1e-6)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run the command quickly, and return what it wrote."""
    folder = tmp_path_factory.mktemp("training")
    page = folder / "page.md"
    page.write_text("above\n<!-- training:begin (generated) -->\nold\n<!-- training:end -->\nbelow\n", encoding="utf-8")
    words = ["--quick", "--threads", "1", "--seeds", "7", "--output", str(folder / "found"), "--readme", str(page)]
    assert train_digits.main(words) == 0
    return folder, json.loads((folder / "found" / "results.json").read_text(encoding="utf-8"))


def test_what_is_written(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, results = quick
    assert results["settings"]["seeds"] == [7]
    assert results["settings"]["threads"] == 1
    assert "--quick" in results["command"]
    assert {"machine", "versions", "date"} <= set(results)
    runs = {run["network"]: run for run in results["runs"]}
    assert list(runs) == list(results["networks"]) == list(train_digits.KINDS)
    for name, entry in results["networks"].items():
        assert entry["accuracy_mean"] == runs[name]["accuracy"] == entry["accuracy_highest"]
        low, high = sorted(runs[name]["seconds_by_epoch"])
        assert entry["epoch_seconds_median"] == pytest.approx((low + high) / 2, abs=1e-4)
        assert entry["step_ms_median"] == pytest.approx(entry["epoch_seconds_median"] / 2 * 1e3)
    assert results["networks"]["conv2d"]["relative_time_median"] == 1
    picture = (folder / "found" / "sampling.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 400_000


def test_table_is_put_into_the_page(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, results = quick
    text = train_digits.table(results)
    assert text == (folder / "found" / "table.md").read_text(encoding="utf-8")
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert page == f"above\n<!-- training:begin (generated) -->\n{text}<!-- training:end -->\nbelow\n"
    accuracy = results["networks"]["v2"]["accuracy_mean"]
    assert f"| DCNv2 | 162,336 | {100 * accuracy:.1f} % |" in text
    with pytest.raises(SystemExit, match="training:begin"):
        train_digits.put_between_marks(folder / "found" / "table.md", text)


def test_a_seed_repeats_itself(quick: tuple[Path, dict[str, Any]]) -> None:
    _, results = quick
    training, judged = (
        train_digits.Originals(part.images[:128], part.labels[:128])
        for part in map(train_digits.Originals.part, (train_digits.TRAINING, train_digits.TEST))
    )
    again = train_digits.train(7, 2, training, judged, lambda line: None)
    for run, before in zip(again, results["runs"], strict=True):
        assert [round(loss, 5) for loss in run.losses] == before["loss_by_epoch"]
        assert run.accuracy == before["accuracy"]
        assert run.losses[1] < run.losses[0]


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--threads", "0"], ["--seeds", "1", "1"]], ids=" ".join)
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_digits.main(words)
    assert f"{words[0]} must" in capsys.readouterr().err


def test_other_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVMDCN_NUM_THREADS", "3")
    with pytest.raises(SystemExit, match="TVMDCN_NUM_THREADS says 3"):
        train_digits.main(["--quick", "--threads", "1"])


# --- what is shown ------------------------------------------------------------------------------------------


def test_readme_shows_the_results() -> None:
    results = json.loads((ROOT / "docs/training/results.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- training:begin")[2].partition("-->\n")[2].partition("<!-- training:end -->")[0]
    assert shown == train_digits.table(results)
    assert "(docs/training/sampling.png)" in readme
    assert (ROOT / "docs/training/sampling.png").stat().st_size < 400_000
