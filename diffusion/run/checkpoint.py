"""Saves and restores checkpoints: Orbax folders, written in the background, visible only when complete, without pickle.

    checkpoints/<step>/state      the tree of arrays
    checkpoints/<step>/about      shape, dtype and checksum of every leaf; metrics; notes of the caller; a CRC-32
    checkpoints/damaged-<step>    a checkpoint that could not be read, set aside; it is never deleted or overwritten

Leaves are identified by the names under which they were saved, even if the code has renamed them since
(`storage/formats.py`). A flipped bit need not break the file format, so a checkpoint is good only if every leaf has the
checksum it was saved with. The checksum is a sum over elements, so it does not depend on how they are distributed over
devices and processes. A checkpoint with other names, shapes or dtypes is not damaged; it belongs to another model.
"""

import hashlib
import json
import logging
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from trimask.diffusion.run.folder import writing
from trimask.diffusion.run.processes import any_process, is_first, sum_over_processes, wait_for_all
from trimask.tokenizers.storage.files import shortened
from trimask.tokenizers.storage.formats import current_name
from trimask.tokenizers.storage.json_text import parse_json

_ELEMENTS_AT_A_TIME = 1 << 20
_JSON, _JSON_FOLDER = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata"), "array_metadatas"
"""Names of the files, and of the folder of files, that Orbax reads as JSON."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or whose content is not what was saved."""


class Restored(NamedTuple):
    """A restored checkpoint: its step, its tree, and the notes saved with it."""

    step: int
    tree: Any
    notes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept; the fields are those of LoopConfig (`keep_last`, `keep_every`, …)."""

    last: int = 2
    every: int | None = None
    step: int | None = None
    """A step whose checkpoint is always kept. None: no such step."""
    best: int = 0
    metric: str = "loss"


@dataclass(frozen=True)
class _KeepBest:
    """Orbax preservation policy that keeps the checkpoints with the lowest metric.

    Orbax's own policy would end the run at a single unreadable number.
    """

    number: int
    metric: str
    metrics: Mapping[int, Mapping[str, float]]
    """Metrics by step; the mapping grows with every saved checkpoint."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        known = {c.step: self.metrics[c.step] for c in checkpoints if c.step in self.metrics}
        best = _ranked(known, self.metric)[: self.number]
        return [checkpoint.step in best for checkpoint in checkpoints]


