"""Who imports whom. Imports only go down; a new arrow is an edited line here."""

import ast
from pathlib import Path

import resnet56

HOUSE = Path(resnet56.__file__).parent

# From the ground up: a module may import those below it that its line names.
ARROWS: dict[str, set[str]] = {
    # ground floor: leaves
    "errors": set(),
    "libraries": set(),
    "compiler": set(),
    "metrics": set(),
    "parallel": set(),
    "corruptions": set(),
    "progress": set(),
    "data": {"errors"},
    "locks": set(),
    "download": {"errors", "locks"},
    "images": {"errors"},
    "pickles": {"errors"},
    "model": {"errors"},
    "recipe": {"errors"},
    "rundir": {"errors", "locks"},
    "runtime": {"errors"},
    "trivial": set(),
    # first floor
    "augment": {"trivial"},
    "batches": {"augment", "data", "errors"},
    "readers": {"data", "errors", "images", "pickles"},
    "shipped": {"errors", "rundir"},
    "fused": {"compiler", "model"},
    "native_plan": {"compiler", "model"},
    "native": {"compiler", "model", "native_plan"},
    "step": {"compiler", "errors", "fused", "model", "native", "recipe", "runtime"},
    "tables": {"errors", "progress"},
    "inference": {"model", "runtime"},
    "evaluation": {
        "augment", "corruptions", "data", "errors", "inference", "metrics", "model", "rundir",
        "runtime",
    },
    "report": {"errors", "libraries", "model", "progress", "recipe", "rundir"},
    # second floor
    "foreign": {"errors", "model", "readers", "rundir"},
    "predict": {
        "augment", "errors", "evaluation", "images", "inference", "libraries", "rundir", "runtime",
        "shipped",
    },
    "training": {
        "batches", "data", "errors", "evaluation", "model", "parallel", "progress",
        "recipe", "rundir", "runtime", "step",
    },
    "export": {
        "augment", "errors", "evaluation", "libraries", "model", "predict", "rundir", "shipped",
    },
    "stock": {"data", "model"},
    "contest": set(),
    "roofline": {"contest", "model", "runtime"},
    "bench": {
        "batches", "contest", "data", "errors", "evaluation", "export", "inference", "model",
        "predict", "recipe", "roofline", "rundir", "runtime", "step", "stock",
    },
    "serve": {"__init__", "errors", "images", "predict"},
    # roof
    "cli": {
        "__init__", "bench", "download", "errors", "evaluation", "export", "foreign", "images",
        "model", "parallel", "predict", "progress", "readers", "recipe", "report", "rundir",
        "runtime", "serve", "shipped", "tables", "training",
    },
    "__main__": {"cli"},
}  # fmt: skip


def imported(place: Path) -> set[str]:
    """Our own modules that a module, or a package's, import; not those for type checkers only."""
    files = place.glob("*.py") if place.is_dir() else [place]
    return set().union(*(imported_by(file) for file in files)) - {place.stem}


def imported_by(file: Path) -> set[str]:
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
            package, *rest = name.split(".")
            if package == "resnet56":
                inside = HOUSE / rest[0] if rest else HOUSE
                submodule = rest and (inside.is_dir() or inside.with_suffix(".py").exists())
                found.add(rest[0] if submodule else "__init__")
    return found


def test_imports_are_those_of_the_table() -> None:
    places = [*HOUSE.glob("*.py"), *(init.parent for init in HOUSE.glob("*/__init__.py"))]
    modules = {path.stem: path for path in places if path.stem != "__init__"}
    assert {name: imported(path) for name, path in modules.items()} == ARROWS


def test_imports_only_go_down() -> None:
    order = ["__init__", *ARROWS]
    for name, below in ARROWS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


def test_only_the_door_knows_recipes() -> None:
    """Recipes stop at the door: the rest takes plain arguments. The report describes them."""
    knowing = {name for name, below in ARROWS.items() if "recipe" in below}
    assert knowing == {"bench", "step", "training", "report", "cli"}


def test_the_public_names_are_pinned_and_there() -> None:
    assert resnet56.__all__ == [
        "RECIPES", "Dataset", "Error", "Prediction", "Predictor", "Recipe", "ResNet", "Split",
        "__version__", "build", "describe", "evaluate", "load", "load_digits", "load_folder",
        "predict_logits", "train",
    ]  # fmt: skip
    for name in resnet56.__all__:
        assert getattr(resnet56, name) is not None
