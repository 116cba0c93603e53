"""Names that a Hugging Face dataset declares for the numbers 0, 1, … in a column of labels.

    metadata.parquet   the JSON under "huggingface" in its schema: info: features: COLUMN: names
    README.md          the YAML between two lines --- at its head: dataset_info: features: - name: COLUMN
                       dtype: class_label: names; dataset_info may be a list with an item for each configuration

Names are a list, or a mapping whose keys are 0 to n - 1. If a key is absent or null, there are no names; a value of any
other type is an error. YAML can repeat a part by reference, so that a small README.md (the dataset's card) holds a huge
value; therefore errors show the types of values, never the values.
"""

import re
from pathlib import Path
from typing import Any

from trimask.tokenizers.storage.files import reading
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.text_files import decode_text

_MAX_CARD_BYTES = 1 << 20
"""Size in bytes of the largest README.md that is read."""
_HEAD = re.compile(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
"""YAML head of a card."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_SHOWN_KEYS = 10
"""Largest number of keys of a mapping that an error shows."""


def label_names(path: Path, root: Path, column: str) -> tuple[str, ...]:
    """Names of the labels in a column of the list at `path`, in the order of their numbers; empty if none are declared.

    They are those of its Parquet schema; for other lists those of the card in its folder, else of the card in the
    folder `root`. Raises ValueError, with the file and the field, if they cannot be read or are not numbered from 0.
    """
    if path.suffix == ".parquet":
        return _names_of_schema(path, column)
    for folder in (path.parent, root):
        if names := _names_of_card(folder / "README.md", column):
            return names
    return ()


def _names_of_schema(path: Path, column: str) -> tuple[str, ...]:
    """Names of labels that the schema of a Parquet file declares."""
    from pyarrow import parquet  # takes a third of a second to load

    with reading(path, "not a readable Parquet file"):
        content = (parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    with reading(path, "the schema's description for Hugging Face cannot be read"):
        description = parse_json(content, None)
    names = _value_at(description, f"{path}: huggingface", "info", "features", column, "names")
    return _checked(names, f"{path}: names of {column!r}")


def _names_of_card(card: Path, column: str) -> tuple[str, ...]:
    """Names of labels that the head of a card declares. Raises ValueError if they differ between configurations."""
    head = _head_of(card)
    infos = head.get("dataset_info") if isinstance(head, dict) else None
    declared = set[tuple[str, ...]]()
    for info in infos if isinstance(infos, list) else [infos]:
        features = _value_at(info, f"{card}: dataset_info", "features")
        if features is not None and not isinstance(features, list):
            raise ValueError(f"{card}: dataset_info.features must be a list, got {type(features).__name__}")
        for feature in features or ():
            if _value_at(feature, f"{card}: an item of dataset_info.features", "name") == column:
                kind = feature.get("dtype")
                where = f"{card}: dtype of {column!r}"
                names = None if isinstance(kind, str) else _value_at(kind, where, "class_label", "names")
                declared.add(_checked(names, f"{card}: names of {column!r}"))
    declared.discard(())
    if len(declared) > 1:
        raise ValueError(
            f"{card}: names of {column!r} differ between configurations; name those to use by --fields.labels"
        )
    return next(iter(declared), ())


def _head_of(card: Path) -> Any:
    """Content of the YAML head of a card; None if it has none."""
    if not card.is_file():
        return None
    size = card.stat().st_size
    if size > _MAX_CARD_BYTES:
        raise ValueError(
            f"{card}: {size:,} bytes, names of labels are looked for in at most {_MAX_CARD_BYTES:,}; "
            "give them by --fields.labels"
        )
    with reading(card, "cannot be read"):
        head = _HEAD.match(decode_text(card.read_bytes()))
    if head is None:
        return None
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Raises ValueError for a repeated key, and for the merge key <<, which multiplies mappings."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            refused = {("tag:yaml.org,2002:merge", "<<")}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in refused:
                    raise ValueError(f"a repeated key, or <<: {key.value[:40]!r}")
                refused.add((key.tag, key.value))

    with reading(card, "its head is not plain YAML"):
        return yaml.load(head[1], StrictLoader)


def _value_at(value: Any, where: str, *keys: str) -> Any:
    """Value under a path of keys in nested mappings; None if a key is absent or its value null.

    Raises ValueError, with its path after `where`, for a value that should be a mapping and is not.
    """
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {type(value).__name__}")
        value, where = value.get(key), f"{where}.{key}"
    return value


def _checked(names: Any, where: str) -> tuple[str, ...]:
    """Names in the order of their numbers; empty for None. Raises ValueError if they are not valid names."""
    if names is None:
        return ()
    if isinstance(names, dict):
        names = _in_order_of_keys(names, where)
    if not isinstance(names, list):
        raise ValueError(f"{where} must be a list, or a mapping of numbers, got {type(names).__name__}")
    if not names:
        raise ValueError(f"{where} are empty")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"{where} must be text, got {type(name).__name__} for {number}; quote them: without quotes no, yes, "
                "null and 7 are not text"
            )
        if not name.strip() or _SURROGATE.search(name):
            raise ValueError(f"{where} must be valid text that is not empty, got {name!r} for {number}")
    return tuple(names)


def _in_order_of_keys(names: dict[Any, Any], where: str) -> list[Any]:
    """Values of a mapping in the order of its keys, which must be 0 to n - 1, as numbers or as text."""
    numbers = {key: number for number in range(len(names)) for key in (number, str(number))}
    numbered = {numbers[key]: name for key, name in names.items() if type(key) in (int, str) and key in numbers}
    if len(numbered) < len(names):
        shown = list(names)[:_MAX_SHOWN_KEYS]
        keys = ", ".join(str(key)[:20] if _can_be_shown(key) else type(key).__name__ for key in shown)
        raise ValueError(
            f"{where} must have the keys 0 to {len(names) - 1}, got {keys}{', …' * (len(names) > _MAX_SHOWN_KEYS)}"
        )
    return [numbered[number] for number in range(len(names))]


def _can_be_shown(key: Any) -> bool:
    """Whether an error can show a key: text, which is cut, or a number of at most 15 digits."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 10**15)
