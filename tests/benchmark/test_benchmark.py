"""The benchmark: fair turns, true ratios, and a stock loop that is what it says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnet56.benchmark import benchmark
from resnet56.benchmark.baseline import Pictures, StockLoop
from resnet56.benchmark.benchmark import Course
from resnet56.benchmark.interleave import Contestant, compared, take_turns
from resnet56.benchmark.roofline import floor
from resnet56.cli import main
from resnet56.data.dataset import Dataset, channel_statistics
from resnet56.errors import UsageError
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import train

CPU = torch.device("cpu")


def test_contestants_take_turns_until_each_has_had_all_rounds() -> None:
    calls: list[str] = []
    pair = [Contestant(n, lambda n=n: calls.append(n), CPU) for n in ("a", "b")]
    take_turns(pair, rounds=3, seconds=1e-9)
    assert [len(contestant.seconds) for contestant in pair] == [3, 3]
    measured = calls[-3 * 2 * 2 :]  # at least two repetitions a turn
    assert measured == ["a", "a", "b", "b"] * 3


def test_a_ratio_is_the_median_of_the_rounds_ratios_to_the_faster_stock() -> None:
    slow, fast, ours = (Contestant(n, int, CPU) for n in ("stock, 2", "stock, 0", "ours"))
    slow.seconds, fast.seconds, ours.seconds = [9, 9, 9], [4, 8, 6], [1, 4, 3]
    rows = {row["name"]: row for row in compared([slow, fast, ours], images=12, stock="stock")}
    assert rows["stock, 0"]["baseline"]
    assert not rows["stock, 2"]["baseline"]
    mine = rows["ours"]
    assert (mine["ratio"], mine["ratio_least"], mine["ratio_most"]) == (2, 2, 4)
    assert mine["images_per_second"] == 4


def test_the_floor_of_arithmetic_is_three_forward_passes() -> None:
    """127 million multiply-accumulates an image, as the paper's network has them."""
    limits = {"gflops": 1.0, "gigabytes_per_second": 1.0}
    least = floor("resnet56", 1, "fp32", limits)
    assert least["arithmetic_ms"] == pytest.approx(3 * 2 * 127, rel=0.02)


def test_the_floor_of_memory_counts_every_map_five_times() -> None:
    """resnet8: conv1 and stage 1 have 3 maps of 16x32x32, stages 2 and 3 two, half each."""
    limits = {"gflops": 1.0, "gigabytes_per_second": 1.0}
    maps = 3 * 16 * 32 * 32 + 2 * 32 * 16 * 16 + 2 * 64 * 8 * 8
    bytes_moved = 5 * 2 * maps * 4  # of each convolution and each norm, in fp32
    least = floor("resnet8", 1, "fp32", limits)
    assert least["memory_ms"] == pytest.approx(bytes_moved / 1e6)
    assert floor("resnet8", 1, "bf16", limits)["memory_ms"] == least["memory_ms"] / 2


def test_a_stock_picture_is_a_crop_of_the_padded_image_mirrored_or_not(tiny: Dataset) -> None:
    pictures = Pictures(tiny.train, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    padded = np.pad(tiny.train.images[7].numpy(), ((0, 0), (4, 4), (4, 4)))
    crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    allowed = {crop.tobytes() for crop in crops} | {crop[:, :, ::-1].tobytes() for crop in crops}
    seen = set()
    for _ in range(40):
        tensor, label = pictures[7]
        assert label == tiny.train.labels[7]
        seen.add(tensor.round().to(torch.uint8).numpy().tobytes())
    assert seen <= allowed
    assert len(seen) > 10


def test_the_stock_loop_learns(tiny: Dataset) -> None:
    torch.manual_seed(0)
    pictures = Pictures(tiny.train, *channel_statistics(tiny.train.images))
    loop = StockLoop("resnet8", pictures, 16, CPU, 0)
    losses = []
    for _ in range(24):
        loop.loss_sum = 0.0
        loop.step()
        losses.append(loop.loss_sum / 16)
    loop.close()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def ten_classes(tiny: Dataset) -> Dataset:
    """The contestants' networks have ten outputs."""
    return dataclasses.replace(tiny, classes=tuple("0123456789"))


def test_our_contestant_is_the_step_that_training_makes(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Trainer] = []

    def recorded(*arguments: Any) -> Trainer:
        made.append(Trainer(*arguments))
        return made[-1]

    monkeypatch.setattr(benchmark, "Trainer", recorded)
    course = Course(tiny.train, *channel_statistics(tiny.train.images), CPU, "fp32")
    once = course.our_step("resnet8", 16, "eager")
    for _ in range(3):  # an epoch
        once()
    recipe = Recipe(arch="resnet8", batch_size=16, epochs=1, execution="eager", precision="fp32")
    train(recipe, ten_classes(tiny), tmp_path / "run", device="cpu")
    trained = RunDirectory(tmp_path / "run").load().model
    mine = made[0].model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in trained.items())


