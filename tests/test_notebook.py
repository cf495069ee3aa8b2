"""The representations of objects in notebooks and at the prompt."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import resnet56
from resnet56 import Recipe
from resnet56.data.dataset import Dataset, Split
from resnet56.files import read_json
from resnet56.notebook import Html, bar, table
from resnet56.predict import Prediction


class Cells(HTMLParser):
    """Reads the cells of a table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


@pytest.fixture
def dataset() -> Dataset:
    images = torch.zeros((24, 3, 32, 32), dtype=torch.uint8)
    classes = tuple(f"class {index}" for index in range(12))
    train = Split(images, torch.arange(24) % 12)
    test = Split(images[:3], torch.tensor([0, 0, 11]))
    return Dataset("mine", classes, train, test, True, "from <here>", "mine", ("skipped 1 image",))


def test_a_table_escapes_text_but_not_html() -> None:
    text = table([("<b>\n", Html("<i>x</i>"))], columns=("a & b", "c"), caption="<u>")
    assert "<b>" not in text
    assert "\n" not in text
    assert "<i>x</i>" in text
    assert text.startswith("<div>&lt;u&gt;</div><table>")
    assert Cells(text).rows == [["a & b", "c"], [r"'<b>\n'", "x"]]


@pytest.mark.parametrize(("fraction", "width"), [(0.0, "0.00em"), (0.5, "6.00em")])
def test_the_length_of_a_bar_is_the_fraction(fraction: float, width: str) -> None:
    assert f'"width:{width};' in bar(fraction)


def test_a_prediction_shows_its_most_probable_classes() -> None:
    values = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]
    probabilities = dict(zip(["<cat>", *"bcdef"], values, strict=True))
    prediction = Prediction("<cat>", 0.5, probabilities, np.zeros(3), np.zeros(64))
    assert repr(prediction) == "Prediction(<cat> 50.0 %, b 25.0 %, c 12.5 %)"
    rows = Cells(prediction._repr_html_()).rows
    assert [(row[0], row[2]) for row in rows] == [
        ("<cat>", "50.0 %"), ("b", "25.0 %"), ("c", "12.5 %"), ("d", "6.2 %"), ("e", "3.1 %"),
    ]  # fmt: skip


def test_a_data_set_shows_its_images_per_class(dataset: Dataset) -> None:
    assert repr(dataset) == "Dataset(mine: 24 training and 3 test images, 12 classes)"
    assert repr(dataset.test) == "Split(3 images on cpu)"
    text = dataset._repr_html_()
    assert text.startswith("<div>from &lt;here&gt;; skipped 1 image</div>")
    rows = Cells(text).rows
    assert rows[:2] == [["class", "training images", "test images"], ["class 0", "2", "2"]]
    assert rows[-2:] == [["2 more classes", "", ""], ["total", "24", "3"]]
    assert len(rows) == 13


def test_a_description_shows_its_parts() -> None:
    description = resnet56.describe("resnet56")
    assert repr(description).startswith("Description(resnet56: 56 layers, 853,018 parameters, ")
    rows = Cells(description._repr_html_()).rows
    assert rows[2][:5] == ["stage1", "2-19", "9", "16x32x32", "42,048"]
    assert rows[-1][0] == "total"


def test_a_predictor_shows_its_runtime() -> None:
    predictor = resnet56.load("resnet56", device="cpu")
    assert repr(predictor) == "Predictor(resnet56: 10 classes, PyTorch on cpu)"


def test_results_are_dictionaries_with_a_short_representation(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, epochs=1, val_size=6)
    result = resnet56.train(recipe, tiny, tmp_path / "run", device="cpu")
    assert isinstance(result, dict)
    assert json.loads(json.dumps(result)) == read_json(tmp_path / "run" / "evaluation.json")
    accuracy = f"{100 * result['test']['accuracy']:.2f} %"
    assert repr(result) == f"Evaluation(test accuracy {accuracy} on 24 images)"
    assert repr(result["test"]) == f"Metrics(accuracy {accuracy} on 24 images)"
    text = result._repr_html_()  # type: ignore[attr-defined]
    assert text.startswith("<div>the tests&#x27; stripes; final weights after epoch 1</div>")
    rows = Cells(text).rows
    assert [row[:2] for row in rows[1:]] == [["test", "24"], ["train", "44"], ["validation", "6"]]
    assert rows[1][2] == accuracy
    assert Cells(result["test"]._repr_html_()).rows[1][1:] == rows[1][1:]  # type: ignore[attr-defined]
