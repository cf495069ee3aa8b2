"""The one way from pictures to answers: a run, a shipped network or an ONNX file.

An ONNX file runs through ONNX Runtime; PyTorch is not imported for it.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from resnet56.data.images import Bytes, Floats, fit, image_errors, read_image, upright
from resnet56.errors import ImageError, MissingExtraError, RunError, UsageError, one_line, shown
from resnet56.libraries import import_onnxruntime
from resnet56.metrics import softmax
from resnet56.runs.checkpoint import Network
from resnet56.runs.pretrained import is_onnx, network_from
from resnet56.runs.sources import open_network
from resnet56.threads import check_threads, set_threads

if TYPE_CHECKING:
    import torch

    from resnet56.model import ResNet

BATCH = 64  # pictures at a time: bounds memory, and keeps answers coming

# A path, the bytes of an image file, an open one, a Pillow image, an array (H, W), (H, W, 3 or 4)
# or a tensor (1, 3 or 4, H, W); arrays and tensors are bytes, or floats from 0 to 1.
Picture: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any] | torch.Tensor"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network sees in a picture."""

    label: str
    """The most probable class."""
    probability: float
    """Its probability, the softmax of the logits."""
    probabilities: Mapping[str, float]
    """Of the classes, the most probable first."""
    map: Floats | None = None
    """(8, 8): what each place of the central square says for `label`; where it was asked for."""


class Backend(Protocol):
    """Runs a network on prepared images."""

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """(N, 3, 32, 32) bytes -> (N, C) logits and (N, C, 8, 8) class activation maps."""
        ...


class TorchBackend:
    """PyTorch, on any device."""

    def __init__(self, model: "ResNet", network: Network, device: "torch.device") -> None:
        import torch

        from resnet56.inference import InferenceForm

        self.model = model
        self.form = InferenceForm(model)
        self.device = device
        self.mean = torch.tensor(network.mean, device=device)
        self.std = torch.tensor(network.std, device=device)

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """(N, 3, 32, 32) bytes -> (N, C) logits and (N, C, 8, 8) class activation maps."""
        import torch

        from resnet56.data.augment import normalize

        with torch.inference_mode():
            x = normalize(torch.from_numpy(images).to(self.device), self.mean, self.std)
            logits, maps = self.form.explain(x)
            return logits.cpu().numpy(), maps.cpu().numpy()


class OnnxBackend:
    """ONNX Runtime, on the CPU, for a file that `resnet56 export` wrote."""

    @classmethod
    def of(cls, path: Path, threads: int | None = None) -> "OnnxBackend":
        """The network in a file. Raises RunError, or MissingExtraError without ONNX Runtime."""
        try:
            return cls(path.read_bytes(), str(path), threads)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None

    def __init__(self, content: bytes, name: str, threads: int | None = None) -> None:
        if threads is not None:
            check_threads(threads)
        try:
            onnxruntime = import_onnxruntime()
        except ImportError:
            raise MissingExtraError("ONNX Runtime", "onnx") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: one per core
        options.log_severity_level = 3  # errors; it remarks on graphs that need no remark
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own, which have no common base
            raise RunError(f"{name} is no whole ONNX file: {one_line(error)}") from None
        again = "write it with resnet56 export"
        try:
            self.network = network_from(self.session.get_modelmeta().custom_metadata_map)
        except ValueError as error:
            raise RunError(
                f"{name} does not say what its network is: {one_line(error)}; {again}"
            ) from None
        for count in (1, 2):
            if fault := self._fault(count):
                raise RunError(f"{name} {fault}; {again}")

    def _fault(self, count: int) -> str | None:
        """What keeps the file from answering so many images, if anything does."""
        classes = len(self.network.classes)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        try:
            answers = self.run(images)
            shapes = tuple(np.shape(part) for part in answers)
            finite = all(np.isfinite(part).all() for part in answers)
        except Exception:  # as above
            return f"does not answer {count} images, bytes (N, 3, 32, 32)"
        if shapes != ((count, classes), (count, classes, 8, 8)):
            return f"does not give logits and maps of its {classes} classes"
        return None if finite else "gives outputs that are not finite"

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """(N, 3, 32, 32) bytes -> (N, C) logits and (N, C, 8, 8) class activation maps."""
        logits, maps = self.session.run(["logits", "maps"], {"images": images})
        return logits, maps


