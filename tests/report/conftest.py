"""Fixtures that the tests of slides share."""

from pathlib import Path

import pytest
from report_fixtures import make_runs

from resnet56.report import write_report


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one run of each type, and return their directories by name."""
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def slide_files(runs: dict[str, Path]) -> dict[str, Path]:
    """Write the slides of each run into its directory, and return the files by name."""
    return {name: write_report([run], format="slides") for name, run in runs.items()}
