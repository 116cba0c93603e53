"""Raw examples → tokenizers and tokenised shards, with a manifest that describes them.

Nothing is written before the sources were read and tokenizers fitted. tokenizers/, config.json and plan.json come
first, each written at once; a folder without a plan takes another configuration. Then the blocks of all sources are
tokenised, by several processes where there are many; the manifest comes last. So a folder that was left at any moment
is continued by the same command, ends with the same bytes, and nothing is tokenised twice.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import zip_longest
from pathlib import Path

from trimask.diffusion.data.fitting import (
    digests_of_given,
    fit_tokenizers,
    given_codecs,
    shapes_of_media,
    with_given_codecs,
)
from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.occurrences import Occurrences
from trimask.diffusion.data.plan import Plan
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import DatasetManifest, Manifest, Prepared
from trimask.diffusion.data.records import Block, Source
from trimask.diffusion.data.shards import (
    BlockReport,
    encode_block,
    forget_encoders,
    raw_folder,
    remove_block,
    remove_partials,
    report_path,
)
from trimask.diffusion.data.splits import TRAIN, in_order
from trimask.diffusion.data.survey import Survey, contents_in_several, require_rules_used, survey
from trimask.diffusion.data.verification import Damaged, Job, checked_report, jobs_of, verified_report, verify
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import locked
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, write_text
from trimask.tokenizers.vocabulary import TEXT

_FREE = ("workers", "on_error", "download")
"""Fields of the configuration that may change between two calls: they do not alter what is made."""
_DIGESTS = ("sha256", "media_sha256")
_FEW_RECORDS = 2048
"""Up to so many, starting processes takes longer than they save."""


def prepare(folder: Path, config: PrepareConfig, report: Report = silent) -> Prepared:
    """Makes, continues or opens the prepared folder; `report` is called as the work goes on.

    A folder made with another configuration, or of files that have changed since, is refused.
    """
    config = with_given_codecs(config)
    _require_same(folder, config)
    require_room_for_workers(config.workers or 0, "workers")
    sources = {name: config.open_source(name, raw_folder(folder)) for name in config.sources}
    blocks = _listed(config, sources, report)
    if (folder / "manifest.json").exists():
        prepared = Prepared(folder)
        change = _change(prepared.plan, blocks, digests_of_given(config))
        if change is not None:
            raise ValueError(f"{folder}: {change}; remove the folder or choose another")
        with locked(folder):
            _mend(prepared, config, report)
    else:
        with locked(folder):
            _require_same(folder, config)  # another process may have worked here meanwhile
            plan = _settle_plan(folder, config, sources, blocks, report)
            reports = _encode(folder, config, plan, sources, report)
            _finish(folder, config, plan, sources, reports)
    return Prepared(folder)


def _mend(prepared: Prepared, config: PrepareConfig, report: Report) -> None:
    """Makes again the blocks that are not what was written, and says which."""
    folder, plan = prepared.folder, prepared.plan
    remove_partials(folder, {name: len(blocks) for name, blocks in plan.blocks.items()})
    faults = verify(folder, plan, prepared.whole, report)
    if not faults:
        return
    for _, fault in faults:
        print(f"{printable(str(fault))}; it is made again", file=sys.stderr)
    forget_encoders()
    for done, _ in enumerate(_encoded(folder, [job for job, _ in faults], _num_workers(config, plan))):
        report("tokenising again", done + 1, len(faults))
    reports = [checked_report(folder, plan, job, prepared.whole[job.dataset]) for job in jobs_of(plan)]
    if _content(reports) != prepared.manifest.content:
        raise ValueError(
            f"{folder}: what was made again is not what was there; the sources, or the code that reads them, have "
            "changed since. Remove the folder or choose another"
        )


def _content(reports: Iterable[BlockReport]) -> str:
    """SHA-256 of the digests of all shards, in order."""
    digests = [shard.sha256 for block in reports for _, shard in sorted(block.shards.items())]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _require_same(folder: Path, config: PrepareConfig) -> None:
    """Refuses a configuration that is not that of the folder, or has nothing to prepare."""
    if (folder / "plan.json").exists():
        old = configuration.load(folder / "config.json", PrepareConfig)
        free = {name: getattr(config, name) for name in _FREE}
        changed = configuration.changed_fields(dataclasses.replace(old, **free), config)
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


def _listed(config: PrepareConfig, sources: dict[str, Source], report: Report) -> dict[str, list[Block]]:
    """The blocks of every source; one without records is refused."""
    blocks = {}
    for number, (name, source) in enumerate(sources.items()):
        report("reading sources", number, len(sources))
        blocks[name] = source.blocks(config.shard_records)
        if not blocks[name]:
            raise ValueError(f"{name}: {', '.join(config.sources[name].where)} holds no records")
    report("reading sources", len(sources), len(sources))
    return blocks


def _settle_plan(
    folder: Path,
    config: PrepareConfig,
    sources: dict[str, Source],
    blocks: dict[str, list[Block]],
    report: Report,
) -> Plan:
    """The plan, the tokenizers and the configuration, made once; the plan comes last.

    They are made again where the sources have changed, as where a bad file was mended.
    """
    path = folder / "plan.json"
    old, digests = configuration.load(path, Plan) if path.exists() else None, digests_of_given(config)
    if old is not None:
        change = _change(old, blocks, digests)
        if change is None:
            configuration.save(folder / "config.json", config)  # whose free fields may be others by now
            return old
        print(f"{printable(change)}; what was made of it is made again", file=sys.stderr)
    given = {TEXT, *given_codecs(config)} if config.tokenizers is not None else set()
    contents = contents_in_several(sources, blocks, config, report) if config.splits.by == "content" else {}
    surveys: dict[str, Survey] = {}
    for name, source in sources.items():
        is_fitted = not {TEXT, source.medium or TEXT} <= given
        surveys[name] = survey(name, source, blocks[name], config, contents.get(name, {}), is_fitted, report)
        if not surveys[name].sample:
            of = "its training split" if is_fitted else "it"
            raise ValueError(f"{name}: there is no usable record in {of}, so nothing can be made of it")
    require_rules_used(config, surveys)
    samples = {name: seen.sample for name, seen in surveys.items()}
    plan = Plan(
        blocks=blocks,
        media_shapes=shapes_of_media(config, sources, samples),
        contents={name: several for name, several in contents.items() if several},
        unread={name: seen.unread for name, seen in surveys.items() if seen.unread},
        given=digests,
    )
    tokenizers = fit_tokenizers(config, sources, samples, plan.media_shapes, report)
    if old is not None:
        _forget(folder, old, plan, tokenizers)
    tokenizers.save(folder / "tokenizers")
    configuration.save(folder / "config.json", config)
    configuration.save(path, plan)
    return plan


def _change(plan: Plan, blocks: dict[str, list[Block]], given: dict[str, str]) -> str | None:
    """What of the sources is not what was planned, if anything: lists and texts by digest, media by size and time."""
    for name, digest in given.items():
        if plan.given.get(name, digest) != digest:
            return f"what {name} names has changed since: it is not what it was"
    for name, own in blocks.items():
        old = plan.blocks.get(name, [])
        for now, before in zip_longest(own, old):
            if now is not None and before is not None:
                # What the plan of an older version does not say is not compared.
                now = dataclasses.replace(now, **{f: "" for f in _DIGESTS if not getattr(before, f)})
            if now == before:
                continue
            if now is None:
                return f"{name} has changed since: it has fewer records"
            where = f"{now.file}, from line {now.line} on,"
            if before is not None and dataclasses.replace(now, media_sha256=before.media_sha256) == before:
                where = f"a file or a label that {now.file} names from line {now.line} on"
            return f"{name} has changed since: {where} is not what it was"
    return None


def _forget(folder: Path, old: Plan, plan: Plan, tokenizers: MediaTokenizers) -> None:
    """Removes what was made of blocks that are not as they were, or of all if tokens do not mean what they did.

    Then the old plan goes, too, before tokenizers come that are none of it.
    """
    same_tokens = media_tokenizers.load_tokenizers(folder / "tokenizers").fingerprints == tokenizers.fingerprints
    for job in jobs_of(old):
        name, number = job
        before, now = (
            [of.blocks[name][number : number + 1], of.media_shapes.get(name), of.contents.get(name)]
            for of in (old, plan)
        )
        if not same_tokens or before != now:
            remove_block(folder, name, number)
    if not same_tokens:
        (folder / "plan.json").unlink()


def _encode(
    folder: Path, config: PrepareConfig, plan: Plan, sources: dict[str, Source], report: Report
) -> dict[str, list[BlockReport]]:
    """All blocks' reports; those that are not there yet are made."""
    forget_encoders()
    jobs, done = jobs_of(plan), dict[Job, BlockReport]()
    total, finished = sum(plan.records.values()), 0
    for job in jobs:
        if report_path(folder, *job).exists():
            try:
                made, _ = verified_report(folder, plan, job, sources[job.dataset].fill != "none")
                if made.rejects and config.on_error == "stop":
                    continue  # to stop there
                done[job] = made
                finished += made.block.count
            except Damaged as fault:
                print(f"{printable(str(fault))}; it is made again", file=sys.stderr)
    report("tokenising", finished, total)
    for job, result in _encoded(folder, [job for job in jobs if job not in done], _num_workers(config, plan)):
        done[job] = result
        finished += result.block.count
        report("tokenising", finished, total)
    return {name: [done[Job(name, number)] for number in range(len(blocks))] for name, blocks in plan.blocks.items()}


