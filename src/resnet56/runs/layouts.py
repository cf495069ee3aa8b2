"""Layer names and normalization constants of checkpoints from other projects."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Triple = tuple[float, float, float]
Constants = tuple[Triple, Triple]  # mean and standard deviation
Rename = str | Callable[[re.Match[str]], str]

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Constants that chenyaofo and many other projects use, by number of classes.
CIFAR: dict[int, Constants] = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


@dataclass(frozen=True)
class Layout:
    """The layer names of a project, and its default normalization constants."""

    stem: str  # name of the first convolution's weight
    heads: tuple[str, ...]  # possible names of the classifier's weight
    rules: tuple[tuple[str, Rename], ...]  # regular expressions and replacements, applied in order
    constants: Mapping[int, Constants]  # default constants, by number of classes
    pads_after: bool = False  # whether shortcut A appends its zero channels at the end

    def rename(self, key: str) -> str:
        """Convert the name of a tensor in this layout to its name in this package."""
        for pattern, name in self.rules:
            key = re.sub(pattern, name, key)
        return key


def _one_based(form: str) -> Callable[[re.Match[str]], str]:
    """Return a replacement for `Layout.rules` that subtracts 1 from one-based block numbers.

    The match groups are the stage number and the block number.
    """
    return lambda match: form.format(match[1], int(match[2]) - 1)


LAYOUTS = (
    Layout(  # this package, akamaster, chenyaofo, torchvision
        "conv1.weight",
        ("fc.weight", "linear.weight"),
        (
            (r"^layer(\d+)\.", r"stage\1."),
            (r"^linear\.", "fc."),
            (r"\.downsample\.", ".shortcut."),
        ),
        CIFAR,
    ),
    Layout(  # osmr (pytorchcv)
        "features.init_block.conv.weight",
        ("output.weight",),
        (
            (r"^features\.stage(\d)\.unit([1-9]\d{0,3})\.", _one_based("stage{}.{}.")),
            (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
            (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
            (r"\.identity_conv\.conv\.", ".shortcut.0."),
            (r"\.identity_conv\.bn\.", ".shortcut.1."),
            (r"^features\.init_block\.conv\.", "conv1."),
            (r"^features\.init_block\.bn\.", "bn1."),
            (r"^output\.", "fc."),
        ),
        CIFAR,
    ),
    Layout(  # hysts, with the activation after the addition
        "conv.weight",
        ("fc.weight",),
        (
            (r"^stage(\d)\.block([1-9]\d{0,3})\.", _one_based("stage{}.{}.")),
            (r"\.shortcut\.conv\.", ".shortcut.0."),
            (r"\.shortcut\.bn\.", ".shortcut.1."),
            (r"^conv\.", "conv1."),
            (r"^bn\.", "bn1."),
        ),
        {
            10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        },
    ),
    Layout(  # D-X-Y and forks
        "conv_1_3x3.weight",
        ("classifier.weight",),
        (
            (r"^stage_(\d)\.", r"stage\1."),
            (r"\.conv_a\.", ".conv1."),
            (r"\.conv_b\.", ".conv2."),
            (r"\.bn_a\.", ".bn1."),
            (r"\.bn_b\.", ".bn2."),
            (r"^conv_1_3x3\.", "conv1."),
            (r"^bn_1\.", "bn1."),
            (r"^classifier\.", "fc."),
        ),
        {
            10: (
                (125.3 / 255, 123.0 / 255, 113.9 / 255),
                (63.0 / 255, 62.1 / 255, 66.7 / 255),
            ),
            100: (
                (129.3 / 255, 124.1 / 255, 112.4 / 255),
                (68.2 / 255, 65.4 / 255, 70.4 / 255),
            ),
        },
        pads_after=True,
    ),
)
