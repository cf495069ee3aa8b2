"""Skipping what needs a kernel of ours on a machine that cannot have it, and on no other."""

import re
from typing import NoReturn

import pytest

MISSING = "no C compiler|no bfloat16|no matrix unit|keeps|made for Linux|OpenMP|unrecognized"


def skip_without_kernel(reason: Exception) -> NoReturn:
    """Skip if `reason` says that this machine has none; any other is a failure, and raised."""
    if not re.search(MISSING, str(reason)):
        raise reason
    pytest.skip(f"no such kernel on this machine: {reason}")
