"""Skip tests of the C kernels on machines that cannot run them."""

import re
from typing import NoReturn

import pytest
import torch

# The native kernel is compiled for this processor and, if it has a matrix unit, also without it.
UNITS = ["native", "vectors"] if torch.cpu._is_amx_tile_supported() else ["native"]
UNSUPPORTED = (
    "C compiler .* was not found|AVX-512 BF16|matrix unit|denies|require Linux|OpenMP|unrecognized"
)


def skip_without_kernel(reason: Exception) -> NoReturn:
    """Skip the test if `reason` is a property of the machine. Otherwise, raise `reason`."""
    if not re.search(UNSUPPORTED, str(reason)):
        raise reason
    pytest.skip(f"the kernel is not available on this machine: {reason}")
