"""Predict the classes of images with a run, a pretrained model or an ONNX file.

ONNX files run in ONNX Runtime, which does not require PyTorch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from resnet56.backends import Backend, OnnxBackend, Outputs, TorchBackend
from resnet56.data.images import (
    FloatArray,
    UInt8Array,
    image_errors,
    read_image,
    to_model_input,
    to_upright_rgb,
)
from resnet56.errors import ImageError, RunError, UsageError, escape, option
from resnet56.files import StrPath
from resnet56.metrics import softmax
from resnet56.notebook import bar, table
from resnet56.runs.checkpoint import ModelConfig
from resnet56.runs.pretrained import is_onnx
from resnet56.runs.sources import open_model
from resnet56.threads import set_threads

if TYPE_CHECKING:
    import torch

    from resnet56.custom import ModelLike
    from resnet56.data.dataset import Split
    from resnet56.model import ResNet
    from resnet56.runs.schema import Metrics

BATCH = 64  # small batches limit memory use and the time to the first result
NO_IMAGES: UInt8Array = np.zeros((0, 3, 32, 32), np.uint8)

# A path, the bytes of an image file, an open image file, a Pillow image, an array of shape (H, W),
# (H, W, 3) or (H, W, 4), or a tensor of shape (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors
# contain uint8 values, or floating-point values from 0 to 1.
ImageLike: TypeAlias = "StrPath | bytes | BinaryIO | Image.Image | npt.NDArray[Any] | torch.Tensor"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image."""

    label: str
    """The most probable class."""
    probability: float
    """Softmax probability of `label`."""
    probabilities: Mapping[str, float]
    """Probability of each class, in descending order."""
    logits: FloatArray
    """Logits (classes,) float32, in the order of `Predictor.classes`."""
    features: FloatArray
    """Features (C,) float32 after global average pooling. They are the input to the classifier."""
    map: FloatArray | None = None
    """Class activation map (8, 8) of `label` for the center square, if requested."""

    def __repr__(self) -> str:
        best = islice(self.probabilities.items(), 3)
        return f"Prediction({', '.join(f'{escape(name)} {100 * p:.1f} %' for name, p in best)})"

    def _repr_html_(self) -> str:
        best = islice(self.probabilities.items(), 5)
        return table([(name, bar(p), f"{100 * p:.1f} %") for name, p in best])


