"""Models for torch.hub: torch.hub.load("OWNER/resnet56", "resnet56").

A model takes (N, 3, 32, 32) images that are normalized with its attributes `mean` and `std` (for
pixels in [0, 1]). It returns (N, C) logits for the C classes in its attribute `classes`. Only
pretrained models have these attributes.
"""

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "src"))

dependencies = ["torch", "numpy", "safetensors", "msgspec"]


def resnet20(pretrained: bool = True) -> nn.Module:
    """ResNet-20 with basic blocks and shortcut A (269,722 parameters).

    Args:
        pretrained: whether to load the pretrained weights.
    """
    return _model("resnet20", pretrained)


def resnet32(pretrained: bool = True) -> nn.Module:
    """ResNet-32 with basic blocks and shortcut A (464,154 parameters).

    Args:
        pretrained: whether to load the pretrained weights.
    """
    return _model("resnet32", pretrained)


def resnet56(pretrained: bool = True) -> nn.Module:
    """ResNet-56 with basic blocks and shortcut A (853,018 parameters).

    Args:
        pretrained: whether to load the pretrained weights.
    """
    return _model("resnet56", pretrained)


def resnet56_bottleneck(pretrained: bool = True) -> nn.Module:
    """ResNet-56 with bottleneck blocks (591,322 parameters).

    Args:
        pretrained: whether to load the pretrained weights.
    """
    return _model("resnet56-bottleneck", pretrained)


def resnet56_cifar100(pretrained: bool = True) -> nn.Module:
    """ResNet-56 for the 100 classes of CIFAR-100 (858,868 parameters).

    Args:
        pretrained: whether to load the pretrained weights.
    """
    return _model("resnet56-cifar100", pretrained)


def _model(name: str, pretrained: bool) -> nn.Module:
    from resnet56.model import build
    from resnet56.runs.pretrained import load

    checkpoint = load(name)
    config = checkpoint.config
    model = build(config.arch, classes=len(config.classes))
    if pretrained:
        model.load_state_dict(checkpoint.model)
        model.mean, model.std, model.classes = config.mean, config.std, config.classes
    return model.eval()
