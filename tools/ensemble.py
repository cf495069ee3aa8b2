"""Print the test accuracy of an ensemble: python tools/ensemble.py RUN RUN ...

The ensemble averages the softmax outputs of the runs. The logits come from predictions.npz, which
`resnet56 evaluate RUN` writes.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.special import softmax

USAGE = "usage: python tools/ensemble.py RUN RUN ..."


def main(runs: list[Path]) -> None:
    """Print the accuracy of each run and of the ensemble."""
    probabilities, labels = [], None
    for run in runs:
        with np.load(run / "predictions.npz") as file:
            if labels is not None and not np.array_equal(labels, file["labels"]):
                sys.exit(f"{runs[0]} and {run} were evaluated on different images")
            labels = file["labels"]
            probabilities.append(softmax(file["logits"].astype(np.float64), axis=1))
        print(f"{run}: {np.mean(probabilities[-1].argmax(axis=1) == labels):.2%}")
    mean = np.mean(probabilities, axis=0)
    print(f"ensemble of {len(runs)}: {np.mean(mean.argmax(axis=1) == labels):.2%}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(USAGE)
    main([Path(argument) for argument in sys.argv[1:]])
