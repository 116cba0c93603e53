"""Saving and restoring: Orbax folders, written in the background and visible only when complete; nothing is pickled."""

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

_Tree = TypeVar("_Tree")


class Checkpoints:
    """The numbered checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, enable_async_checkpointing=True
        )
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Copies the tree and writes it in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: _Tree) -> _Tree:
        """The tree saved at `step`; `like` gives structure, shapes, dtypes and shardings."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
