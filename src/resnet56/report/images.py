"""Images for the report: training images and mistakes, encoded as PNG."""

import base64
from dataclasses import dataclass

import numpy as np

from resnet56.report import plots, png, words
from resnet56.report.read import RunFacts

MAX_SAMPLES, MAX_VERSIONS, MAX_MISTAKES = 10, 8, 24  # limit the size of the report


@dataclass(frozen=True)
class EncodedImage:
    """A PNG image and its label."""

    name: str
    png: bytes
    label: str

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return plots.data_uri(self.png)


Augmented = tuple[EncodedImage, list[EncodedImage]]  # a training image and augmented versions


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image."""

    image: EncodedImage
    index: int
    true: str
    predicted: str
    confidence: float


def originals(facts: RunFacts) -> list[Augmented]:
    """Return training images and, if training augments images, augmented versions of them."""
    if facts.samples is None:
        return []
    shown = []
    samples = facts.samples
    for i, image in enumerate(samples.originals[:MAX_SAMPLES]):
        label = facts.classes[int(samples.original_labels[i])]
        versions = [
            EncodedImage(f"sample-{i + 1}-{j + 1}", png.encode(version), f"{label}, augmented")
            for j, version in enumerate(samples.augmented[i, :MAX_VERSIONS])
            if facts.augmented
        ]
        shown.append((EncodedImage(f"sample-{i + 1}", png.encode(image), label), versions))
    return shown


def sample_sheet(facts: RunFacts) -> EncodedImage | None:
    """Return one image with a row for each training image and its augmented versions."""
    if facts.samples is None or not len(facts.samples.originals):
        return None
    versions = facts.samples.augmented[:MAX_SAMPLES, : MAX_VERSIONS if facts.augmented else 0]
    firsts = facts.samples.originals[:MAX_SAMPLES, None]
    rows = np.concatenate((firsts, versions), axis=1)
    return EncodedImage("samples", png.encode_grid(rows), "Training images")


def mistakes(facts: RunFacts) -> list[Mistake]:
    """Return the most confident mistakes."""
    if facts.samples is None:
        return []
    samples, names = facts.samples, facts.classes
    shown = []
    for i, image in enumerate(samples.mistakes[:MAX_MISTAKES]):
        index = int(samples.mistake_index[i])
        true, predicted = (
            names[int(samples.mistake_true[i])],
            names[int(samples.mistake_predicted[i])],
        )
        label = f"Test image {index}, {true} classified as {predicted}"
        encoded = EncodedImage(f"mistake-{i + 1:02}", png.encode(image), label)
        shown.append(Mistake(encoded, index, true, predicted, float(samples.mistake_confidence[i])))
    return shown


def kept_mistakes(facts: RunFacts) -> list[tuple[int, int, int, str, str]]:
    """Return the mistakes for the cells of the interactive confusion matrix.

    Returns:
        For each mistake, the true class, the predicted class, the index in the test set, the
        confidence in percent, and the image as a base64-encoded PNG. The mistakes are in descending
        order of confidence.
    """
    if facts.samples is None:
        return []
    samples = facts.samples
    return [
        (
            int(samples.mistake_true[i]),
            int(samples.mistake_predicted[i]),
            int(samples.mistake_index[i]),
            words.percent(float(samples.mistake_confidence[i])),
            base64.b64encode(png.encode(image)).decode("ascii"),
        )
        for i, image in enumerate(samples.mistakes)
    ]
