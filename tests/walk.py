"""Number of modules a reader enters to follow one record into its shard, or one prompt to its answer.

    python tests/walk.py record      a picture with a caption, from its folder to its shard, by `prepare`
    python tests/walk.py prompt      a text, from the command line to the picture that is written, by `trimask generate`

A walk consists of the functions that take the record as an argument, or return it, in any of its forms: its text, its
bytes, its pixels, its codes. Each function counts once, when it is first called. A *stay* is an entry into a module
that is not on the call stack already; a call of a function in a module on the stack belongs to that module's stay. A
*return* is a stay in a module that had one before. Imports, methods of dataclasses and `tokenizers/storage`, which
every module uses like the standard library, do not count. A compiled function counts as one call.

The record is a typical one: it is not in the sample on which tokenizers are fitted.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizers", "diffusion", "sampling_rl", "configs", "scripts")
LEFT_OUT = "tokenizers/storage/"
NAME = "emu"
"""File name of the record without its ending, and its caption."""
_MAX_PARTS = 64
"""Containers with at least this number of parts are not searched."""


class Stay(NamedTuple):
    """Functions of one module, in the order in which they were first called."""

    module: str
    functions: list[str]
    is_return: bool


@dataclasses.dataclass(frozen=True)
class TracedItem:
    """A record or a prompt in all its forms."""

    text: str
    arrays: Sequence[np.ndarray] = ()
    """Pixels, samples and codes."""

    def is_in(self, value: Any, depth: int = 5) -> bool:
        """Whether a value is the item, or contains it in at most `depth` nested containers."""
        if isinstance(value, str | Path):
            return self.text in str(value)
        if isinstance(value, bytes | bytearray):
            return self.text.encode() in value or any(
                array.tobytes() in value for array in self.arrays if array.size > 8
            )
        if isinstance(value, jax.core.Tracer) or depth == 0:
            return False
        if isinstance(value, np.ndarray | jax.Array):
            return value.dtype.kind in "iuf" and any(_holds(np.asarray(value), array) for array in self.arrays)
        if isinstance(value, partial):
            return self._is_in_any((*value.args, *value.keywords.values()), depth)
        if isinstance(value, dict):
            return self._is_in_any((*value, *value.values()), depth)
        if isinstance(value, list | tuple):
            return self._is_in_any(value, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "parameters"):
            return self._is_in_any([getattr(value, field.name, None) for field in dataclasses.fields(value)], depth)
        return False

    def _is_in_any(self, parts: Sequence[Any], depth: int) -> bool:
        return len(parts) < _MAX_PARTS and any(self.is_in(part, depth - 1) for part in parts)


def _holds(values: np.ndarray, array: np.ndarray) -> bool:
    """Whether `values` is `array`, a batch that contains it, or rows of tokens that contain it at any position."""
    if values.shape[-array.ndim :] == array.shape and values.dtype.kind == array.dtype.kind:
        return bool((values.reshape(-1, array.size) == array.reshape(-1)).all(axis=1).any())
    if array.ndim > 1 or values.ndim == 0 or values.shape[-1] < array.size or array.size < 2:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(values, array.size, axis=-1)
    return bool((windows == array).all(axis=-1).any())


def _module_of(code: CodeType) -> str | None:
    """Path of the module of a function; None for modules that do not count."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in ROOMS:
        return None
    module = str(path.relative_to(ROOT))
    return None if module.startswith(LEFT_OUT) else module


def _is_left_out(frame: FrameType) -> bool:
    """Whether a call does not count, as that of a method of a dataclass."""
    name, first = frame.f_code.co_name, frame.f_code.co_varnames[:1]
    is_method = first in (("self",), ("cls",)) and dataclasses.is_dataclass(frame.f_locals.get(first[0]))
    return is_method or name.startswith(("<", "__"))


def _is_on_stack_rows(frame: FrameType | None, file: str) -> bool:
    """Whether a function of a file is on the stack of calls that ends with `frame`."""
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


