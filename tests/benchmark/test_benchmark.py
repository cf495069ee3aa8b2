"""The benchmark interleaves its measurements, and its baseline trains correctly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import context

from resnet56.benchmark import benchmark, roofline
from resnet56.benchmark.baseline import AugmentedImages, BaselineLoop
from resnet56.benchmark.benchmark import BenchmarkSetup
from resnet56.benchmark.interleave import Candidate, interleave, summarize
from resnet56.benchmark.roofline import roofline_times
from resnet56.cli import main
from resnet56.data.dataset import Dataset, channel_statistics
from resnet56.errors import UsageError
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import train

CPU = torch.device("cpu")


def test_measurements_are_interleaved() -> None:
    calls: list[str] = []
    pair = [Candidate(n, lambda n=n: calls.append(n), CPU) for n in ("a", "b")]
    interleave(pair, rounds=3, seconds=1e-9)
    assert [len(candidate.seconds) for candidate in pair] == [3, 3]
    measured = calls[-3 * 2 * 2 :]  # at least two calls per round
    assert measured == ["a", "a", "b", "b"] * 3


def test_a_ratio_is_the_median_of_ratios_to_the_faster_baseline() -> None:
    slow, fast, new = (Candidate(n, int, CPU) for n in ("baseline, 2", "baseline, 0", "eager"))
    slow.seconds, fast.seconds, new.seconds = [9, 9, 9], [4, 8, 6], [1, 4, 3]
    rows = {
        row["name"]: row for row in summarize([slow, fast, new], images=12, baseline="baseline")
    }
    assert rows["baseline, 0"]["baseline"]
    assert not rows["baseline, 2"]["baseline"]
    row = rows["eager"]
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2, 2, 4)
    assert row["images_per_second"] == 4


def test_the_compute_time_is_three_forward_passes() -> None:
    """The network of the paper has 127 million multiply-accumulates per image."""
    limits = {"gflops": 1.0, "gigabytes_per_second": 1.0}
    bound = roofline_times("resnet56", 1, "fp32", limits)
    assert bound["compute_ms"] == pytest.approx(3 * 2 * 127, rel=0.02)


def test_the_memory_time_counts_each_activation_five_times() -> None:
    """resnet8 has 3 convolutions with 16x32x32 outputs, 2 with 32x16x16, and 2 with 64x8x8."""
    limits = {"gflops": 1.0, "gigabytes_per_second": 1.0}
    maps = 3 * 16 * 32 * 32 + 2 * 32 * 16 * 16 + 2 * 64 * 8 * 8
    bytes_moved = 5 * 2 * maps * 4  # outputs of convolutions and norms, in fp32
    bound = roofline_times("resnet8", 1, "fp32", limits)
    assert bound["memory_ms"] == pytest.approx(bytes_moved / 1e6)
    assert roofline_times("resnet8", 1, "bf16", limits)["memory_ms"] == bound["memory_ms"] / 2


def test_a_baseline_image_is_a_crop_of_the_padded_image_with_or_without_flip(tiny: Dataset) -> None:
    images = AugmentedImages(tiny.train, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    padded = np.pad(tiny.train.images[7].numpy(), ((0, 0), (4, 4), (4, 4)))
    crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    allowed = {crop.tobytes() for crop in crops} | {crop[:, :, ::-1].tobytes() for crop in crops}
    seen = set()
    for _ in range(40):
        tensor, label = images[7]
        assert label == tiny.train.labels[7]
        seen.add(tensor.round().to(torch.uint8).numpy().tobytes())
    assert seen <= allowed
    assert len(seen) > 10


def test_the_baseline_loop_learns(tiny: Dataset) -> None:
    torch.manual_seed(0)
    images = AugmentedImages(tiny.train, *channel_statistics(tiny.train.images))
    loop = BaselineLoop("resnet8", images, 16, CPU, 0)
    losses = []
    for _ in range(24):
        loop.loss_sum = 0.0
        loop.step()
        losses.append(loop.loss_sum / 16)
    loop.close()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def ten_classes(tiny: Dataset) -> Dataset:
    """Use ten class names, because the networks have ten outputs."""
    return dataclasses.replace(tiny, classes=tuple("0123456789"))


def test_the_measured_step_is_the_training_step(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Trainer] = []

    def recorded(*arguments: Any, **options: Any) -> Trainer:
        made.append(Trainer(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(benchmark, "Trainer", recorded)
    setup = BenchmarkSetup(tiny.train, *channel_statistics(tiny.train.images), CPU, "fp32")
    run_once = setup.package_step("resnet8", 16, "eager")
    for _ in range(3):  # one epoch
        run_once()
    recipe = Recipe(arch="resnet8", batch_size=16, epochs=1, execution="eager", precision="fp32")
    train(recipe, ten_classes(tiny), tmp_path / "run", device="cpu")
    trained = RunDirectory(tmp_path / "run").load().model
    benchmarked = made[0].model.state_dict()
    assert all(torch.equal(benchmarked[name], tensor) for name, tensor in trained.items())


def test_peak_memory_grows_with_the_batch(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 48 instead of 2 images, memory grows by at least the size of the saved activations."""
    monkeypatch.setattr(benchmark, "get_context", lambda _: context())
    setup = BenchmarkSetup(tiny.train, *channel_statistics(tiny.train.images), CPU, "fp32")
    few, many = (benchmark.peak_memory(setup, "resnet8", batch, ["eager"]) for batch in (2, 48))
    # Outputs of convolutions and norms: 3 with 16 channels, 2 with 32 and 2 with 64.
    values = 2 * (3 * 16 * 32**2 + 2 * 32 * 16**2 + 2 * 64 * 8**2)
    for mode in ("baseline", "eager"):
        assert many[mode] - few[mode] > 4 * 46 * values / 1e6


