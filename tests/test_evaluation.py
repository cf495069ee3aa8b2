"""Evaluation of a run: results and files."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet56 import evaluation, samples
from resnet56.data.augment import Augmentation
from resnet56.data.corruptions import CORRUPTIONS, corrupt, evenly_spaced
from resnet56.data.dataset import Dataset, Split
from resnet56.evaluation import (
    compare,
    evaluate_run,
    evaluated_model,
    inference_speed,
    measure_extras,
    measure_robustness,
)
from resnet56.files import write_json
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.training import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny: Dataset, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Train a network that still makes mistakes."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(dataclasses.replace(small, epochs=1, lr=0.005), tiny, out, device="cpu")
    return RunDirectory(out)


def test_evaluating_again_gives_the_same_metrics(run: RunDirectory, tiny: Dataset) -> None:
    trained = json.loads(run.evaluation_file.read_text())
    again = evaluate_run(run, tiny, device=CPU)
    assert json.loads(json.dumps(again)) == trained
    assert json.loads(run.evaluation_file.read_text()) == trained


def test_predictions_match_the_metrics(run: RunDirectory, tiny: Dataset) -> None:
    metrics = json.loads(run.evaluation_file.read_text())["test"]
    saved = np.load(run.predictions_file, allow_pickle=False)
    assert saved["indices"].tolist() == list(range(24))
    assert saved["labels"].tolist() == tiny.test.labels.tolist()
    predicted = saved["logits"].argmax(axis=1)
    assert (predicted == saved["labels"]).mean() == metrics["accuracy"]
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (saved["labels"], predicted), 1)
    assert matrix.tolist() == metrics["confusion_matrix"]


def test_stored_mistakes_cover_all_cells_of_the_confusion_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "MOST_CONFIDENT", 2)
    # Nine images of class 0 are predicted as 1 with high confidence. With lower confidence, three
    # images of class 1 are predicted as 2, and one image of class 2 as 0.
    cells = [(0, 1)] * 9 + [(1, 2)] * 3 + [(2, 0)]
    labels = torch.tensor([true for true, _ in cells])
    logits = np.zeros((13, 3))
    for i, (_, predicted) in enumerate(cells):
        logits[i, predicted] = 10 - i / 2
    split = Split(torch.zeros(13, 3, 32, 32, dtype=torch.uint8), labels)
    assert samples.select_mistakes(logits, split)["mistake_index"].tolist() == list(range(13))
    kept = samples.select_mistakes(logits, split, limit=6)
    # First the two most confident mistakes, then the first of each other cell, then the second.
    assert kept["mistake_index"].tolist() == [0, 1, 2, 9, 10, 12]


def test_samples_are_confident_mistakes_and_crops(run: RunDirectory, tiny: Dataset) -> None:
    saved = np.load(run.samples_file, allow_pickle=False)
    logits = np.load(run.predictions_file)["logits"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = tiny.test.labels.numpy()
    wrong = [i for i in range(24) if logits[i].argmax() != labels[i]]
    assert wrong, "the run should still make mistakes"
    expected = sorted(wrong, key=lambda i: -probabilities[i].max())
    assert saved["mistake_index"].tolist() == expected
    assert saved["mistake_confidence"].tolist() == pytest.approx(
        probabilities[expected].max(axis=1).tolist()
    )
    assert (saved["mistakes"] == tiny.test.images[expected].numpy()).all()

    assert saved["original_labels"].tolist() == [0, 1, 2]
    assert (saved["originals"] == tiny.train.images[:3].numpy()).all()
    assert saved["augmented"].shape == (3, 5, 3, 32, 32)
    for original, variants in zip(saved["originals"], saved["augmented"], strict=True):
        padded = np.pad(original, ((0, 0), (4, 4), (4, 4)))
        crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        for variant in variants:
            assert any((variant == c).all() or (variant == c[..., ::-1]).all() for c in crops)


def test_samples_include_cutout_and_trivial_augment(
    run: RunDirectory, tiny: Dataset, tmp_path: Path
) -> None:
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    augmentation = Augmentation(flip=False, padding=0, cutout=12)
    evaluate_run(copy, tiny, augmentation=augmentation, device=CPU)
    saved = np.load(copy.samples_file)
    mean = np.round(255 * np.array(run.load().config.mean))[:, None]
    for original, variants in zip(saved["originals"], saved["augmented"], strict=True):
        for variant in variants:
            covered = (variant != original).any(axis=0)
            assert 36 <= covered.sum() <= 144  # at least a quarter of the square is inside
            assert (variant[:, covered] == mean).all()
    augmentation = Augmentation(flip=False, padding=0, trivial_augment=True)
    evaluate_run(copy, tiny, augmentation=augmentation, device=CPU)
    saved = np.load(copy.samples_file)
    changed = (saved["augmented"] != saved["originals"][:, None]).any(axis=(2, 3, 4))
    assert changed.mean() > 0.5


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "ricap"])
def test_samples_have_the_same_fraction_of_mixed_images_as_training(
    run: RunDirectory, tiny: Dataset, tmp_path: Path, mix: str
) -> None:
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    augmentation = Augmentation(flip=False, padding=0, mix=mix, mix_probability=0.3)
    evaluate_run(copy, tiny, augmentation=augmentation, device=CPU)
    saved = np.load(copy.samples_file)
    same = (saved["augmented"] == saved["originals"][:, None]).all(axis=(2, 3, 4))
    assert same[:, 2:].all()  # two of five variants are mixed
    assert not same[:, :2].all()


def test_robustness_is_the_accuracy_on_corrupted_images(run: RunDirectory, tiny: Dataset) -> None:
    evaluated = evaluated_model(run.load(), CPU)
    result = measure_robustness(evaluated, tiny.test, 10)
    assert result["images"] == 10
    assert set(result["corruptions"]) == set(CORRUPTIONS)
    index = evenly_spaced(24, 10)
    noisy = corrupt(tiny.test.images[index], "shot noise", 3)
    correct = (evaluated.logits(noisy).argmax(1) == tiny.test.labels[index]).sum().item()
    assert result["corruptions"]["shot noise"][2] == pytest.approx(correct / 10)
    accuracies = [value for values in result["corruptions"].values() for value in values]
    assert result["mean_accuracy"] == pytest.approx(sum(accuracies) / 50)


def test_speed_is_the_median_time_divided_by_the_batch_size(
    run: RunDirectory, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The median batch takes 12 s. The 24 images are repeated to fill a batch of 256.
    durations = itertools.cycle([6.0, 12.0, 6.0, 12.0, 60.0, 12.0])
    readings = itertools.chain.from_iterable((0.0, seconds) for seconds in durations)
    evaluated = evaluated_model(run.load(), CPU)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(readings))
    speed = inference_speed(evaluated, tiny.test.images)
    assert speed["batch_1"] == {"ms_per_image": 12_000.0, "images_per_second": 1 / 12}
    assert speed["batch_256"] == {
        "ms_per_image": 12_000.0 / 256, "images_per_second": 256 / 12,
    }  # fmt: skip


def test_evaluating_again_keeps_speed_and_robustness_of_the_same_weights(
    run: RunDirectory, tiny: Dataset
) -> None:
    first = evaluate_run(run, tiny, device=CPU)
    evaluated = evaluated_model(run.load(), CPU)
    measure_extras(first, evaluated, tiny.test, robustness=5)
    robustness = first["robustness"]
    measure_extras(first, evaluated, tiny.test, robustness=0)
    assert first["robustness"] is robustness
    run.write_evaluation(first)
    again = evaluate_run(run, tiny, device=CPU)
    assert (again["robustness"], again["speed"]) == (first["robustness"], first["speed"])
    assert "robustness" not in evaluate_run(run, tiny, device=CPU, precision="bf16")
    write_json(run.evaluation_file, first | {"step": first["step"] - 1})
    assert "robustness" not in evaluate_run(run, tiny, device=CPU)
    run.evaluation_file.write_text("damaged")
    assert json.loads(json.dumps(evaluate_run(run, tiny, device=CPU)["test"])) == first["test"]


def test_a_model_compared_with_itself_has_no_changes(run: RunDirectory, tiny: Dataset) -> None:
    evaluated = evaluated_model(run.load(), CPU)
    result = compare(evaluated, evaluated, ("cpu fp32", "cpu fp32"), tiny.test)
    assert (result["changed"], result["largest_difference"]) == (0, 0.0)
    assert result["verdict"].endswith(
        "so the choice between the two does not explain any accuracy gap."
    )


def test_a_comparison_counts_the_changed_predictions(run: RunDirectory, tiny: Dataset) -> None:
    original, modified = evaluated_model(run.load(), CPU), evaluated_model(run.load(), CPU)
    with torch.no_grad():
        modified.model.fc.bias[1] += 100.0  # all predictions become the second class
    result = compare(original, modified, ("a", "b"), tiny.test)
    before = original.logits(tiny.test.images).argmax(1)
    assert result["changed"] == (before != 1).sum().item() > 0
    assert result["accuracy_b"] == pytest.approx(8 / 24)
    assert result["largest_difference"] == pytest.approx(100, rel=1e-3)
    assert result["median_difference"] == pytest.approx(0, abs=1e-5)


class Fixed:
    """A classifier that returns these logits for all images."""

    def __init__(self, config: ModelConfig, outputs: torch.Tensor) -> None:
        self.config, self.outputs = config, outputs

    def logits(self, images: torch.Tensor, batch: int = 1, advance: object = None) -> torch.Tensor:
        return self.outputs


def test_a_comparison_states_how_much_of_a_gap_it_explains(
    run: RunDirectory, tiny: Dataset
) -> None:
    config = run.load().config
    correct = torch.nn.functional.one_hot(tiny.test.labels, 3).float()
    wrong = correct.clone()
    wrong[:6] = correct[:6].roll(1, dims=1)
    a, b = (Fixed(config, outputs) for outputs in (correct, wrong))
    assert compare(a, b, ("a", "b"), tiny.test)["verdict"] == (
        "a and b predict different classes for 6 of 24 images (25.00 %). Accuracy changes by "
        "-25.00 points from a to b, so the choice between the two explains at most 25.00 points "
        "of an accuracy gap."
    )
    # Both predictions are wrong, so they differ but do not change the accuracy.
    first, second = (Fixed(config, correct.roll(shift, dims=1)) for shift in (1, 2))
    assert compare(first, second, ("a", "b"), tiny.test)["verdict"].endswith(
        "Accuracy does not change from a to b, so the choice between the two does not explain any "
        "accuracy gap."
    )


def test_bf16_logits_are_close_to_fp32(run: RunDirectory, tiny: Dataset) -> None:
    a, b = (evaluated_model(run.load(), CPU, precision) for precision in ("fp32", "bf16"))
    result = compare(a, b, ("cpu fp32", "cpu bf16"), tiny.test)
    assert 0 < result["largest_difference"] < 0.5
