"""Select the device and the precision, measure memory usage, and describe the environment."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from resnet56.distributed import from_environment
from resnet56.errors import UsageError, option

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto` or a PyTorch device name (cpu, cuda:1, mps) specifies.

    `auto` selects a GPU if one is available. Each process that torchrun starts gets its own GPU. On
    CUDA, the function disables TF32, which rounds the inputs of convolutions to ten mantissa bits.

    Raises:
        UsageError: the device is unknown or not available, or several processes cannot share it.
    """
    distributed = from_environment("WORLD_SIZE", 1) > 1
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and not distributed else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps")
    if distributed and (
        device.type == "mps" or (device.type == "cuda" and device.index is not None)
    ):
        raise UsageError(
            f"several processes cannot share {name!r}; use {option('device', 'cuda')} or "
            f"{option('device', 'cpu')}"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", from_environment("LOCAL_RANK", 0))
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}[device.type]
    if count == 0:
        raise UsageError(f"device {name!r} is not available; PyTorch finds no such hardware")
    if not 0 <= (device.index or 0) < count:  # PyTorch converts the index 128 to -128
        label = str(device) if distributed else name
        raise UsageError(
            f"device {label!r} is not available; this machine has {count} {device.type} "
            f"device{'s' * (count > 1)}"
        )
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision that `name` specifies.

    `auto` selects the fastest precision that the hardware supports. A CPU uses bf16 only if it has
    bf16 instructions, because emulation is several times slower than fp32. A GPU without bf16 (such
    as a T4) uses fp16 with loss scaling.

    Raises:
        UsageError: the device does not support the precision.
    """
    if name == "fp16" and device.type == "mps":
        raise UsageError(
            "fp16 requires loss scaling, which PyTorch does not support on mps; use fp32"
        )
    if name != "auto":
        return name  # type: ignore[return-value]  # the recipe has checked the name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    # PyTorch 2.4 added these private functions.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context for a forward pass. Parameters stay in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB (10**6 bytes).

    On CUDA, this is the peak of the memory that PyTorch allocated. On other devices, it is the peak
    resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, `getrusage` includes memory that was in use before `exec`
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset / 1e6)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def processor_name() -> str:
    """Return the model name of the processor, or a generic name if the model is unknown."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device, precision: Precision) -> dict[str, Any]:
    """Describe the hardware, the software and the command of a run for environment.json."""
    info: dict[str, Any] = {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "device": str(device),
        "precision": precision,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        info["gpu"] = gpu.name
        info["gpu_memory_gb"] = round(gpu.total_memory / 1e9, 1)
        info["cuda"] = torch.version.cuda
        info["cudnn"] = torch.backends.cudnn.version()
    info["python"] = platform.python_version()
    info["versions"] = {
        name: metadata.version(name)
        for name in ("resnet56", "torch", "numpy", "safetensors", "scikit-learn", "pillow")
    }
    info["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    info["git"] = git_state()
    return info


def git_state() -> dict[str, Any] | None:
    """Return the commit and whether files are modified, or None outside a git checkout."""
    directory = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return result.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # the checkout belongs to another project
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
