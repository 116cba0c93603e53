"""Names of the numbers 0, 1, … in a column of labels, where a dataset of Hugging Face says them.

    metadata.parquet   the JSON under "huggingface" in its schema: info: features: COLUMN: names
    README.md          the YAML between two lines --- at its head: dataset_info: features: - name: COLUMN
                       dtype: class_label: names; dataset_info may be a list with an item for each configuration

Names are a list, or a mapping whose keys are 0 to n - 1. What is absent or null gives no names; any other value is
refused. YAML may repeat a part by reference, so that a small card holds a huge value: errors show types of values,
never the values themselves.
"""

import re
from pathlib import Path
from typing import Any

from trimask.tokenizers.storage.files import reading
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.text_files import decode_text

_MAX_CARD_BYTES = 1 << 20
"""Largest README.md that is looked into."""
_HEAD = re.compile(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
"""What comes before the text of a card."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_KEYS = 10
"""Most keys of a mapping that an error shows."""


def label_names(path: Path, root: Path, column: str) -> tuple[str, ...]:
    """Names for a column of a list: those of its Parquet schema, else of the card in its folder, else in the root.

    Raises ValueError, naming the file and the field, where they cannot be read or do not number from 0 on.
    """
    if path.suffix == ".parquet":
        return _names_of_schema(path, column)
    for folder in (path.parent, root):
        if names := _names_of_card(folder / "README.md", column):
            return names
    return ()


def _names_of_schema(path: Path, column: str) -> tuple[str, ...]:
    from pyarrow import parquet  # takes a third of a second to load

    with reading(path, "not a readable Parquet file"):
        said = (parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    with reading(path, "the schema's description for Hugging Face cannot be read"):
        about = parse_json(said, None)
    names = _value_at(about, f"{path}: huggingface", "info", "features", column, "names")
    return _checked(names, f"{path}: names of {column!r}")


def _names_of_card(card: Path, column: str) -> tuple[str, ...]:
    """Names that the head of a card gives; configurations must not differ in them."""
    head = _head_of(card)
    infos = head.get("dataset_info") if isinstance(head, dict) else None
    found = set[tuple[str, ...]]()
    for info in infos if isinstance(infos, list) else [infos]:
        features = _value_at(info, f"{card}: dataset_info", "features")
        if features is not None and not isinstance(features, list):
            raise ValueError(f"{card}: dataset_info.features must be a list, got {type(features).__name__}")
        for feature in features or ():
            if _value_at(feature, f"{card}: an item of dataset_info.features", "name") == column:
                kind = feature.get("dtype")
                where = f"{card}: dtype of {column!r}"
                names = None if isinstance(kind, str) else _value_at(kind, where, "class_label", "names")
                found.add(_checked(names, f"{card}: names of {column!r}"))
    found.discard(())
    if len(found) > 1:
        raise ValueError(f"{card}: names of {column!r} differ between configurations; --fields.labels says which")
    return next(iter(found), ())


def _head_of(card: Path) -> Any:
    """The YAML at the head of a card; None where there is none."""
    if not card.is_file():
        return None
    size = card.stat().st_size
    if size > _MAX_CARD_BYTES:
        raise ValueError(
            f"{card}: {size:,} bytes, names of labels are looked for in at most {_MAX_CARD_BYTES:,}; "
            "--fields.labels gives them"
        )
    with reading(card, "cannot be read"):
        found = _HEAD.match(decode_text(card.read_bytes()))
    if found is None:
        return None
    import yaml

    class Strict(yaml.SafeLoader):
        """Refuses a key that is there twice, and <<, which multiplies mappings."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            seen = {("tag:yaml.org,2002:merge", "<<")}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in seen:
                    raise ValueError(f"a key that is there twice, or <<: {key.value[:40]!r}")
                seen.add((key.tag, key.value))

    with reading(card, "its head is not plain YAML"):
        return yaml.load(found[1], Strict)


def _value_at(value: Any, where: str, *keys: str) -> Any:
    """The value under these keys of mappings inside one another; None where one is absent or null."""
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {type(value).__name__}")
        value, where = value.get(key), f"{where}.{key}"
    return value


def _checked(names: Any, where: str) -> tuple[str, ...]:
    """The names in the order of their numbers; none for None."""
    if names is None:
        return ()
    if isinstance(names, dict):
        names = _in_order(names, where)
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


def _in_order(names: dict[Any, Any], where: str) -> list[Any]:
    """The values of a mapping whose keys are the numbers from 0 on, as numbers or as text."""
    numbers = {key: number for number in range(len(names)) for key in (number, str(number))}
    found = {numbers[key]: name for key, name in names.items() if type(key) in (int, str) and key in numbers}
    if len(found) < len(names):
        keys = ", ".join(str(key)[:20] if _is_short(key) else type(key).__name__ for key in list(names)[:_SHOWN_KEYS])
        raise ValueError(
            f"{where} must have the keys 0 to {len(names) - 1}, got {keys}{', …' * (len(names) > _SHOWN_KEYS)}"
        )
    return [found[number] for number in range(len(names))]


def _is_short(key: Any) -> bool:
    """Whether a key can be shown: text, or a number of few digits."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 10**15)
