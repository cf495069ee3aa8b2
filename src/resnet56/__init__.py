"""ResNet-56 on CIFAR-10: build, train and test the network, and explain its results.

The names below are the public API. Each name is imported on first use, which keeps
`import resnet56` and `resnet56 --help` fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet56.data.augment import Augmentation
    from resnet56.data.batches import Batches
    from resnet56.data.dataset import Dataset, Split, channel_statistics
    from resnet56.data.readers import load_data
    from resnet56.errors import Error
    from resnet56.evaluation import evaluate
    from resnet56.inference import predict_logits
    from resnet56.model import ResNet, build, describe
    from resnet56.predict import Prediction, Predictor, load
    from resnet56.recipe import RECIPES, Recipe
    from resnet56.report.figures import (
        plot_calibration,
        plot_confusion_matrix,
        plot_curves,
        plot_mistakes,
    )
    from resnet56.runs.schema import EpochMetrics, Evaluation, Metrics
    from resnet56.training import train

__version__ = "0.1.0"

_HOME = {
    "Augmentation": "data.augment",
    "Batches": "data.batches",
    "Dataset": "data.dataset",
    "EpochMetrics": "runs.schema",
    "Error": "errors",
    "Evaluation": "runs.schema",
    "Metrics": "runs.schema",
    "Prediction": "predict",
    "Predictor": "predict",
    "RECIPES": "recipe",
    "Recipe": "recipe",
    "ResNet": "model",
    "Split": "data.dataset",
    "build": "model",
    "channel_statistics": "data.dataset",
    "describe": "model",
    "evaluate": "evaluation",
    "load": "predict",
    "load_data": "data.readers",
    "plot_calibration": "report.figures",
    "plot_confusion_matrix": "report.figures",
    "plot_curves": "report.figures",
    "plot_mistakes": "report.figures",
    "predict_logits": "inference",
    "train": "training",
}

__all__ = [
    "RECIPES",
    "Augmentation",
    "Batches",
    "Dataset",
    "EpochMetrics",
    "Error",
    "Evaluation",
    "Metrics",
    "Prediction",
    "Predictor",
    "Recipe",
    "ResNet",
    "Split",
    "__version__",
    "build",
    "channel_statistics",
    "describe",
    "evaluate",
    "load",
    "load_data",
    "plot_calibration",
    "plot_confusion_matrix",
    "plot_curves",
    "plot_mistakes",
    "predict_logits",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