class Checkpoints:
    """The numbered checkpoints of one run folder; read-only unless `keep` says which of them to keep."""

    def __init__(self, run: Path, keep: Retention | None = None):
        self.run, self.folder = run, run / "checkpoints"
        self._metrics: dict[int, Mapping[str, float]] = {}
        options = ocp.CheckpointManagerOptions(
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
            preservation_policy=None if keep is None else self._policy(keep),
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        )
        _quiet_orbax()
        with writing(run, Exception):
            self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        self._metrics |= self._read_metrics()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with writing(self.run, Exception):
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def best(self, metric: str) -> int:
        """Step of the checkpoint with the lowest value of a metric. Raises ValueError if none has the metric."""
        ranked = _ranked(self._metrics, metric)
        if not ranked:
            known = sorted({name for metrics in self._metrics.values() for name in metrics})
            raise ValueError(f"{self.folder}: no checkpoint has the metric {metric!r}; there are {', '.join(known)}")
        return ranked[0]

    def save(self, step: int, tree: Any, *, notes: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Copies the tree and writes it in the background.

        `notes` are returned by `restore`; `metrics` decide which checkpoints are the best.
        """
        about = _signed({"arrays": _leaves(tree), "notes": notes, "metrics": metrics})
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(about))
        self._metrics[step] = metrics
        with writing(self.run, Exception):
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        with writing(self.run, Exception):
            self._manager.wait_until_finished()

    def restore_newest(self, like: Any, *, set_aside: bool, is_part: bool = False) -> Restored | None:
        """Restores the newest good checkpoint; None if there is none. Reports each damaged one in a line on stderr.

        `like` and `is_part` are as in `restore`. With `set_aside` a damaged checkpoint is renamed, so that its step can
        be saved again and nothing is lost. Raises ValueError if all checkpoints are damaged.
        """
        remaining, damaged = self.steps(), {path.name for path in self.folder.glob("damaged-*")}
        while remaining:
            step = remaining.pop()
            try:
                return self.restore(step, like, is_part=is_part)
            except DamagedCheckpoint as damage:
                name = self._set_aside(step).name if set_aside else str(step)
                damaged.add(name)
                kept = f", kept as {name}" if set_aside else ""
                then = f"going back to step {remaining[-1]}" if remaining else "no other is left"
                print(f"{damage}{kept}; {then}", file=sys.stderr)
        if damaged:
            raise ValueError(
                f"{self.folder}: no good checkpoint is left, all are damaged: {', '.join(sorted(damaged))}"
            )
        return None

    def restore(self, step: int, like: Any, *, is_part: bool = False) -> Restored:
        """Restores the tree saved at `step`.

        `like` gives structure, shapes, dtypes and shardings (without a sharding: the first local device). With
        `is_part`, `like` is a dictionary of some top-level branches, and only these are read. All processes of a run
        must call this together if arrays are sharded over their devices. Raises DamagedCheckpoint for damaged content,
        and ValueError for a missing step or another model's checkpoint.
        """
        if step not in self.steps():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self.folder}: no checkpoint of step {step}; there are {steps}")
        about = self._about(step)
        abstract = jax.tree.map(_abstract, like)
        if "arrays" not in about:
            raise ValueError(f"{self.folder / str(step)}: was written by another version of trimask")
        path, expected = self.folder / str(step), _leaves(abstract)
        saved_names = {_present_path(name): name for name in about["arrays"]}
        saved = {name: about["arrays"][saved_name] for name, saved_name in saved_names.items()}
        if is_part:
            saved = {name: leaf for name, leaf in saved.items() if name.partition("/")[0] in like}
        _require_same_tree(saved, expected, path)
        as_saved = _with_keys(abstract, {part: name for names in saved_names.items() for part, name in _parts(*names)})
        args: ocp.args.CheckpointArgs = ocp.args.StandardRestore(as_saved)
        if is_part:
            shardings = ocp.checkpoint_utils.construct_restore_args(as_saved)
            args = ocp.args.PyTreeRestore(as_saved, restore_args=shardings, partial_restore=True)
        read = {
            _name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(self._read_by_all(step, "state", args))
        }
        tree = jax.tree.unflatten(jax.tree.structure(abstract), [read[saved_names[name]] for name in expected])
        changed = [name for name, leaf in _leaves(tree).items() if leaf != saved[name]]
        if changed:
            raise DamagedCheckpoint(f"{path}: damaged: {', '.join(changed[:3])} is not what was saved")
        return Restored(step, tree, about["notes"])

    def digest(self, step: int) -> str:
        """Digest of the arrays of a step's checkpoint, by their checksums: 16 hexadecimal digits."""
        arrays = self._about(step).get("arrays", {})
        return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()[:16]

    def _about(self, step: int) -> dict[str, Any]:
        """Content of the checkpoint's `about` item, after checking its CRC-32."""
        _require_plain(self.folder / str(step))
        about = self._read(step, "about", ocp.args.JsonRestore())
        if not isinstance(about, dict) or _signed(about) != about:
            raise DamagedCheckpoint(f"{self.folder / str(step)}: damaged: about/ is not what was saved")
        return about

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """Reads one item of a checkpoint; turns any exception of Orbax's readers into DamagedCheckpoint."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # a damaged file can make Orbax's readers raise almost anything
            if "RESOURCE_EXHAUSTED" in str(error):  # too little memory is no fault of the checkpoint
                raise
            path = self.folder / str(step)
            raise DamagedCheckpoint(f"{path}: damaged: {item}/ cannot be read: {shortened(str(error))}") from error

    def _read_by_all(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """Reads an item in which every process has its part; all processes fail if one does."""
        tree, damage = None, None
        try:
            tree = self._read(step, item, args)
        except DamagedCheckpoint as error:
            damage = error
        if any_process(damage is not None):
            raise damage or DamagedCheckpoint(f"{self.folder / str(step)}: damaged: another process cannot read it")
        return tree

    def _read_metrics(self) -> dict[int, Mapping[str, float]]:
        """Metrics by step of all checkpoints that can be read."""
        by_step: dict[int, Mapping[str, float]] = {}
        for step in self.steps():
            with suppress(DamagedCheckpoint):
                metrics = self._about(step)["metrics"]
                by_step[step] = {current_name("metric", name): value for name, value in metrics.items()}
        return by_step

    def _policy(self, keep: Retention) -> policies.AnyPreservationPolicy:
        every = [] if keep.every is None else [policies.EveryNSteps(keep.every)]
        one = [] if keep.step is None else [policies.CustomSteps([keep.step])]
        return policies.AnyPreservationPolicy(
            [policies.LatestN(keep.last), *every, *one, _KeepBest(keep.best, keep.metric, self._metrics)]
        )

    def _set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, on the first process alone, and returns its new path."""
        names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        target = next(self.folder / name for name in names if not (self.folder / name).exists())
        wait_for_all(f"all processes have chosen a name for the damaged checkpoint of step {step}")
        if is_first():
            with writing(self.run):
                (self.folder / str(step)).rename(target)
        wait_for_all(f"the damaged checkpoint of step {step} is set aside")
        self._manager.reload()
        return target


def _require_plain(checkpoint: Path) -> None:
    """Raises DamagedCheckpoint for special files and for JSON that is not strict, before Orbax opens the checkpoint."""
    for path in checkpoint.rglob("*"):
        mode, name = path.lstat().st_mode, path.relative_to(checkpoint)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DamagedCheckpoint(f"{checkpoint}: damaged: {name} is neither a file nor a folder")
        if stat.S_ISREG(mode) and (path.name in _JSON or path.parent.name == _JSON_FOLDER):
            try:
                parse_json(path.read_bytes(), str(name), allows_infinity=True)
            except ValueError as error:
                raise DamagedCheckpoint(f"{checkpoint}: damaged: {shortened(str(error))}") from error


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, except that a thread whose write has failed raises that failure.

    Otherwise it would wait for the other processes, which in turn wait for the write, until the timeout.
    """
    failure = sys.exc_info()[1]
    if failure is not None:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _quiet_orbax() -> None:
    """Keeps Orbax's log messages off the terminal; the errors that it raises reach us anyway.

    After a failed read or write its threads keep logging, and TensorStore may report to an event loop that is already
    closed, long after the error was handled.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)  # which adds a filter once
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    is_of_tensorstore = "Future exception was never retrieved" in said and '" driver: ' in said
    return "orbax" not in Path(record.pathname).parts and "/orbax/" not in said and not is_of_tensorstore


