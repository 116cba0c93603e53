"""Verification of prepared data: reports and shards are compared with what `prepare` wrote.

A report may have been edited, and a shard may be missing, cut, changed or swapped with another. A report is compared
with the plan, with itself and with the sizes of its shards whenever it is read. `verify` compares the SHA-256 of the
shards as well, and records undamaged ones in verified.json, by size and time of last change.
"""

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trimask.diffusion.data.plan import Job
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import Block
from trimask.diffusion.data.shards import BlockReport
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import require_regular_file


class Damaged(ValueError):
    """A report or a shard that differs from what was written."""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """Size and time of last change of a shard, recorded when its digest was right."""

    num_bytes: int
    changed_ns: int
    """Time of last change in nanoseconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class VerifiedShards:
    """Content of verified.json: shards that were found undamaged."""

    shards: dict[str, FileState] = field(default_factory=dict)
    """Path of a shard in the folder → its state when its digest was right."""


def checked_report(folder: PreparedFolder, job: Job, is_one_to_one: bool) -> BlockReport:
    """Report of a block. Raises Damaged if it contradicts the plan, itself, or the sizes of its shards.

    If `is_one_to_one`, every record is exactly one example, so that their numbers can be compared.
    """
    path = folder.report(job)
    try:
        report = configuration.load(path, BlockReport)
        _require_consistent(report, folder.plan.block(job), is_one_to_one)
        for split, shard in report.shards.items():
            file = folder.shard(job, split)
            require_regular_file(file)
            size = file.stat().st_size
            if shard.num_bytes is not None and size != shard.num_bytes:
                raise ValueError(f"{file} has {size:,} bytes, its report says {shard.num_bytes:,}")
    except (ValueError, OSError) as error:
        raise Damaged(f"{path}: damaged: {error}") from error
    return report


def _require_consistent(report: BlockReport, block: Block, is_one_to_one: bool) -> None:
    """Raises ValueError if a report contradicts itself or the plan's block."""
    if report.block != block:
        raise ValueError("it is of another block than the plan's")
    lines = {reject.line for reject in report.rejects}
    if len(lines) != len(report.rejects) or len(lines) > block.count:
        raise ValueError(f"it rejects {len(report.rejects)} of {block.count} records")
    examples = 0
    for split, shard in report.shards.items():
        if not split.isidentifier():
            raise ValueError(f"a split must be a plain word, got {split!r}")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{shard.sha256!r} is not a SHA-256")
        if not all(re.fullmatch("[0-9a-f]{16}", content) for content in shard.contents):
            raise ValueError(f"its digests of contents of {split} are not 16 hexadecimal digits each")
        pairs = list(zip(shard.text_tokens, shard.given_tokens, strict=False))
        if len(shard.text_tokens) != len(shard.given_tokens) or not all(0 <= given <= text for text, given in pairs):
            raise ValueError(f"its numbers of tokens of {split} contradict one another")
        examples += len(pairs)
    used = block.count - len(lines)
    if examples != used if is_one_to_one else examples < used:
        raise ValueError(f"it counts {examples} examples of {used} records")


def verified_report(folder: PreparedFolder, job: Job, is_one_to_one: bool) -> tuple[BlockReport, dict[str, FileState]]:
    """Report of a block, and path → state of its shards. Raises Damaged if the report or a shard is damaged."""
    report, states = checked_report(folder, job, is_one_to_one), dict[str, FileState]()
    for split, shard in report.shards.items():
        file = folder.shard(job, split)
        try:
            states[folder.name_of(file)] = _state_of(file)
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{file}: cannot be read: {error}") from error
        if digest != shard.sha256:
            raise Damaged(
                f"{file}: damaged: its SHA-256 begins with {digest[:12]}, its report says {shard.sha256[:12]}"
            )
    return report, states


def verify(
    folder: PreparedFolder, is_one_to_one: Mapping[str, bool], report: Report = silent
) -> list[tuple[Job, Damaged]]:
    """Computes the digests of all shards; returns the damaged blocks with their faults, and records undamaged shards.

    `is_one_to_one`: dataset → whether every record is exactly one example.
    """
    states, faults, jobs = dict[str, FileState](), list[tuple[Job, Damaged]](), folder.plan.jobs
    for done, job in enumerate(jobs):
        report("verifying", done, len(jobs))
        try:
            states |= verified_report(folder, job, is_one_to_one[job.dataset])[1]
        except Damaged as fault:
            faults.append((job, fault))
    report("verifying", len(jobs), len(jobs))
    if states != _recorded_states(folder):
        with suppress(OSError):  # the folder may be read-only
            configuration.save(folder.verified_file, VerifiedShards(shards=states))
    return faults


def is_verified(folder: PreparedFolder, is_one_to_one: Mapping[str, bool]) -> bool:
    """Whether every shard had the right digest at the last verification, and has the same size and time since."""
    recorded = _recorded_states(folder)
    for job in folder.plan.jobs:
        for split in checked_report(folder, job, is_one_to_one[job.dataset]).shards:
            file = folder.shard(job, split)
            if recorded.get(folder.name_of(file)) != _state_of(file):
                return False
    return True


def _state_of(file: Path) -> FileState:
    status = file.stat()
    return FileState(num_bytes=status.st_size, changed_ns=status.st_mtime_ns)


def _recorded_states(folder: PreparedFolder) -> dict[str, FileState]:
    """States in verified.json; empty if there is no such file, or it cannot be read."""
    try:
        return configuration.load(folder.verified_file, VerifiedShards).shards
    except (ValueError, OSError):
        return {}


class BackgroundVerification:
    """Verification of a folder in a thread, while other work continues."""

    def __init__(self, folder: PreparedFolder, is_one_to_one: Mapping[str, bool]):
        self._folder, self._is_one_to_one = folder, is_one_to_one
        self._faults: list[tuple[Job, Damaged]] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, unless all shards were verified before and have not changed since."""
        if not is_verified(self._folder, self._is_one_to_one):
            self._thread = threading.Thread(target=self._verify, daemon=True)
            self._thread.start()

    def require_undamaged(self, *, wait: bool = False) -> None:
        """Raises Damaged if a damaged block has been found so far; with `wait`, after all blocks were verified."""
        if wait and self._thread is not None:
            self._thread.join()
        require_undamaged(self._folder, [fault for _, fault in self._faults])

    def _verify(self) -> None:
        self._faults = verify(self._folder, self._is_one_to_one)


def require_undamaged(folder: PreparedFolder, faults: Sequence[Damaged]) -> None:
    """Raises Damaged, with the first fault, if there are any faults."""
    if faults:
        raise Damaged(
            f"{faults[0]}; number of damaged blocks of {folder}: {len(faults)}. "
            "`trimask prepare` with the same arguments as before makes them again"
        )
