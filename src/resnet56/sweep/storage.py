"""The storage of a sweep: its directory, and its Optuna study in a database."""

import contextlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from resnet56.errors import MissingExtraError, RunError, UsageError, one_line, option
from resnet56.runs.schema import Sweep
from resnet56.sweep.results import FILE, read_sweep

if TYPE_CHECKING:
    import optuna

MAX_RETRIES = 5  # maximum number of retries for a trial whose workers died
COMPARED = ("recipe", "fingerprint", "space", "seeds", "grid")  # settings that cannot change


def import_optuna() -> ModuleType:
    """Import Optuna, and disable its logging.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("Optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    module: ModuleType = optuna
    return module


def prepare_directory(out: Path, content: Sweep) -> None:
    """Create the directory of the sweep, or check that it contains the same sweep."""
    if (out / FILE).exists():
        _require_same(content, cast(dict[str, Any], read_sweep(out)), str(out))
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise RunError(f"cannot use {out} for a sweep: {error.strerror or error}") from None
    # Another worker may have created the database and started the first trial.
    others = [n for n in others if not n.startswith(("study.db", "trial-")) and n[-4:] != ".tmp"]
    if others:
        raise RunError(
            f"{out} is not a sweep but contains files such as {others[0]}; choose another "
            f"directory for {option('out')}"
        )


def _require_same(content: Sweep, saved: Mapping[str, Any], place: str) -> None:
    """Raise UsageError if the settings of a sweep differ from the saved settings."""
    new: dict[str, Any] = json.loads(json.dumps(content))
    remedy = f"to continue it, repeat its options; otherwise, choose another {option('out')}"
    for key in COMPARED:
        if new[key] == saved.get(key):
            continue
        if key == "fingerprint":
            difference = "a different data set"
        elif key == "recipe":
            old = saved["recipe"]
            changes = [f"{n} {old.get(n)} -> {v}" for n, v in new["recipe"].items() if v != old[n]]
            difference = f"a different recipe ({', '.join(changes)})"
        elif key == "space":
            difference = f"different values to vary ({one_line(json.dumps(saved['space']))})"
        elif key == "seeds":
            difference = f"different seeds ({' '.join(map(str, saved['seeds']))})"
        else:
            difference = "a grid" if saved["grid"] else f"no {option('grid', True)}"
        raise UsageError(f"{place} contains a sweep with {difference}; {remedy}")


def open_study(content: Sweep, url: str | None, directory: Path, heartbeat: int) -> "optuna.Study":
    """Open or create the study, and check its settings."""
    import optuna

    storage = _open_storage(url, directory, heartbeat)
    study = optuna.create_study(
        study_name=content["study"], storage=storage, direction="maximize", load_if_exists=True
    )
    # Store each setting in its own attribute, because some databases limit the length of an
    # attribute.
    saved = study.user_attrs
    for key in COMPARED:
        if key not in saved:
            study.set_user_attr(key, content[key])  # type: ignore[literal-required]
    _require_same(content, study.user_attrs, f"the study {content['study']!r}")
    return study


def _open_storage(url: str | None, directory: Path, heartbeat: int) -> Any:
    """Open the database. Raises UsageError or RunError if that fails."""
    import sqlalchemy
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    if url is None:
        parsed = sqlalchemy.URL.create("sqlite", database=str(directory / "study.db"))
    else:
        try:
            parsed = sqlalchemy.make_url(url)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise UsageError(
                f"{option('storage')} must be a URL such as postgresql://user:password@host/name, "
                f"not {one_line(repr(url))}"
            ) from None
    dialect = parsed.get_backend_name()
    if dialect == "postgresql" and "+" not in parsed.drivername:
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    connect = {"timeout": 60} if dialect == "sqlite" else {"connect_timeout": 10}
    for attempt in itertools.count():
        try:
            return RDBStorage(
                # Double the braces, because Optuna calls `str.format` on the URL.
                parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
                engine_kwargs={"connect_args": connect, "pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
            )
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise UsageError(
                f"the driver for {parsed.drivername} is not installed: {one_line(error)}"
            ) from None
        except sqlalchemy.exc.DBAPIError as error:
            # If two workers create the tables at the same time, one of them can fail.
            if attempt == 2:
                reason = one_line(error.orig)
                raise RunError(f"the storage {shown} does not respond: {reason}") from None
            time.sleep(1)
        except RuntimeError as error:  # another version of Optuna created the tables
            raise RunError(f"cannot use the storage {shown}: {one_line(error)}") from None
    raise AssertionError


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Convert database errors in the block to RunError."""
    import sqlalchemy
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = one_line(getattr(cause, "orig", None) or cause or error)
        raise RunError(
            f"the storage of the sweep does not respond: {reason}; run the same command again to "
            "continue"
        ) from error


@contextlib.contextmanager
def ignore_experimental_warnings() -> Iterator[None]:
    """Ignore Optuna's warnings about experimental functions, such as heartbeats."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
