"""One way from pictures to answers, whatever the picture comes as."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CLASSES, lively
from PIL import Image
from report_fixtures import evaluation

import resnet56
from resnet56.data.images import prepare
from resnet56.errors import ImageError, RunError, UsageError
from resnet56.evaluation import predict_logits
from resnet56.files import write_json
from resnet56.predict import Predictor
from resnet56.runs import pretrained, sources
from resnet56.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "lively")
    directory.save(lively())
    return directory


@pytest.fixture(scope="module")
def predictor(run: RunDirectory) -> Predictor:
    return resnet56.load(run.path, device="cpu")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels).resize((600, 400))


def test_the_logits_are_those_that_evaluation_measures(predictor: Predictor) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    logits, maps = predictor.run(images.numpy())
    expected = predict_logits(predictor.model, images, predictor.mean, predictor.std)
    assert np.allclose(logits, expected.numpy(), atol=1e-5)
    assert logits.std() > 0.1
    assert maps.shape == (5, 3, 8, 8)


def test_a_maps_mean_and_the_bias_make_the_logit(predictor: Predictor) -> None:
    """Zhou et al. 2016, section 2: pooling and the linear layer change places."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    logits, maps = predictor.run(images)
    bias = predictor.model.fc.bias.detach().numpy()
    assert np.allclose(maps.mean(axis=(2, 3)) + bias, logits, atol=1e-5)
    assert maps.std(axis=(2, 3)).min() > 0.01


def test_the_map_is_the_gradient_weighted_one(predictor: Predictor) -> None:
    """Grad-CAM at the last stage, by autograd: equal, for this kind of network."""
    image = torch.rand(1, 3, 32, 32)
    features = predictor.model.features(image).detach().requires_grad_()
    logits = predictor.model.fc(features.mean(dim=(2, 3)))
    weights = torch.autograd.grad(logits[0, 1], features)[0].sum(dim=(2, 3), keepdim=True)
    by_gradient = (weights * features).sum(dim=1)
    with torch.no_grad():
        _, maps = predictor.model.explain(image)
    assert torch.allclose(maps[:, 1], by_gradient, atol=1e-5)


def test_a_picture_is_the_same_through_every_door(
    predictor: Predictor, picture: Image.Image, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    picture.save(file)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    doors = [
        file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()),
        picture, array, array.astype(np.float32) / 255,
        tensor, tensor.double() / 255, prepare(picture).transpose(1, 2, 0),
    ]  # fmt: skip
    answers = predictor.predict(doors)
    assert len({answer.label for answer in answers}) == 1
    for answer in answers:
        assert answer.probability == pytest.approx(answers[0].probability, abs=1e-6)
    [alone] = predictor.predict(picture)
    assert alone.probabilities == pytest.approx(answers[0].probabilities)


def test_probabilities_are_sorted_and_cut_to_the_top(
    predictor: Predictor, picture: Image.Image
) -> None:
    [full] = predictor.predict(picture, maps=True)
    assert set(full.probabilities) == set(CLASSES)
    assert sum(full.probabilities.values()) == pytest.approx(1)
    assert list(full.probabilities.values()) == sorted(full.probabilities.values(), reverse=True)
    assert next(iter(full.probabilities.items())) == (full.label, full.probability)
    _, maps = predictor.run(prepare(picture)[None])
    assert full.map is not None
    assert np.allclose(full.map, maps[0, CLASSES.index(full.label)])
    [cut] = predictor.predict(picture, top=2)
    assert list(cut.probabilities) == list(full.probabilities)[:2]
    assert cut.map is None
    with pytest.raises(UsageError, match="top must be at least 1"):
        predictor.predict(picture, top=0)


def test_a_batch_is_its_images(predictor: Predictor) -> None:
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    by_tensor = predictor.predict(batch)
    by_array = predictor.predict(batch.permute(0, 2, 3, 1).numpy())
    one_by_one = [predictor.predict(image)[0] for image in batch]
    for same in zip(by_tensor, by_array, one_by_one, strict=True):
        assert len({round(answer.probability, 5) for answer in same}) == 1


def test_streaming_reads_a_batch_at_a_time_and_goes_on_after_a_broken_one(
    predictor: Predictor, picture: Image.Image
) -> None:
    taken = 0

    def pictures() -> Iterator[Image.Image | bytes]:
        nonlocal taken
        for index in range(300):
            taken += 1
            yield b"broken" if index % 100 == 7 else picture

    answers = predictor.stream(pictures())
    next(answers)
    assert taken < 100
    rest = list(answers)
    assert taken == 300
    assert [index for index, a in enumerate(rest, 1) if isinstance(a, ImageError)] == [7, 107, 207]
    with pytest.raises(ImageError):
        predictor.predict([picture, b"broken"])
    assert predictor.predict([]) == []


