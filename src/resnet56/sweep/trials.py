"""The trials of a study: which trials count, and which trials lost their worker."""

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Trials:
    """The trials of all workers of a study.

    Attributes:
        study: the study.
        total: number of trials that the study requires.
        unique: whether to try each combination only once.
        heartbeat: number of seconds between heartbeats of a worker.
    """

    study: "optuna.Study"
    total: int
    unique: bool
    heartbeat: int

    # Count the trials.

    def superseded(self) -> set[int]:
        """Return the trial numbers of trials that have been retried or are queued for a retry."""
        trials = self.study.get_trials(deepcopy=False)
        return {n for trial in trials for n in trial.system_attrs.get("retry_history", [])}

    def counted(self) -> list["FrozenTrial"]:
        """Return the trials that count toward `total`: all except surplus and superseded trials."""
        superseded = self.superseded()
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.number not in superseded and "surplus" not in trial.user_attrs
        ]

    def finished(self) -> list["FrozenTrial"]:
        """Return the finished trials, including trials that failed too often."""
        return [trial for trial in self.counted() if trial.state.is_finished()]

    def is_surplus(self, trial: "optuna.Trial") -> bool:
        """Return whether trials with lower numbers make this trial unnecessary."""
        earlier = [other for other in self.counted() if other.number < trial.number]
        if len(earlier) >= self.total:
            return True
        return self.unique and any(other.params == trial.params for other in earlier)

    # Recover the trials of dead workers.

    def recover(self) -> None:
        """Queue the trials of dead workers for a retry."""
        import optuna

        optuna.storages.fail_stale_trials(self.study)  # finds dead workers by their heartbeats
        # Find dead workers on this machine by their processes, without waiting for heartbeats.
        for trial in self.study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
            worker = trial.user_attrs.get("worker")
            if worker is not None:
                dead = worker["host"] == platform.node() and not _is_alive(worker)
            else:  # the worker may have died before its first heartbeat
                assert trial.datetime_start is not None
                age = time.time() - trial.datetime_start.timestamp()
                dead = age > 10 * self.heartbeat
            if dead:
                with contextlib.suppress(ValueError):  # another worker has already queued the trial
                    self.retry(self.study.tell(trial.number, state=_state("FAIL")))

    def retry(self, trial: "FrozenTrial") -> None:
        """Queue a failed trial for a retry. The retry continues from the checkpoint."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback

        RetryHeartbeatStaleTrialCallback()(self.study, trial)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def this_worker() -> dict[str, Any]:
    """Return the identity of this process, so that other workers can check that it still exists."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_alive(worker: Mapping[str, Any]) -> bool:
    """Return whether the process of a worker on this machine still exists."""
    try:
        return bool(psutil.Process(worker["pid"]).create_time() == worker["started"])
    except psutil.Error:
        return False
