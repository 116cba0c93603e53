"""Which split a record belongs to: what its source says, rules that hold records out, and else a draw by its id."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from trimask.diffusion.data.records import Entry, draw_of
from trimask.diffusion.data.splits import TEST, TRAIN, VALIDATION
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.ranges import Checked, Seed, real


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Checked):
    """Which records are held out. What a source itself says of a record's split stands, but for `held_out`."""

    validation: Annotated[float, real(0, below=1)] = 0.05
    """Share of the records to choose settings on."""
    test: Annotated[float, real(0, below=1)] = 0.1
    """Share of the records to report on."""
    by: Literal["id", "content"] = added_field(as_before="id", default="id")
    """What the draw goes by: the id of a record, or its content, so that what is there twice is in one split. Then a
    content that the source itself puts in several splits is in the one that is held out."""
    held_out: tuple[str, ...] = ()
    """FIELD=VALUE, as in speaker=anna: records whose metadata say so are the split test_FIELD. The value is text, or
    JSON: true, 7."""
    seed: Seed = 0
    """Of the draw."""

    def __post_init__(self):
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test must leave something to train on, got {self.validation} and {self.test}"
            )
        for rule in self.held_out:
            name, equals, value = rule.partition("=")
            if not (name.isidentifier() and equals and value):
                raise ValueError(f"what is held out is written FIELD=VALUE, as in speaker=anna, got {rule!r}")

    def of(self, entry: Entry, content: str | None = None) -> str:
        """The split of a record; the digest of its content is needed where the draw goes by it."""
        rule = self.rule_of(entry.fields)
        if rule is not None:
            return f"test_{rule.partition('=')[0]}"
        if entry.split is not None:
            return entry.split
        if self.by == "content" and content is None:
            raise AssertionError(f"the split of {entry.id} goes by its content")
        draw = draw_of(content if self.by == "content" and content else entry.id, f"split {self.seed}")
        if draw < self.test:
            return TEST
        return VALIDATION if draw < self.test + self.validation else TRAIN

    def rule_of(self, fields: Mapping[str, Any]) -> str | None:
        """The first rule that holds a record with these fields out."""
        return next(iter(self.rules_of(fields)), None)

    def rules_of(self, fields: Mapping[str, Any]) -> list[str]:
        """All rules that hold for a record with these fields."""
        return [rule for rule in self.held_out if _is_held_out(rule, fields)]


def shown(value: Any) -> str:
    """A value as a rule writes it."""
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False, default=str)


def _is_held_out(rule: str, fields: Mapping[str, Any]) -> bool:
    name, _, word = rule.partition("=")
    if name not in fields:
        return False
    value = _plain(fields[name])
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value) == unicodedata.normalize("NFC", word)
    try:
        wanted = parse_json(word, None)
    except ValueError:
        return False
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted) if type(value) in (int, float) else shown(value) == shown(wanted)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value
