"""The trials that count toward the requested number."""

import pytest

from resnet56.sweep.trials import Trials

optuna = pytest.importorskip("optuna")


def test_a_trial_is_not_trained_if_another_worker_makes_it_unnecessary() -> None:
    """Two workers can start a trial at the same time although only one trial is missing."""
    trials = Trials(optuna.create_study(), total=2, unique=False, heartbeat=60)
    started = [trials.study.ask() for _ in range(3)]
    assert [trials.is_surplus(trial) for trial in started] == [False, False, True]

    trials = Trials(optuna.create_study(), total=3, unique=True, heartbeat=60)  # as in a grid
    surplus = []
    for value in (1, 2, 1):
        trials.study.enqueue_trial({"cutout": value})
        trial = trials.study.ask()
        trial.suggest_categorical("cutout", [1, 2])
        surplus.append(trials.is_surplus(trial))
    assert surplus == [False, False, True]
