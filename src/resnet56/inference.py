"""Restore a model from a checkpoint, optimize the model for inference, and compute logits."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnet56.data.augment import normalize
from resnet56.errors import NotFiniteError, RunError
from resnet56.model import BLOCKS, PadShortcut, ResNet, build, norm_relu
from resnet56.progress import ProgressCallback
from resnet56.runs.checkpoint import Checkpoint, require_fit
from resnet56.runtime import DTYPES, Precision, autocast

BATCH = 256  # default batch size

# The types of all modules in a model from `build`.
_LAYERS = {
    ResNet, *BLOCKS.values(), PadShortcut,
    nn.BatchNorm2d, nn.Conv2d, nn.Identity, nn.Linear, nn.Sequential,
}  # fmt: skip

NONFINITE_MESSAGE = "the network returns outputs that are not finite; its weights are unusable"


def restore(checkpoint: Checkpoint, device: torch.device) -> ResNet:
    """Return the model from a checkpoint, on `device` and in evaluation mode.

    The parameters are contiguous. For faster convolutions, use an `InferenceModel`, which uses the
    channels-last format.

    Raises:
        RunError: the weights do not match the architecture.
        NotFiniteError: the outputs are not finite, for example because of a negative variance.
        UsageError: the architecture is unknown.
    """
    config = checkpoint.config
    require_builtin(checkpoint)
    with torch.device("meta"):  # allocate memory only after checking the weights
        model = build(config.arch, classes=len(config.classes))
    message = f"the weights do not match {config.arch} with {len(config.classes)} classes"
    require_fit(checkpoint.model, model.state_dict(), message)
    model.to_empty(device=device)
    model.load_state_dict(checkpoint.model)
    model.eval()
    _require_finite_outputs(model, config.mean, config.std)
    return model


def require_builtin(checkpoint: Checkpoint) -> None:
    """Raise RunError if the checkpoint has a custom model, whose code is not in the checkpoint."""
    custom = checkpoint.metadata.get("custom", {}).get("model")
    if custom is not None:
        raise RunError(
            f"the model is the custom {custom['name']}, which can be loaded only in Python: "
            f"resnet56.load(RUN, model={custom['name']})"
        )


def restore_custom(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Load the weights of a checkpoint into a custom model. Return the model in evaluation mode.

    Raises:
        RunError: the weights do not match the model.
        NotFiniteError: the outputs are not finite.
    """
    message = f"the weights of {checkpoint.config.arch} do not match the model"
    require_fit(checkpoint.model, model.state_dict(), message)
    model.load_state_dict(checkpoint.model)
    model.eval()
    _require_finite_outputs(model, checkpoint.config.mean, checkpoint.config.std)
    return model


@torch.inference_mode()
def _require_finite_outputs(
    model: nn.Module, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """Run the model on a black image and on noise, and check that the outputs are finite."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if not bool(model(images.to(next(model.parameters()).device)).isfinite().all()):
        raise NotFiniteError(NONFINITE_MESSAGE)


class InferenceModel(nn.Module):
    """A copy of a model, with each batch norm folded into the convolution before it.

    In evaluation mode, batch norm applies a fixed scale and shift, which the convolution can apply
    instead (Jacob et al. 2018, section 3.2). The outputs equal those of the model to within
    rounding error. The convolutions run in `precision`, without the casts of autocast. The last
    layer runs in fp32.

    Args:
        model: the model to copy.
        precision: precision of the convolutions.
    """

    def __init__(self, model: ResNet, precision: Precision = "fp32") -> None:
        super().__init__()
        net = copy.deepcopy(model).eval()
        net.set_norm_relu(norm_relu)
        for module in list(net.modules()):
            _fold(module)
        self.dtype = DTYPES[precision]
        self.net: ResNet = net.to(self.dtype)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.fc.float()
        self.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Compute features: normalized images (N, 3, 32, 32) -> (N, C, 8, 8)."""
        return self.net.features(x.to(self.dtype, memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: normalized images (N, 3, 32, 32) -> float32 (N, classes)."""
        return self.net(x.to(self.dtype, memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def explain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits, class activation maps and features. See `ResNet.explain`."""
        return self.net.explain(x.to(self.dtype, memory_format=torch.channels_last))


def can_fold(model: nn.Module) -> bool:
    """Return whether `InferenceModel` can copy a model.

    `InferenceModel` can copy a model from `build` unless the model has been modified. Modified
    models can recompute the weights of a convolution in each forward pass. For example,
    `torch.nn.utils.prune` and `torch.nn.utils.parametrize` modify models in this way.
    """
    return type(model) is ResNet and all(
        type(module) in _LAYERS and not module._forward_pre_hooks and not module._forward_hooks
        for module in model.modules()
    )


def _fold(parent: nn.Module) -> None:
    """Fold each batch norm that is a child of `parent` into the convolution before it."""
    children = dict(parent.named_children())
    previous = ""
    for name, child in children.items():
        if isinstance(child, nn.BatchNorm2d):
            conv = getattr(parent, previous)
            assert isinstance(conv, nn.Conv2d)
            setattr(parent, previous, fuse_conv_bn_eval(conv, child))
            setattr(parent, name, nn.Identity())
        previous = name


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Precision = "fp32",
    batch: int = BATCH,
    advance: ProgressCallback = lambda count: None,
) -> Tensor:
    """Compute the logits of images, without augmentation.

    Args:
        model: a model in evaluation mode. The function converts a model from `build` to an
            `InferenceModel`, unless its layers were modified, for example by
            `torch.nn.utils.prune`.
        images: uint8 images (N, 3, 32, 32), on any device.
        mean: channel means of the training images, for pixels in [0, 1].
        std: channel standard deviations of the training images, for pixels in [0, 1].
        precision: precision of the forward pass.
        batch: batch size.
        advance: function that is called after each batch with the batch size.

    Returns:
        float32 logits (N, C) on the CPU.

    Raises:
        NotFiniteError: a logit is not finite.
    """
    model, precision = folded(model, precision)
    device = next(model.parameters()).device
    mean_std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    outputs = []
    for chunk in images.split(batch):
        inputs = normalize(chunk.to(device), *mean_std)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            outputs.append(model(inputs).float())
        advance(len(chunk))
    logits = torch.cat(outputs).cpu()
    if not bool(logits.isfinite().all()):
        raise NotFiniteError(NONFINITE_MESSAGE)
    return logits


def folded(model: nn.Module, precision: Precision) -> tuple[nn.Module, Precision]:
    """Convert a model from `build` to an `InferenceModel`, which runs without autocast.

    Other models are returned unchanged.
    """
    if isinstance(model, ResNet) and can_fold(model):
        return InferenceModel(model, precision), "fp32"
    return model, precision
