"""Writes answers to a folder: each as a file, with its animation and trace, and a line of index.jsonl.

Answers that the folder holds keep their file names, so the same call writes the same bytes again, and another call adds
answers. With several calls at the same time, or one that is killed and repeated, no line and no file is lost or
duplicated. An index may come from an untrusted source, so every name in it must be a plain file name with the suffix of
its kind.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from trimask.diffusion.run.folder import staged
from trimask.scripts.output.media_files import write_animation
from trimask.scripts.output.presentation import ending_of, presentation_of
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import require_plain_name, write_text
from trimask.tokenizers.storage.json_text import read_json_lines
from trimask.tokenizers.vocabulary import TEXT

_INDEX = "index.jsonl"
_TRACE = ".trace.jsonl"
FRAME_MILLISECONDS = 150
"""Duration of a frame of an animation."""
_STEM_LENGTH = 60
"""Largest number of characters of a file name, without its number and suffix."""
_STEM_BYTES = 120
"""Largest number of bytes of a file name in UTF-8, without its number and suffix."""
_ACCENTS = re.compile("([a-z])[\u0300-\u036f]+")


@dataclass(frozen=True)
class Answered:
    """One answer, ready to be written."""

    title: str
    """Text from which file names are made."""
    entry: dict[str, Any]
    """The answer's line of the index, without file names."""
    media: Any
    """The answer: a text, or a medium as its codec decodes it."""
    animation: Literal["gif", "mp4"] | None
    """Format of the animation. None: no animation."""
    frames: list[Image.Image]
    """Frames of the animation."""
    trace: str | None
    """Lines of the trace. None: no trace."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A line of the index."""

    file: str
    prompt: str
    task: str
    to: str
    number: int
    seed: int
    step: int
    settings: dict[str, Any]
    nfe: int | None = None
    text: str | None = None
    log_probs: list[float] | None = None
    animation: str | None = None
    trace: str | None = None


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Lines of a folder's index; empty if it has none.

    Raises ValueError if a line is not an entry of an index, or its file names are not plain or have another suffix.
    """
    path = folder / _INDEX
    if not path.exists() and not path.is_symlink():
        return []
    entries = []
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        entry = configuration.from_dict(line, _Entry, f"{where}: not an entry of an index; choose another --out")
        require_plain_name(entry.file, f"{where} @ $.file", f".{ending_of(entry.to)}")
        if entry.animation is not None:
            require_plain_name(entry.animation, f"{where} @ $.animation", ".gif", ".mp4")
        if entry.trace is not None:
            require_plain_name(entry.trace, f"{where} @ $.trace", _TRACE)
        entries.append(line)
    return entries


def write_answers(out: Path, outputs: Sequence[Answered], tokenizers: MediaTokenizers) -> None:
    """Writes all files and the index, or nothing if an error occurs."""
    with staged(out) as stage:
        index = read_index(out)
        lines = {entry["file"]: entry for entry in index}
        file_of = {_identity(entry): entry["file"] for entry in index}
        stems = {Path(name).stem for name in lines}
        for answer in outputs:
            ending = ending_of(answer.entry["to"])
            name = file_of.get(_identity(answer.entry))
            if name is None:
                stem = file_stem(answer.title, partial(_is_taken, out, stems, ending))
                stems.add(stem)
                name = f"{stem}.{ending}"
            write_media(stage / name, answer.entry["to"], answer.media, tokenizers)
            entry = {**lines.get(name, {}), **answer.entry, "file": name}
            if answer.animation is not None:
                entry["animation"] = Path(name).with_suffix(f".{answer.animation}").name
                write_animation(stage / entry["animation"], answer.frames, FRAME_MILLISECONDS)
            if answer.trace is not None:
                entry["trace"] = Path(name).with_suffix(_TRACE).name
                write_text(stage / entry["trace"], answer.trace)
            lines[name] = entry
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines.values())
        write_text(stage / _INDEX, text)


def write_media(path: Path, modality: str, media: Any, tokenizers: MediaTokenizers) -> None:
    """Writes one answer to a file."""
    if modality == TEXT:
        write_text(path, media + "\n")
    else:
        presentation_of(modality).write(path, media, tokenizers.codec(modality))


def file_stem(prompt: str, is_taken: Callable[[str], bool] = lambda _: False) -> str:
    """File name without suffix: letters and digits of the prompt, joined by dashes, with a number if it is taken.

    Latin letters lose their accents; letters of other scripts stay as they are. A prompt without letters and digits,
    such as an emoji, gives the Unicode names of its characters.
    """
    plain = _ACCENTS.sub(r"\1", unicodedata.normalize("NFKD", prompt).casefold())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in unicodedata.normalize("NFC", plain))
    if not re.sub("-", "", kept):  # emoji and signs
        kept = "-".join(unicodedata.name(c, "").casefold().replace(" ", "-") for c in prompt if not c.isspace())
    words = re.sub("-+", "-", kept).strip("-")[:_STEM_LENGTH]
    while len(words.encode()) > _STEM_BYTES:
        words = words[:-1]
    stem = words.strip("-") or "untitled"
    if not is_taken(stem):
        return stem
    number = 2
    while is_taken(f"{stem}-{number}"):
        number += 1
    return f"{stem}-{number}"


def _identity(entry: dict[str, Any]) -> str:
    """Text that is equal for two lines of an index if they are the same question with the same settings."""
    names = ("prompt", "task", "number", "seed", "step", "settings")
    return json.dumps([entry[name] for name in names], sort_keys=True)


def _is_taken(out: Path, stems: set[str], ending: str, stem: str) -> bool:
    """Whether a file of the index or another file of the folder has this stem."""
    return stem in stems or any((out / f"{stem}.{e}").exists() for e in (ending, "gif", "mp4", "trace.jsonl"))
