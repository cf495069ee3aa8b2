"""Synthetic run directories for tests of the report, and a parser for its pages."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet56.files import write_json
from resnet56.metrics import compute_metrics
from resnet56.recipe import RECIPES, Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress
from resnet56.runs.directory import RunDirectory

CIFAR = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# A recipe with a cosine schedule, Cutout and an EMA, but without mixed targets.
BEST = replace(RECIPES["best"], epochs=200, mix="none", plain_tail=0)
EVIL = ("<script>alert(1)</script>", "猫 & \"Hund\" $x_1$ | `b` 'c' " + "x" * 300)
NUMBERS = tuple(f"{i}th class" for i in range(100))
SIMILAR = {3: 5, 5: 3, 0: 8, 8: 0, 1: 9, 9: 1, 2: 4, 4: 2}  # cat and dog, airplane and ship, ...


class Page(HTMLParser):
    """A parsed page: text by id, tables as cells, attributes and tags."""

    VOID = ("meta", "link", "br", "img", "path", "rect", "circle", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.by_id: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.open: list[tuple[str, str | None]] = []
        self.table: list[list[str]] | None = None
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "table":
            self.table = self.tables[attributes.get("id", f"table-{len(self.tables)}")] = []
        elif tag == "tr" and self.table is not None:
            self.table.append([])
        elif tag in ("td", "th") and self.table is not None:
            self.table[-1].append("")
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()
        assert opened[0] == tag, f"</{tag}> closes <{opened[0]}>"

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if "script" in inside or "style" in inside:
            return
        self.text += data
        for _, name in self.open:
            if name:
                self.by_id[name] = self.by_id.get(name, "") + data
        if self.table and self.table[-1] and ("td" in inside or "th" in inside):
            self.table[-1][-1] += data.strip()


def make_metrics(
    classes: tuple[str, ...], images: int, accuracy: float, seed: int = 0
) -> dict[str, Any]:
    """Return metrics of synthetic logits with approximately this accuracy."""
    return dict(compute_metrics(*make_predictions(classes, images, accuracy, seed), classes))


def make_predictions(
    classes: tuple[str, ...], images: int, accuracy: float, seed: int
) -> tuple[Any, Any]:
    """Return synthetic logits with approximately this accuracy, and the labels."""
    generator = np.random.default_rng(seed)
    count = len(classes)
    labels = np.arange(images) % count
    predicted = labels.copy()
    wrong = generator.random(images) > accuracy
    other = (labels + generator.integers(1, max(count, 2), images)) % count
    if count == 10:
        similar = np.array([SIMILAR.get(i, (i + 1) % count) for i in range(count)])
        other = np.where(generator.random(images) < 0.5, similar[labels], other)
    predicted[wrong] = other[wrong]
    logits = generator.normal(0, 1, (images, count))
    margin = np.where(wrong, generator.exponential(2, images), generator.exponential(7, images))
    logits[np.arange(images), predicted] = logits.max(axis=1) + margin
    return logits, labels


def evaluation(
    classes: tuple[str, ...] = CIFAR, *, step: int = 0, data: str = "some images", **metrics: Any
) -> dict[str, Any]:
    """Return the content of an evaluation.json with metrics of 10,000 test images."""
    return {
        "test": make_metrics(classes, 10_000, 0.9) | metrics,
        "weights": "final",
        "epoch": 0,
        "step": step,
        "device": "cpu",
        "precision": "fp32",
        "data": data,
    }


def epochs(recipe: Recipe, done: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of metrics.jsonl for a plausible training run."""
    generator = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, done + 1):
        share = epoch / recipe.epochs
        loss = 2.0 * math.exp(-4 * share) + 0.02 + 0.02 * generator.random()
        row = {
            "epoch": epoch,
            "step": 390 * epoch,
            "lr": recipe.lr * 0.5 * (1 + math.cos(math.pi * share)),
            "train_loss": loss,
            "train_accuracy": math.exp(-loss / 2),
            "images_per_second": 3000 + 40 * generator.random(),
            "seconds": 16.5 + generator.random(),
            "peak_memory_mb": 812.5,
        }
        if recipe.val_size:
            row |= {"val_loss": 1.1 * loss + 0.15, "val_accuracy": 0.97 - loss / 3}
        rows.append(row)
    return rows


