"""Who imports whom. Imports only go down; a new arrow is an edited line here."""

import ast
from pathlib import Path

import resnet56

HOUSE = Path(resnet56.__file__).parent

# From the ground up: a module may import those below it that its line names.
ARROWS: dict[str, set[str]] = {
    # ground floor: leaves
    "errors": set(),
    "augment": set(),
    "metrics": set(),
    "parallel": set(),
    "progress": set(),
    "data": {"errors"},
    "download": {"errors"},
    "model": {"errors"},
    "recipe": {"errors"},
    "rundir": {"errors"},
    "runtime": {"errors"},
    # first floor
    "batches": {"augment", "data", "errors"},
    "step": {"recipe", "runtime"},
    "evaluation": {"augment", "data", "metrics", "model", "rundir", "runtime"},
    # second floor
    "training": {
        "__init__", "batches", "data", "errors", "evaluation", "model", "parallel", "progress",
        "recipe", "rundir", "runtime", "step",
    },
    # roof
    "cli": {
        "__init__", "data", "download", "errors", "evaluation", "model", "parallel", "progress",
        "recipe", "rundir", "runtime", "training",
    },
    "__main__": {"cli"},
}  # fmt: skip


def imported(module: Path) -> set[str]:
    """Our own modules that `module` imports, anywhere in it, but for type checkers only."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
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
                submodule = rest and (HOUSE / f"{rest[0]}.py").exists()
                found.add(rest[0] if submodule else "__init__")
    return found


def test_imports_are_those_of_the_table() -> None:
    modules = {path.stem: path for path in HOUSE.glob("*.py") if path.stem != "__init__"}
    assert {name: imported(path) for name, path in modules.items()} == ARROWS


def test_imports_only_go_down() -> None:
    order = ["__init__", *ARROWS]
    for name, below in ARROWS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


def test_only_the_door_knows_recipes() -> None:
    """Design: recipes stop at the door; everything else takes plain arguments."""
    knowing = {name for name, below in ARROWS.items() if "recipe" in below}
    assert knowing == {"step", "training", "cli"}


def test_the_public_names_are_pinned_and_there() -> None:
    assert resnet56.__all__ == [
        "RECIPES", "Dataset", "Error", "Recipe", "ResNet", "Split", "__version__", "build",
        "describe", "evaluate", "load_digits", "load_folder", "predict_logits", "train",
    ]  # fmt: skip
    for name in resnet56.__all__:
        assert getattr(resnet56, name) is not None