class Predictor:
    """A network ready to be used: pictures in, classes and evidence out.

    Safe to use from several threads.
    """

    def __init__(self, name: str, network: Network, backend: Backend) -> None:
        self.name = name
        self.network = network
        self.backend = backend

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.network.classes

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the training images' channels, in units of [0, 1]."""
        return self.network.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Their standard deviations."""
        return self.network.std

    @property
    def model(self) -> "ResNet":
        """The PyTorch module, in evaluation mode; UsageError where an ONNX file runs.

        Predictions come from a copy in inference form: what is changed here does not reach them.
        """
        if not isinstance(self.backend, TorchBackend):
            raise UsageError(f"{self.name} runs in ONNX Runtime: it has no PyTorch module")
        return self.backend.model

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        """Prepared images to logits and class activation maps (Zhou et al. 2016).

        Args:
            images: (N, 3, 32, 32) uint8, as `images.prepare` makes them.

        Returns:
            (N, C) logits and (N, C, 8, 8) maps, float32; a map's mean and the class's bias make
            its logit.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
            raise UsageError(
                f"expected bytes of the shape (N, 3, 32, 32), not {images.dtype} {images.shape}"
            )
        logits, maps = self.backend.run(np.ascontiguousarray(images))
        if not np.isfinite(logits).all():
            raise RunError(
                f"{self.name} gives outputs that are not finite: its weights are of no use"
            )
        return logits, maps

    def predict(
        self, images: "Picture | Iterable[Picture]", *, top: int | None = None, maps: bool = False
    ) -> list[Prediction]:
        """What is in each picture.

        Args:
            images: pictures, or one: paths, bytes of image files, Pillow images, arrays or
                tensors, of any size; a batch of arrays or tensors is taken as its images.
            top: classes to name; all by default.
            maps: whether to give class activation maps.

        Returns:
            A prediction for each picture, in their order.

        Raises:
            ImageError: a picture cannot be read.
        """
        predictions = []
        for prediction in self.stream(images, top=top, maps=maps):
            if isinstance(prediction, ImageError):
                raise prediction
            predictions.append(prediction)
        return predictions

    def stream(
        self, images: "Picture | Iterable[Picture]", *, top: int | None = None, maps: bool = False
    ) -> Iterator[Prediction | ImageError]:
        """Like `predict`, one after the other; a picture that cannot be read yields its error.

        Holds one batch at a time, so there may be any number of pictures.
        """
        if top is not None and top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        pictures = iter(_each(images))
        # Decoding large photographs takes longer than the network; Pillow lets threads do it.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            while batch := list(islice(pictures, BATCH)):
                yield from self._answer(list(pool.map(_prepared, batch)), top, maps)

    def _answer(
        self, prepared: list[Bytes | ImageError], top: int | None, maps: bool
    ) -> Iterator[Prediction | ImageError]:
        """Answers for one batch, errors in their places."""
        whole = [image for image in prepared if not isinstance(image, ImageError)]
        answers = iter(self.explain(np.stack(whole), top=top, maps=maps) if whole else [])
        for image in prepared:
            yield image if isinstance(image, ImageError) else next(answers)

    def explain(
        self, images: Bytes, *, top: int | None = None, maps: bool = False
    ) -> list[Prediction]:
        """`run`, in words: a prediction for each of the prepared images."""
        logits, evidence = self.run(images)
        predictions = []
        for shares, places in zip(softmax(logits), evidence, strict=True):
            order = likeliest(shares, top)
            named = {self.classes[index]: float(shares[index]) for index in order}
            best = order[0]
            predictions.append(
                Prediction(
                    label=self.classes[best],
                    probability=float(shares[best]),
                    probabilities=named,
                    map=places[best] if maps else None,
                )
            )
        return predictions


