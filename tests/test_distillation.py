"""The distillation loss, ensembles of teachers, and runs with distillation."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet56.data.dataset import Dataset
from resnet56.distillation import Teachers, distillation_loss, fingerprint
from resnet56.errors import RunError, UsageError
from resnet56.inference import restore
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import Interrupted, train

CPU = torch.device("cpu")
STUDENT = ModelConfig("resnet8", ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def teacher(seed: int, **constants: Any) -> Checkpoint:
    weights = build("resnet8", classes=3, seed=seed).state_dict()
    return Checkpoint(dataclasses.replace(STUDENT, **constants), weights)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_teacher_equal_to_the_student_has_zero_loss(temperature: float) -> None:
    model = restore(teacher(0), CPU)
    logits = model(images()).detach().requires_grad_()
    ensemble = Teachers({"it": teacher(0)}, STUDENT, CPU, "fp32")
    probabilities = ensemble.probabilities(images(), temperature)
    loss = distillation_loss(logits, probabilities, temperature)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-5  # type: ignore[union-attr]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_and_gradient_match_the_formula(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    probabilities = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    loss = distillation_loss(logits, probabilities, temperature)
    loss.backward()
    student_probabilities = torch.exp(logits.detach() / temperature)
    student_probabilities = student_probabilities / student_probabilities.sum(dim=1, keepdim=True)
    expected = (
        temperature**2
        * (probabilities * (probabilities.log() - student_probabilities.log())).sum(dim=1).mean()
    )
    assert float(loss.detach()) == pytest.approx(float(expected))
    torch.testing.assert_close(
        logits.grad, temperature * (student_probabilities - probabilities) / 5
    )


def test_an_ensemble_averages_teachers_with_their_own_normalization() -> None:
    other = teacher(1, mean=(0.1, 0.2, 0.6), std=(0.5, 0.1, 0.2))
    ensemble = Teachers({"one": teacher(0), "other": other}, STUDENT, CPU, "fp32")
    view = images()
    expected = []
    for checkpoint in (teacher(0), other):
        net = checkpoint.config
        pixels = view * torch.tensor(STUDENT.std)[:, None, None]
        pixels = pixels + torch.tensor(STUDENT.mean)[:, None, None]
        own = (pixels - torch.tensor(net.mean)[:, None, None]) / torch.tensor(net.std)[
            :, None, None
        ]
        with torch.no_grad():
            expected.append((restore(checkpoint, CPU)(own) / 2).softmax(dim=1))
    torch.testing.assert_close(ensemble.probabilities(view, 2.0), sum(expected) / 2)
    for member in (0, 1):
        torch.testing.assert_close(ensemble.probabilities(view, 2.0, member), expected[member])
    drawn = [ensemble.random_member(3, step) for step in range(200)]
    assert 70 < sum(drawn) < 130
    assert drawn == [ensemble.random_member(3, step) for step in range(200)]


def test_a_teacher_with_different_classes_raises_an_error() -> None:
    with pytest.raises(UsageError, match="the classes of teacher it"):
        Teachers({"it": teacher(0, classes=("a", "b", "d"))}, STUDENT, CPU, "fp32")


def test_the_weight_interpolates_between_label_and_teacher_loss() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for weight in (None, 1.0, 0.3):
        model = build("resnet8", classes=3, seed=5)
        ensemble = Teachers({"it": teacher(0)}, STUDENT, CPU, "fp32")
        plan = Recipe(arch="resnet8", teacher=("it",), teacher_weight=weight or 1.0)
        trainer = Trainer(model, model, plan, "fp32", ensemble if weight else None)
        trainer.step(images(), labels, 0.01, 0)
        losses.append(float(trainer.sums[0]))
    assert losses[2] == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], rel=1e-5)


def test_a_distilled_run_records_its_teachers_and_resumes_bitwise_identically(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    names = []
    for seed in (1, 2):
        out = tmp_path / f"teacher{seed}"
        train(dataclasses.replace(small, epochs=1, seed=seed), tiny, out, device="cpu")
        names.append(str(out))
    recipe = dataclasses.replace(
        small, epochs=2, teacher=tuple(names), teacher_random=True, teacher_temperature=2.0,
        mix="cutmix", mix_probability=0.5,
    )  # fmt: skip
    train(recipe, tiny, tmp_path / "straight", device="cpu")
    take = Trainer.step

    def take_and_stop(self: Trainer, *arguments: Any) -> None:
        take(self, *arguments)
        if arguments[-1] == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", take_and_stop)
        with pytest.raises(Interrupted):
            train(recipe, tiny, tmp_path / "run", device="cpu")
    shutil.copytree(tmp_path / "run", tmp_path / "stale")
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True)
    one, other = (RunDirectory(tmp_path / name).load() for name in ("straight", "run"))
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["teachers"]
    assert recorded == one.metadata["teachers"]
    assert [entry["sha256"] for entry in recorded] == [
        fingerprint(RunDirectory(Path(name)).load()) for name in names
    ]
    shutil.rmtree(names[1])
    shutil.copytree(names[0], names[1])
    with pytest.raises(RunError, match="the weights of its teachers"):
        train(recipe, tiny, tmp_path / "stale", device="cpu", resume=True)