class Predictor:
    """A model for inference. Its methods are thread-safe."""

    def __init__(self, name: str, config: ModelConfig, backend: Backend) -> None:
        self.name = name
        self.config = config
        self.backend = backend

    def __repr__(self) -> str:
        classes = f"{len(self.classes):,} classes"
        return f"Predictor({escape(self.name)}: {classes}, {self.backend.runtime})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.config.classes

    @property
    def mean(self) -> tuple[float, float, float]:
        """The channel means of the training images, for pixels in [0, 1]."""
        return self.config.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """The channel standard deviations of the training images, for pixels in [0, 1]."""
        return self.config.std

    @property
    def model(self) -> "ResNet":
        """The PyTorch module, in evaluation mode.

        Predictions use an optimized copy, so changes to this module do not affect them. If `load`
        was called with a custom module, the property returns the same module.

        Raises:
            UsageError: the model runs in ONNX Runtime.
        """
        if not isinstance(self.backend, TorchBackend):
            raise UsageError(f"{self.name} runs in ONNX Runtime and has no PyTorch module")
        return self.backend.model

    def run(self, images: UInt8Array) -> Outputs:
        """Compute logits, class activation maps and features of preprocessed images.

        Args:
            images: (N, 3, 32, 32) uint8, as returned by `images.to_model_input`.

        Returns:
            `logits` (N, classes), `maps` (N, classes, 8, 8) and `features` (N, C), all float32.
            `features` are the outputs of global average pooling. The logit of a class is the mean
            of its map plus its bias (Zhou et al. 2016).

        Raises:
            UsageError: the images have the wrong dtype or shape.
            RunError: the logits are not finite.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
            raise UsageError(
                f"expected uint8 images of shape (N, 3, 32, 32), not {images.dtype} {images.shape}"
            )
        outputs = self.backend.run(np.ascontiguousarray(images))
        if not np.isfinite(outputs.logits).all():
            raise RunError(
                f"{self.name} returns outputs that are not finite; its weights are unusable"
            )
        return outputs

    def evaluate(self, split: "Split") -> "Metrics":
        """Return the metrics on a split, in the format of `resnet56.evaluate`.

        Args:
            split: images and labels. The labels are indices into `classes`. If the classes of the
                data set differ or have a different order, convert the data set with
                `Dataset.for_classes` first.

        Raises:
            UsageError: the split contains no images, or a label is not the index of a class.
            NotFiniteError: a logit is not finite.
        """
        from resnet56.inference import BATCH
        from resnet56.metrics import split_metrics

        logits = self.backend.logits(split.images, BATCH, lambda count: None)
        return split_metrics(logits, split, self.classes)

    def logits(self, images: "ImageLike | Iterable[ImageLike]") -> FloatArray:
        """Return float32 logits (N, classes). The argument is the same as in `predict`."""
        rows = [prediction.logits for prediction in self.predict(images)]
        return np.stack(rows) if rows else self.run(NO_IMAGES).logits

    def features(self, images: "ImageLike | Iterable[ImageLike]") -> FloatArray:
        """Return the features of images after global average pooling.

        The features are the input to the classifier.

        Args:
            images: one or more images, as in `predict`.

        Returns:
            (N, C) float32. C is 64, or 256 with bottleneck blocks.

        Raises:
            ImageError: an image cannot be read.
        """
        rows = [prediction.features for prediction in self.predict(images)]
        if rows and not rows[0].size:
            raise UsageError(
                "features require an explain method, which the custom model of "
                f"{self.name} does not have"
            )
        return np.stack(rows) if rows else self.run(NO_IMAGES).features

    def predict(
        self,
        images: "ImageLike | Iterable[ImageLike]",
        *,
        top: int | None = None,
        maps: bool = False,
    ) -> list[Prediction]:
        """Predict the classes of images.

        Args:
            images: one or more images of any size: paths, bytes of image files, Pillow images,
                arrays or tensors. A 4-dimensional array or tensor is a batch.
            top: number of classes to return. By default, all classes are returned.
            maps: whether to return class activation maps.

        Returns:
            One prediction per image, in the same order.

        Raises:
            ImageError: an image cannot be read.
            UsageError: `top` is less than 1.
        """
        predictions = []
        for prediction in self.stream(images, top=top, maps=maps):
            if isinstance(prediction, ImageError):
                raise prediction
            predictions.append(prediction)
        return predictions

    def stream(
        self,
        images: "ImageLike | Iterable[ImageLike]",
        *,
        top: int | None = None,
        maps: bool = False,
    ) -> Iterator[Prediction | ImageError]:
        """Yield one prediction per image, or an error if the image cannot be read.

        The arguments are the same as in `predict`. Only one batch is in memory at a time, so the
        number of images is unlimited.
        """
        if top is not None and top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        iterator = iter(_as_iterable(images))
        # Decode in threads, because decoding large photos takes longer than inference. Pillow
        # releases the GIL while it decodes.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            while batch := list(islice(iterator, BATCH)):
                yield from self._predict_batch(list(pool.map(_preprocess, batch)), top, maps)

    def _predict_batch(
        self, batch: list[UInt8Array | ImageError], top: int | None, maps: bool
    ) -> Iterator[Prediction | ImageError]:
        """Yield predictions and errors in the order of the batch."""
        valid = [image for image in batch if not isinstance(image, ImageError)]
        predictions = iter(self._predict_valid(np.stack(valid), top, maps) if valid else [])
        for image in batch:
            yield image if isinstance(image, ImageError) else next(predictions)

    def _predict_valid(self, images: UInt8Array, top: int | None, maps: bool) -> list[Prediction]:
        """Return one prediction per preprocessed image."""
        outputs = self.run(images)
        if maps and not outputs.maps.size:
            raise UsageError(
                "class activation maps require an explain method, which the custom model of "
                f"{self.name} does not have"
            )
        predictions = []
        for probabilities, logits, image_maps, features in zip(
            softmax(outputs.logits), *outputs, strict=True
        ):
            order = top_classes(probabilities, top)
            best = order[0]
            predictions.append(
                Prediction(
                    label=self.classes[best],
                    probability=float(probabilities[best]),
                    probabilities={self.classes[i]: float(probabilities[i]) for i in order},
                    logits=logits,
                    features=features,
                    map=image_maps[best] if maps else None,
                )
            )
        return predictions


def load(
    source: StrPath = "resnet56",
    device: str = "auto",
    *,
    model: "ModelLike | None" = None,
    threads: int | None = None,
) -> Predictor:
    """Load a model for inference.

    Args:
        source: a run directory, the name of a pretrained model, or the output of `resnet56 export`.
            The output can be an ONNX file, a model hub directory, or the weight file in such a
            directory. ONNX files do not require PyTorch.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". An ONNX file runs on the CPU.
        model: the custom model of a run, as it was passed to `train`: a module, or a function
            that takes the number of classes and returns a module. The weights of the run replace
            the weights of the module. Class activation maps and features require an `explain`
            method like that of `ResNet`.
        threads: number of CPU threads for PyTorch or ONNX Runtime. By default, one thread per core.

    Raises:
        RunError: the model does not exist or is damaged, the run requires `model`, or its weights
            do not match `model`.
        UsageError: the device is not available, the number of threads is out of range, or
            `model` is passed for a built-in network.
        MissingExtraError: the model is an ONNX file and ONNX Runtime is not installed.
    """
    path = Path(source)
    if is_onnx(path) and model is None:
        if device not in ("auto", "cpu"):
            raise UsageError(
                f"an ONNX file runs only on the CPU, not on {device!r}; use "
                f"{option('device', 'cpu')}"
            )
        onnx = OnnxBackend.from_file(path, threads)
        return Predictor(path.stem, onnx.config, onnx)
    checkpoint = open_model(source).checkpoint

    from resnet56.inference import restore, restore_custom
    from resnet56.runtime import resolve_device

    if threads is not None:
        set_threads(threads)
    torch_device = resolve_device(device)
    config = checkpoint.config
    if model is None:
        net = restore(checkpoint, torch_device)
    else:
        from resnet56.custom import make_model

        if "model" not in checkpoint.metadata.get("custom", {}):
            raise UsageError(
                f"{path} contains the built-in network {config.arch}; omit the argument model"
            )
        module = make_model(model, len(config.classes), torch_device)
        net = cast("ResNet", restore_custom(module, checkpoint))
    backend = TorchBackend(net, config, torch_device)
    return Predictor(path.resolve().name, config, backend)


def top_classes(
    probabilities: npt.NDArray[np.float64], top: int | None = None
) -> npt.NDArray[np.intp]:
    """Return the indices of the `top` most probable classes. Ties are broken by index."""
    order: npt.NDArray[np.intp] = np.argsort(-probabilities, kind="stable")[:top]
    return order


def _as_iterable(images: Any) -> Iterable[ImageLike]:
    """Wrap a single image in a list. Return iterables, arrays and tensors of images unchanged."""
    single = isinstance(images, str | os.PathLike | bytes | Image.Image) or hasattr(images, "read")
    if single or getattr(images, "ndim", 4) < 4:
        return [images]
    iterable: Iterable[ImageLike] = images
    return iterable


def _preprocess(image: ImageLike) -> UInt8Array | ImageError:
    """Convert any image to a model input (3, 32, 32). If the conversion fails, return the error."""
    name = escape(os.fspath(image)) if isinstance(image, str | os.PathLike) else "the image"
    try:
        with image_errors(name):
            return to_model_input(to_pil(image))
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(f"cannot read {name}: not enough memory")


def to_pil(image: ImageLike) -> Image.Image:
    """Convert any image to an upright RGB Pillow image.

    Raises:
        ImageError: the image is empty or has an unsupported type, or the file cannot be read.
        Exception: any other exception that Pillow raises.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError("the image has no pixels")
        return to_upright_rgb(image)
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, bytes) or hasattr(image, "read"):
        return read_image(image)  # type: ignore[arg-type]
    if isinstance(image, np.ndarray):
        return to_upright_rgb(_array_to_pil(image))
    if hasattr(image, "detach"):  # recognizes tensors without importing PyTorch
        tensor = image.detach().cpu()
        pixels = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return to_upright_rgb(
            _array_to_pil(np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels)
        )
    raise ImageError(
        f"cannot read an image from an object of type {type(image).__name__}; pass a path, bytes, "
        "a Pillow image, an array or a tensor"
    )


def _array_to_pil(pixels: npt.NDArray[Any]) -> Image.Image:
    """Convert an array (H, W) or (H, W, C) to a Pillow image. See `ImageLike`."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if 0 in pixels.shape or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    ):
        raise ImageError(
            f"an array of shape {pixels.shape} is not an image: expected (H, W) or (H, W, 3), "
            "or (3, H, W) for a tensor"
        )
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # this also rejects NaN
            raise ImageError("floating-point pixels must be from 0 to 1")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageError(f"pixels must be uint8 or floating point, not {pixels.dtype}")
    return Image.fromarray(np.ascontiguousarray(pixels))
