"""A folder of answers: a file each, with its animation and trace, and index.jsonl with a line each.

What is there already keeps its file, so the same call writes the same bytes again and another call adds to them. Of
several calls at a time, and of one that was killed and is repeated, no line and no file is lost or there twice. An
index may have been sent by someone else: each name in it is a plain one of the folder, with the ending of its kind.
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
_STEM_LENGTH = 60
_STEM_BYTES = 120
_ACCENTS = re.compile("([a-z])[\u0300-\u036f]+")


@dataclass(frozen=True)
class Answered:
    """One answer, ready to be written."""

    title: str
    entry: dict[str, Any]
    """Its line of the index, but for the files."""
    media: Any
    animation: Literal["gif", "mp4"] | None
    frames: list[Image.Image]
    """Of the animation."""
    trace: str | None


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
    """The lines of earlier calls. Raises ValueError for what is no index, or names files as none of ours does."""
    path = folder / _INDEX
    if not path.exists() and not path.is_symlink():
        return []
    entries = []
    for number, line in read_json_lines(path):
        where = f"{path}, line {number}"
        entry = configuration.from_dict(line, _Entry, f"{where}: not an entry of this index; choose another --out")
        require_plain_name(entry.file, f"{where} @ $.file", f".{ending_of(entry.to)}")
        if entry.animation is not None:
            require_plain_name(entry.animation, f"{where} @ $.animation", ".gif", ".mp4")
        if entry.trace is not None:
            require_plain_name(entry.trace, f"{where} @ $.trace", _TRACE)
        entries.append(line)
    return entries


def write_answers(out: Path, outputs: Sequence[Answered], tokenizers: MediaTokenizers) -> None:
    """All files and the index, or nothing."""
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
    """Writes one answer."""
    if modality == TEXT:
        write_text(path, media + "\n")
    else:
        presentation_of(modality).write(path, media, tokenizers.codec(modality))


def file_stem(prompt: str, is_taken: Callable[[str], bool] = lambda _: False) -> str:
    """A file name without its ending: the prompt's letters and digits, numbered if it is taken.

    Latin letters lose their accents; those of other scripts stay as they are. Of signs alone it is their names.
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
    """What makes two lines of the index the same question asked again."""
    names = ("prompt", "task", "number", "seed", "step", "settings")
    return json.dumps([entry[name] for name in names], sort_keys=True)


def _is_taken(out: Path, stems: set[str], ending: str, stem: str) -> bool:
    """Whether the index has a file of this name or, unknown to the index, the folder has."""
    return stem in stems or any((out / f"{stem}.{e}").exists() for e in (ending, "gif", "mp4", "trace.jsonl"))
