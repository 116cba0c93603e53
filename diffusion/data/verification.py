"""Is a prepared folder what `prepare` wrote? Names, sizes and counts at every opening, digests where it is asked for.

A report may lie and a shard may be missing, cut, changed or swapped with another. What a report says is compared with
the plan, with itself and with the size of its shards whenever it is read; `verify` computes the SHA-256 of the shards,
too, and remembers in verified.json those that were as they should be, by size and time of the last change.
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
    """A report or a shard is not what was written."""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """A shard when its digest was right."""

    num_bytes: int
    changed_ns: int


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What verified.json says: shards by their path in the folder."""

    shards: dict[str, FileState] = field(default_factory=dict)


def checked_report(folder: PreparedFolder, job: Job, is_whole: bool) -> BlockReport:
    """The report of a block. Raises Damaged if it lies, or if a shard is missing or of another size.

    `is_whole` says that a record is an example, so that their numbers can be compared.
    """
    path = folder.report(job)
    try:
        report = configuration.load(path, BlockReport)
        _require_consistent(report, folder.plan.block(job), is_whole)
        for split, shard in report.shards.items():
            file = folder.shard(job, split)
            require_regular_file(file)
            size = file.stat().st_size
            if shard.num_bytes is not None and size != shard.num_bytes:
                raise ValueError(f"{file} has {size:,} bytes, its report says {shard.num_bytes:,}")
    except (ValueError, OSError) as error:
        raise Damaged(f"{path}: damaged: {error}") from error
    return report


def _require_consistent(report: BlockReport, block: Block, is_whole: bool) -> None:
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
            raise ValueError(f"{shard.sha256!r} is no SHA-256")
        if not all(re.fullmatch("[0-9a-f]{16}", content) for content in shard.contents):
            raise ValueError(f"its digests of contents of {split} are none")
        pairs = list(zip(shard.text_tokens, shard.given_tokens, strict=False))
        if len(shard.text_tokens) != len(shard.given_tokens) or not all(0 <= given <= text for text, given in pairs):
            raise ValueError(f"its numbers of tokens of {split} are none")
        examples += len(pairs)
    used = block.count - len(lines)
    if examples != used if is_whole else examples < used:
        raise ValueError(f"it counts {examples} examples of {used} records")


def verified_report(folder: PreparedFolder, job: Job, is_whole: bool) -> tuple[BlockReport, dict[str, FileState]]:
    """The report of a block, and its shards as they are now. Raises Damaged if the report or a shard's digest lies."""
    report, seen = checked_report(folder, job, is_whole), dict[str, FileState]()
    for split, shard in report.shards.items():
        file = folder.shard(job, split)
        try:
            seen[folder.name_of(file)] = _now(file)
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{file}: cannot be read: {error}") from error
        if digest != shard.sha256:
            raise Damaged(
                f"{file}: damaged: its SHA-256 begins with {digest[:12]}, its report says {shard.sha256[:12]}"
            )
    return report, seen


def verify(folder: PreparedFolder, whole: Mapping[str, bool], report: Report = silent) -> list[tuple[Job, Damaged]]:
    """Computes the digests of all shards; returns what is damaged, and remembers what is not.

    `whole` says of each dataset whether a record is an example.
    """
    seen, faults, jobs = dict[str, FileState](), list[tuple[Job, Damaged]](), folder.plan.jobs
    for done, job in enumerate(jobs):
        report("verifying", done, len(jobs))
        try:
            seen |= verified_report(folder, job, whole[job.dataset])[1]
        except Damaged as fault:
            faults.append((job, fault))
    report("verifying", len(jobs), len(jobs))
    if seen != _known(folder):
        with suppress(OSError):  # of a folder that may only be read
            configuration.save(folder.verified_file, Verified(shards=seen))
    return faults


def is_verified(folder: PreparedFolder, whole: Mapping[str, bool]) -> bool:
    """Whether every shard was right the last time, and has not changed since by its size and its time."""
    known = _known(folder)
    for job in folder.plan.jobs:
        for split in checked_report(folder, job, whole[job.dataset]).shards:
            file = folder.shard(job, split)
            if known.get(folder.name_of(file)) != _now(file):
                return False
    return True


def _now(file: Path) -> FileState:
    about = file.stat()
    return FileState(num_bytes=about.st_size, changed_ns=about.st_mtime_ns)


def _known(folder: PreparedFolder) -> dict[str, FileState]:
    try:
        return configuration.load(folder.verified_file, Verified).shards
    except (ValueError, OSError):
        return {}


class BackgroundVerification:
    """Verifies a folder in a thread, while the work goes on."""

    def __init__(self, folder: PreparedFolder, whole: Mapping[str, bool]):
        self._folder, self._whole = folder, whole
        self._faults: list[tuple[Job, Damaged]] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins, unless all shards were verified before and have not changed since."""
        if not is_verified(self._folder, self._whole):
            self._thread = threading.Thread(target=self._verify, daemon=True)
            self._thread.start()

    def require(self, *, wait: bool = False) -> None:
        """Raises Damaged if something was found damaged by now, or with `wait` at all."""
        if wait and self._thread is not None:
            self._thread.join()
        require_none(self._folder, [fault for _, fault in self._faults])

    def _verify(self) -> None:
        self._faults = verify(self._folder, self._whole)


def require_none(folder: PreparedFolder, faults: Sequence[Damaged]) -> None:
    """Raises Damaged, with the first fault, if there are any."""
    if faults:
        raise Damaged(
            f"{faults[0]}; blocks of {folder} that are damaged: {len(faults)}. "
            "`trimask prepare` with the arguments it had makes them again"
        )
