"""Run both C kernels under the address and undefined-behavior sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from requires_kernels import skip_without_kernel

from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.native import native_network
from resnet56.model import build

SANITIZED = "cc -fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
# Loading a kernel compares its forward and backward passes with PyTorch. For the fused kernel, this
# check includes short blocks. For the native step, its three networks cover all shortcuts.
PROGRAM = """
import os

del os.environ["LD_PRELOAD"]  # the compiler itself runs without the sanitizers

import torch
from resnet56.kernels import compiler
from resnet56.kernels.fused import fused_norm_relu
from resnet56.kernels.native import native_network
from resnet56.model import build

compiler.FLAGS.remove("-O3")  # compiling with it takes a minute
torch.set_num_threads(3)
for dtype in (torch.float32, torch.bfloat16):
    fused_norm_relu(dtype)
native_network(build("resnet8"))
print("clean")
"""


def test_the_kernels_pass_the_sanitizers() -> None:
    try:
        native_network(build("resnet8"))
    except UnavailableError as reason:
        skip_without_kernel(reason)
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():  # GCC prints only the name if a library is missing
            pytest.skip(f"the compiler has no {name}")
        libraries.append(found)
    environment = os.environ | {
        "CC": SANITIZED,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees some memory only at exit
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert result.stdout == "clean\n", result.stderr
