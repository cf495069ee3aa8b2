"""A worker of a sweep: a process that trains the trials of a study."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet56.data.dataset import Dataset
from resnet56.errors import NotFiniteError, TrainingError, one_line
from resnet56.progress import Output, TrainingDisplay
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import EpochMetrics, Sweep
from resnet56.sweep.results import describe_trial, trial_number, with_trials, write_sweep
from resnet56.sweep.space import Space, suggest
from resnet56.sweep.trials import Trials, this_worker
from resnet56.training import CallbackError, train

if TYPE_CHECKING:
    import optuna

POLL = 1.0  # seconds between queries while other workers run the last trials


class _SurplusError(Exception):
    """Other workers have started enough trials, or a trial with the same settings."""


@dataclass
class Worker:
    """One process that works on a study.

    Attributes:
        trials: the trials of the study.
        sampler: function that returns the sampler for a trial number.
        space: the values of each field that varies.
        recipes: one recipe per seed, without the settings of a trial.
        dataset: the data set.
        directory: directory of the sweep.
        content: content of sweep.json without trials.
        base: a pair (name, recipe). The command for the best trial is based on this recipe.
        options: the arguments `device` and `threads` of `train`.
        output: display that shows a line per trial.
    """

    trials: Trials
    sampler: Callable[[int], Any]
    space: Space
    recipes: Sequence[Recipe]
    dataset: Dataset
    directory: Path
    content: Sweep
    base: tuple[str, Recipe]
    options: dict[str, Any]
    output: Output
    number: int | None = field(default=None, init=False)  # number of the current trial

    def work(self) -> Sweep:
        """Run trials until enough of them are finished. Return the content of sweep.json."""
        self._save()
        waiting = False
        total = self.trials.total
        done = len(self.trials.finished())
        if done:
            self.output.log(f"{done} of {total} trials are finished")
        while True:
            self.trials.recover()
            trials = self.trials.counted()
            finished = self.trials.finished()
            states = [trial.state.name for trial in trials]
            if len(finished) >= total:
                return self._save()
            if "WAITING" in states or len(trials) < total:
                waiting = False
                self._run_trial()
            else:
                if not waiting:
                    self.output.log("waiting for the trials of other workers")
                waiting = True
                time.sleep(min(POLL, self.trials.heartbeat))

    def _run_trial(self) -> None:
        """Run a trial and show its result."""
        study = self.trials.study
        self.number = None
        try:
            study.optimize(self._objective, n_trials=1, catch=(_SurplusError,))
        except BaseException as error:
            trial = None if self.number is None else study.trials[self.number]
            if trial is None:
                raise
            if isinstance(error, Exception) and trial.number in self.trials.superseded():
                self.output.log(f"another worker has taken over trial {trial_number(trial)}")
                return
            if trial.state.name == "FAIL":
                self.trials.retry(trial)
            self._save()
            raise
        assert self.number is not None
        trial = study.trials[self.number]
        if trial.state.name != "FAIL":
            content = self._save()
            self.output.log(describe_trial(trial, content))

    def _objective(self, trial: "optuna.Trial") -> float:
        """Train with the settings of a trial. Return the mean validation accuracy."""
        from optuna.exceptions import TrialPruned

        self.number = trial.number
        number = trial_number(trial)
        trial.set_user_attr("worker", this_worker())
        trial.set_user_attr("directory", number)
        self.trials.study.sampler = self.sampler(trial.number)
        settings = {name: suggest(trial, name, values) for name, values in self.space.items()}
        if self.trials.is_surplus(trial):
            trial.set_user_attr("surplus", True)
            raise _SurplusError
        accuracies: list[float] = []
        for index in range(len(self.recipes)):
            recipe = replace(self.recipes[index], **settings)
            try:
                accuracies.append(self._train(trial, number, recipe, index))
            except (TrainingError, NotFiniteError) as error:
                trial.set_user_attr("diverged", one_line(error))
                raise TrialPruned from error
            trial.set_user_attr("accuracies", accuracies)
        return statistics.fmean(accuracies)

    def _train(self, trial: "optuna.Trial", number: int, recipe: Recipe, index: int) -> float:
        """Train with one seed. Report the validation accuracy of each epoch to Optuna."""
        from optuna.exceptions import TrialPruned

        suffix = f"-seed{recipe.seed}" if len(self.recipes) > 1 else ""
        run = RunDirectory(self.directory / f"trial-{number:04d}{suffix}")
        last = recipe.epochs * len(self.recipes)
        accuracy = math.nan

        def report(row: EpochMetrics) -> None:
            nonlocal accuracy
            accuracy = row["val_accuracy"]
            step = index * recipe.epochs + row["epoch"]
            trial.report(accuracy, step)
            if step < last and trial.should_prune():
                raise TrialPruned

        resume = run.checkpoint_file.exists()
        if resume:
            epochs = run.load().progress.epoch
            for row in run.read_metrics()[:epochs]:
                report(row)
        display = TrainingDisplay(_Status(self.output, f"trial {number}{suffix}"))
        with display:
            try:
                train(
                    recipe,
                    self.dataset,
                    run.path,
                    resume=resume,
                    progress=display,
                    callbacks=[report],
                    **self.options,
                )
            except CallbackError as error:
                raise error.__cause__ or error from None
        return accuracy

    def _save(self) -> Sweep:
        """Write sweep.json with all trials. Return its content."""
        trials = self.trials.counted()
        content = with_trials(self.content, trials, self.space, self.recipes[0], self.base)
        write_sweep(self.directory, content)
        return content


class _Status(Output):
    """Shows only the status line of a trial."""

    def __init__(self, output: Output, label: str) -> None:
        self.output, self.label = output, label

    def status(self, label: str, fraction: float, text: str) -> None:
        """Show the status after the name of the trial."""
        self.output.status(f"{self.label}, {label}", fraction, text)

    def end(self) -> None:
        """Remove the status."""
        self.output.end()
