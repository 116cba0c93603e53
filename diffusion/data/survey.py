"""One look at all records of a source before anything is tokenised.

What tokenizers are fitted on is drawn by id, so it is the same whatever else there is. On the way it is seen whether
the lists contradict themselves, whether `--splits.held-out` holds anything out, whether `--fields.labels` names
anything, and which files nothing names. Media are read of the sample alone; of all records where splits go by their
content.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.occurrences import Occurrences
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers.folders import Folder
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, Source, digest
from trimask.diffusion.data.split_rules import shown
from trimask.diffusion.data.splits import TRAIN, most_held_out
from trimask.diffusion.run.progress import Report

_FIT_BYTES = 512 << 20
"""Of media, on which tokenizers are fitted."""
_EVERY = 256
"""Records between two reports of progress."""
_SHOWN_VALUES = 1000
"""Different values of a field that are remembered, to be named in an error."""


@dataclass(frozen=True)
class Survey:
    """What was seen of a source."""

    sample: list[RawExample]
    """Training examples on which tokenizers are fitted; media as they are kept for that."""
    unread: dict[str, int]
    """Folder → number of its files that no record names."""
    values: dict[str, Counter[str]] = field(default_factory=dict)
    """Field of a rule of `splits.held_out` → how often it has which value."""
    held_out: frozenset[str] = frozenset()
    """Rules that hold something out."""
    shadowed: frozenset[str] = frozenset()
    """Rules that hold for something that an earlier rule holds out."""
    has_labels: bool = False
    """Whether a caption is a number, which `fields.labels` names."""


def survey(
    name: str,
    source: Source,
    blocks: list[Block],
    config: PrepareConfig,
    contents: dict[str, str],
    is_fitted: bool,
    report: Report,
) -> Survey:
    """Looks at all records; bad ones are passed over, or stop. The sample is of the training split if `is_fitted`.

    `contents` are those of the dataset that `contents_in_several` found. Raises ValueError where two lists name a file,
    or one file is in two splits.
    """
    total = sum(block.count for block in blocks)
    share = config.fit_examples / max(1, total)
    sample, size, held_out, shadowed = list[RawExample](), 0, set[str](), set[str]()
    has_labels = False
    values = {rule.partition("=")[0]: Counter[str]() for rule in config.splits.held_out}
    splits, lists = Occurrences(), Occurrences()
    for done, entry in enumerate(_entries(source, blocks, config)):
        if done % _EVERY == 0:
            report(f"reading records of {name}", done, total)
        has_labels = has_labels or (isinstance(source, Folder) and source.has_label(entry))
        rules = config.splits.rules_of(entry.fields)
        held_out |= {*rules[:1]}
        shadowed |= {*rules[1:]}
        for word, counts in values.items():
            if word in entry.fields and (len(counts) < _SHOWN_VALUES or shown(entry.fields[word]) in counts):
                counts[shown(entry.fields[word])] += 1
        if source.medium is not None:
            splits.add(entry.digest, rules[0] if rules else entry.split or "")
            lists.add(entry.digest, entry.file)
        if entry.draw("fit") >= share or size > _FIT_BYTES:
            continue
        try:
            if is_fitted and _split(source, entry, contents, config) != TRAIN:
                continue
            sample.append(_kept(entry, sample, source.medium, config))
        except BadRecord:
            if config.on_error == "stop":
                raise
            continue
        size += 0 if source.medium is None else sample[-1].media[source.medium].nbytes
    report(f"reading records of {name}", total, total)
    _require_one_place(source, blocks, config, splits, lists)
    unread = _unread(source, lists) if isinstance(source, Folder) else {}
    return Survey(sample, unread, values, frozenset(held_out), frozenset(shadowed), has_labels)


def require_rules_used(config: PrepareConfig, surveys: dict[str, Survey]) -> None:
    """Raises ValueError for a rule that holds nothing out, with the values that there are.

    Names of labels without a caption that is a number are refused likewise.
    """
    if config.fields.labels and not any(survey.has_labels for survey in surveys.values()):
        raise ValueError(
            f"fields.labels: no caption of a picture or a sound is a number, so {', '.join(config.fields.labels)} name "
            "nothing; leave them out, or choose the field of the numbers with --fields.text"
        )
    for rule in config.splits.held_out:
        if any(rule in survey.held_out for survey in surveys.values()):
            continue
        if any(rule in survey.shadowed for survey in surveys.values()):
            raise ValueError(f"splits.held-out: all that {rule} holds out is held out by rules before it; leave it out")
        name = rule.partition("=")[0]
        counts = sum((survey.values[name] for survey in surveys.values()), Counter[str]())
        known = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(10))
        said = f"{name} is {known}{', …' if len(counts) > 10 else ''}" if counts else f"no record has a field {name}"
        raise ValueError(f"splits.held-out: no record's metadata say {rule}, so nothing is held out by it; {said}")


def _entries(source: Source, blocks: list[Block], config: PrepareConfig) -> Iterator[Entry]:
    """All records that can be read; a bad one stops if the configuration says so."""
    for entry in (entry for block in blocks for entry in source.entries(block)):
        if isinstance(entry, BadRecord):
            if config.on_error == "stop":
                raise entry
        else:
            yield entry


def contents_in_several(
    sources: dict[str, Source], blocks: dict[str, list[Block]], config: PrepareConfig, report: Report
) -> dict[str, dict[str, str]]:
    """Dataset → digest of a content of it that sources put in several splits → the split that it belongs to."""
    everywhere, own = Occurrences(), {name: Occurrences() for name in sources}
    total, done = sum(block.count for of_source in blocks.values() for block in of_source), 0
    for name, source in sources.items():
        for entry in _entries(source, blocks[name], config):
            if done % _EVERY == 0:
                report("comparing contents", done, total)
            done += 1
            try:
                content = entry.example().content(source.medium)
            except BadRecord:
                if config.on_error == "stop":
                    raise
                continue
            everywhere.add(content, config.splits.of(entry, content))
            own[name].add(content, "")
    report("comparing contents", total, total)
    several = {content: most_held_out(splits) for content, splits in everywhere.in_several().items()}
    return {name: dict(compress(several.items(), ~seen.missing(several))) for name, seen in own.items()}


def _split(source: Source, entry: Entry, contents: dict[str, str], config: PrepareConfig) -> str:
    if config.splits.by == "id":
        return config.splits.of(entry)
    content = entry.example().content(source.medium)
    return contents.get(content) or config.splits.of(entry, content)


def _kept(entry: Entry, sample: list[RawExample], medium: str | None, config: PrepareConfig) -> RawExample:
    """The example, its medium as it is kept for fitting."""
    example = entry.example()
    if medium is None:
        return example
    first = sample[0].media[medium] if sample else example.media[medium]
    try:
        content = modality(medium).sampled(example.media[medium], first, config.media)
    except ValueError as error:
        raise BadRecord(entry.file, entry.line, f"{example.id}: {error}") from error
    return RawExample(example.id, {**example.media, medium: content}, example.given)


def _require_one_place(
    source: Source, blocks: list[Block], config: PrepareConfig, splits: Occurrences, lists: Occurrences
) -> None:
    """Refuses a file that two lists name, or that is in two splits, with the lines that say so."""
    several = lists.in_several() or splits.in_several()
    if not several:
        return
    wanted, found = next(iter(several)), dict[str, Entry]()
    for entry in _entries(source, blocks, config):
        if entry.digest == wanted:
            where = entry.file if lists.in_several() else config.splits.rule_of(entry.fields) or entry.split or "none"
            found.setdefault(where, entry)
    places = " and ".join(f"{e.file}, line {e.line} (split {e.split or 'drawn'})" for e in found.values())
    (first, *_) = found.values()
    what = "in two lists" if lists.in_several() else "in two splits"
    raise ValueError(f"{first.id} is {what}: {places}; a file is listed in one place, and is of one split")


def _unread(folder: Folder, lists: Occurrences) -> dict[str, int]:
    """Files that no record names, counted by the folder they lie in."""
    ids = list(folder.unread())
    unread = Counter(
        f"{Path(id).parts[0]}/" if "/" in id else "./"
        for id, is_missing in zip(ids, lists.missing(map(digest, ids)), strict=True)
        if is_missing
    )
    return dict(sorted(unread.items()))
