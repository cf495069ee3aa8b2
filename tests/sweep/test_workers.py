"""Sweeps in several processes."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start

from resnet56.data.dataset import Dataset
from resnet56.progress import LineOutput
from resnet56.recipe import Recipe
from resnet56.step import Trainer
from resnet56.sweep.search import sweep
from resnet56.sweep.space import Choices

pytest.importorskip("optuna")


def work(dataset: Dataset, out: Path, storage: str, machine: str, last_step: int) -> None:
    """Run a worker that reports `machine` as its host name and hangs before step `last_step`."""
    original_step = Trainer.step

    def step(self: Trainer, *arguments: Any) -> None:
        if arguments[-1] == last_step:
            time.sleep(600)
        original_step(self, *arguments)

    platform.node = lambda: machine
    Trainer.step = step
    recipe = Recipe(
        arch="resnet8", epochs=3, batch_size=8, lr=0.05, schedule="cosine", precision="fp32",
        execution="eager", val_size=15,
    )  # fmt: skip
    sweep(
        recipe, {"lr": Choices((1e-6, 0.05)), "momentum": Choices((0.8, 0.9))}, dataset, out,
        grid=True, prune=False, storage=storage, device="cpu", threads=1, heartbeat=1,
        output=LineOutput(sys.stderr),
    )  # fmt: skip


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server on a local socket, and yield the URL of a database."""
    directories = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tools = str(directories[-1]) if directories else os.path.dirname(shutil.which("initdb") or "")  # noqa: PTH120
    if not tools:
        pytest.skip("PostgreSQL is not installed (initdb)")
    root = os.geteuid() == 0
    if root and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and runuser is missing")
    # The path of a socket must be short.
    directory = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    prefix = ["runuser", "-u", "postgres", "--"] if root else []
    if root:
        shutil.chown(directory, "postgres")

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([*prefix, f"{tools}/{name}", *arguments], check=True, capture_output=True,
                       cwd=directory)  # fmt: skip

    data = str(directory / "data")
    tool("initdb", "-D", data, "-U", "sweep", "-A", "trust", "-N")
    server = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
    tool("pg_ctl", "-D", data, "-l", str(directory / "log"), "-w", "-o", server, "start")
    try:
        yield f"postgresql://sweep@/postgres?host={directory}"
    finally:
        tool("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(directory)


@pytest.mark.parametrize("shared", [True, False], ids=["shared directory", "two machines"])
def test_another_worker_finishes_the_trial_of_a_killed_one(
    postgresql: str, tiny: Dataset, tmp_path: Path, shared: bool
) -> None:
    """Two workers share a PostgreSQL database, and one is killed during its first trial."""
    first = tmp_path / "one" / f"sweep-{shared}"
    second = first if shared else tmp_path / "two" / first.name
    outputs = tmp_path / "killed", tmp_path / "other"
    killed = start(work, tiny, first, postgresql, "one", 6, stderr=outputs[0])  # hangs in epoch 2
    deadline = time.monotonic() + 120
    while not list(first.glob("trial-*/metrics.jsonl")):  # its first epoch is finished
        assert killed.is_alive(), outputs[0].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    machine = "one" if shared else "two"
    other = start(work, tiny, second, postgresql, machine, -1, stderr=outputs[1])
    while not list(second.glob("trial-0001/metrics.jsonl")):
        assert other.is_alive(), outputs[1].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()  # SIGKILL
    killed.join()
    other.join(120)
    assert other.exitcode == 0, outputs[1].read_text()
    result = json.loads((second / "sweep.json").read_text())
    assert [trial["state"] for trial in result["trials"]] == ["complete"] * 4
    settings = {(t["settings"]["lr"], t["settings"]["momentum"]) for t in result["trials"]}
    assert settings == {(lr, momentum) for lr in (1e-6, 0.05) for momentum in (0.8, 0.9)}
    best = max(result["trials"], key=lambda trial: trial["value"])
    assert result["best"] == best["number"]
    assert best["settings"]["lr"] == 0.05
    if shared:  # the killed run was continued
        record = json.loads((first / "trial-0000" / "environment.json").read_text())
        assert len(record["resumed"]) == 1
