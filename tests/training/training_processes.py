"""Training in other processes, which are killed or belong to a group of two ranks."""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

from resnet56 import cadence, training
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training.loop import TrainingLoop


def train_until_killed(step: int, moment: str, *arguments: Any) -> None:
    """Train with a checkpoint after every step, and kill this process at a given moment."""
    cadence.SAVE_EVERY = 0.0

    def die() -> None:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    if moment == "in a step":
        original_step = Trainer.step
        Trainer.step = lambda self, *args: (
            die() if args[-1] + 1 == step else original_step(self, *args)
        )
    elif moment == "while saving":
        replace = Path.replace
        Path.replace = lambda self, to: (
            die() if to.name == f"training-{step:08d}.safetensors" else replace(self, to)
        )
    elif moment == "between the log and the checkpoint":
        append = RunDirectory.append_metrics
        RunDirectory.append_metrics = lambda self, row: (
            append(self, row), die() if row["step"] == step else None
        )  # fmt: skip
    training.train(*arguments, device="cpu")


def train_as_rank(job: dict[str, Any], environment: dict[str, str]) -> None:
    """Train as one of two ranks, which synchronize at every second step.

    Only the clock of the first rank triggers saving. Only the second rank receives a stop request,
    in the middle of an epoch. Both ranks must save after the steps in `job["saves"]`.
    """
    os.environ.update(environment)
    first = os.environ["RANK"] == "0"
    cadence.READ_LOSS_EVERY = 2
    cadence.SAVE_EVERY = 0.0 if first else 1e9
    original_step, save = Trainer.step, TrainingLoop.save

    def step_and_stop(self: Trainer, *arguments: Any) -> None:
        original_step(self, *arguments)
        if not first and arguments[-1] + 1 == job["stop"]:
            signal.raise_signal(signal.SIGTERM)

    def save_and_count(self: TrainingLoop) -> None:
        save(self)
        saved.append(self.progress.step)

    saved: list[int] = []
    Trainer.step, TrainingLoop.save = step_and_stop, save_and_count
    try:
        training.train(
            job["recipe"], job["dataset"], job["out"], device="cpu", resume=job["resume"]
        )
    except training.Interrupted as stopped:
        code = stopped.exit_code
    else:
        code = 0
    assert code == (143 if job["stop"] else 0)
    assert not job["stop"] or job["stop"] == saved[-1] - 1, saved
    assert saved == job["saves"], saved
    tasks = Path("/proc/self/task").glob("*/comm")  # empty if the system is not Linux
    # If threads of gloo are still running, they can abort the process when it exits.
    assert not [name for task in tasks if "gloo" in (name := task.read_text())]


def torchrun(arguments: list[str]) -> None:
    """Run the command `torchrun` in this process."""
    from torch.distributed.run import main

    main(arguments)


if __name__ == "__main__":  # started by torchrun
    train_as_rank(pickle.loads(Path(sys.argv[1]).read_bytes()), {})
