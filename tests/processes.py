"""Start processes that do not import PyTorch again, because the import is slow."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

# PyTorch imports torch._dynamo when it creates an optimizer. The metrics import scikit-learn, and
# Optuna imports SQLAlchemy and Alembic when it opens a database.
PRELOADED = [
    "resnet56.benchmark.benchmark",
    "resnet56.training",
    "torch._dynamo",
    "sklearn.metrics",
    "optuna.storages",
    "sqlalchemy.orm",
    "alembic.command",
]


def context() -> BaseContext:
    """Return a context that forks processes from a server that has imported PyTorch.

    Windows can only spawn processes, which import PyTorch again.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def start(
    target: Callable[..., None], *arguments: object, stderr: Path, daemon: bool = True
) -> BaseProcess:
    """Call `target` in a new process that writes its errors to a file.

    A daemon cannot start processes, and is terminated when this process exits.
    """
    process = context().Process(target=_run, args=(target, arguments, stderr), daemon=daemon)
    process.start()
    return process


def _run(target: Callable[..., None], arguments: tuple[object, ...], stderr: Path) -> None:
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    target(*arguments)
