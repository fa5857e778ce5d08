"""Training checkpoints through Orbax: asynchronous, atomic, the last N kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dspark_jax.characters import first_line
from dspark_jax.files import SaveError

Tree = Any


class Checkpoints:
    """Checkpoints of one run, by step; a context manager that waits for the last write.

    What is written in the background may fail: :meth:`check` says so, as does whatever is asked
    next.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """Open (and create) a directory of checkpoints of which the last ``keep`` stay.

        Raises:
            ValueError: it is a file.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.directory = directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file, not a directory of checkpoints")
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except SaveError:
            if error is None:  # or that is what is said
                raise
        finally:
            with contextlib.suppress(Exception):  # which says again what is known already
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree) -> None:
        """Write ``state`` in the background, unless this step is there already.

        Raises:
            SaveError: it cannot be written, or an earlier step could not be.
        """
        if step not in self._manager.all_steps():
            self._said(lambda: self._manager.save(step, args=ocp.args.StandardSave(state)))

    def check(self) -> None:
        """Look whether what was written in the background failed.

        Raises:
            SaveError: it did.
        """
        self._said(self._manager.check_for_errors)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            SaveError: it could not be.
        """
        self._said(self._manager.wait_until_finished)

    def _said(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # Orbax and its storage raise anything
            raise SaveError(
                f"a checkpoint could not be written to {self.directory} ({first_line(error)}): "
                f"make room there and run again to go on from step {self.latest or 0}"
            ) from None

    def restore(self, step: int, like: Tree) -> Tree:
        """The state of a step, with the structure, shapes, dtypes and shardings of ``like``.

        Raises:
            ValueError: the checkpoint is damaged or was made by another configuration.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._restore(step, ocp.args.StandardRestore(abstract))

    def restore_part(self, step: int, like: Mapping[str, Tree]) -> Tree:
        """Some of the fields of a step's state, by their names, in the form of ``like``.

        Raises:
            ValueError: as for :meth:`restore`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        forms = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._restore(step, ocp.args.PyTreeRestore(abstract, forms, partial_restore=True))

    def _restore(self, step: int, how: Any) -> Tree:
        try:
            return self._manager.restore(step, args=how)
        except Exception as error:  # Orbax and its storage raise anything on damaged files
            raise ValueError(
                f"checkpoint {self.directory / str(step)} does not fit this configuration or is "
                f"damaged ({first_line(error)}): train into another directory, or remove that "
                "step to go on from the one before"
            ) from None