def test_networks_have_one_output_per_class(tiny: Dataset) -> None:
    last = dataclasses.replace(tiny.train, labels=tiny.train.labels + 10)  # 13 classes
    mean, std = channel_statistics(last.images)
    setup = BenchmarkSetup(last, mean, std, CPU, "fp32", classes=13)
    setup.package_step("resnet8", 16, "eager")()
    loop = BaselineLoop("resnet8", setup.augmented_images(), 16, CPU, workers=0, classes=13)
    loop.step()
    names = tuple(map(str, range(13)))
    dataset = dataclasses.replace(tiny, classes=names, train=last)
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "machine_limits", lambda *_: made.append(1))
        patch.setattr(benchmark, "bench_training", lambda setup, *_: made.append(setup.classes))
        patch.setattr(benchmark, "peak_memory", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            benchmark.bench(lambda: dataset, archs=["resnet8"], batches=[8], device="cpu")
    assert made == [1, 13]


def test_a_batch_larger_than_the_training_set_is_rejected(tiny: Dataset) -> None:
    with pytest.raises(UsageError, match="batch size 64 exceeds the 50 training images"):
        benchmark.bench(lambda: tiny, archs=["resnet8"], batches=[8, 64], device="cpu")


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        benchmark, "peak_memory", lambda *_: dict.fromkeys(("baseline", "eager", "fused"), 1.0)
    )
    monkeypatch.setattr(benchmark, "START_REPEATS", 1)
    monkeypatch.setattr(roofline, "CPU_MATRIX_SIZE", 128)
    monkeypatch.setattr(roofline, "COPIED_ELEMENTS", 2**16)
    file = tmp_path / "bench.json"
    arguments = ["--arch", "resnet8", "--batch", "4", "--rounds", "1", "--seconds", "0.01"]
    assert main(["bench", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "training resnet8, batch 4" in printed
    assert "inference resnet8, batch 256" in printed
    result = json.loads(file.read_text())
    (comparison,) = result["training"]
    names = [row["name"] for row in comparison["rows"]]
    assert names[:2] == ["baseline, 0 workers", "baseline, 2 workers"]
    assert "eager" in names
    assert sum(row["baseline"] for row in comparison["rows"]) == 1
    assert result["limits"]["gflops"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch", "32,x"], "--batch: expected an integer"),
        (["--batch", "0"], "--batch requires batch sizes from 1 to 1,000,000"),
        (["--seconds", "nan"], "--seconds: expected a finite number"),
        (
            ["--json", "no/such/directory/x.json"],
            "--json no/such/directory/x.json: the directory does not exist; create it first",
        ),
        (["--json", "."], "--json . is a directory; choose a file"),
        (["--rounds", "0"], "--rounds must be from 1"),
        (["--arch", "resnet57"], "depth 57 is not of the form 6n + 2"),
    ],
)
def test_invalid_arguments_cause_a_one_line_error(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("resnet56: " + line)
