"""Survey of a source: all its records are read once before anything is tokenised.

The survey draws the sample on which tokenizers are fitted, by id, so that it does not depend on other records. It also
checks that lists do not contradict one another, that `--splits.held-out` holds records out and `--fields.labels` names
labels, and finds files that no record names. Media are read for the sample alone, or for all records if `splits.by` is
content.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.occurrences import Occurrences
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers.folders import MediaFolder
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, Source, text_digest
from trimask.diffusion.data.split_rules import as_rule_value
from trimask.diffusion.data.splits import TRAIN, most_held_out
from trimask.diffusion.run.progress import Report

_FIT_BYTES = 512 << 20
"""Size in bytes of the media in a sample, above which no more are added to it."""
_REPORT_EVERY = 256
"""Number of records between two reports of progress."""
_MAX_COUNTED_VALUES = 1000
"""Largest number of different values of a field that are counted, to be named in an error."""


@dataclass(frozen=True)
class RuleUse:
    """Effect of the rules of `splits.held_out` on the records of a source."""

    values: dict[str, Counter[str]]
    """Field of a rule → value → number of records that have it."""
    effective: set[str] = field(default_factory=set)
    """Rules that hold a record out."""
    shadowed: set[str] = field(default_factory=set)
    """Rules that match a record which an earlier rule holds out."""

    def add(self, fields: Mapping[str, Any], matching: Sequence[str]) -> None:
        """Counts a record with these fields that matches these rules."""
        self.effective.update(matching[:1])
        self.shadowed.update(matching[1:])
        for name, counts in self.values.items():
            if name in fields:
                value = as_rule_value(fields[name])
                if len(counts) < _MAX_COUNTED_VALUES or value in counts:
                    counts[value] += 1


@dataclass(frozen=True)
class SourceSurvey:
    """What the survey of a source found."""

    sample: list[RawExample]
    """Examples on which tokenizers are fitted, with media reduced for that."""
    unread: dict[str, int]
    """Folder → number of its files that no record names."""
    rules: RuleUse
    has_labels: bool = False
    """Whether a caption is a number, for which `fields.labels` may have a name."""


def survey_source(
    name: str,
    source: Source,
    blocks: list[Block],
    config: PrepareConfig,
    contents: dict[str, str],
    is_fitted: bool,
    report: Report,
) -> SourceSurvey:
    """Reads all records of a source. The sample is of the training split if `is_fitted`, else of all splits.

    `contents` are those of the dataset that `splits_of_shared_contents` found. Raises ValueError if two lists name a
    file, or if a file is in two splits; BadRecord at a record that cannot be used, unless the configuration says to
    skip it.
    """
    total = sum(block.count for block in blocks)
    share = config.fit_examples / max(1, total)
    sample, sample_bytes, has_labels = list[RawExample](), 0, False
    rule_use = RuleUse({rule.partition("=")[0]: Counter[str]() for rule in config.splits.held_out})
    splits, lists = Occurrences(), Occurrences()
    for done, entry in enumerate(_entries(source, blocks, config)):
        if done % _REPORT_EVERY == 0:
            report(f"reading records of {name}", done, total)
        has_labels = has_labels or (isinstance(source, MediaFolder) and source.has_label(entry))
        rules = config.splits.matching_rules(entry.fields)
        rule_use.add(entry.fields, rules)
        if source.medium is not None:
            splits.add(entry.digest, rules[0] if rules else entry.split or "")
            lists.add(entry.digest, entry.file)
        if entry.draw("fit") >= share or sample_bytes > _FIT_BYTES:
            continue
        try:
            if is_fitted and _split(source, entry, contents, config) != TRAIN:
                continue
            sample.append(_reduced_example(entry, sample, source.medium, config))
        except BadRecord:
            if config.on_error == "stop":
                raise
            continue
        sample_bytes += 0 if source.medium is None else sample[-1].media[source.medium].nbytes
    report(f"reading records of {name}", total, total)
    _require_one_location(source, blocks, config, splits, lists)
    unread = _unread(source, lists) if isinstance(source, MediaFolder) else {}
    return SourceSurvey(sample, unread, rule_use, has_labels)


def require_rules_used(config: PrepareConfig, surveys: dict[str, SourceSurvey]) -> None:
    """Raises ValueError for a rule that holds no record out, with the values that the records have.

    Raises ValueError also if there are names of labels, but no caption is a number.
    """
    if config.fields.labels and not any(survey.has_labels for survey in surveys.values()):
        raise ValueError(
            f"fields.labels: no caption of a picture or a sound is a number, so {', '.join(config.fields.labels)} name "
            "nothing; leave them out, or choose the field of the numbers with --fields.text"
        )
    for rule in config.splits.held_out:
        if any(rule in survey.rules.effective for survey in surveys.values()):
            continue
        if any(rule in survey.rules.shadowed for survey in surveys.values()):
            raise ValueError(
                f"splits.held-out: earlier rules hold out every record that {rule} holds out; leave it out"
            )
        name = rule.partition("=")[0]
        counts = sum((survey.rules.values[name] for survey in surveys.values()), Counter[str]())
        known = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(10))
        values = f"{name} is {known}{', …' if len(counts) > 10 else ''}" if counts else f"no record has a field {name}"
        raise ValueError(f"splits.held-out: {rule} holds no record out; {values}")


def _entries(source: Source, blocks: list[Block], config: PrepareConfig) -> Iterator[Entry]:
    """All records that can be read. Raises the first BadRecord, unless the configuration says to skip them."""
    for entry in (entry for block in blocks for entry in source.entries(block)):
        if isinstance(entry, BadRecord):
            if config.on_error == "stop":
                raise entry
        else:
            yield entry


def splits_of_shared_contents(
    sources: dict[str, Source], blocks: dict[str, list[Block]], config: PrepareConfig, report: Report
) -> dict[str, dict[str, str]]:
    """Dataset → digest of a content of it that sources put into several splits → the split of all its examples.

    Raises BadRecord at a record that cannot be used, unless the configuration says to skip it.
    """
    all_splits, of_dataset = Occurrences(), {name: Occurrences() for name in sources}
    total, done = sum(block.count for of_source in blocks.values() for block in of_source), 0
    for name, source in sources.items():
        for entry in _entries(source, blocks[name], config):
            if done % _REPORT_EVERY == 0:
                report("comparing contents", done, total)
            done += 1
            try:
                content = entry.example().content_digest(source.medium)
            except BadRecord:
                if config.on_error == "stop":
                    raise
                continue
            all_splits.add(content, config.splits.split_of(entry, content))
            of_dataset[name].add(content, "")
    report("comparing contents", total, total)
    shared = {content: most_held_out(splits) for content, splits in all_splits.at_several_locations().items()}
    return {name: dict(compress(shared.items(), ~seen.is_unseen(shared))) for name, seen in of_dataset.items()}


def _split(source: Source, entry: Entry, contents: dict[str, str], config: PrepareConfig) -> str:
    """Split of a record, for which its medium is read if splits go by content."""
    if config.splits.by == "id":
        return config.splits.split_of(entry)
    content = entry.example().content_digest(source.medium)
    return contents.get(content) or config.splits.split_of(entry, content)


def _reduced_example(entry: Entry, sample: list[RawExample], medium: str | None, config: PrepareConfig) -> RawExample:
    """The example of an entry, with its medium reduced for fitting. Raises BadRecord if the medium cannot be used."""
    example = entry.example()
    if medium is None:
        return example
    first = sample[0].media[medium] if sample else example.media[medium]
    try:
        content = modality(medium).reduce_for_fitting(example.media[medium], first, config.media)
    except ValueError as error:
        raise BadRecord(entry.file, entry.line, f"{example.id}: {error}") from error
    return RawExample(example.id, {**example.media, medium: content}, example.given_characters)


def _require_one_location(
    source: Source, blocks: list[Block], config: PrepareConfig, splits: Occurrences, lists: Occurrences
) -> None:
    """Raises ValueError for a file that two lists name, or that is in two splits, with the lines that name it."""
    in_lists, in_splits = lists.at_several_locations(), splits.at_several_locations()
    if not in_lists and not in_splits:
        return
    wanted, entries = next(iter(in_lists or in_splits)), dict[str, Entry]()
    for entry in _entries(source, blocks, config):
        if entry.digest == wanted:
            split = config.splits.first_rule(entry.fields) or entry.split or "none"
            entries.setdefault(entry.file if in_lists else split, entry)
    lines = " and ".join(f"{e.file}, line {e.line} (split {e.split or 'drawn'})" for e in entries.values())
    (first, *_) = entries.values()
    what = "in two lists" if in_lists else "in two splits"
    raise ValueError(f"{first.id} is {what}: {lines}; list each file in one place, and in one split")


def _unread(folder: MediaFolder, lists: Occurrences) -> dict[str, int]:
    """Folder → number of its files that no record names, in alphabetical order."""
    ids = list(folder.unread())
    unread = Counter(
        f"{Path(id).parts[0]}/" if "/" in id else "./"
        for id, is_missing in zip(ids, lists.is_unseen(map(text_digest, ids)), strict=True)
        if is_missing
    )
    return dict(sorted(unread.items()))
