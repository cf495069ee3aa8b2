"""The samplers that choose the settings of trials, and the pruner that stops unpromising trials."""

from typing import Any, cast

from resnet56.sweep.space import Choices, Space


def grid_sampler(space: Space) -> Any:
    """Return a sampler that tries all combinations of the choices."""
    import optuna

    values = {name: cast(Choices, choices).stored() for name, choices in space.items()}
    return optuna.samplers.GridSampler(values, seed=0)


def tpe_sampler(number: int) -> Any:
    """Return a sampler whose seed is the number of the trial.

    The suggestions of a single worker are then reproducible, and several workers get different
    suggestions.
    """
    import optuna

    # `constant_liar` makes workers avoid the settings of trials that other workers are running.
    return optuna.samplers.TPESampler(seed=number, constant_liar=True)


def halving_pruner(epochs: int) -> Any:
    """Return a pruner that repeatedly stops the worse half of the remaining trials.

    The pruner compares trials after a quarter of the epochs, and again whenever the number of
    epochs, summed over the seeds, has doubled. Earlier pruning would favor settings that converge
    fast.
    """
    import optuna

    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, epochs // 4), reduction_factor=2
    )
