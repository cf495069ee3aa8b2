"""Imports between modules only go down. To add an import, edit the table in this file."""

import ast
import re
from collections.abc import Collection
from pathlib import Path

import resnet56

PACKAGE = Path(resnet56.__file__).parent
ROOT = Path(__file__).parents[1]

# From the lowest module to the highest. A module can import the modules that its line lists.
ARROWS: dict[str, set[str]] = {
    # ground
    "errors": set(),
    "libraries": set(),
    "notebook": {"errors"},
    "locks": set(),
    "distributed": {"errors"},
    "files": {"errors", "locks"},
    "progress": {"errors"},
    "recipe": {"errors"},
    "threads": {"errors"},
    "cadence": {"distributed", "threads"},
    "runtime": {"distributed", "errors"},
    # data
    "data.class_names": set(),
    "data.corruptions": set(),
    "data.image_headers": set(),
    "data.mixing": set(),
    "data.trivial_augment": set(),
    "data.archives": {"errors"},
    "data.augment": {"data.trivial_augment"},
    "data.dataset": {"errors", "notebook"},
    "data.image_files": {"errors"},
    "data.images": {"data.image_headers", "errors"},
    "data.pickles": {"errors"},
    "data.arrays": {"data.dataset", "errors"},
    "data.batches": {"data.augment", "data.dataset", "data.mixing", "errors"},
    "data.cifar": {"data.class_names", "data.dataset", "data.pickles", "errors"},
    "data.download": {"data.archives", "errors", "locks"},
    "data.image_directory": {"data.dataset", "data.image_files", "data.images", "errors"},
    "data.readers": {
        "data.archives", "data.cifar", "data.class_names", "data.dataset", "data.download",
        "data.image_directory", "data.image_files", "errors", "files", "progress",
    },
    # model
    "model": {"errors", "notebook"},
    "inspection": {"model"},
    "optimizer": {"errors", "recipe"},
    # kernels
    "kernels.compiler": set(),
    "kernels.cuda_graph": set(),
    "kernels.fused": {"kernels.compiler", "model"},
    "kernels.plan": {"kernels.compiler", "model"},
    "kernels.agreement": {"kernels.compiler", "model"},
    "kernels.native": {"kernels.agreement", "kernels.compiler", "kernels.plan", "model"},
    "kernels.triton_network": {
        "errors", "kernels.agreement", "kernels.compiler", "model",
    },
    # runs
    "runs.schema": {"errors", "files"},
    "runs.checkpoint": {"errors", "files", "runs.schema"},
    "runs.directory": {"errors", "files", "locks", "runs.checkpoint", "runs.schema"},
    "runs.pretrained": {"errors", "files", "runs.checkpoint", "runs.directory"},
    "runs.tensor_files": {"data.pickles", "errors", "runs.pretrained"},
    "runs.layouts": set(),
    "runs.hub": {"errors", "runs.layouts", "runs.pretrained"},
    "runs.state_dicts": {"data.pickles", "errors", "runs.layouts", "runs.tensor_files"},
    "runs.matching": {"errors", "model", "runs.hub", "runs.tensor_files"},
    "runs.convert": {
        "data.class_names", "errors", "model", "runs.checkpoint", "runs.hub", "runs.layouts",
        "runs.matching", "runs.state_dicts", "runs.tensor_files",
    },
    "runs.sources": {
        "errors", "files", "runs.checkpoint", "runs.convert", "runs.directory", "runs.hub",
        "runs.pretrained",
    },
    # step and evaluation
    "custom": {"data.batches", "errors", "runs.schema"},
    "inference": {
        "data.augment", "errors", "model", "progress", "runs.checkpoint", "runtime",
    },
    "metrics": {"errors", "notebook", "progress", "runs.schema"},
    "samples": {"data.augment", "data.batches", "data.dataset", "data.mixing", "metrics"},
    "evaluation": {
        "data.augment", "data.corruptions", "data.dataset", "errors", "inference", "metrics",
        "progress", "runs.checkpoint", "runs.directory", "runs.schema", "runtime", "samples",
    },
    "ema": {"runtime"},
    "distillation": {"data.batches", "errors", "inference", "runs.checkpoint", "runtime"},
    "execution": {
        "errors", "kernels.compiler", "kernels.fused", "kernels.native", "kernels.triton_network",
        "model", "recipe", "runtime",
    },
    "step": {
        "custom", "distillation", "ema", "kernels.cuda_graph", "optimizer", "recipe", "runtime",
    },
    # training and prediction
    "training.fine_tuning": {
        "distillation", "errors", "recipe", "runs.checkpoint", "runs.schema",
    },
    "training.setup": {
        "custom", "data.augment", "data.batches", "data.dataset", "distillation", "distributed",
        "errors", "execution", "model", "recipe", "runs.checkpoint", "runs.schema",
        "runs.sources", "runtime", "step", "training.fine_tuning",
    },
    "training.final_weights": {
        "data.batches", "data.dataset", "ema", "evaluation", "model", "training.fine_tuning",
        "training.setup",
    },
    "training.record": {
        "custom", "data.dataset", "errors", "files", "optimizer", "recipe", "runs.checkpoint",
        "runs.directory", "runs.schema", "runtime", "training.setup",
    },
    "training.loop": {
        "cadence", "custom", "data.batches", "data.dataset", "distributed", "errors", "progress",
        "recipe", "runs.checkpoint", "runs.directory", "runs.schema", "runtime", "step", "threads",
        "training.final_weights", "training.record", "training.setup",
    },
    "training": {
        "cadence", "custom", "data.dataset", "distributed", "errors", "evaluation", "files",
        "progress", "recipe", "runs.directory", "runs.schema", "runtime", "threads",
        "training.loop", "training.record", "training.setup",
    },
    "sweep.space": {"errors", "model", "recipe"},
    "sweep.results": {"errors", "progress", "recipe", "runs.schema", "sweep.space"},
    "sweep.storage": {"errors", "runs.schema", "sweep.results"},
    "sweep.sampling": {"sweep.space"},
    "sweep.importance": {"runs.schema", "sweep.space", "sweep.storage"},
    "sweep.trials": set(),
    "sweep.worker": {
        "data.dataset", "errors", "progress", "recipe", "runs.directory", "runs.schema",
        "sweep.results", "sweep.space", "sweep.trials", "training",
    },
    "sweep.search": {
        "data.dataset", "errors", "files", "progress", "recipe", "runs.schema", "sweep.sampling",
        "sweep.space", "sweep.storage", "sweep.trials", "sweep.worker",
    },
    "backends": {
        "data.augment", "data.images", "errors", "inference", "libraries", "runs.checkpoint",
        "runs.pretrained", "threads",
    },
    "predict": {
        "backends", "custom", "data.images", "errors", "files", "inference", "metrics", "notebook",
        "runs.checkpoint", "runs.pretrained", "runs.sources", "runtime", "threads",
    },
    "export": {
        "backends", "data.augment", "data.dataset", "errors", "files", "inference", "libraries",
        "metrics", "model", "progress", "runs.checkpoint", "runs.pretrained", "runs.schema",
    },
    "classifiers": {
        "backends", "data.dataset", "errors", "evaluation", "export", "files", "runs.checkpoint",
        "runs.directory", "runs.pretrained", "runs.sources", "runtime", "threads",
    },
    # report
    "significance": set(),
    "report.png": set(),
    "report.notebook": set(),
    "report.plots": {"libraries", "report.notebook"},
    "report.words": {"progress"},
    "report.recipe_words": {"recipe", "report.words", "runs.schema"},
    "report.render": {"files", "report.plots", "report.words"},
    "report.story": {"recipe", "report.recipe_words", "report.words", "runs.schema"},
    "report.read": {
        "errors", "files", "model", "recipe", "report.recipe_words", "runs.checkpoint",
        "runs.directory", "runs.schema",
    },
    "report.figures": {
        "errors", "report.plots", "report.read", "report.words", "runs.directory", "runs.schema",
    },
    "report.statements": {"report.read", "report.story", "report.words"},
    "report.charts": {"report.plots", "report.read", "report.story", "report.words"},
    "report.images": {"report.plots", "report.png", "report.read", "report.words"},
    "report.page": {
        "data.cifar", "report.charts", "report.images", "report.read", "report.recipe_words",
        "report.statements", "report.story", "report.words", "runs.schema",
    },
    "report.slides": {
        "recipe", "report.charts", "report.images", "report.plots", "report.read",
        "report.recipe_words", "report.statements", "report.story", "report.words", "runs.schema",
    },
    "report.comparison": {
        "report.plots", "report.read", "report.recipe_words", "report.statements", "report.words",
        "significance",
    },
    "report.sweep": {
        "errors", "report.plots", "report.words", "runs.schema", "significance", "sweep.importance",
        "sweep.results", "sweep.space",
    },
    "report": {
        "errors", "files", "report.comparison", "report.page", "report.read", "report.render",
        "report.slides", "report.sweep",
    },
    # benchmark
    "benchmark.interleave": set(),
    "benchmark.baseline": {"data.dataset", "model"},
    "benchmark.roofline": {"benchmark.interleave", "model", "runtime"},
    "benchmark.benchmark": {
        "backends", "benchmark.baseline", "benchmark.interleave", "benchmark.roofline", "cadence",
        "data.batches", "data.dataset", "errors", "execution", "export", "inference", "model",
        "recipe", "runs.checkpoint", "runs.directory", "runtime", "step",
    },
    # serve
    "serve": set(),
    "serve.docs": set(),
    "serve.meter": set(),
    "serve.schema": set(),
    "serve.middleware": {"errors", "serve.meter"},
    "serve.batching": {"data.images"},
    "serve.decode_worker": {"data.images", "errors"},
    "serve.limits": {"data.images"},
    "serve.decoding": {"data.images", "serve.decode_worker", "serve.limits"},
    "serve.uploads": {"errors", "serve.limits", "serve.schema"},
    "serve.service": {
        "data.images", "metrics", "predict", "serve.batching", "serve.decoding", "serve.limits",
        "serve.meter", "serve.schema", "serve.uploads",
    },
    "serve.app": {
        "__init__", "serve.batching", "serve.docs", "serve.limits", "serve.meter",
        "serve.middleware", "serve.schema", "serve.service", "serve.uploads",
    },
    "serve.server": {"errors", "serve.app", "serve.batching", "serve.limits"},
    # cli
    "cli": {"__init__", "errors"},
    "cli.arguments": {"errors"},
    "cli.tables": {"errors", "progress", "report.words"},
    "cli.describe": {"cli.arguments", "cli.tables", "files", "model"},
    "cli.common": {"data.readers", "distributed", "errors", "progress"},
    "cli.data": {"cli.arguments", "data.readers", "errors"},
    "cli.train": {
        "cli", "cli.arguments", "cli.common", "distributed", "errors", "files", "model", "progress",
        "recipe", "report", "runs.directory", "runtime", "threads", "training",
    },
    "cli.sweep": {
        "cli", "cli.arguments", "cli.common", "distributed", "errors", "files", "progress",
        "recipe", "runtime", "sweep.search", "sweep.space", "sweep.storage", "threads",
    },
    "cli.predict": {
        "cli.arguments", "cli.common", "data.image_files", "data.images", "errors", "files",
        "predict", "progress",
    },
    "cli.networks": {
        "classifiers", "cli.common", "data.augment", "errors", "evaluation", "files", "recipe",
        "report.read", "runs.pretrained", "runs.sources", "runtime", "training",
    },
    "cli.report": {
        "cli.arguments", "cli.common", "cli.networks", "errors", "files", "report",
        "report.sweep", "runs.sources",
    },
    "cli.compare": {
        "cli.arguments", "cli.common", "cli.networks", "cli.tables", "errors", "files", "report",
        "report.comparison",
    },
    "cli.import_": {
        "classifiers", "cli.arguments", "cli.common", "cli.networks", "data.class_names", "errors",
        "progress", "runs.directory", "runs.sources",
    },
    "cli.evaluate": {
        "classifiers", "cli.arguments", "cli.common", "cli.networks", "cli.tables", "data.arrays",
        "errors", "evaluation", "export", "files", "runtime",
    },
    "cli.export": {
        "cli.arguments", "cli.common", "errors", "export", "runs.pretrained", "runs.sources",
    },
    "cli.bench": {
        "benchmark.benchmark", "cli.arguments", "cli.common", "cli.tables", "errors", "files",
        "model", "recipe", "threads",
    },
    "cli.inspect": {
        "cli.arguments", "cli.common", "cli.tables", "data.augment", "data.dataset", "errors",
        "files", "inference", "inspection", "model", "report.plots", "runs.directory",
        "runs.pretrained", "runs.sources", "runtime", "threads",
    },
    "cli.serve": {
        "cli.arguments", "cli.common", "data.images", "errors", "predict", "serve.limits",
        "serve.server",
    },
    "__main__": {"cli"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Return each module by its dotted name in the package. A package stands for its __init__."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = file
    return found


def imported_by(file: Path, known: Collection[str]) -> set[str]:
    """Return the modules of this package that a module imports, except for type checking."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inside = name.partition(".")
            if package == "resnet56":
                # The name is a module, or a name in the module before its last dot.
                candidates = (inside, inside.rpartition(".")[0])
                found.add(next((name for name in candidates if name in known), "__init__"))
    return found


def test_imports_match_the_table() -> None:
    """Packages whose __init__ imports no module are not in the table."""
    known = modules()
    found = {name: imported_by(file, known) - {name} for name, file in known.items()}
    bare = {"__init__", "benchmark", "data", "kernels", "runs", "sweep"}
    assert {name: below for name, below in found.items() if name not in bare} == ARROWS
    assert not any(found[name] for name in bare)


def test_imports_only_go_down() -> None:
    order = ["__init__", *ARROWS]
    for name, below in ARROWS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


def test_the_documented_layout_names_every_module() -> None:
    """The packages report, serve and cli have one entry each."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page[page.index("src/resnet56/\n") :]
    directory, named = "", set()
    for indent, name in re.findall(r"^( +)([\w./]+)", tree[: tree.index("```")], re.MULTILINE):
        if name.endswith("/"):
            directory = name
        path = directory if name.endswith("/") else name if len(indent) == 2 else directory + name
        named.add(path.removesuffix("/").removesuffix(".py").replace("/", "."))
    whole = {"report", "serve", "cli"}
    small = {"__init__", "__main__"}
    assert (
        named == {name for name in modules() if name.partition(".")[0] not in whole} - small | whole
    )


def test_only_these_packages_import_recipes() -> None:
    """The other packages take plain arguments. The report describes recipes."""
    knowing = {name.partition(".")[0] for name, below in ARROWS.items() if "recipe" in below}
    assert knowing == {
        "benchmark", "cli", "execution", "optimizer", "report", "step", "sweep", "training",
    }  # fmt: skip


def test_the_public_names_are_pinned_and_exist() -> None:
    assert resnet56.__all__ == [
        "RECIPES", "Augmentation", "Batches", "Dataset", "EpochMetrics", "Error", "Evaluation",
        "Metrics", "Prediction", "Predictor", "Recipe", "ResNet", "Split",
        "__version__", "build", "channel_statistics", "describe", "evaluate", "load", "load_data",
        "plot_calibration", "plot_confusion_matrix", "plot_curves", "plot_mistakes",
        "predict_logits", "train",
    ]  # fmt: skip
    for name in resnet56.__all__:
        assert getattr(resnet56, name) is not None
