"""Write the example report and slides in docs/: python tools/example_report.py DIR RUN

The tool writes example-report.html, example-slides.html, and report.png, a screenshot of the
report. The example shows the pretrained model. Its run directory is not part of the repository.
Therefore, the tool creates a run directory at RUN from the files in results/ and the pretrained
weights. It then evaluates the run on the CIFAR-10 images in DIR. The report states how it was
created. If RUN is already evaluated, the tool only writes the files. It saves the screenshot only
if Chromium is on the PATH.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from resnet56.data.dataset import Dataset
from resnet56.data.readers import load_directory
from resnet56.evaluation import compare, evaluate_run, evaluated_model, measure_robustness
from resnet56.files import read_json, write_json
from resnet56.recipe import from_fields
from resnet56.report import page, render, slides
from resnet56.report.read import read_run
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Progress
from resnet56.runs.directory import RunDirectory
from resnet56.training import augmentation_of

USAGE = "usage: python tools/example_report.py DIR RUN"
ROOT = Path(__file__).parents[1]
KEPT = RunDirectory(ROOT / "results" / "best250-seed0")
NETWORK = "resnet56"  # the half-precision weights of that run
CPU = torch.device("cpu")
NOTE = (
    "This example was written by tools/example_report.py. The curves, the recipe, and the system "
    "are those of the training run results/best250-seed0. The results are those of its "
    "half-precision weights, which are part of the package."
)


def make_run(path: Path, dataset: Dataset) -> RunDirectory:
    """Write the run directory and evaluate it."""
    run = RunDirectory(path)
    run.create()
    recipe = from_fields(read_json(KEPT.recipe_file), str(KEPT.recipe_file))
    write_json(run.recipe_file, recipe.to_json())
    environment = KEPT.read_environment()
    assert environment is not None
    environment["data"] = {
        "origin": environment["data"]["origin"],
        "source": dataset.source,
        "flip": dataset.allow_flip,
    }
    run.write_environment(environment)
    rows = KEPT.read_metrics()
    for row in rows:
        run.append_metrics(row)
    progress = Progress(epoch=rows[-1]["epoch"], step=rows[-1]["step"])
    metadata = {"weights": pretrained.card(NETWORK)["weights"], "data": dataset.fingerprint()}
    run.save(replace(pretrained.load(NETWORK), progress=progress, metadata=metadata))
    evaluation = evaluate_run(
        run,
        dataset,
        device=CPU,
        augmentation=augmentation_of(recipe, allow_flip=dataset.allow_flip),
    )
    checkpoint = run.load()
    # Do not measure the speed, because this may not be the machine that trained the network.
    robustness = measure_robustness(evaluated_model(checkpoint, CPU), dataset.test, 500)
    run.write_evaluation({**evaluation, "robustness": robustness})
    first, second = evaluated_model(checkpoint, CPU), evaluated_model(checkpoint, CPU, "bf16")
    comparison = compare(first, second, ("cpu fp32", "cpu bf16"), dataset.test)
    run.add_comparison(comparison, progress.step)
    return run


def write(run: RunDirectory) -> None:
    """Write the report, the slides, and the screenshot."""
    facts = replace(read_run(run.path), path=KEPT.path)  # the path to show on the page
    out = ROOT / "docs" / "example-report.html"
    content = page.content(facts)
    content["story"]["state"].append(NOTE)
    render.write_html(out, "page", content)
    deck = out.with_name("example-slides.html")
    render.write_html(deck, "slides", slides.content(facts), "slides")
    if chromium := shutil.which("chromium"):
        command = [chromium, "--headless", "--no-sandbox", "--window-size=1280,900"]
        screenshot = f"--screenshot={ROOT / 'docs' / 'report.png'}"
        subprocess.run([*command, "--hide-scrollbars", screenshot, out.as_uri()], check=True)


def main(directory: Path, path: Path) -> None:
    """Create and evaluate the run if necessary, and write the files."""
    run = RunDirectory(path)
    if not run.parity_file.exists():  # evaluation writes this file last
        run = make_run(path, load_directory(directory))
    write(run)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
