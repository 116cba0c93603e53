"""Names of splits. No other module spells them.

    train                 records on which models are trained and tokenizers fitted
    validation            records on which settings are chosen; val, valid and dev are other names of it
    test, test_FIELD      records on which results are reported: drawn, or held out by a rule on FIELD

Any other word is a split as well, which no command uses by default.
"""

import re
from collections.abc import Iterable
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
"""Splits of a dataset that is divided at random."""
_CANONICAL = {"training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION, "testing": TEST}


def canonical_split(name: str) -> str:
    """Name of the split that a source calls `name`: validation for val, valid and dev, for example."""
    return _CANONICAL.get(name, name)


def split_of_folder(name: str) -> str | None:
    """Split of the files in a folder of this name; None if the name is not that of a split."""
    split = canonical_split(name.lower())
    return split if is_used_by_default(split) and split.isidentifier() else None


def held_out_split(field: str) -> str:
    """Split of the records that a rule on a field holds out: test_FIELD."""
    return f"{TEST}_{field}"


def is_test(split: str) -> bool:
    """Whether results are reported on the split: test, or test_FIELD."""
    return split == TEST or split.startswith(held_out_split(""))


def is_used_by_default(split: str) -> bool:
    """Whether some command uses the split without naming it in its arguments."""
    return split in (TRAIN, VALIDATION) or is_test(split)


def splits_of_files(files: Iterable[Path]) -> dict[Path, str]:
    """File → split that its name begins with, as train-0001.jsonl, or that its folder is called.

    Other files are absent. If all named splits are the same, the words do not count as splits, and all are absent.
    """
    words = {path: [re.split(r"[-_. \d]", path.name)[0], path.parent.name] for path in files}
    splits = {path: next(filter(None, map(split_of_folder, names)), None) for path, names in words.items()}
    named = {path: split for path, split in splits.items() if split is not None}
    return named if len(set(named.values())) > 1 else {}


def sorted_splits(splits: Iterable[str]) -> list[str]:
    """The splits in this order: train, validation, and the others by name."""
    return sorted(splits, key=lambda split: (split != TRAIN, split != VALIDATION, split))


def most_held_out(splits: Iterable[str]) -> str:
    """The split that all examples of a content go to if sources put them into several.

    The first that there is of: test splits, validation, other splits, train; of several of one kind the last by name.
    """
    return max(splits, key=lambda split: (is_test(split), split == VALIDATION, split != TRAIN, split))
