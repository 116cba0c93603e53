"""What files say outlives the code: names that have changed since, and values that mean "as before".

A name in a file (a field of a configuration, a parameter, a kind of codec, a metric) stays as it is, or is a key of
`RENAMED`. Files of any age are read by the present names; a file is never rewritten for its names.

A field that is added later says with `added` which value means that nothing has changed. A file that does not have the
field is read as having that value, whatever the default is by then, and a configuration that has the value is written
without the field. So fingerprints, which are digests of what files say, stay what they were.
"""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

RENAMED: dict[str, str] = {
    # Fields: CLASS.FIELD → the present field of that class, or a path of fields inside it.
    "BatchConfig.open_questions": "masked_prompt_share",
    "LoopConfig.keep_checkpoints": "keep_last",
    "LossConfig.rows": "tile_positions",
    "LossConfig.columns": "tile_ids",
    "PrepareConfig.image": "codecs.image",
    "PrepareConfig.audio": "codecs.audio",
    # Metrics: in metrics.jsonl, in checkpoints, and as best_metric.
    "metric.learning_rate": "largest_learning_rate",
}
"""Former name in files → present name. Further scopes are `parameter.NAME`, a part of a parameter's path and a key of
multipliers; and `codec.KIND`, a kind of tokenizer."""

_AS_BEFORE = "as_before"

Plain = Callable[[Any], Any]
"""Makes JSON types of a value."""


def added(as_before: Any, **options: Any) -> Any:
    """A dataclass field that files did not have from the beginning; `options` are those of `dataclasses.field`."""
    return dataclasses.field(metadata={_AS_BEFORE: as_before}, **options)


def present_name(scope: str, name: str) -> str:
    """The present name of what files may call by a former one."""
    return RENAMED.get(f"{scope}.{name}", name)


def present_fields(kind: type, content: Mapping[str, Any], plain: Plain = lambda value: value) -> dict[str, Any]:
    """What a file says of a dataclass, by the present names of its fields; fields that it lacks are as before."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for name, value in content.items():
        *outer, last = (name if name in fields else present_name(kind.__name__, name)).split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    for name, field in fields.items():
        if name not in found and _AS_BEFORE in field.metadata:
            found[name] = plain(field.metadata[_AS_BEFORE])
    return found


def written_fields(kind: type, content: Mapping[str, Any], plain: Plain = lambda value: value) -> dict[str, Any]:
    """The fields of a dataclass as JSON types, without those that are as before: what a file says."""
    before = {f.name: f.metadata[_AS_BEFORE] for f in dataclasses.fields(kind) if _AS_BEFORE in f.metadata}
    return {name: value for name, value in content.items() if name not in before or value != plain(before[name])}


def nearest(name: str, known: Collection[str]) -> str:
    """A suggestion in words for an unknown name; all known ones where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {near[0]!r}" if near else f"there are {', '.join(known) or 'none'}"
