"""The generated pages of the documentation are those that today's program generates."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from resnet56.cli import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["command_line", "run_directory"])
def test_the_reference_is_up_to_date(reference: ModuleType, page: str) -> None:
    """If this fails, run `python tools/reference.py`."""
    file = ROOT / "docs" / "reference" / f"{page.replace('_', '-')}.md"
    assert file.read_text(encoding="utf-8") == getattr(reference, page)()


def test_every_command_has_a_section(reference: ModuleType) -> None:
    assert reference.commands() == list(COMMANDS)
