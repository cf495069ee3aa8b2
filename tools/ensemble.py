"""Print the test accuracy of an ensemble: python tools/ensemble.py RUN RUN ...

The ensemble averages the softmax outputs of the runs. The logits come from predictions.npz, which
`resnet56 evaluate RUN` writes.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.special import softmax

from resnet56.errors import Error
from resnet56.runs.directory import RunDirectory

USAGE = "usage: python tools/ensemble.py RUN RUN ..."


def main(runs: list[Path]) -> None:
    """Print the accuracy of each run and of the ensemble."""
    probabilities, labels = [], None
    for run in runs:
        arrays = RunDirectory(run).read_predictions()
        if arrays is None:
            sys.exit(f"{run} contains no predictions.npz; write it with: resnet56 evaluate {run}")
        if labels is not None and not np.array_equal(labels, arrays["labels"]):
            sys.exit(f"{runs[0]} and {run} were evaluated on different images")
        labels = arrays["labels"]
        probabilities.append(softmax(arrays["logits"].astype(np.float64), axis=1))
        print(f"{run}: {np.mean(probabilities[-1].argmax(axis=1) == labels):.2%}")
    mean = np.mean(probabilities, axis=0)
    print(f"ensemble of {len(runs)}: {np.mean(mean.argmax(axis=1) == labels):.2%}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(USAGE)
    try:
        main([Path(argument) for argument in sys.argv[1:]])
    except Error as error:
        sys.exit(str(error))