def make_run(
    path: Path,
    recipe: Recipe = BEST,
    classes: tuple[str, ...] = CIFAR,
    *,
    done: int | None = None,
    images: int = 2000,
    accuracy: float = 0.93,
    train_accuracy: float = 0.999,
    tested: bool = True,
    extras: bool = False,
    seed: int = 0,
    fingerprint: str | None = None,
) -> Path:
    """Write a run directory. With `extras`, include all optional files."""
    run = RunDirectory(path)
    path.mkdir(parents=True)
    done = recipe.epochs if done is None else done
    write_json(run.recipe_file, recipe.to_json())
    write_json(run.environment_file, ENVIRONMENT)
    rows = epochs(recipe, done, seed)
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ModelConfig(recipe.arch, classes, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    weights = "ema" if recipe.ema_decay else "final"
    run.save(
        Checkpoint(
            config,
            model={"w": torch.zeros(1)},
            progress=Progress(epoch=done, step=390 * done),
            metadata={"weights": weights, "data": fingerprint},
        )
    )
    if tested:
        evaluation = {
            "test": make_metrics(classes, images, accuracy, seed),
            "train": make_metrics(classes, images, train_accuracy, seed + 1),
            "weights": weights,
            "epoch": done,
            "step": 390 * done,
            "device": "cuda",
            "precision": "fp32",
            "data": ENVIRONMENT["data"]["source"],
        }
        if recipe.val_size:
            evaluation["validation"] = make_metrics(classes, images, accuracy, seed + 2)
        if extras:
            evaluation |= {"speed": SPEED, "robustness": ROBUSTNESS}
        write_json(run.evaluation_file, evaluation)
        logits, labels = make_predictions(classes, images, accuracy, seed)
        run.write_predictions({"logits": logits, "labels": labels, "indices": np.arange(images)})
    if extras:
        write_json(path / "parity.json", PARITY)
        np.savez_compressed(path / "samples.npz", **samples(classes, seed))
    return path


def make_runs(path: Path) -> dict[str, Path]:
    """Write one run of each type, and return their directories by name."""
    short = replace(BEST, epochs=3)
    plain = replace(RECIPES["report"], epochs=3, arch="plain20", padding=0, flip=False)
    runs = {
        "full": make_run(path / "full", replace(BEST, val_size=500), extras=True),
        "two": make_run(path / "two", short, ("cat", "dog"), images=100, extras=True),
        "hundred": make_run(path / "hundred", short, NUMBERS, extras=True),
        "evil": make_run(path / ("<b>e" + "v" * 100), short, EVIL, images=100, extras=True),
        "perfect": make_run(path / "perfect", short, accuracy=1.0, extras=True),
        "chance": make_run(path / "chance", short, accuracy=0.1, images=300, extras=True),
        "plain": make_run(path / "plain", plain),
        "bottleneck": make_run(path / "bottleneck", replace(short, arch="resnet164-bottleneck")),
        "validated": make_run(path / "validated", replace(short, val_size=500), tested=False),
        "unfinished": make_run(path / "unfinished", done=4, tested=False),
        "new": make_run(path / "new", done=0, tested=False),
        "imported": make_run(path / "imported", short, done=0, extras=True),
        "converted": make_run(path / "converted", short, done=0, tested=False),
    }
    arrays = samples(CIFAR)
    none = {key: array[:0] for key, array in arrays.items() if key.startswith("mistake")}
    RunDirectory(runs["perfect"]).write_samples(arrays | none)
    for name in ("imported", "converted"):
        for file in ("recipe.json", "environment.json", "metrics.jsonl"):
            (runs[name] / file).unlink()
    return runs


def samples(classes: tuple[str, ...], seed: int = 0, mistakes: int = 24) -> dict[str, Any]:
    """Return sample images: a colored blob per class, with a little noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32]

    def blob(label: int) -> Any:
        center = generator.integers(10, 22, 2)
        mask = np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / 60)
        color = np.array([(label * 67) % 200, (label * 131) % 200, (label * 29) % 200]) + 55
        image = 90 + (color[:, None, None] - 90) * mask + generator.normal(0, 9, (3, 32, 32))
        return image.clip(0, 255).astype(np.uint8)

    labels = np.arange(6) % len(classes)
    true = generator.integers(0, len(classes), mistakes)
    originals = np.stack([blob(int(label)) for label in labels])
    shifted = [[np.roll(one, (v - 2, 2 - v), (1, 2)) for v in range(5)] for one in originals]
    return {
        "originals": originals,
        "original_labels": labels,
        "augmented": np.array(shifted),
        "mistakes": np.stack([blob(int(label)) for label in true]),
        "mistake_index": generator.permutation(2000)[:mistakes],
        "mistake_true": true,
        "mistake_predicted": (true + 1) % len(classes),
        "mistake_confidence": np.sort(0.9 + 0.1 * generator.random(mistakes))[::-1],
    }


ENVIRONMENT: dict[str, Any] = {
    "processor": "Example 9000",
    "cores": 16,
    "threads": 16,
    "memory_gb": 128.0,
    "system": "Linux-6.1-x86_64",
    "device": "cuda",
    "precision": "bf16",
    "gpu": "Example GPU",
    "gpu_memory_gb": 80.0,
    "python": "3.12.1",
    "versions": {"resnet56": "0.1.0", "torch": "2.13.0"},
    "command": "resnet56 train best --data cifar-10-batches-bin",
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "changed": False},
    "processes": 1,
    "data": {
        "origin": "cifar-10-batches-bin",
        "source": "cifar-10-batches-bin: 50,000 training and 10,000 test images",
    },
}
SPEED = {
    "batch_1": {"ms_per_image": 4.7321, "images_per_second": 211.3},
    "batch_256": {"ms_per_image": 0.0214, "images_per_second": 46728.9},
    "peak_memory_mb": 1234.5,
}
ROBUSTNESS = {
    "images": 2000,
    "severities": [1, 2, 3, 4, 5],
    "clean_accuracy": 0.93,
    "mean_accuracy": 0.7325,
    "corruptions": {
        "gaussian_noise": [0.8, 0.7, 0.55, 0.48, 0.42],
        "motion_blur": [0.9, 0.86, 0.8, 0.79, 0.7],
        "brightness": [0.93, 0.93, 0.92, 0.91, 0.88],
        "contrast": [0.93, 0.9, 0.85, 0.7, 0.4],
        "jpeg": [0.85, 0.81, 0.79, 0.76, 0.73],
    },
}
PARITY = {
    "comparisons": [
        {
            "a": "cuda fp32",
            "b": "cuda bf16",
            "images": 10000,
            "accuracy_a": 0.9303,
            "accuracy_b": 0.9301,
            "changed": 12,
            "median_difference": 0.0123,
            "largest_difference": 0.4567,
            "verdict": "bf16 changes the class of 12 of 10,000 images and the accuracy by 2.",
        }
    ]
}