def load(
    what: str | Path = "resnet56", device: str = "auto", *, threads: int | None = None
) -> Predictor:
    """A network ready to be used.

    Args:
        what: a run's directory, a shipped network's name, or what `resnet56 export` wrote: an
            ONNX file (PyTorch is then not imported), or a hub's folder or its weights.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; an ONNX file runs on the CPU.
        threads: CPU threads, of PyTorch as a whole or of the ONNX file's session; by default one
            per core.

    Raises:
        RunError: it is not there, or damaged.
        UsageError: no such device, or so many threads.
        MissingExtraError: an ONNX file without ONNX Runtime.
    """
    path = Path(what)
    if is_onnx(path):
        if device not in ("auto", "cpu"):
            raise UsageError(f"an ONNX file runs on the CPU, not on {device!r}")
        onnx = OnnxBackend.of(path, threads)
        return Predictor(path.stem, onnx.network, onnx)
    checkpoint = open_network(what).checkpoint

    from resnet56.inference import restore
    from resnet56.runtime import resolve_device

    if threads is not None:
        set_threads(threads)
    where = resolve_device(device)
    network = checkpoint.network
    backend = TorchBackend(restore(checkpoint, where), network, where)
    return Predictor(path.resolve().name, network, backend)


def likeliest(
    probabilities: npt.NDArray[np.float64], top: int | None = None
) -> npt.NDArray[np.intp]:
    """(C,) -> the indices of the `top` likeliest classes, likeliest first; equal ones in order."""
    order: npt.NDArray[np.intp] = np.argsort(-probabilities, kind="stable")[:top]
    return order


def _each(images: Any) -> Iterable[Picture]:
    """One picture as a list of itself; a batch of arrays or tensors as its images."""
    alone = isinstance(images, str | Path | bytes | Image.Image) or hasattr(images, "read")
    if alone or getattr(images, "ndim", 4) < 4:
        return [images]
    every: Iterable[Picture] = images
    return every


def _prepared(picture: Picture) -> Bytes | ImageError:
    """A picture as the network takes it, or what is wrong with it, whatever that is."""
    name = shown(str(picture)) if isinstance(picture, str | Path) else "the image"
    try:
        with image_errors(name):
            return fit(to_image(picture))
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(f"cannot read {name}: there is not enough memory for it")


def to_image(picture: Picture) -> Image.Image:
    """Whatever holds a picture, upright and RGB. Raises ImageError, or what Pillow raises."""
    if isinstance(picture, Image.Image):
        if 0 in picture.size:
            raise ImageError("the image has no pixels")
        return upright(picture)
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    if isinstance(picture, bytes) or hasattr(picture, "read"):
        return read_image(picture)  # type: ignore[arg-type]
    if isinstance(picture, np.ndarray):
        return upright(_image_from(picture))
    if hasattr(picture, "detach"):  # a tensor, told without importing PyTorch
        tensor = picture.detach().cpu()
        pixels = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return upright(_image_from(np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels))
    raise ImageError(f"cannot read a picture from {type(picture).__name__}")


def _image_from(pixels: npt.NDArray[Any]) -> Image.Image:
    """(H, W) or (H, W, 1, 3 or 4), bytes or floats from 0 to 1."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if 0 in pixels.shape or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    ):
        raise ImageError(
            f"an array of the shape {pixels.shape} is no picture: expected (H, W) or (H, W, 3), "
            "and for tensors (3, H, W)"
        )
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # nor NaN
            raise ImageError("a picture of floats has values from 0 to 1; these lie outside")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageError(f"a picture is of bytes or of floats from 0 to 1, not {pixels.dtype}")
    return Image.fromarray(np.ascontiguousarray(pixels))