@dataclass(frozen=True)
class _UnraisableHook:
    """`sys.unraisablehook` that leaves out Orbax's coroutines and closed event loops."""

    rest: Callable[[Any], object]
    """The hook that is given everything else."""

    def __call__(self, failure: Any) -> None:
        code = getattr(failure.object, "cr_code", None)
        is_orbax = code is not None and "orbax" in Path(code.co_filename).parts
        if not is_orbax and str(failure.exc_value) != "Event loop is closed":
            self.rest(failure)


def _ranked(metrics: Mapping[int, Mapping[str, float]], metric: str) -> list[int]:
    """Steps that have the metric, lowest value first."""
    return sorted((step for step in metrics if metric in metrics[step]), key=lambda step: metrics[step][metric])


def _leaves(tree: Any) -> dict[str, list[Any]]:
    """Shape, dtype and checksum of every leaf, by name; the checksum is 0 in a tree of ShapeDtypeStructs."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor() as threads:
        local = np.array(list(threads.map(_checksum_here, (leaf for _, leaf in named))), np.uint64)
    is_described = any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in named)
    checksums = local if is_described else sum_over_processes(local)
    return {
        _name(path): [list(leaf.shape), str(leaf.dtype), int(checksum)]
        for (path, leaf), checksum in zip(named, checksums, strict=True)
    }


def _checksum_here(leaf: Any) -> int:
    """Checksum of the elements whose first copy is on this process: Σ bits·w modulo 2⁶⁴.

    The weight w of an element is odd and pseudo-random in its index, so flipped bits and swapped elements both change
    the sum.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return 0
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        shards = [((0,) * leaf.ndim, leaf)]
    else:
        shards = [
            (tuple(part.start or 0 for part in shard.index), np.asarray(shard.data))
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]
    return sum(_checksum(leaf.shape, start, values) for start, values in shards) % 2**64


def _checksum(shape: tuple[int, ...], start: tuple[int, ...], values: np.ndarray) -> int:
    """Checksum of the part of an array that begins at index `start`, computed a few rows at a time to save memory."""
    rows = max(1, _ELEMENTS_AT_A_TIME * len(values) // values.size) if values.ndim and values.size else 1
    if values.ndim and len(values) > rows:
        first, *rest = start
        return sum(_checksum(shape, (first + n, *rest), values[n : n + rows]) for n in range(0, len(values), rows))
    index = np.zeros((), np.uint64)
    for size, first, length in zip(shape, start, values.shape, strict=True):
        index = index[..., None] * np.uint64(size) + np.arange(first, first + length, dtype=np.uint64)
    bits = values.reshape(-1).view(f"u{values.itemsize}").astype(np.uint64)
    return int(np.dot(bits, index.reshape(-1) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)))


def _present_path(name: str) -> str:
    """Current name of a leaf that was saved under this name."""
    return "/".join(current_name("parameter", part) for part in name.split("/"))


def _parts(present: str, saved: str) -> Iterator[tuple[str, str]]:
    """Yields each prefix of a leaf's current path, and the name of the prefix's last part in the file."""
    parts = present.split("/")
    for number, name in enumerate(saved.split("/"), 1):
        yield "/".join(parts[:number]), name


def _with_keys(tree: Any, names: Mapping[str, str], path: str = "") -> Any:
    """The tree with its dictionary keys replaced by `names[path of the key]`."""
    if jax.tree_util.all_leaves([tree]):
        return tree
    children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    inner = [(f"{path}{_name(key)}", child) for key, child in children]
    changed = [_with_keys(child, names, f"{child_path}/") for child_path, child in inner]
    if isinstance(tree, dict):
        return {names[child_path]: child for (child_path, _), child in zip(inner, changed, strict=True)}
    return jax.tree.unflatten(structure, changed)


def _name(path: Any) -> str:
    """Name of a leaf in a checkpoint: its path, joined by /."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its CRC-32 added as `crc32`."""
    rest = {name: value for name, value in content.items() if name != "crc32"}
    return {**rest, "crc32": zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same_tree(saved: dict[str, list[Any]], expected: dict[str, list[Any]], path: Path) -> None:
    """Raises ValueError, naming the first differences, for a checkpoint of another model."""
    old, new = ({name: f"{leaf[1]}{leaf[0]}" for name, leaf in tree.items()} for tree in (saved, expected))
    changed = [
        f"{name}: {old.get(name, 'absent')} → {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{path}: not a checkpoint of the model in config.json; checkpoint → model: {'; '.join(changed[:3])}{more}"
        )
