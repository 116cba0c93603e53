"""Compatibility with files written by earlier versions: renamed fields and fields added later.

A name in a file (a configuration field, a parameter, a codec kind, a metric) either stays unchanged or becomes a key of
`RENAMED`. Files of any age are read under the current names; a file is never rewritten for its names.

A field added later is declared with `added_field`, which states the value that reproduces the earlier behaviour. A file
without the field is read as having that value, whatever the default has become, and a configuration with that value is
written without the field. Fingerprints, which are digests of file contents, therefore do not change.
"""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

RENAMED: dict[str, str] = {
    # Fields: CLASS.FIELD → the current field of that class, or a path of fields inside it.
    "BatchConfig.open_questions": "masked_prompt_share",
    "LoopConfig.keep_checkpoints": "keep_last",
    "LossConfig.rows": "tile_positions",
    "LossConfig.columns": "tile_ids",
    "ScheduleConfig.min_time": "min_share",
    "PrepareConfig.image": "codecs.image",
    "PrepareConfig.audio": "codecs.audio",
    # Metrics: in metrics.jsonl, in checkpoints, and as best_metric.
    "metric.learning_rate": "largest_learning_rate",
}
"""Former name in files → current name. Besides CLASS.FIELD and metric.NAME the scopes are `parameter.NAME`, one part of
a parameter's path and a key of multipliers, and `codec.KIND`, a kind of tokenizer."""

_AS_BEFORE = "as_before"

Plain = Callable[[Any], Any]
"""Converts a value to JSON types."""


def added_field(as_before: Any, **options: Any) -> Any:
    """A dataclass field that earlier files lack; `as_before` is its value that reproduces the earlier behaviour.

    `options` are those of `dataclasses.field`.
    """
    return dataclasses.field(metadata={_AS_BEFORE: as_before}, **options)


def current_name(scope: str, name: str) -> str:
    """Current name of something that files may call by a former name."""
    return RENAMED.get(f"{scope}.{name}", name)


def current_fields(kind: type, content: Mapping[str, Any], plain: Plain = lambda value: value) -> dict[str, Any]:
    """A file's fields of a dataclass under their current names; added fields that it lacks are as before."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    current: dict[str, Any] = {}
    for name, value in content.items():
        *outer, last = (name if name in fields else current_name(kind.__name__, name)).split(".")
        parent = current
        for part in outer:
            parent = parent.setdefault(part, {})
        parent[last] = value
    for name, field in fields.items():
        if name not in current and _AS_BEFORE in field.metadata:
            current[name] = plain(field.metadata[_AS_BEFORE])
    return current


def written_fields(kind: type, content: Mapping[str, Any], plain: Plain = lambda value: value) -> dict[str, Any]:
    """Fields of a dataclass as JSON types, as a file holds them: without added fields whose value is as before."""
    before = {f.name: f.metadata[_AS_BEFORE] for f in dataclasses.fields(kind) if _AS_BEFORE in f.metadata}
    return {name: value for name, value in content.items() if name not in before or value != plain(before[name])}


def suggestion(name: str, known: Collection[str]) -> str:
    """Suggests, for an error message, the known name closest to an unknown one; lists all names if none is close."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"
