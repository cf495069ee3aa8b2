"""Parts that the user passes to `train`: model, optimizer, loss, augmentation and callbacks."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_same_run, run_until, without_times
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56 import load
from resnet56.cli import main
from resnet56.custom import Custom, difference
from resnet56.data.dataset import Dataset
from resnet56.errors import Error, RunError, TrainingError, UsageError
from resnet56.evaluation import evaluate_run
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.report.comparison import groups, ranked
from resnet56.report.read import read_run
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import train


class Small(nn.Module):
    """A network with dropout, whose random numbers must resume exactly."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def generalized(power: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The generalized cross-entropy loss (Zhang & Sabuncu 2018)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        own = logits.softmax(1).gather(1, targets[:, None])
        return ((1 - own**power) / power).mean()

    return loss


def noisy(images: Tensor) -> Tensor:
    noise = torch.randint(-8, 9, images.shape)
    return (images + noise).clamp(0, 255).to(torch.uint8)


class Averaging(torch.optim.SGD):
    """SGD whose steps shrink. Its state contains numbers for the group and for a parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            state = self.state[group["params"][0]]
            state["total"] = state.get("total", 0.0) + 0.5
            group["lr"] /= group["count"] + state["total"]
        return super().step(closure)


rmsprop = functools.partial(torch.optim.RMSprop, momentum=0.9)
# An optimizer whose state contains tensors with shapes other than those of the parameters.
adafactor = functools.partial(torch.optim.Adafactor, weight_decay=0.1)


@pytest.fixture
def recipe(small: Recipe) -> Recipe:
    return dataclasses.replace(small, epochs=2, lr=0.01)


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ({"model": Small, "optimizer": rmsprop}, {}),
        ({"model": Small, "loss": generalized(0.7)}, {"ema_decay": (0.5, 0.9999), "val_size": 11}),
        ({"model": Small, "optimizer": adafactor, "augment": noisy}, {}),
        ({"optimizer": Averaging, "model": Small}, {}),
    ],
    ids=["model-optimizer", "model-loss-ema", "optimizer-augment", "numbers"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, parts: dict[str, Any], fields: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(recipe, **fields)
    state = torch.get_rng_state()
    train(recipe, tiny, tmp_path / "uninterrupted", device="cpu", **parts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # the state of the caller does not matter
    run_until(tmp_path / "run", 8, recipe, tiny, **parts)
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True, **parts)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


def test_parts_like_the_built_in_ones_result_in_the_same_run(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(
        recipe, padding=0, flip=False, execution="eager", ema_decay=(0.9,), val_size=11
    )
    train(recipe, tiny, tmp_path / "built-in", device="cpu")
    sgd = functools.partial(
        torch.optim.SGD, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    train(
        recipe, tiny, tmp_path / "custom", device="cpu",
        model=lambda classes: build("resnet8", classes=classes),
        optimizer=sgd, loss=F.cross_entropy, augment=lambda images: images,
    )  # fmt: skip
    first, second = (
        without_times(RunDirectory(tmp_path / name).read_metrics())
        for name in ("built-in", "custom")
    )
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


class Tied(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.mean((2, 3)))))  # type: ignore[no-any-return]


def test_a_model_can_use_the_same_weights_twice(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    model = Tied(3)
    train(recipe, tiny, tmp_path / "run", device="cpu", model=model)
    saved = RunDirectory(tmp_path / "run").load().model
    assert torch.equal(saved["first.weight"], saved["second.weight"])
    assert torch.equal(saved["first.weight"], model.first.weight)


def test_the_schedule_scales_the_learning_rate_of_each_group(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    original_step = Trainer.step

    def record(self: Trainer, *arguments: Any) -> None:
        original_step(self, *arguments)
        rates.append([group["lr"] / arguments[2] for group in self.optimizer.param_groups])

    def two_groups(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 10 * lr}]
        return torch.optim.SGD(groups, lr=lr)

    monkeypatch.setattr(Trainer, "step", record)
    train(recipe, tiny, tmp_path / "run", device="cpu", optimizer=two_groups)
    assert len(rates) == 12
    assert all(pair == pytest.approx([1, 10]) for pair in rates)


def test_the_parts_are_recorded(tiny: Dataset, recipe: Recipe, tmp_path: Path) -> None:
    model = Small(3)
    train(recipe, tiny, tmp_path / "run", device="cpu", model=model, optimizer=rmsprop)
    run = RunDirectory(tmp_path / "run")
    checkpoint = run.load()
    custom = checkpoint.metadata["custom"]
    assert json.loads(run.environment_file.read_text())["custom"] == custom
    assert set(custom) == {"model", "optimizer"}
    assert checkpoint.config.arch == custom["model"]["name"] == f"{__name__}.Small"
    assert custom["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert custom["optimizer"]["name"] == "torch.optim.rmsprop.RMSprop"
    environment = run.read_environment()
    assert environment is not None
    assert environment["execution"] == "eager"
    assert "does not support custom models" in environment["execution_reason"]


def other_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {},
            r"trained with the custom loss .*generalized.*; pass it in Python as loss=, or choose",
        ),
        (
            {"loss": other_loss},
            r"with the custom loss .*generalized.*, not .*other_loss; pass the same loss=, or",
        ),
        (
            {"loss": generalized(0.5)},
            "whose source code or settings have changed; restore them, or choose",
        ),
        (
            {"loss": generalized(0.7), "augment": noisy},
            r"built-in augmentation; omit augment=.*noisy, or",
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_parts(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    train(recipe, tiny, out, device="cpu", loss=generalized(0.7))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=message) as caught:
        train(recipe, tiny, out, device="cpu", resume=True, **parts)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_identity_depends_on_the_source_code_and_the_settings() -> None:
    def sha256(part: Any) -> str:
        return Custom(optimizer=part).identities()["optimizer"]["sha256"]

    class Loss:
        def __init__(self, alpha: float) -> None:
            self.alpha, self.buffer = alpha, torch.rand(2)

        def __call__(self, logits: Tensor) -> Tensor:
            return self.alpha * logits

        def method(self, logits: Tensor) -> Tensor:
            return logits

    def repeated(start: int) -> Any:
        def count(number: int = start) -> int:
            return count(number - 1) if number else 0

        return count

    adamw = torch.optim.AdamW
    same: list[Callable[[], Any]] = [
        lambda: Loss(0.1), lambda: Loss(0.1).method, lambda: repeated(2), lambda: Small(3),
        lambda: lambda x: x + 1, lambda: functools.partial(adamw, betas=(0.9, 0.95)),
    ]  # fmt: skip
    for make in same:
        assert sha256(make()) == sha256(make())
    different = [
        Loss(0.1), Loss(0.2), Loss(0.1).method, Loss(0.2).method, repeated(2), repeated(3),
        Small(3), Small(4), Small, adamw, functools.partial(adamw, betas=(0.9, 0.95)),
        functools.partial(adamw, betas=(0.9, 0.96)), lambda x: x + 1, lambda x: x + 2,
        Loss, generalized(0.1), generalized(0.2), eval("lambda x: x + 3"), other_loss, max, len,
    ]  # fmt: skip
    assert len({sha256(part) for part in different}) == len(different)
    identities = Custom(loss=other_loss).identities()
    assert difference(identities, identities) is None


class Extra(Small):
    def get_extra_state(self) -> Any:
        return {"version": 1}


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ValueError("closure is required\nin every step")


class Odd(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["history"] = object()


def broken(*_: Any) -> Any:
    raise KeyError("nothing here")


BEFORE_THE_RUN = [
    ({"model": 5}, UsageError, "model must be callable, not 5"),
    ({"model": broken}, TrainingError, r"the model .*broken raised KeyError: 'nothing here'"),
    ({"model": lambda classes: [classes]}, UsageError, "returned an object of type list; expected"),
    ({"model": lambda classes: nn.Identity()}, UsageError, "has no parameters"),
    ({"model": Small(4)}, UsageError, r"Small for 2 images is a float32 tensor of shape \(2, 4\)"),
    ({"model": Extra(3)}, UsageError, "values that are not tensors, such as _extra_state"),
    ({"model": nn.Linear(3, 3)}, TrainingError, r"Linear raised RuntimeError: mat1 and mat2"),
    ({"optimizer": lambda p, lr: None}, UsageError, "returned None; expected a torch.optim.Opt"),
    ({"optimizer": broken}, TrainingError, "the optimizer .*broken raised TypeError"),
    (
        {"optimizer": lambda p, lr: torch.optim.SGD(nn.Linear(2, 2).parameters())},
        UsageError,
        "contains parameters that were not passed to this function",
    ),
    ({"loss": lambda a, b: 0.5}, TrainingError, "returned an object of type float; expected a sc"),
    (
        {"loss": functools.partial(F.cross_entropy, reduction="none")},
        TrainingError,
        r"cross_entropy returned a float32 tensor of shape \(8,\); .*, such as its mean",
    ),
    ({"loss": lambda a, b: torch.tensor(1.0)}, TrainingError, "does not depend on the logits"),
    ({"loss": broken}, TrainingError, "the loss .*broken raised KeyError"),
    ({"loss": nn.Bilinear(2, 2, 2)}, UsageError, "has parameters, which are not trained"),
    ({"augment": lambda x: x / 255}, TrainingError, "returned a float32 tensor .* a uint8 tensor"),
    ({"augment": lambda x: x[:1]}, TrainingError, r"shape \(1, 3, 32, 32\); expected .* \(8, 3"),
    ({"augment": broken}, TrainingError, "the augmentation .*broken raised KeyError"),
    ({"callbacks": ["print"]}, UsageError, "'print' must be callable or have an on_epoch method"),
]


@pytest.mark.parametrize(("parts", "error", "message"), BEFORE_THE_RUN)
def test_an_invalid_part_raises_an_error_and_leaves_no_files(
    tiny: Dataset, recipe: Recipe, tmp_path: Path,
    parts: dict[str, Any], error: type[Error], message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        train(recipe, tiny, tmp_path / "run", device="cpu", **parts)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Failing, "the optimizer .*Failing raised ValueError: closure is required in every step"),
        (Odd, "the optimizer Odd cannot be saved: .* 'history' of its state"),
    ],
)
def test_an_optimizer_that_fails_stops_the_run_at_the_first_step(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, optimizer: Any, message: str
) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        train(recipe, tiny, tmp_path / "run", device="cpu", optimizer=optimizer)
    assert "\n" not in str(caught.value)
    assert RunDirectory(tmp_path / "run").load(training=True).progress.step == 0


def test_conflicting_settings_raise_errors(tiny: Dataset, recipe: Recipe, tmp_path: Path) -> None:
    taught = dataclasses.replace(recipe, teacher=("resnet56",))
    with pytest.raises(UsageError, match="the loss has no effect.*set teacher_weight below 1"):
        train(taught, tiny, tmp_path / "run", device="cpu", loss=F.cross_entropy)
    fused = dataclasses.replace(recipe, execution="fused")
    with pytest.raises(UsageError, match="fused execution is not available: it does not support"):
        train(fused, tiny, tmp_path / "run", device="cpu", model=Small)
    assert not (tmp_path / "run").exists()


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_epoch(self, row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) == 1:
            raise ValueError("no connection")


def test_a_callback_that_raises_keeps_the_checkpoint(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    recorder, rows, out = Recorder(), [], tmp_path / "run"  # type: ignore[var-annotated]
    message = (
        r"the callback .*Recorder raised ValueError after epoch 1: no connection; the checkpoint "
        r"is saved in .*run; continue with resume=True"
    )
    parts: dict[str, Any] = {"model": Small, "callbacks": [rows.append, recorder]}
    with pytest.raises(TrainingError, match=message) as caught:
        train(recipe, tiny, out, device="cpu", **parts)
    assert isinstance(caught.value.__cause__, ValueError)
    train(recipe, tiny, out, device="cpu", resume=True, **parts)
    assert [row["epoch"] for row in recorder.rows] == [row["epoch"] for row in rows] == [1, 2]
    train(recipe, tiny, tmp_path / "uninterrupted", device="cpu", model=Small)
    assert_same_run(out, tmp_path / "uninterrupted")


def test_a_run_with_a_custom_model_is_loaded_with_that_model(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    metrics = train(recipe, tiny, out, device="cpu", model=Small)
    predictor = load(out, "cpu", model=Small)
    assert predictor.evaluate(tiny.test)["accuracy"] == metrics["test"]["accuracy"]
    assert isinstance(predictor.model, Small)
    assert set(predictor.predict(tiny.test.images[0])[0].probabilities) == set(tiny.classes)
    with pytest.raises(UsageError, match="maps require an explain method"):
        predictor.predict(tiny.test.images[0], maps=True)
    with pytest.raises(UsageError, match="features require an explain method"):
        predictor.features(tiny.test.images[0])
    with pytest.raises(RunError, match=r"do not match the model: 44 missing tensors"):
        load(out, "cpu", model=lambda classes: build("resnet8", classes=classes))
    with pytest.raises(
        UsageError, match="contains the built-in network resnet56; omit the argument model"
    ):
        load("resnet56", "cpu", model=Small)
    needed = "resnet56.load(RUN, model="
    with pytest.raises(RunError) as caught:
        load(out, "cpu")
    assert needed in str(caught.value)
    commands = (["evaluate", str(out)], ["predict", "photo.jpg", "--run", str(out)])
    for command in commands:
        assert main(command) == 1
        error = capsys.readouterr().err
        assert needed in error
        assert error.count("\n") == 1


@pytest.mark.usefixtures("blank_charts")
def test_the_report_describes_the_parts(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All formats, and a comparison with a run without custom parts."""
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(recipe, epochs=1)
    parts: dict[str, Any] = {"model": Small, "optimizer": rmsprop, "loss": generalized(0.7)}
    train(recipe, tiny, "custom", device="cpu", augment=noisy, **parts)
    train(recipe, tiny, "built-in", device="cpu")
    for command in (["report", "custom"], ["report", "custom", "--format", "slides"]):
        assert main(command) == 0
    assert main(["report", "custom", "built-in", "--format", "md", "--out", "both.md"]) == 0
    assert main(["report", "custom", "--format", "md", "--out", "custom.md"]) == 0
    page, slides = Path("custom/report.html").read_text(), Path("custom/slides.html").read_text()
    markdown, both = (
        Path(name).read_text().replace("\\_", "_") for name in ("custom.md", "both.md")
    )
    count = sum(parameter.numel() for parameter in Small(3).parameters())
    for text in (page, markdown):
        assert f"the custom model {__name__}.Small with {count} parameters." in text
        assert "the custom optimizer torch.optim.rmsprop.RMSprop (batch size 8)" in text
        assert f"The loss is the custom function {__name__}.generalized" in text
        assert f"The custom function {__name__}.noisy augments training images." in text
        assert "The training loss is the custom loss." in text
        assert "the mean and standard deviation of the training images" in text
        assert "weight decay" not in text
        assert "cropped" not in text
        assert "multiply-accumulates" not in text
    assert f"A custom model with {count} parameters" in slides
    assert "Optimizer: torch.optim.rmsprop.RMSprop with batch size 8 and a custom loss." in slides
    assert f"augmented with {__name__}.noisy" in slides
    row = next(line for line in both.splitlines() if line.startswith("| custom loss |"))
    assert "generalized" in row
    assert "\N{EN DASH}" in row


