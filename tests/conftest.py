"""Shared fixtures: a tiny data set that a small network can learn."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # At run time, functions import these, because the process that distributes the tests does not
    # need PyTorch.
    from resnet56.data.dataset import Dataset, Split
    from resnet56.recipe import Recipe

# Use one thread, which is faster for tiny networks on a busy machine. As a result, the processes
# that tests start also round in the same way. PyTorch reads this variable on import.
os.environ["OMP_NUM_THREADS"] = "1"
# A few tests use two threads. Waiting threads sleep, because other tests use the same cores.
os.environ["OMP_WAIT_POLICY"] = "passive"

# Return before the disk has written the data, which can take seconds after tests with large files.
# Like fsync, fstat rejects invalid descriptors.
os.fsync = os.fstat

# A shell starts background jobs with SIGINT ignored. The tests of Ctrl-C need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The slowest test files. They start first, so that the other workers do not wait for them at the
# end.
SLOW = (
    "test_readme.py",
    "test_examples.py",
    "test_tutorials.py",
    "test_training.py",
    "test_fused.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def striped(count: int, seed: int) -> "Split":
    """Return noisy images of three classes: horizontal stripes, vertical stripes and no stripes."""
    import torch

    from resnet56.data.dataset import Split

    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    wave = (torch.arange(32) % 8 < 4).float() * 120
    patterns = torch.stack(
        (wave[:, None].expand(32, 32), wave.expand(32, 32), torch.full((32, 32), 60.0))
    )
    noise = torch.randint(0, 100, (count, 3, 32, 32), generator=generator)
    return Split((patterns[labels][:, None] + noise).to(torch.uint8), labels)


@pytest.fixture(scope="session")
def tiny() -> "Dataset":
    """Return 50 training and 24 test images. 50 is not a multiple of the batch size, 8."""
    from resnet56.data.dataset import Dataset

    return Dataset(
        name="tiny",
        classes=("rows", "columns", "plain"),
        train=striped(50, seed=1),
        test=striped(24, seed=2),
        allow_flip=True,
        source="the tests' stripes",
        origin="nowhere",
    )


@pytest.fixture(scope="session")
def small() -> "Recipe":
    """Return a recipe for `tiny`: the smallest network and three epochs of six steps."""
    from resnet56.recipe import Recipe

    return Recipe(
        arch="resnet8", epochs=3, batch_size=8, lr=0.05, schedule="cosine", precision="fp32"
    )


@pytest.fixture
def blank_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts of reports empty, because drawing them takes most of the time of a report.

    For tests that check neither charts nor their files.
    """
    from resnet56.report.plots import Chart

    monkeypatch.setattr(Chart, "svg", lambda chart: f'<svg id="{chart.name}"></svg>')
    monkeypatch.setattr(Chart, "png", lambda chart: b"")


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the speed measurement and all corruptions but one, which take most of the time."""
    batch = {"ms_per_image": 1.0, "images_per_second": 1000.0}
    speed = {"batch_1": batch, "batch_256": batch}
    monkeypatch.setattr("resnet56.evaluation.inference_speed", lambda *_: speed)
    monkeypatch.setattr("resnet56.evaluation.CORRUPTIONS", ("contrast",))


@pytest.fixture(scope="session")
def cifar10() -> "Dataset":
    """Return the published CIFAR-10 in $CIFAR10_DIR. Tests fail if its checksums differ."""
    from resnet56.data.readers import load_directory

    directory = os.environ.get("CIFAR10_DIR")
    if not directory:
        pytest.skip("CIFAR10_DIR is not set; it names a directory with cifar-10-batches-bin")
    dataset = load_directory(Path(directory))
    if dataset.remarks:
        pytest.fail(f"CIFAR10_DIR: {'; '.join(dataset.remarks)}")
    return dataset
