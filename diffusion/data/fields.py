"""Named values of a record as its source has them, and the text and the split that they hold."""

from typing import Any

from trimask.diffusion.data.splits import canonical_split
from trimask.tokenizers.storage.json_text import parse_json


class Fields(dict[str, Any]):
    """Named values of a record: a JSON object, a row of a table, or the features of a TFDS record."""

    @classmethod
    def of_json(cls, line: str) -> "Fields":
        """Fields of the JSON object that a line holds. Raises ValueError if it holds anything else."""
        content = parse_json(line, None)
        if not isinstance(content, dict):
            raise ValueError(f"a line must be a JSON object, got {type(content).__name__}")
        return cls(content)

    def text(self, name: str, hint: str = "") -> str:
        """Text of a field. Raises ValueError if it holds no text, with `hint` at the end, or only white space."""
        value = self.get(name)
        if not isinstance(value, str):
            raise ValueError(
                f'needs a "{name}", which is text, got {value!r}; its fields are {", ".join(self) or "none"}{hint}'
            )
        if not value.strip():
            raise ValueError(f'"{name}" is empty')
        return value

    def split(self, default: str | None = None) -> str | None:
        """Split that the record names, by its canonical name; `default` if the field is absent or null."""
        split = default if self.get("split") is None else self["split"]
        if split is not None and (not isinstance(split, str) or not split.isidentifier()):
            raise ValueError(f"a split must be a plain word, such as train or test, got {split!r}")
        return None if split is None else canonical_split(split)