def test_runs_with_different_parts_are_not_seeds_of_one_recipe(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    losses: list[Any] = [None, generalized(0.7), generalized(0.7), generalized(0.6)]
    for seed, loss in enumerate(losses):
        seeded = dataclasses.replace(recipe, seed=seed, epochs=1)
        train(seeded, tiny, tmp_path / str(seed), device="cpu", model=Small, loss=loss)
    entries = ranked([read_run(tmp_path / str(seed)) for seed in range(4)])
    grouped = [[entry.facts.name for entry in group.entries] for group in groups(entries)]
    assert sorted(grouped) == [["0"], ["1", "2"], ["3"]]


def test_evaluating_again_keeps_the_augmented_samples(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    train(recipe, tiny, run.path, device="cpu", augment=lambda images: 255 - images)
    before = run.read_samples()
    assert before is not None
    assert (before["augmented"] == 255 - before["originals"][:, None]).all()
    evaluate_run(run, tiny, device=torch.device("cpu"))
    after = run.read_samples()
    assert after is not None
    assert (after["augmented"] == before["augmented"]).all()


def test_weights_of_a_custom_model_start_a_longer_run(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    train(recipe, tiny, tmp_path / "first", device="cpu", model=Small)
    longer = dataclasses.replace(
        recipe, epochs=1, weights=str(tmp_path / "first"), freeze=("body",)
    )
    train(longer, tiny, tmp_path / "second", device="cpu", model=Small)
    first, second = (RunDirectory(tmp_path / name).load().model for name in ("first", "second"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(
        UsageError, match=r"belong to .*Small, but the run trains resnet8; pass model="
    ):
        train(dataclasses.replace(longer, freeze=()), tiny, tmp_path / "third", device="cpu")
