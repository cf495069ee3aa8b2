"""A checkpoint's network, and the form in which it predicts fastest."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnet56.errors import NotFiniteError
from resnet56.model import ResNet, build, norm_relu
from resnet56.runs.checkpoint import Checkpoint, require_fit
from resnet56.runtime import DTYPES, Resolved

UNUSABLE = "the network gives outputs that are not finite: its weights are of no use"


def restore(checkpoint: Checkpoint, device: torch.device) -> ResNet:
    """The checkpoint's network with its weights, on `device`, in evaluation mode.

    Its parameters are contiguous, as PyTorch's tools expect them; `InferenceForm` makes a copy in
    the memory format in which convolutions are fastest.

    Raises:
        RunError: the weights are not those of such a network.
        NotFiniteError: its outputs are not finite, as with a negative variance.
        UsageError: the architecture is not known.
    """
    net = checkpoint.network
    with torch.device("meta"):  # no memory and no initialization before the weights are checked
        model = build(net.arch, classes=len(net.classes))
    what = f"the weights do not fit {net.arch} with {len(net.classes)} classes"
    require_fit(checkpoint.model, model.state_dict(), what)
    model.to_empty(device=device)
    model.load_state_dict(checkpoint.model)
    model.eval()
    _require_finite_outputs(model, net.mean, net.std)
    return model


@torch.inference_mode()
def _require_finite_outputs(
    model: ResNet, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """Try a black image and one of noise."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if not bool(model(images.to(next(model.parameters()).device)).isfinite().all()):
        raise NotFiniteError(UNUSABLE)


class InferenceForm(nn.Module):
    """A copy of `model` with each batch norm folded into the convolution before it.

    In evaluation batch norm is a fixed scale and shift, which the convolution can apply itself
    (Jacob et al. 2018, section 3.2): the same function, up to rounding. The convolutions run in
    `precision`, without the casts that autocast makes on each call; the last layer stays fp32.

    Args:
        model: stays as it is.
        precision: of the convolutions.
    """

    def __init__(self, model: ResNet, precision: Resolved = "fp32") -> None:
        super().__init__()
        net = copy.deepcopy(model).eval()
        net.use(norm_relu)
        for module in list(net.modules()):
            _fold(module)
        self.dtype = DTYPES[precision]
        self.net: ResNet = net.to(self.dtype)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.fc.float()
        self.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalised images -> (N, C, 8, 8), the last stage's maps."""
        return self.net.features(x.to(self.dtype, memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalised images -> (N, classes) float32 logits."""
        return self.net(x.to(self.dtype, memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def explain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 32, 32) normalised images -> logits and maps, as `ResNet.explain` gives them."""
        return self.net.explain(x.to(self.dtype, memory_format=torch.channels_last))


def _fold(parent: nn.Module) -> None:
    """Fold the batch norms directly below `parent`: `bnN` into `convN`, or one into its elder."""
    children = dict(parent.named_children())
    elder = ""
    for name, child in children.items():
        if isinstance(child, nn.BatchNorm2d):
            conv = getattr(parent, elder)
            assert isinstance(conv, nn.Conv2d)
            setattr(parent, elder, fuse_conv_bn_eval(conv, child))
            setattr(parent, name, nn.Identity())
        elder = name