def test_a_picture_that_takes_too_much_memory_does_not_stop_the_others(
    predictor: Predictor, picture: Image.Image
) -> None:
    class Greedy(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise MemoryError

    greedy, fine = predictor.stream([Greedy(), picture])
    assert "not enough memory" in str(greedy)
    assert not isinstance(fine, ImageError)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"shape \(3, 32, 32\) is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "is no picture"),
        (np.full((4, 4), np.nan), "from 0 to 1"),
        (np.full((4, 4), 255.0), "from 0 to 1"),
        (np.zeros((4, 4), np.int64), "not int64"),
        (torch.zeros(5, 4, 4), "is no picture"),
        ([object()], "cannot read a picture from object"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot read the image"),
    ],
    ids=range(9),
)
def test_arrays_that_are_no_pictures_are_refused(
    predictor: Predictor, odd: object, says: str
) -> None:
    with pytest.raises(ImageError, match=says):
        predictor.predict(odd)  # type: ignore[arg-type]


def test_a_run_goes_by_its_directorys_name_and_knows_its_classes(predictor: Predictor) -> None:
    assert predictor.name == "lively"
    assert predictor.classes == CLASSES
    assert not predictor.model.training
    with pytest.raises(UsageError, match=r"\(N, 3, 32, 32\)"):
        predictor.run(np.zeros((3, 32, 32), np.uint8))


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is neither a run nor a pretrained network"):
        resnet56.load("nothing")
    with pytest.raises(RunError, match=r"cannot read .*none\.onnx: No such file"):
        resnet56.load(tmp_path / "none.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="has no checkpoint"):
        resnet56.load(tmp_path / "empty")


# Shipped networks


@pytest.fixture
def shelf(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One shipped network, `small`, in a folder of its own."""
    pretrained.save(run, "small", tmp_path / "weights")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_shipped_network_answers_like_its_run(
    shelf: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shelf)
    assert pretrained.names() == ["small"]
    assert pretrained.card("small")["network"]["classes"] == list(CLASSES)
    small = resnet56.load("small", device="cpu")
    assert (small.name, small.network) == ("small", predictor.network)
    assert {p.dtype for p in small.model.parameters()} == {torch.float32}
    images = np.random.default_rng(1).integers(0, 256, (64, 3, 32, 32), np.uint8)
    ours, theirs = small.run(images)[0], predictor.run(images)[0]
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    size = (shelf / "small.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(p.numel() for p in small.model.parameters()) + 10_000


def test_the_card_says_how_the_network_was_trained_and_how_good_it_is(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = RunDirectory(tmp_path / "run")
    measured.save(run.load())
    write_json(measured.recipe_file, {"lr": 0.1})
    measured.write_evaluation(evaluation(CLASSES, accuracy=0.5))
    pretrained.save(measured, "it", tmp_path / "weights")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    card = pretrained.card("it")
    assert card["recipe"] == {"lr": 0.1}
    assert card["evaluation"]["test"]["accuracy"] == 0.5


def test_a_missing_name_lists_what_is_there(shelf: Path) -> None:
    with pytest.raises(RunError, match=r"nor a pretrained network \(available: small\)"):
        resnet56.load("large")
    with pytest.raises(RunError, match="available: small"):
        pretrained.load("../small")


def test_a_run_goes_before_a_shipped_network_of_its_name(
    shelf: Path, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert sources.open_network("small").pretrained  # a folder that is no run is not in the way
    RunDirectory(tmp_path / "small").save(run.load())
    assert sources.open_network("small").run


def test_a_damaged_shipped_file_is_one_line(shelf: Path) -> None:
    (shelf / "small.safetensors").write_bytes(b"junk")
    with pytest.raises(RunError, match="is damaged"):
        pretrained.load("small")


def test_what_cannot_be_shipped_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    checkpoint = run.load()
    large = {"fc.bias": torch.full((3,), 1e6), "conv1.weight": torch.zeros(2_000_000)}
    for keys, says in (
        ({"fc.bias"}, "half precision"),
        ({"conv1.weight"}, "too large for a pretrained"),
    ):
        other = RunDirectory(tmp_path / says)
        model = dict(checkpoint.model) | {key: large[key] for key in keys}
        other.save(dataclasses.replace(checkpoint, model=model))
        with pytest.raises(RunError, match=says):
            pretrained.save(other, "odd", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
