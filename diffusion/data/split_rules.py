"""Split of a record: by a rule that holds it out, else as its source says, else by a random draw."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from trimask.diffusion.data.records import Entry, uniform_draw
from trimask.diffusion.data.splits import TEST, TRAIN, VALIDATION, held_out_split
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.ranges import Checked, Seed, real


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Checked):
    """How records are divided into splits. A split that the source names takes precedence over the draw."""

    validation: Annotated[float, real(0, below=1)] = 0.05
    """Share of the records in the validation split, on which settings are chosen."""
    test: Annotated[float, real(0, below=1)] = 0.1
    """Share of the records in the test split, on which results are reported."""
    by: Literal["id", "content"] = added_field(as_before="id", default="id")
    """Key of the draw: the id of a record, or its content, so that records of equal content are in one split. By
    content, a content that sources put into several splits is in the most held-out one of them."""
    held_out: tuple[str, ...] = ()
    """Rules FIELD=VALUE, as in speaker=anna: records whose metadata have this value form the split test_FIELD, whatever
    their source says. The value is text, or JSON such as true or 7."""
    seed: Seed = 0
    """Seed of the draw."""

    def __post_init__(self):
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test must leave something to train on, got {self.validation} and {self.test}"
            )
        for rule in self.held_out:
            name, equals, value = rule.partition("=")
            if not (name.isidentifier() and equals and value):
                raise ValueError(f"a rule of held_out must be FIELD=VALUE, as in speaker=anna, got {rule!r}")

    def split_of(self, entry: Entry, content: str | None = None) -> str:
        """Split of a record; `content` is the digest of its content, which is needed if `by` is content."""
        rule = self.first_rule(entry.fields)
        if rule is not None:
            return held_out_split(rule.partition("=")[0])
        if entry.split is not None:
            return entry.split
        if self.by == "content" and content is None:
            raise AssertionError(f"the split of {entry.id} is drawn by its content, which is not given")
        draw = uniform_draw(content if self.by == "content" and content else entry.id, f"split {self.seed}")
        if draw < self.test:
            return TEST
        return VALIDATION if draw < self.test + self.validation else TRAIN

    def first_rule(self, fields: Mapping[str, Any]) -> str | None:
        """The first rule that a record with these fields matches; None if it matches none."""
        return next(iter(self.matching_rules(fields)), None)

    def matching_rules(self, fields: Mapping[str, Any]) -> list[str]:
        """All rules that a record with these fields matches, in their order."""
        return [rule for rule in self.held_out if _matches(rule, fields)]


def as_rule_value(value: Any) -> str:
    """A value of a field as it is written in a rule: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False, default=str)


def _matches(rule: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field has the value of a rule. Text is compared in Unicode's normal form C, numbers by value."""
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
    return bool(value == wanted) if type(value) in (int, float) else as_rule_value(value) == as_rule_value(wanted)


def _plain(value: Any) -> Any:
    """The value, with a NumPy scalar converted to Python's type."""
    return value.item() if isinstance(value, np.generic) else value
