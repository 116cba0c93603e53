"""Prepares data: raw examples → tokenizers and tokenised shards, with a manifest that describes them.

Nothing is written before the sources have been read and the tokenizers fitted. tokenizers/, config.json and plan.json
come first, each written atomically; until there is a plan, the configuration may be replaced. Then the blocks of all
sources are tokenised, by several processes if there are many records. The manifest comes last. So the same command
continues a folder that was left at any moment, ends with the same bytes, and tokenises nothing twice.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from trimask.diffusion.data.fitting import (
    digests_of_reused_tokenizers,
    fit_tokenizers,
    reused_codecs,
    shapes_of_media,
    with_reused_codecs,
)
from trimask.diffusion.data.manifest import Reports, digest_of_shards, manifest_of
from trimask.diffusion.data.plan import Job, Plan
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import Block, Source
from trimask.diffusion.data.shards import BlockReport, encode_block
from trimask.diffusion.data.survey import SourceSurvey, require_rules_used, splits_of_shared_contents, survey_source
from trimask.diffusion.data.verification import Damaged, checked_report, verified_report, verify
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import locked
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, write_text
from trimask.tokenizers.vocabulary import TEXT

_CHANGEABLE_FIELDS = ("workers", "on_error", "download")
"""Fields of the configuration that may change between two calls, since the prepared data do not depend on them."""
_MAX_SERIAL_RECORDS = 2048
"""Number of records up to which starting processes takes longer than they save."""


def prepare(path: Path, config: PrepareConfig, report: Report = silent) -> Prepared:
    """Makes, continues or opens the prepared folder at `path`; `report` is told the progress.

    The damaged blocks of a complete folder are made again. Raises ValueError for a folder that was made with another
    configuration, or for a complete one if its sources have changed since; BadRecord for a record that cannot be used,
    unless the configuration says to skip it.
    """
    # A PreparedFolder reads each file once, so it is made anew wherever another process, or a stage, may have written.
    config = with_reused_codecs(config)
    _require_same(PreparedFolder(path), config)
    require_room_for_workers(config.workers or 0, "workers")
    sources = {name: PreparedFolder(path).open_source(name, config) for name in config.sources}
    blocks = _list_blocks(config, sources, report)
    if PreparedFolder(path).manifest_file.exists():
        prepared = Prepared(path)
        change = prepared.plan.first_difference(blocks, digests_of_reused_tokenizers(config))
        if change is not None:
            raise ValueError(f"{path}: {change}; remove the folder or choose another")
        with locked(path):
            _repair(prepared, config, report)
    else:
        with locked(path):
            _require_same(PreparedFolder(path), config)  # another process may have worked here meanwhile
            _write_plan(PreparedFolder(path), config, sources, blocks, report)
            folder = PreparedFolder(path)
            reports = _encode_all(folder, report)
            _write_manifest(folder, reports)
    return Prepared(path)


def _repair(prepared: Prepared, config: PrepareConfig, report: Report) -> None:
    """Makes the damaged blocks of a complete folder again, and names them on standard error.

    Raises ValueError if the shards differ from the lost ones.
    """
    folder = prepared.paths
    folder.remove_partials(prepared.plan)
    faults = verify(folder, prepared.is_one_to_one, report)
    if not faults:
        return
    for _, fault in faults:
        print(f"{printable(str(fault))}; the block is made again", file=sys.stderr)
    for done, _ in enumerate(_encode(folder, [job for job, _ in faults], _num_workers(config, prepared.plan)), 1):
        report("tokenising again", done, len(faults))
    reports = [checked_report(folder, job, prepared.is_one_to_one[job.dataset]) for job in prepared.plan.jobs]
    if digest_of_shards(reports) != prepared.manifest.content:
        raise ValueError(
            f"{folder}: the shards that were made again differ from the damaged ones; the sources, or the code that "
            "reads them, have changed since. Remove the folder or choose another"
        )


def _require_same(folder: PreparedFolder, config: PrepareConfig) -> None:
    """Raises ValueError if the configuration differs from the folder's, or if it names no source."""
    if folder.plan_file.exists():
        changeable = {name: getattr(config, name) for name in _CHANGEABLE_FIELDS}
        changed = configuration.changed_fields(dataclasses.replace(folder.config, **changeable), config)
        if changed:
            raise ValueError(
                f"{folder} was prepared with another configuration; remove it or choose another folder. "
                f"Folder → this call: {'; '.join(changed)}"
            )
    if not config.sources:
        raise ValueError(
            "nothing to prepare: no sources given; name some by flags such as --images, --audio or --text, or choose a "
            "--preset that has some"
        )


def _list_blocks(config: PrepareConfig, sources: dict[str, Source], report: Report) -> dict[str, list[Block]]:
    """Dataset → blocks of its source. Raises ValueError for a source without records."""
    blocks = {}
    for number, (name, source) in enumerate(sources.items()):
        report("reading sources", number, len(sources))
        blocks[name] = source.blocks(config.shard_records)
        if not blocks[name]:
            raise ValueError(f"{name}: {', '.join(config.sources[name].where)} holds no records")
    report("reading sources", len(sources), len(sources))
    return blocks


