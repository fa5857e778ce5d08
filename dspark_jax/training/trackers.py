"""Trackers of experiments: each a context manager around a callback of ``fit``.

    with tensorboard() as track:
        fit(recipe, callbacks=[track])

Each needs its library, an extra of this package by the same name. Nothing is opened before the
first report, which only the process that writes makes; what is open is closed at the end, also of a
training that fails. A run that goes on begins a new experiment, but for TensorBoard's, whose
repeated steps are hidden.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dspark_jax.training.fit import Callback
from dspark_jax.training.records import Report

# Log some numbers of a step, and the end of it.
Log = Callable[[dict[str, float], int], object]


@contextmanager
def _tracker(open_at: Callable[[Report, ExitStack], Log]) -> Iterator[Callback]:
    """A callback that opens its experiment at the first report."""
    with ExitStack() as stack:
        log: Log | None = None

        def track(report: Report) -> None:
            nonlocal log
            if log is None:
                log = open_at(report, stack)
            log(report.scalars(), report.step)

        yield track


def _library(name: str, package: str) -> Any:
    """A tracker's library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"the tracker {name} needs {package}: pip install 'dspark-jax[{name}]'"
        ) from None


def _settings(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report.recipe)


def tensorboard(directory: str | Path | None = None) -> AbstractContextManager[Callback]:
    """TensorBoard's event files.

    Args:
        directory: where to; None for ``tensorboard`` in the run's.

    Raises:
        ValueError: the library is not installed.
    """
    library = _library("tensorboard", "tensorboardX")

    def open_at(report: Report, stack: ExitStack) -> Log:
        place = Path(report.recipe.out) / "tensorboard" if directory is None else directory
        writer = library.SummaryWriter(str(place), purge_step=report.step)
        stack.callback(writer.close)

        def log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return log

    return _tracker(open_at)


def wandb(**options: Any) -> AbstractContextManager[Callback]:
    """Weights & Biases.

    Args:
        options: of ``wandb.init``, for instance ``mode="offline"``; the project is ``"dspark"``,
            the name that of the run's directory, unless they say otherwise.

    Raises:
        ValueError: the library is not installed.
    """
    library = _library("wandb", "wandb")

    def open_at(report: Report, stack: ExitStack) -> Log:
        given = {"project": "dspark", "name": Path(report.recipe.out).name} | options
        run = library.init(config=_settings(report), **given)
        stack.callback(run.finish)
        # Reports of one step are several rows with one number.
        run.define_metric("*", step_metric="step")
        return lambda values, step: run.log(values | {"step": step})

    return _tracker(open_at)


def trackio(**options: Any) -> AbstractContextManager[Callback]:
    """Trackio.

    Args:
        options: of ``trackio.init``; project and name as for :func:`wandb`.

    Raises:
        ValueError: the library is not installed.
    """
    library = _library("trackio", "trackio")

    def open_at(report: Report, stack: ExitStack) -> Log:
        given = {"project": "dspark", "name": Path(report.recipe.out).name} | options
        library.init(config=_settings(report), **given)
        stack.callback(library.finish)
        return lambda values, step: library.log(values, step=step)

    return _tracker(open_at)


def mlflow(**options: Any) -> AbstractContextManager[Callback]:
    """MLflow, at the place that ``mlflow.set_tracking_uri`` or its environment names.

    Args:
        options: of ``mlflow.start_run``; the name of the run is that of its directory, unless they
            say otherwise.

    Raises:
        ValueError: the library is not installed.
    """
    library = _library("mlflow", "mlflow")

    def open_at(report: Report, stack: ExitStack) -> Log:
        given = {"run_name": Path(report.recipe.out).name} | options
        stack.enter_context(library.start_run(**given))
        library.log_params(_settings(report))
        return lambda values, step: library.log_metrics(values, step=step)

    return _tracker(open_at)


# By the names of their extras.
TRACKERS: Mapping[str, Callable[[], AbstractContextManager[Callback]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "mlflow": mlflow,
}
