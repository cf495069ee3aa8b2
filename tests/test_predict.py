"""Predictions from every type of image, and pretrained models."""

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from networks import CLASSES, random_checkpoint
from PIL import Image
from report_fixtures import evaluation
from requires_kernels import skip_without_kernel
from torch import nn
from torch.nn.utils import parameters_to_vector, prune

import resnet56
from resnet56 import Recipe, ResNet, build, cli
from resnet56.data.dataset import Dataset, Split
from resnet56.data.images import to_model_input, to_upright_rgb
from resnet56.errors import ImageError, RunError, UsageError
from resnet56.files import write_json
from resnet56.inference import predict_logits
from resnet56.predict import Predictor
from resnet56.runs import pretrained, sources
from resnet56.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "random_checkpoint")
    directory.save(random_checkpoint())
    return directory


@pytest.fixture(scope="module")
def predictor(run: RunDirectory) -> Predictor:
    return resnet56.load(str(run.path), device="cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels).resize((600, 400))


def test_logits_match_evaluation(predictor: Predictor) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    logits, maps, _ = predictor.run(images.numpy())
    expected = predict_logits(predictor.model, images, predictor.mean, predictor.std)
    assert np.allclose(logits, expected.numpy(), atol=1e-5)
    assert logits.std() > 0.1
    assert maps.shape == (5, 3, 8, 8)


def test_the_mean_of_a_map_plus_the_bias_is_the_logit(predictor: Predictor) -> None:
    """Pooling and the linear layer commute (Zhou et al. 2016, section 2)."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    logits, maps, _ = predictor.run(images)
    bias = predictor.model.fc.bias.detach().numpy()
    assert np.allclose(maps.mean(axis=(2, 3)) + bias, logits, atol=1e-5)
    assert maps.std(axis=(2, 3)).min() > 0.01


def test_the_map_equals_grad_cam(predictor: Predictor) -> None:
    """With global average pooling, the map equals Grad-CAM at the last stage."""
    x = torch.rand(1, 3, 32, 32)
    features = predictor.model.features(x).detach().requires_grad_()
    logits = predictor.model.fc(features.mean(dim=(2, 3)))
    weights = torch.autograd.grad(logits[0, 1], features)[0].sum(dim=(2, 3), keepdim=True)
    grad_cam = (weights * features).sum(dim=1)
    with torch.no_grad():
        _, maps, _ = predictor.model.explain(x)
    assert torch.allclose(maps[:, 1], grad_cam, atol=1e-5)


def test_features_are_the_pooled_input_of_the_classifier(predictor: Predictor) -> None:
    images = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8)  # more than one batch
    features = predictor.features(images)
    mean, std = (torch.tensor(values)[:, None, None] for values in (predictor.mean, predictor.std))
    with torch.inference_mode():
        expected = predictor.model.features((images / 255 - mean) / std).mean(dim=(2, 3))
        logits = predictor.model.fc(torch.from_numpy(features))
    assert (features.dtype, features.shape) == (np.float32, (70, 64))
    assert np.allclose(features, expected.numpy(), atol=1e-5)
    assert np.allclose(predictor.logits(images), logits.numpy(), atol=1e-5)
    assert predictor.logits([]).shape == (0, 3)
    assert predictor.features([]).shape == (0, 64)


def test_evaluate_returns_the_metrics_of_the_function(predictor: Predictor, tiny: Dataset) -> None:
    split = tiny.test
    metrics = predictor.evaluate(split)
    assert metrics == resnet56.evaluate(
        predictor.model, split, predictor.classes, predictor.mean, predictor.std
    )
    assert metrics["n"] == 24


def test_evaluate_restores_the_mode_of_the_model(tiny: Dataset) -> None:
    model = build("resnet8", classes=3)
    arguments = tiny.test, tiny.classes, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    resnet56.evaluate(model, *arguments)
    assert model.training
    nn.init.constant_(model.fc.bias, float("inf"))
    with pytest.raises(RunError, match="not finite"):
        resnet56.evaluate(model, *arguments)
    assert model.training


def test_unsuitable_splits_are_not_evaluated(predictor: Predictor, tiny: Dataset) -> None:
    with pytest.raises(UsageError, match="without images"):
        predictor.evaluate(tiny.test.select(slice(0)))
    for offset, found in ((1, "from 1 to 3"), (-1, "from -1 to 1")):
        with pytest.raises(UsageError, match=f"the labels range {found}, but the model has 3"):
            predictor.evaluate(Split(tiny.test.images, tiny.test.labels + offset))
    with pytest.raises(UsageError, match="the model has 3 outputs, but 2 class names"):
        resnet56.evaluate(predictor.model, tiny.test, ("a", "b"), predictor.mean, predictor.std)


def test_all_image_types_give_the_same_prediction(
    predictor: Predictor, image: Image.Image, tmp_path: Path
) -> None:
    file = tmp_path / "image.png"
    image.save(file)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    images = [
        file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()),
        image, array, array.astype(np.float32) / 255,
        tensor, tensor.double() / 255, to_model_input(to_upright_rgb(image)).transpose(1, 2, 0),
    ]  # fmt: skip
    predictions = predictor.predict(images)
    assert len({prediction.label for prediction in predictions}) == 1
    for prediction in predictions:
        assert prediction.probability == pytest.approx(predictions[0].probability, abs=1e-6)
    [single] = predictor.predict(image)
    assert single.probabilities == pytest.approx(predictions[0].probabilities)


def test_probabilities_are_sorted_and_limited_to_top(
    predictor: Predictor, image: Image.Image
) -> None:
    [full] = predictor.predict(image, maps=True)
    assert set(full.probabilities) == set(CLASSES)
    assert sum(full.probabilities.values()) == pytest.approx(1)
    assert list(full.probabilities.values()) == sorted(full.probabilities.values(), reverse=True)
    assert next(iter(full.probabilities.items())) == (full.label, full.probability)
    logits, maps, features = predictor.run(to_model_input(to_upright_rgb(image))[None])
    assert full.map is not None
    assert np.allclose(full.map, maps[0, CLASSES.index(full.label)])
    assert (full.logits == logits[0]).all()
    assert (full.features == features[0]).all()
    [limited] = predictor.predict(image, top=2)
    assert list(limited.probabilities) == list(full.probabilities)[:2]
    assert limited.map is None
    with pytest.raises(UsageError, match="top must be at least 1"):
        predictor.predict(image, top=0)


def test_a_batch_matches_single_images(predictor: Predictor) -> None:
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    from_tensor = predictor.predict(batch)
    from_array = predictor.predict(batch.permute(0, 2, 3, 1).numpy())
    from_images = [predictor.predict(tensor)[0] for tensor in batch]
    for predictions in zip(from_tensor, from_array, from_images, strict=True):
        assert len({round(prediction.probability, 5) for prediction in predictions}) == 1


def test_a_stream_reads_one_batch_at_a_time_and_continues_after_errors(
    predictor: Predictor, image: Image.Image
) -> None:
    consumed = 0

    def images() -> Iterator[Image.Image | bytes]:
        nonlocal consumed
        for index in range(300):
            consumed += 1
            yield b"broken" if index % 100 == 7 else image

    predictions = predictor.stream(images())
    next(predictions)
    assert consumed < 100
    rest = list(predictions)
    assert consumed == 300
    assert [i for i, result in enumerate(rest, 1) if isinstance(result, ImageError)] == [
        7,
        107,
        207,
    ]
    with pytest.raises(ImageError):
        predictor.predict([image, b"broken"])
    assert predictor.predict([]) == []


def test_a_memory_error_affects_only_its_image(predictor: Predictor, image: Image.Image) -> None:
    class Greedy(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise MemoryError

    failed, valid = predictor.stream([Greedy(), image])
    assert "not enough memory" in str(failed)
    assert not isinstance(valid, ImageError)


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"shape \(3, 32, 32\) is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "is not an image"),
        (np.full((4, 4), np.nan), "from 0 to 1"),
        (np.full((4, 4), 255.0), "from 0 to 1"),
        (np.zeros((4, 4), np.int64), "not int64"),
        (torch.zeros(5, 4, 4), "is not an image"),
        ([object()], "cannot read an image from an object of type object"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot read the image"),
    ],
    ids=range(9),
)
def test_an_invalid_image_is_rejected(predictor: Predictor, invalid: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        predictor.predict(invalid)  # type: ignore[arg-type]


def test_a_run_is_named_after_its_directory(predictor: Predictor) -> None:
    assert predictor.name == "random_checkpoint"
    assert predictor.classes == CLASSES
    assert not predictor.model.training
    with pytest.raises(UsageError, match=r"\(N, 3, 32, 32\)"):
        predictor.run(np.zeros((3, 32, 32), np.uint8))


def test_a_missing_model_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is neither a run nor a pretrained model"):
        resnet56.load("nothing")
    with pytest.raises(RunError, match=r"cannot read .*none\.onnx: No such file"):
        resnet56.load(tmp_path / "none.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="has no checkpoint"):
        resnet56.load(tmp_path / "empty")


# The PyTorch module


def prune_half(model: ResNet) -> None:
    """Prune half of all weights of the convolutions, and check the parameters as one vector."""
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_to_vector(model.parameters()).shape == (count,)
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    for layer in layers:
        prune.remove(*layer)
    weights = parameters_to_vector([layer.weight for layer, _ in layers])
    assert int((weights == 0).sum()) == round(0.5 * weights.numel())


@pytest.mark.parametrize("execution", ["eager", "fused", "native"])
def test_trained_networks_can_be_pruned(
    execution: Literal["eager", "fused", "native"], tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    """Training uses the channels-last format, but `load` returns contiguous parameters."""
    recipe = replace(small, epochs=1, precision="bf16", execution=execution)
    try:
        resnet56.train(recipe, tiny, tmp_path / "run", device="cpu")
    except UsageError as error:
        skip_without_kernel(error)
    prune_half(resnet56.load(tmp_path / "run", device="cpu").model)


def test_pretrained_and_imported_networks_can_be_pruned(tmp_path: Path) -> None:
    prune_half(resnet56.load("resnet56", device="cpu").model)
    strided = {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in build("resnet20-b").state_dict().items()
    }
    torch.save(strided, tmp_path / "other.pt")
    imported = tmp_path / "imported"
    assert cli.main(["import", str(tmp_path / "other.pt"), "--out", str(imported)]) == 0
    prune_half(resnet56.load(imported, device="cpu").model)


# Pretrained models


@pytest.fixture
def weights_directory(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a directory with one pretrained model, `small`."""
    pretrained.save(run, "small", tmp_path / "weights")
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_pretrained_model_matches_its_run(
    weights_directory: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights_directory)
    assert pretrained.names() == ["small"]
    assert pretrained.card("small")["config"]["classes"] == list(CLASSES)
    small = resnet56.load("small", device="cpu")
    assert (small.name, small.config) == ("small", predictor.config)
    assert {p.dtype for p in small.model.parameters()} == {torch.float32}
    images = np.random.default_rng(1).integers(0, 256, (64, 3, 32, 32), np.uint8)
    logits, expected = small.run(images)[0], predictor.run(images)[0]
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()
    size = (weights_directory / "small.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(p.numel() for p in small.model.parameters()) + 10_000


def test_a_card_has_the_recipe_and_the_evaluation(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = RunDirectory(tmp_path / "run")
    evaluated.save(run.load())
    write_json(evaluated.recipe_file, {"lr": 0.1})
    evaluated.write_evaluation(evaluation(CLASSES, accuracy=0.5))
    pretrained.save(evaluated, "it", tmp_path / "weights")
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    card = pretrained.card("it")
    assert card["recipe"] == {"lr": 0.1}
    assert card["evaluation"]["test"]["accuracy"] == 0.5


def test_the_error_about_an_unknown_name_lists_the_available_names(weights_directory: Path) -> None:
    with pytest.raises(RunError, match=r"nor a pretrained model \(available: small\)"):
        resnet56.load("large")
    with pytest.raises(RunError, match="available: small"):
        pretrained.load("../small")


def test_a_run_takes_precedence_over_a_pretrained_model(
    weights_directory: Path, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert sources.open_model("small").pretrained  # a directory without a run is ignored
    RunDirectory(tmp_path / "small").save(run.load())
    assert sources.open_model("small").run


def test_a_damaged_pretrained_file_raises_an_error(weights_directory: Path) -> None:
    (weights_directory / "small.safetensors").write_bytes(b"junk")
    with pytest.raises(RunError, match="is damaged"):
        pretrained.load("small")


def test_unsuitable_weights_cannot_become_pretrained(run: RunDirectory, tmp_path: Path) -> None:
    checkpoint = run.load()
    large = {"fc.bias": torch.full((3,), 1e6), "conv1.weight": torch.zeros(2_000_000)}
    for keys, message in (
        ({"fc.bias"}, "half precision"),
        ({"conv1.weight"}, "too large for a pretrained"),
    ):
        other = RunDirectory(tmp_path / message)
        model = dict(checkpoint.model) | {key: large[key] for key in keys}
        other.save(dataclasses.replace(checkpoint, model=model))
        with pytest.raises(RunError, match=message):
            pretrained.save(other, "odd", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
