"""What is measured of a run, and what of it is written down."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet56 import evaluation
from resnet56.data.augment import Augmentation
from resnet56.data.corruptions import CORRUPTIONS, corrupt, evenly_spaced
from resnet56.data.dataset import Dataset
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
from resnet56.runs.directory import RunDirectory
from resnet56.training import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny: Dataset, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that still makes mistakes."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(dataclasses.replace(small, epochs=1, lr=0.005), tiny, out, device="cpu")
    return RunDirectory(out)


def test_evaluating_again_gives_the_same_figures(run: RunDirectory, tiny: Dataset) -> None:
    trained = json.loads(run.evaluation_file.read_text())
    again = evaluate_run(run, tiny, device=CPU)
    assert json.loads(json.dumps(again)) == trained
    assert json.loads(run.evaluation_file.read_text()) == trained


def test_predictions_are_the_ones_the_figures_count(run: RunDirectory, tiny: Dataset) -> None:
    metrics = json.loads(run.evaluation_file.read_text())["test"]
    kept = np.load(run.predictions_file, allow_pickle=False)
    assert kept["indices"].tolist() == list(range(24))
    assert kept["labels"].tolist() == tiny.test.labels.tolist()
    predicted = kept["logits"].argmax(axis=1)
    assert (predicted == kept["labels"]).mean() == metrics["accuracy"]
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (kept["labels"], predicted), 1)
    assert matrix.tolist() == metrics["confusion_matrix"]


def test_samples_show_the_surest_mistakes_and_real_crops(run: RunDirectory, tiny: Dataset) -> None:
    kept = np.load(run.samples_file, allow_pickle=False)
    logits = np.load(run.predictions_file)["logits"].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = tiny.test.labels.numpy()
    wrong = [i for i in range(24) if logits[i].argmax() != labels[i]]
    assert wrong, "the run should still make mistakes"
    surest = sorted(wrong, key=lambda i: -shares[i].max())
    assert kept["mistake_index"].tolist() == surest
    assert kept["mistake_confidence"].tolist() == pytest.approx(shares[surest].max(axis=1).tolist())
    assert (kept["mistakes"] == tiny.test.images[surest].numpy()).all()

    assert kept["original_labels"].tolist() == [0, 1, 2]
    assert (kept["originals"] == tiny.train.images[:3].numpy()).all()
    assert kept["augmented"].shape == (3, 5, 3, 32, 32)
    for original, variants in zip(kept["originals"], kept["augmented"], strict=True):
        padded = np.pad(original, ((0, 0), (4, 4), (4, 4)))
        crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        for variant in variants:
            assert any((variant == c).all() or (variant == c[..., ::-1]).all() for c in crops)


def test_samples_show_cutout_and_trivial_augment_too(
    run: RunDirectory, tiny: Dataset, tmp_path: Path
) -> None:
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    erased = Augmentation(flip=False, padding=0, cutout=12)
    evaluate_run(copy, tiny, augmentation=erased, device=CPU)
    kept = np.load(copy.samples_file)
    mean = np.round(255 * np.array(run.load().config.mean))[:, None]
    for original, variants in zip(kept["originals"], kept["augmented"], strict=True):
        for variant in variants:
            covered = (variant != original).any(axis=0)
            assert 36 <= covered.sum() <= 144  # a quarter of the square lies inside at least
            assert (variant[:, covered] == mean).all()
    trivial = Augmentation(flip=False, padding=0, trivial_augment=True)
    evaluate_run(copy, tiny, augmentation=trivial, device=CPU)
    kept = np.load(copy.samples_file)
    changed = (kept["augmented"] != kept["originals"][:, None]).any(axis=(2, 3, 4))
    assert changed.mean() > 0.5


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "ricap"])
def test_samples_show_mixed_images_as_often_as_the_training_made_them(
    run: RunDirectory, tiny: Dataset, tmp_path: Path, mix: str
) -> None:
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    still = Augmentation(flip=False, padding=0, mix=mix, mix_probability=0.3)
    evaluate_run(copy, tiny, augmentation=still, device=CPU)
    kept = np.load(copy.samples_file)
    same = (kept["augmented"] == kept["originals"][:, None]).all(axis=(2, 3, 4))
    assert same[:, 2:].all()  # two of five versions are mixed
    assert not same[:, :2].all()


def test_robustness_is_the_accuracy_on_corrupted_images(run: RunDirectory, tiny: Dataset) -> None:
    evaluated = evaluated_model(run.load(), CPU)
    found = measure_robustness(evaluated, tiny.test, 10)
    assert found["images"] == 10
    assert set(found["corruptions"]) == set(CORRUPTIONS)
    index = evenly_spaced(24, 10)
    noisy = corrupt(tiny.test.images[index], "shot noise", 3)
    hits = (evaluated.logits(noisy).argmax(1) == tiny.test.labels[index]).sum().item()
    assert found["corruptions"]["shot noise"][2] == pytest.approx(hits / 10)
    every = [value for values in found["corruptions"].values() for value in values]
    assert found["mean_accuracy"] == pytest.approx(sum(every) / 50)


def test_speed_is_the_median_time_over_the_images_of_a_batch(
    run: RunDirectory, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every other batch takes 6 s, one 60, the rest 12; the 24 images are repeated to make 256.
    durations = itertools.cycle([6.0, 12.0, 6.0, 12.0, 60.0, 12.0])
    readings = itertools.chain.from_iterable((0.0, seconds) for seconds in durations)
    evaluated = evaluated_model(run.load(), CPU)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(readings))
    speed = inference_speed(evaluated, tiny.test.images)
    assert speed["batch_1"] == {"ms_per_image": 12_000.0, "images_per_second": 1 / 12}
    assert speed["batch_256"] == {
        "ms_per_image": 12_000.0 / 256, "images_per_second": 256 / 12,
    }  # fmt: skip


def test_what_was_measured_of_the_same_weights_stays(run: RunDirectory, tiny: Dataset) -> None:
    evaluate_run(run, tiny, device=CPU)
    measure_extras(run, tiny, device=CPU, robustness=5)
    first = json.loads(run.evaluation_file.read_text())
    assert measure_extras(run, tiny, device=CPU)["robustness"] == first["robustness"]
    first = json.loads(run.evaluation_file.read_text())
    again = evaluate_run(run, tiny, device=CPU)
    assert (again["robustness"], again["speed"]) == (first["robustness"], first["speed"])
    assert "robustness" not in evaluate_run(run, tiny, device=CPU, precision="bf16")
    write_json(run.evaluation_file, first | {"step": first["step"] - 1})
    assert "robustness" not in evaluate_run(run, tiny, device=CPU)
    run.evaluation_file.write_text("damaged")
    assert json.loads(json.dumps(evaluate_run(run, tiny, device=CPU)["test"])) == first["test"]


def test_a_network_compared_with_itself_changes_nothing(run: RunDirectory, tiny: Dataset) -> None:
    evaluated = evaluated_model(run.load(), CPU)
    found = compare(evaluated, evaluated, ("cpu fp32", "cpu fp32"), tiny.test)
    assert (found["changed"], found["largest_difference"]) == (0, 0.0)
    assert "explains none" in found["verdict"]


def test_a_changed_network_is_counted_image_by_image(run: RunDirectory, tiny: Dataset) -> None:
    one, other = evaluated_model(run.load(), CPU), evaluated_model(run.load(), CPU)
    with torch.no_grad():
        other.model.fc.bias[1] += 100.0  # every image becomes the second class
    found = compare(one, other, ("a", "b"), tiny.test)
    before = one.logits(tiny.test.images).argmax(1)
    assert found["changed"] == (before != 1).sum().item() > 0
    assert found["accuracy_b"] == pytest.approx(8 / 24)
    assert found["largest_difference"] == pytest.approx(100, rel=1e-3)
    assert found["median_difference"] == pytest.approx(0, abs=1e-5)
    points = 100 * (found["accuracy_b"] - found["accuracy_a"])
    assert f"{points:+.2f} points" in found["verdict"]


def test_bf16_logits_are_near_those_of_fp32(run: RunDirectory, tiny: Dataset) -> None:
    a, b = (evaluated_model(run.load(), CPU, precision) for precision in ("fp32", "bf16"))
    found = compare(a, b, ("cpu fp32", "cpu bf16"), tiny.test)
    assert 0 < found["largest_difference"] < 0.5