@contextmanager
def traced(item: TracedItem) -> Iterator[list[Stay]]:
    """Context that records the stays of everything called in it."""
    stays: list[Stay] = []
    counted: set[CodeType] = set()

    def profile(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or code in counted:
            return
        module = None if _is_left_out(frame) else _module_of(code)
        if module is None:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names] if event == "call" else [result]
        sys.setprofile(None)
        try:
            has_item = any(item.is_in(value) for value in values)
        finally:
            sys.setprofile(profile)
        if not has_item:
            return
        counted.add(code)
        earlier = [stay for stay in stays if stay.module == module]
        if earlier and (stays[-1].module == module or _is_on_stack_rows(frame.f_back, code.co_filename)):
            earlier[-1].functions.append(code.co_qualname)
        else:
            stays.append(Stay(module, [code.co_qualname], bool(earlier)))

    sys.setprofile(profile)
    try:
        yield stays
    finally:
        sys.setprofile(None)


def walk_of_record(folder: Path) -> list[Stay]:
    """Stays of a picture with a caption, from its folder to its shard."""
    from trimask.diffusion.data.prepare import prepare
    from trimask.diffusion.data.prepare_config import PrepareConfig
    from trimask.diffusion.data.sources import SourceConfig
    from trimask.tokenizers.image import PatchConfig

    photos = folder / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    names = [NAME, *(f"other{number}" for number in range(15))]
    pixels = {name: draw.integers(0, 256, (8, 8, 3), np.uint8) for name in names}
    for name in names:
        Image.fromarray(pixels[name]).save(photos / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "text": name, "split": "train"}) + "\n" for name in names]
    (photos / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    config = PrepareConfig(
        sources={"photos": SourceConfig(kind="images", where=(str(photos),))},
        codecs={"image": PatchConfig(patch_side=4, codebook_size=4)},
        text_vocabulary=256,
        fit_examples=1,
        workers=1,
    )
    prepared = prepare(folder / "before", config)  # does the imports, and gives the record's codes
    examples = prepared.examples("photos", "train")
    codes = next(example["image"] for example in examples if example["id"] == f"{NAME}.png")
    with traced(TracedItem(NAME, [pixels[NAME], codes])) as stays:
        prepare(folder / "data", config)
    return stays


def walk_of_prompt(loaded: Any, folder: Path) -> list[Stay]:
    """Stays of a text, from the command line to the picture that is written, with a loaded model."""
    from unittest.mock import patch

    from trimask.scripts import generate, questions

    answers: list[Any] = []
    original = questions.Generator.generate

    def generate_and_keep(self: Any, *arguments: Any) -> Any:
        answers[:] = original(self, *arguments)
        return answers

    def run_command(out: str) -> None:
        generate.main([str(loaded.folder), "--prompt", NAME, "--to", "image", "--out", str(folder / out)])

    with patch.object(generate, "load", lambda *_: loaded):
        with patch.object(questions.Generator, "generate", generate_and_keep):
            run_command("before")  # does the imports and compiles
        (answer,) = answers
        codes = [segment.codes for segment in answer.example.segments]
        picture = loaded.tokenizers.decode("image", [codes[-1]])[0]
        text = loaded.vocabulary.to_ids("text", codes[0][:3])
        with traced(TracedItem(NAME, [*codes, text, picture])) as stays:
            run_command("out")
    return stays


def counts(stays: Sequence[Stay]) -> tuple[int, int]:
    """Number of stays, and number of returns among them."""
    return len(stays), sum(stay.is_return for stay in stays)


def show(stays: Sequence[Stay]) -> str:
    """A walk as text, with a line per stay."""
    lines = [
        f"{number:3}  {'return ' if stay.is_return else '       '}{stay.module}: {', '.join(stay.functions)}"
        for number, stay in enumerate(stays, 1)
    ]
    return "\n".join([*lines, "{} stays, {} returns".format(*counts(stays))])


def main(words: Sequence[str]) -> None:
    """Prints the walk that the single argument names. Exits with a usage message for any other arguments."""
    import synthetic

    walks: dict[str, Callable[[Path], list[Stay]]] = {
        "record": walk_of_record,
        "prompt": lambda folder: walk_of_prompt(
            synthetic.untrained(synthetic.prepare_all(folder / "data"), folder), folder
        ),
    }
    if len(words) != 1 or words[0] not in walks:
        sys.exit(f"usage: python tests/walk.py {'|'.join(walks)}")
    with tempfile.TemporaryDirectory() as folder:
        print(show(walks[words[0]](Path(folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
