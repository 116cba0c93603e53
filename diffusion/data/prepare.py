"""Prepares data: raw examples → tokenizers and tokenised shards, with a manifest that describes them.

Nothing is written before the sources were read and tokenizers fitted. tokenizers/, config.json and plan.json come
first, each written at once; a folder without a plan takes another configuration. Then the blocks of all sources are
tokenised, by several processes where there are many; the manifest comes last. So a folder that was left at any moment
is continued by the same command, ends with the same bytes, and nothing is tokenised twice.
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
    digests_of_given,
    fit_tokenizers,
    given_codecs,
    shapes_of_media,
    with_given_codecs,
)
from trimask.diffusion.data.manifest import Reports, content_of, manifest_of
from trimask.diffusion.data.plan import Job, Plan
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import Block, Source
from trimask.diffusion.data.shards import BlockReport, encode_block
from trimask.diffusion.data.survey import Survey, contents_in_several, require_rules_used, survey
from trimask.diffusion.data.verification import Damaged, checked_report, verified_report, verify
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import locked
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, write_text
from trimask.tokenizers.vocabulary import TEXT

_FREE = ("workers", "on_error", "download")
"""Fields of the configuration that may change between two calls: they do not alter what is made."""
_FEW_RECORDS = 2048
"""Number of records up to which starting processes takes longer than they save."""


def prepare(path: Path, config: PrepareConfig, report: Report = silent) -> Prepared:
    """Makes, continues or opens the prepared folder; `report` is called as the work goes on.

    Raises ValueError for a folder that was made with another configuration, or of files that have changed since.
    """
    config = with_given_codecs(config)
    _require_same(PreparedFolder(path), config)
    require_room_for_workers(config.workers or 0, "workers")
    sources = {name: PreparedFolder(path).open_source(name, config) for name in config.sources}
    blocks = _list_blocks(config, sources, report)
    if PreparedFolder(path).manifest_file.exists():
        prepared = Prepared(path)
        change = prepared.plan.change(blocks, digests_of_given(config))
        if change is not None:
            raise ValueError(f"{path}: {change}; remove the folder or choose another")
        with locked(path):
            _mend(prepared, config, report)
    else:
        with locked(path):
            _require_same(PreparedFolder(path), config)  # another process may have worked here meanwhile
            _settle_plan(PreparedFolder(path), config, sources, blocks, report)
            folder = PreparedFolder(path)
            reports = _encode_all(folder, report)
            _finish(folder, reports)
    return Prepared(path)


def _mend(prepared: Prepared, config: PrepareConfig, report: Report) -> None:
    """Makes damaged blocks again, and names them on standard error."""
    folder = prepared.paths
    folder.remove_partials(prepared.plan)
    faults = verify(folder, prepared.whole, report)
    if not faults:
        return
    for _, fault in faults:
        print(f"{printable(str(fault))}; it is made again", file=sys.stderr)
    for done, _ in enumerate(_encode(folder, [job for job, _ in faults], _num_workers(config, prepared.plan))):
        report("tokenising again", done + 1, len(faults))
    reports = [checked_report(folder, job, prepared.whole[job.dataset]) for job in prepared.plan.jobs]
    if content_of(reports) != prepared.manifest.content:
        raise ValueError(
            f"{folder}: what was made again is not what was there; the sources, or the code that reads them, have "
            "changed since. Remove the folder or choose another"
        )


def _require_same(folder: PreparedFolder, config: PrepareConfig) -> None:
    """Refuses a configuration that differs from the folder's, or that names no source."""
    if folder.plan_file.exists():
        free = {name: getattr(config, name) for name in _FREE}
        changed = configuration.changed_fields(dataclasses.replace(folder.config, **free), config)
        if changed:
            raise ValueError(
                f"{folder} was prepared with another configuration; remove it or choose another folder. "
                f"There → asked for: {'; '.join(changed)}"
            )
    if not config.sources:
        raise ValueError(
            "nothing to prepare: no sources given; --images, --audio, --media, --text, --prompts and --tfds name some, "
            "and --preset has some of its own"
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


def _settle_plan(
    folder: PreparedFolder,
    config: PrepareConfig,
    sources: dict[str, Source],
    blocks: dict[str, list[Block]],
    report: Report,
) -> None:
    """Writes tokenizers, configuration and plan, unless the folder has a plan of sources that have not changed.

    The plan is written last. Where the sources have changed, as where a bad file was mended, all three are made again.
    """
    old, given = folder.plan if folder.plan_file.exists() else None, digests_of_given(config)
    if old is not None:
        change = old.change(blocks, given)
        if change is None:
            configuration.save(folder.config_file, config)  # whose free fields may be others by now
            return
        print(f"{printable(change)}; what was made of it is made again", file=sys.stderr)
    contents = contents_in_several(sources, blocks, config, report) if config.splits.by == "content" else {}
    surveys = _survey_all(config, sources, blocks, contents, report)
    samples = {name: surveyed.sample for name, surveyed in surveys.items()}
    plan = Plan(
        blocks=blocks,
        media_shapes=shapes_of_media(config, sources, samples),
        contents={name: several for name, several in contents.items() if several},
        unread={name: surveyed.unread for name, surveyed in surveys.items() if surveyed.unread},
        given=given,
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
) -> dict[str, Survey]:
    """Dataset → what one look at all its records found."""
    given = {TEXT, *given_codecs(config)} if config.tokenizers is not None else set()
    surveys: dict[str, Survey] = {}
    for name, source in sources.items():
        is_fitted = not {TEXT, source.medium or TEXT} <= given
        surveys[name] = survey(name, source, blocks[name], config, contents.get(name, {}), is_fitted, report)
        if not surveys[name].sample:
            where = "its training split" if is_fitted else "it"
            raise ValueError(f"{name}: there is no usable record in {where}, so nothing can be made of it")
    require_rules_used(config, surveys)
    return surveys


def _remove_outdated(folder: PreparedFolder, plan: Plan, tokenizers: MediaTokenizers) -> None:
    """Removes what was made of blocks that the new plan has changed; everything, if tokens have another meaning.

    Then the old plan is removed as well, before the new tokenizers are written, which it knows nothing of.
    """
    has_same_tokens = folder.tokenizers.fingerprints == tokenizers.fingerprints
    for job in folder.plan.jobs:
        if not (has_same_tokens and folder.plan.has_same(job, plan)):
            folder.remove_block(job)
    if not has_same_tokens:
        folder.plan_file.unlink()


def _encode_all(folder: PreparedFolder, report: Report) -> Reports:
    """Reports of all blocks; blocks that are not done yet are tokenised."""
    config, plan = folder.config, folder.plan
    done, total, finished = dict[Job, BlockReport](), plan.num_records, 0
    for job in plan.jobs:
        if folder.report(job).exists():
            try:
                made, _ = verified_report(folder, job, folder.sources[job.dataset].fill != "none")
                if made.rejects and config.on_error == "stop":
                    continue  # to stop there
                done[job] = made
                finished += made.block.count
            except Damaged as fault:
                print(f"{printable(str(fault))}; it is made again", file=sys.stderr)
    report("tokenising", finished, total)
    for job, made in _encode(folder, [job for job in plan.jobs if job not in done], _num_workers(config, plan)):
        done[job] = made
        finished += made.block.count
        report("tokenising", finished, total)
    return {name: [done[Job(name, number)] for number in range(len(blocks))] for name, blocks in plan.blocks.items()}


def _encode(folder: PreparedFolder, jobs: list[Job], workers: int) -> Iterator[tuple[Job, BlockReport]]:
    """Tokenises blocks, by several processes if `workers` is more than 1; yields jobs and reports in their order."""
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
                    f"a process ended before it was through (memory?); what was finished before is in {folder}, and "
                    "the same command goes on from there"
                ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_workers_folder: PreparedFolder | None = None
"""The folder that a worker process works on."""


def _begin_worker(parent: int, path: Path) -> None:
    """Opens the folder, once in the life of a worker process, which ends with its parent."""
    global _workers_folder
    end_with(parent)
    _workers_folder = PreparedFolder(path)


def _encode_in_worker(job: Job) -> BlockReport:
    """Tokenises a block in a worker process."""
    assert _workers_folder is not None
    return encode_block(_workers_folder, job)


def _num_workers(config: PrepareConfig, plan: Plan) -> int:
    if config.workers is not None:
        return config.workers
    if plan.num_records <= _FEW_RECORDS:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)


def _finish(folder: PreparedFolder, reports: Reports) -> None:
    """Writes rejects.jsonl and then the manifest."""
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
