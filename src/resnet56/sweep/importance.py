"""The importance of the settings of a finished sweep."""

from resnet56.runs.schema import Sweep
from resnet56.sweep.space import distribution, from_json, to_scalar
from resnet56.sweep.storage import import_optuna


def importance(content: Sweep) -> dict[str, float]:
    """Return the fraction of the variance of the accuracy that each setting explains (fANOVA).

    The function uses only completed trials. The result is empty if there are fewer than four
    completed trials, or if all have the same value.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    optuna = import_optuna()
    complete = [trial for trial in content["trials"] if trial["state"] == "complete"]
    if len(complete) < 4 or len({trial["value"] for trial in complete}) == 1:
        return {}
    distributions = {
        name: distribution(name, from_json(values)) for name, values in content["space"].items()
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.create_trial(
                params={name: to_scalar(value) for name, value in trial["settings"].items()},
                distributions=distributions,
                value=trial["value"],
            )
            for trial in complete
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return shares