def _encoded(folder: Path, jobs: list[Job], workers: int) -> Iterator[tuple[Job, BlockReport]]:
    """Reports in the order of the jobs."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, encode_block(folder, *job)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, end_with, (os.getpid(),))
    try:
        futures = [pool.submit(encode_block, folder, *job) for job in jobs]
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


def _num_workers(config: PrepareConfig, plan: Plan) -> int:
    if config.workers is not None:
        return config.workers
    if sum(plan.records.values()) <= _FEW_RECORDS:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)


def _finish(
    folder: Path,
    config: PrepareConfig,
    plan: Plan,
    sources: dict[str, Source],
    reports: dict[str, list[BlockReport]],
) -> None:
    """rejects.jsonl and the manifest."""
    tokenizers = media_tokenizers.load_tokenizers(folder / "tokenizers")
    lines = [
        json.dumps({"dataset": name, **configuration.to_dict(reject)}, ensure_ascii=False) + "\n"
        for name, of_dataset in reports.items()
        for block in of_dataset
        for reject in block.rejects
    ]
    (folder / "rejects.jsonl").unlink(missing_ok=True)
    if lines:
        write_text(folder / "rejects.jsonl", "".join(lines))
    manifest = Manifest(
        shared=_shared_by_datasets(reports),
        trimask=importlib.metadata.version("trimask"),
        tokenizers=tokenizers.fingerprints,
        vocabulary=tokenizers.vocabulary,
        datasets={
            name: _dataset_manifest(folder, name, config, plan, sources[name], reports[name], tokenizers)
            for name in sources
        },
        content=_content(block for blocks in reports.values() for block in blocks),
    )
    remove_partials(folder, {name: len(of_dataset) for name, of_dataset in reports.items()})
    configuration.save(folder / "manifest.json", manifest)


def _dataset_manifest(
    folder: Path,
    name: str,
    config: PrepareConfig,
    plan: Plan,
    source: Source,
    reports: list[BlockReport],
    tokenizers: MediaTokenizers,
) -> DatasetManifest:
    shards = [shard for block in reports for shard in block.shards.values()]
    text = [n for shard in shards for n in shard.text_tokens]
    given = [n for shard in shards for n in shard.given_tokens]
    if not text:
        raise ValueError(f"{name}: none of its records could be used; {folder / 'rejects.jsonl'} says why")
    answer_length, longest = None, max(text)
    if source.fill == "answer":
        answer_length = config.response_tokens or 1 + max(t - g for t, g in zip(text, given, strict=True))
        longest = max(given) + answer_length
    elif source.fill == "whole":
        longest += 1
    shapes = {TEXT: [longest]}
    if source.medium is not None:
        shape = tokenizers.codec(source.medium).code_shape(tuple(plan.media_shapes[name]))
        shapes[source.medium] = list(shape)
    splits: dict[str, int] = {}
    for block in reports:
        for split, shard in block.shards.items():
            splits[split] = splits.get(split, 0) + len(shard.text_tokens)
    return DatasetManifest(
        source=config.sources[name],
        layout=Layout(shapes=shapes, fill=source.fill, answer_length=answer_length, is_cropped=config.pictures.crop),
        records=sum(block.block.count for block in reports),
        rejected=sum(len(block.rejects) for block in reports),
        splits={split: splits[split] for split in in_order(splits)},
        shared=_shared(reports, splits),
        unread=plan.unread.get(name, {}),
    )


def _shared_by_datasets(reports: dict[str, list[BlockReport]]) -> dict[str, dict[str, int]]:
    """Dataset/split that is held out → dataset/train of another → how many of its examples are of a content of that."""
    seen, places = Occurrences(), list[str]()
    for name, of_dataset in reports.items():
        for block in of_dataset:
            for split, shard in block.shards.items():
                places.append(f"{name}/{split}")
                for content in shard.contents:
                    seen.add(content, places[-1])
    places = sorted(set(places), key=lambda place: (not place.endswith(f"/{TRAIN}"), place))
    shared: dict[str, dict[str, int]] = {}
    for (earlier, later), count in seen.shared(places).items():
        is_other = earlier.partition("/")[0] != later.partition("/")[0]
        if is_other and earlier.endswith(f"/{TRAIN}") and not later.endswith(f"/{TRAIN}"):
            shared.setdefault(later, {})[earlier] = count
    return shared


def _shared(reports: list[BlockReport], splits: Collection[str]) -> dict[str, dict[str, int]]:
    """Split → earlier split → how many of its examples are of a content that is there, too."""
    seen, shared = Occurrences(), dict[str, dict[str, int]]()
    for block in reports:
        for split, shard in block.shards.items():
            for content in shard.contents:
                seen.add(content, split)
    for (earlier, later), count in seen.shared(in_order(splits)).items():
        shared.setdefault(later, {})[earlier] = count
    return shared