def test_peak_memory_is_that_of_steps(tiny: Dataset) -> None:
    """Of 48 images in place of 2: more by the maps that backward needs, which can be counted."""
    course = Course(tiny.train, *channel_statistics(tiny.train.images), CPU, "fp32")
    few, many = (benchmark.peaks(course, "resnet8", batch, ["eager"]) for batch in (2, 48))
    # The outputs of convolutions and batch norms: 16, 32 and 64 maps, 3 and 2 and 2 times.
    values = 2 * (3 * 16 * 32**2 + 2 * 32 * 16**2 + 2 * 64 * 8**2)
    for way in ("stock", "eager"):
        assert many[way] - few[way] > 4 * 46 * values / 1e6


def test_networks_have_as_many_outputs_as_the_images_classes(tiny: Dataset) -> None:
    last = dataclasses.replace(tiny.train, labels=tiny.train.labels + 10)  # 13 classes
    mean, std = channel_statistics(last.images)
    course = Course(last, mean, std, CPU, "fp32", classes=13)
    course.our_step("resnet8", 16, "eager")()
    loop = StockLoop("resnet8", course.pictures(), 16, CPU, workers=0, classes=13)
    loop.step()
    names = tuple(map(str, range(13)))
    dataset = dataclasses.replace(tiny, classes=names, train=last)
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "machine_limits", lambda *_: made.append(1))
        patch.setattr(benchmark, "bench_training", lambda course, *_: made.append(course.classes))
        patch.setattr(benchmark, "peaks", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            benchmark.bench(lambda: dataset, archs=["resnet8"], batches=[8], device="cpu")
    assert made == [1, 13]


def test_a_batch_larger_than_the_set_is_refused(tiny: Dataset) -> None:
    with pytest.raises(UsageError, match="a batch of 64 is more than the 50 training images"):
        benchmark.bench(lambda: tiny, archs=["resnet8"], batches=[8, 64], device="cpu")


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        benchmark, "peaks", lambda *_: dict.fromkeys(("stock", "eager", "fused"), 1.0)
    )
    monkeypatch.setattr(benchmark, "STARTS", 1)
    file = tmp_path / "bench.json"
    arguments = ["--arch", "resnet8", "--batch", "4", "--rounds", "1", "--seconds", "0.01"]
    assert main(["bench", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "training resnet8, batch 4" in printed
    assert "inference resnet8, batch 256" in printed
    found = json.loads(file.read_text())
    (contest,) = found["training"]
    names = [row["name"] for row in contest["rows"]]
    assert names[:2] == ["stock, 0 workers", "stock, 2 workers"]
    assert "ours, eager" in names
    assert sum(row["baseline"] for row in contest["rows"]) == 1
    assert found["limits"]["gflops"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch", "32,x"], "--batch wants whole numbers above 0"),
        (["--batch", "0"], "--batch wants whole numbers above 0"),
        (["--seconds", "nan"], "--rounds must"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: there is no such"),
        (["--json", "."], "--json . is a folder; choose a file"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--arch", "resnet57"], "depth 57 is not of the form 6n + 2"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("resnet56: " + line)
