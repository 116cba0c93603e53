"""Names of splits: the only place that knows them.

    train                 what is trained and fitted on
    validation            what settings are chosen on; val, valid and dev mean it, too
    test, test_FIELD      what is reported on: drawn, or all records that a field holds out

Any other word is a split as well; no command uses it by itself.
"""

import re
from collections.abc import Iterable
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_USUAL = {"training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION, "testing": TEST}


def usual_split(name: str) -> str:
    """The split that a source's word means."""
    return _USUAL.get(name, name)


def split_of_folder(name: str) -> str | None:
    """The split of which a folder of this name holds the files; None: it is a folder as any."""
    split = usual_split(name.lower())
    return split if is_used(split) and split.isidentifier() else None


def is_test(split: str) -> bool:
    """Whether results are reported on the split."""
    return split == TEST or split.startswith(f"{TEST}_")


def is_used(split: str) -> bool:
    """Whether some command uses the split without being told to."""
    return split in (TRAIN, VALIDATION) or is_test(split)


def splits_of_files(files: Iterable[Path]) -> dict[Path, str]:
    """The splits that names of files say: their own, as train-0001.jsonl, or that of the folder they lie in.

    Where fewer than two splits are named, they are words as any, and nothing is said.
    """
    words = {path: [re.split(r"[-_. \d]", path.name)[0], path.parent.name] for path in files}
    found = {path: next(filter(None, map(split_of_folder, names)), None) for path, names in words.items()}
    named = {path: split for path, split in found.items() if split is not None}
    return named if len(set(named.values())) > 1 else {}


def in_order(splits: Iterable[str]) -> list[str]:
    """Training, validation and the others by name."""
    return sorted(splits, key=lambda split: (split != TRAIN, split != VALIDATION, split))


def most_held_out(splits: Iterable[str]) -> str:
    """Of several splits the one that a content belongs to which is in all of them."""
    return max(splits, key=lambda split: (is_test(split), split == VALIDATION, split != TRAIN, split))