def _write_plan(
    folder: PreparedFolder,
    config: PrepareConfig,
    sources: dict[str, Source],
    blocks: dict[str, list[Block]],
    report: Report,
) -> None:
    """Writes tokenizers, configuration and plan, unless the folder has a plan and its sources have not changed.

    The plan is written last. If the sources have changed, as after a bad file was corrected, all three are made again.
    """
    old, digests = folder.plan if folder.plan_file.exists() else None, digests_of_reused_tokenizers(config)
    if old is not None:
        change = old.first_difference(blocks, digests)
        if change is None:
            configuration.save(folder.config_file, config)  # its changeable fields may be others by now
            return
        print(f"{printable(change)}; the blocks made from it are made again", file=sys.stderr)
    contents = splits_of_shared_contents(sources, blocks, config, report) if config.splits.by == "content" else {}
    surveys = _survey_all(config, sources, blocks, contents, report)
    samples = {name: survey.sample for name, survey in surveys.items()}
    plan = Plan(
        blocks=blocks,
        media_shapes=shapes_of_media(config, sources, samples),
        contents={name: splits for name, splits in contents.items() if splits},
        unread={name: survey.unread for name, survey in surveys.items() if survey.unread},
        given=digests,
    )
    tokenizers = fit_tokenizers(config, sources, samples, plan.media_shapes, report)
    if old is not None:
        _remove_outdated(folder, plan, tokenizers)
    tokenizers.save(folder.tokenizers_folder)
    configuration.save(folder.config_file, config)
    configuration.save(folder.plan_file, plan)


def _survey_all(
    config: PrepareConfig,
    sources: dict[str, Source],
    blocks: dict[str, list[Block]],
    contents: dict[str, dict[str, str]],
    report: Report,
) -> dict[str, SourceSurvey]:
    """Dataset → survey of all its records.

    Raises ValueError if a sample is empty, or if a rule of held-out records or the names of labels have no effect.
    """
    reused = {TEXT, *reused_codecs(config)} if config.tokenizers is not None else set()
    surveys: dict[str, SourceSurvey] = {}
    for name, source in sources.items():
        is_fitted = not {TEXT, source.medium or TEXT} <= reused
        surveys[name] = survey_source(name, source, blocks[name], config, contents.get(name, {}), is_fitted, report)
        if not surveys[name].sample:
            where = "its training split, on which tokenizers are fitted" if is_fitted else "it"
            raise ValueError(f"{name}: there is no usable record in {where}")
    require_rules_used(config, surveys)
    return surveys


def _remove_outdated(folder: PreparedFolder, plan: Plan, tokenizers: MediaTokenizers) -> None:
    """Removes reports and shards of the blocks that differ in the new plan, or of all if the tokenizers differ.

    If the tokenizers differ, the old plan is removed as well, so that it never lies beside tokenizers it was not made
    with.
    """
    has_same_tokens = folder.tokenizers.fingerprints == tokenizers.fingerprints
    for job in folder.plan.jobs:
        if not (has_same_tokens and folder.plan.has_same_block(job, plan)):
            folder.remove_block(job)
    if not has_same_tokens:
        folder.plan_file.unlink()


def _encode_all(folder: PreparedFolder, report: Report) -> Reports:
    """Dataset → reports of all its blocks; blocks without a report, or with damaged shards, are tokenised."""
    config, plan = folder.config, folder.plan
    reports, num_records = dict[Job, BlockReport](), 0
    for job in plan.jobs:
        if folder.report(job).exists():
            try:
                block_report, _ = verified_report(folder, job, folder.sources[job.dataset].fill != "none")
                if block_report.rejects and config.on_error == "stop":
                    continue  # tokenising it again stops at its first bad record
                reports[job] = block_report
                num_records += block_report.block.count
            except Damaged as fault:
                print(f"{printable(str(fault))}; the block is made again", file=sys.stderr)
    report("tokenising", num_records, plan.num_records)
    missing = [job for job in plan.jobs if job not in reports]
    for job, block_report in _encode(folder, missing, _num_workers(config, plan)):
        reports[job] = block_report
        num_records += block_report.block.count
        report("tokenising", num_records, plan.num_records)
    return {name: [reports[Job(name, number)] for number in range(len(blocks))] for name, blocks in plan.blocks.items()}


def _encode(folder: PreparedFolder, jobs: list[Job], workers: int) -> Iterator[tuple[Job, BlockReport]]:
    """Tokenises blocks, in several processes if `workers` is more than 1; yields each job with its report, in order.

    Raises ChildProcessError if a process ends before its work is done.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, encode_block(folder, job)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(), folder.path))
    try:
        futures = [pool.submit(_encode_in_worker, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield job, future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    f"a process ended before its work was done (out of memory?); finished blocks are in {folder}, and "
                    "the same command continues from there"
                ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_workers_folder: PreparedFolder | None = None
"""Folder that this worker process works on; None in all other processes."""


def _begin_worker(parent: int, path: Path) -> None:
    """Opens the folder once per worker process, and ends the process with its parent."""
    global _workers_folder
    end_with(parent)
    _workers_folder = PreparedFolder(path)


def _encode_in_worker(job: Job) -> BlockReport:
    """Tokenises a block in a worker process."""
    assert _workers_folder is not None
    return encode_block(_workers_folder, job)


def _num_workers(config: PrepareConfig, plan: Plan) -> int:
    """Number of processes that tokenise: as configured, else 1 for few records, or one per core, at most 32."""
    if config.workers is not None:
        return config.workers
    if plan.num_records <= _MAX_SERIAL_RECORDS:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)


def _write_manifest(folder: PreparedFolder, reports: Reports) -> None:
    """Writes rejects.jsonl, removes partial shards, and writes the manifest last."""
    lines = [
        json.dumps({"dataset": name, **configuration.to_dict(reject)}, ensure_ascii=False) + "\n"
        for name, of_dataset in reports.items()
        for report in of_dataset
        for reject in report.rejects
    ]
    folder.rejects_file.unlink(missing_ok=True)
    if lines:
        write_text(folder.rejects_file, "".join(lines))
    manifest = manifest_of(folder, reports)
    folder.remove_partials(folder.plan)
    configuration.save(folder.manifest_file, manifest)
