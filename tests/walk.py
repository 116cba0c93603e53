"""How far a reader has to go to follow one record into its shard, or one prompt to its answer.

    python tests/walk.py record      a picture with a caption, from its folder to its shard, by `prepare`
    python tests/walk.py prompt      a text, from the command line to the picture that is written, by `trimask generate`

The way is that of the functions that are handed the record in any of its forms, or hand it on: its text, its bytes, its
pixels, its codes. Each counts once, when it is first entered. A *stay* is an entry into a module that is not on the
stack already; what a function of a module on the stack does is part of that module's stay. A *return* is a stay in a
module that had one before. Left out: imports, methods of dataclasses, which say something of themselves, and
`tokenizers/storage`, which is to all modules what the standard library is. What is compiled is one step of the way.

The record is one as most are: it is none of those that tokenizers are fitted on, which are a sample.
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
"""What the record is called, and its caption."""
_MOST_PARTS = 64


class Stay(NamedTuple):
    """Functions of one module, in the order in which they were entered."""

    module: str
    functions: list[str]
    is_return: bool


@dataclasses.dataclass(frozen=True)
class Thing:
    """A record or a prompt in all its forms."""

    text: str
    arrays: Sequence[np.ndarray] = ()
    """Pixels, samples and codes."""

    def is_in(self, value: Any, depth: int = 5) -> bool:
        """Whether a value is, or holds, the thing."""
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
        return len(parts) < _MOST_PARTS and any(self.is_in(part, depth - 1) for part in parts)


def _holds(values: np.ndarray, array: np.ndarray) -> bool:
    """Whether an array is another, or a batch that has it, or a row of tokens that has it somewhere."""
    if values.shape[-array.ndim :] == array.shape and values.dtype.kind == array.dtype.kind:
        return bool((values.reshape(-1, array.size) == array.reshape(-1)).all(axis=1).any())
    if array.ndim > 1 or values.ndim == 0 or values.shape[-1] < array.size or array.size < 2:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(values, array.size, axis=-1)
    return bool((windows == array).all(axis=-1).any())


@contextmanager
def watched(thing: Thing) -> Iterator[list[Stay]]:
    """The stays of whatever is called meanwhile."""
    stays: list[Stay] = []
    known: set[CodeType] = set()

    def module_of(code: CodeType) -> str | None:
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in ROOMS:
            return None
        module = str(path.relative_to(ROOT))
        return None if module.startswith(LEFT_OUT) else module

    def is_left_out(frame: FrameType) -> bool:
        name, first = frame.f_code.co_name, frame.f_code.co_varnames[:1]
        is_method = first in (("self",), ("cls",)) and dataclasses.is_dataclass(frame.f_locals.get(first[0]))
        return is_method or name.startswith(("<", "__"))

    def is_on_stack(frame: FrameType | None, file: str) -> bool:
        while frame is not None:
            if frame.f_code.co_filename == file:
                return True
            frame = frame.f_back
        return False

    def note(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or code in known:
            return
        module = None if is_left_out(frame) else module_of(code)
        if module is None:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        handed = [frame.f_locals.get(name) for name in names] if event == "call" else [result]
        sys.setprofile(None)
        try:
            is_on_the_way = any(thing.is_in(value) for value in handed)
        finally:
            sys.setprofile(note)
        if not is_on_the_way:
            return
        known.add(code)
        inside = [stay for stay in stays if stay.module == module]
        if inside and (stays[-1].module == module or is_on_stack(frame.f_back, code.co_filename)):
            inside[-1].functions.append(code.co_qualname)
        else:
            stays.append(Stay(module, [code.co_qualname], bool(inside)))

    sys.setprofile(note)
    try:
        yield stays
    finally:
        sys.setprofile(None)


def walk_of_record(folder: Path) -> list[Stay]:
    """The way of a picture with a caption into its shard."""
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
    prepared = prepare(folder / "before", config)  # imports, and the codes
    examples = prepared.examples("photos", "train")
    codes = next(example["image"] for example in examples if example["id"] == f"{NAME}.png")
    with watched(Thing(NAME, [pixels[NAME], codes])) as stays:
        prepare(folder / "data", config)
    return stays


def walk_of_prompt(loaded: Any, folder: Path) -> list[Stay]:
    """The way of a text from the command line to the picture that is written, with a model that is loaded."""
    from unittest.mock import patch

    from trimask.scripts import generate, questions

    answers: list[Any] = []
    original = questions.Generator.generate

    def kept(self: Any, *arguments: Any) -> Any:
        answers[:] = original(self, *arguments)
        return answers

    def asked(out: str) -> None:
        generate.main([str(loaded.folder), "--prompt", NAME, "--to", "image", "--out", str(folder / out)])

    with patch.object(generate, "load", lambda *_: loaded):
        with patch.object(questions.Generator, "generate", kept):
            asked("before")  # imports and compiles
        (answer,) = answers
        codes = [segment.codes for segment in answer.example.segments]
        picture = loaded.tokenizers.decode("image", [codes[-1]])[0]
        text = loaded.vocabulary.to_ids("text", codes[0][:3])
        with watched(Thing(NAME, [*codes, text, picture])) as stays:
            asked("out")
    return stays


def counts(stays: Sequence[Stay]) -> tuple[int, int]:
    """Number of stays, and of returns among them."""
    return len(stays), sum(stay.is_return for stay in stays)


def show(stays: Sequence[Stay]) -> str:
    """The way as text, a line per stay."""
    lines = [
        f"{number:3}  {'return ' if stay.is_return else '       '}{stay.module}: {', '.join(stay.functions)}"
        for number, stay in enumerate(stays, 1)
    ]
    return "\n".join([*lines, "{} stays, {} returns".format(*counts(stays))])


def main(words: Sequence[str]) -> None:
    """Prints a walk."""
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
