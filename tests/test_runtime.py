"""Devices, precisions and the environment, on simulated hardware and on this machine."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL
import psutil
import pytest
import torch

import resnet56
from resnet56 import runtime
from resnet56.errors import UsageError
from resnet56.runtime import environment, git_state, peak_memory_mb, resolve_device
from resnet56.runtime import resolve_precision as precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def simulate_gpus(monkeypatch: pytest.MonkeyPatch, count: int, *, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


# Devices


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"),
    [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda:0"), (2, True, "cuda:0")],
)
def test_auto_selects_the_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str
) -> None:
    simulate_gpus(monkeypatch, gpus, mps=mps)
    assert str(resolve_device("auto")) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")],
)
def test_each_process_of_torchrun_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    simulate_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device(name)) == expected


@pytest.mark.parametrize(
    "name",
    ["", " ", "gpu", "CPU", "0", "cuda:", "cuda:x", "cuda:-1", "cpu:", "meta", "xla", "cpu\n"],
)
def test_an_unknown_device_raises_an_error(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device") as caught:
        resolve_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "name"),
    [
        (0, "cuda"), (0, "cuda:0"), (0, "mps"), (2, "cuda:2"), (2, "cuda:127"), (2, "cuda:128"),
        (2, "cuda:200"), (0, "cpu:1"), (0, "cpu:200"),
    ],
)  # fmt: skip
def test_an_unavailable_device_raises_an_error(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str
) -> None:
    simulate_gpus(monkeypatch, gpus)
    with pytest.raises(UsageError, match="is not available|unknown device") as caught:
        resolve_device(name)
    assert repr(name) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_raises_an_error() -> None:
    with pytest.raises(UsageError, match="no such hardware"):
        resolve_device("cuda")


# Precision


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_auto_on_a_cpu_is_bf16_only_if_it_has_bf16_instructions(
    monkeypatch: pytest.MonkeyPatch, probe: str | None
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(
            torch.cpu, name, lambda supported=name == probe: supported, raising=False
        )
    assert precision("auto", CPU) == ("bf16" if probe else "fp32")


def test_auto_is_fp32_if_pytorch_has_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((10, 0), "bf16")],
)
def test_auto_on_a_gpu_is_bf16_since_ampere(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision("auto", torch.device("cuda", 0)) == expected


def test_auto_on_mps_is_fp32() -> None:
    assert precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_named_precision_is_used(name: str, device: str) -> None:
    assert precision(name, torch.device(device)) == name


def test_fp16_without_loss_scaling_raises_an_error() -> None:
    with pytest.raises(UsageError, match="fp16 requires loss scaling"):
        precision("fp16", torch.device("mps"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_multiplies_matrices_in_the_precision(
    name: runtime.Precision, dtype: object
) -> None:
    with runtime.autocast(CPU, name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# Memory and environment


def test_peak_memory_grows_with_use_and_does_not_decrease() -> None:
    before = peak_memory_mb(CPU)
    # This exceeds the earlier peak of this process by 200 MB.
    size = int((before + 200) * 1e6) - psutil.Process().memory_info().rss
    block = np.ones(size, dtype=np.uint8)
    resident = psutil.Process().memory_info().rss / 1e6
    grown = peak_memory_mb(CPU)
    assert grown > before + 150
    assert resident / 2 < grown < resident * 2
    assert block[-1] == 1
    del block
    assert peak_memory_mb(CPU) > grown - 1  # Linux counts pages in batches


def test_the_environment_describes_the_machine_and_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/resnet56", "train", "my recipe.toml"])
    facts = environment(CPU, "fp32")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["processor"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory_gb"] == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.1)
    assert (facts["device"], facts["precision"]) == ("cpu", "fp32")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["python"] == platform.python_version()
    assert facts["command"] == "resnet56 train 'my recipe.toml'"
    versions = {name: text.split("+")[0] for name, text in facts["versions"].items()}
    assert versions["resnet56"] == resnet56.__version__
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    assert set(facts["git"] or {}) in (set(), {"commit", "changed"})


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="no sysconf on this system")
def test_memory_is_the_total_memory_of_the_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert environment(CPU, "fp32")["memory_gb"] == pytest.approx(total / 1e9, rel=0.1)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a directory that contains the module file and is not a repository yet."""
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "runtime.py").write_text("")
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    return tmp_path


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_state_contains_the_commit_and_whether_files_differ(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    git(checkout, "add", "runtime.py")
    git(checkout, "commit", "--quiet", "--message", "one")
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "changed": False}
    (checkout / "runtime.py").write_text("changed = True\n")
    assert git_state() == {"commit": commit, "changed": True}


def test_git_state_outside_a_repository_is_none(checkout: Path) -> None:
    assert git_state() is None


def test_git_state_in_another_repository_is_none(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "one")
    assert git_state() is None


def test_git_state_before_the_first_commit_is_none(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    git(checkout, "add", "runtime.py")
    assert git_state() is None


def test_git_state_without_git_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_several_processes_cannot_share_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes cannot share"):
        resolve_device(name)


def test_fewer_gpus_than_processes_raise_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="'cuda:1' is not available; this machine has 1"):
        resolve_device("auto")


def test_tf32_is_disabled_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert torch.backends.cudnn.allow_tf32 is False
