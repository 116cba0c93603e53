"""Makes examples with masked codes from what a user gives, laid out as the model's training examples were.

A layout gives the shape of every modality's codes (`RunDescription.layouts`). Text has a buffer of fixed length; a
prompt must leave at least one position of it free, for EOS or for the text to be generated. Code -1 is masked.

    complete     text followed by masks up to the end of the buffer
    infill       text with masked holes: `_` is one token, `[MASK:n]` are n; the rest of the buffer is EOS. A backslash
                 before `_`, `[` or another backslash makes it a plain character.
    from_text    text given, a medium (picture, sound, …) masked
    from_medium  a medium given, text masked
    inpaint      part of a medium masked, text given or masked
    with_answer  nothing masked: a known answer, for its likelihood
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from trimask.diffusion.data.layout import Layout
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.vocabulary import TEXT, Task

_HOLE = re.compile(r"\\(?P<plain>[_\[\\])|(?P<one>_)|\[MASK(?P<many>[^\]]*)\]")


@dataclass(frozen=True)
class Prompts:
    """Makes prompts for one model, from its tokenizers and layouts."""

    tokenizers: MediaTokenizers
    layouts: Mapping[str, Layout]
    """Layout of the examples of every dataset, by the dataset's name."""
    dataset: str | None = None
    """Dataset whose layout is used. None: the first with room for the prompt, and among them first those in which the
    texts have responses."""

    def __post_init__(self):
        if self.dataset is not None and self.dataset not in self.layouts:
            raise ValueError(f"the model was not trained on a dataset {self.dataset!r}, only {', '.join(self.layouts)}")

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks of the vocabulary whose modalities are those of some layout."""
        known = {frozenset(layout.shapes) for n, layout in self.layouts.items() if self.dataset in (None, n)}
        tasks = self.tokenizers.vocabulary.tasks.values()
        return tuple(task for task in tasks if frozenset(task.modalities) in known)

    def task(self, condition: str | None, target: str) -> Task:
        """The task that generates modality `target` given modality `condition` (None: nothing given).

        Raises ValueError, which names the model's tasks, if it was not trained on this one.
        """
        for task in self.tasks:
            if (task.condition, task.target) == (condition, target):
                return task
        wanted = target if condition is None else f"{condition} to {target}"
        names = ", ".join(task.name.replace("_", " ") for task in self.tasks)
        raise ValueError(f"this model was not trained on {wanted}; it has {names or 'no tasks'}")

    def media_shape(self, medium: str) -> tuple[int, ...]:
        """Shape of the pictures or waveforms that the tokenizer of this modality takes."""
        layout = self.layout(self.task(medium, TEXT))
        return self.tokenizers.codec(medium).media_shape(tuple(layout.shapes[medium]))

    def layout(self, task: Task) -> Layout:
        """The preferred layout for a task, regardless of the length of the prompt."""
        return self._layouts(task)[0]

    def complete(self, prompt: str, length: int | None = None) -> Example:
        """A text that begins with the prompt, followed by `length` masked tokens; None: up to the layout's length.

        It may be longer than the texts trained on: coordinates and positions simply continue.
        """
        task, given = self.task(None, TEXT), self._encode(prompt)
        layout = self._layout_with_room(task, len(given), prompt)
        if length is not None and length < 1:
            raise ValueError(f"after {prompt!r} there must be at least 1 token to write, not {length}")
        default = layout.text_length(len(given)) - len(given)
        return Example.of_task(task, {TEXT: np.concatenate([given, _masked((length or default,))])})

    def infill(self, pattern: str) -> Example:
        """A text whose holes, written as in the module's docstring, are masked."""
        task, pieces = self.task(None, TEXT), parse_infill(pattern)
        num_tokens = sum(p if isinstance(p, int) else len(self.tokenizers.text.encode(p)) for p in pieces)
        layout = self._layout_with_room(task, num_tokens, pattern, is_whole=True)
        length = num_tokens + 1 if layout.fill == "none" else layout.shapes[TEXT][0]
        parts = [_masked((p,)) if isinstance(p, int) else self.tokenizers.text.encode(p) for p in pieces]
        return Example.of_task(task, {TEXT: self.tokenizers.vocabulary.pad_with_eos(np.concatenate(parts), length)})

    def from_text(self, prompt: str, target: str) -> Example:
        """A masked medium given its description.

        An empty description is masked and stays so, as the condition of some training examples is.
        """
        task = self.task(TEXT, target)
        if not prompt:
            layout = self.layout(task)
            return Example.of_task(task, {name: _masked(tuple(layout.shapes[name])) for name in (TEXT, target)})
        shape = tuple(self._layout_with_room(task, len(self._encode(prompt)), prompt).shapes[target])
        return Example.of_task(task, {TEXT: self._caption(task, prompt), target: _masked(shape)})

    def from_medium(self, medium: str, content: np.ndarray) -> Example:
        """A masked description given a medium of shape `media_shape`."""
        task = self.task(medium, TEXT)
        text = _masked(tuple(self.layout(task).shapes[TEXT]))
        return Example.of_task(task, {medium: self._codes(medium, content), TEXT: text})

    def inpaint(self, medium: str, content: np.ndarray, is_hole: np.ndarray, prompt: str | None = None) -> Example:
        """A medium of shape `media_shape`, with every code masked that `is_hole`, an array over that shape, touches.

        Without a prompt the description is masked as well, and generated with it.
        """
        task, codes = self.task(TEXT, medium), self._codes(medium, content)
        touched = np.where(_touches_hole(is_hole, codes.shape), -1, codes).astype(np.int32)
        if prompt is not None:
            return Example.of_task(task, {TEXT: self._caption(task, prompt), medium: touched})
        caption = Segment(TEXT, _masked(tuple(self.layout(task).shapes[TEXT])))
        return Example(task.name, (caption, Segment(medium, touched)))

    def with_answer(self, given: Mapping[str, Any], target: str, answer: Any) -> Example:
        """A known answer, laid out as the model would generate it from what is given.

        `given` maps at most one modality to its medium, the condition; a text given for a text is how that begins.
        """
        condition = next((modality for modality in given if modality != TEXT or target != TEXT), None)
        task = self.task(condition, target)
        if target != TEXT:
            return Example.of_task(task, {TEXT: self._caption(task, given[TEXT]), target: self._codes(target, answer)})
        if not answer:
            raise ValueError("an answer must not be empty")
        beginning = self._encode(given[TEXT]) if TEXT in given else np.zeros(0, np.int32)
        text = np.concatenate([beginning, self.tokenizers.text.encode(answer)])
        layout = self._layout_with_room(task, len(beginning) if condition is None else len(text), answer)
        length = layout.text_length(len(beginning)) if condition is None else layout.shapes[TEXT][0]
        if layout.fill != "none":
            text = self.tokenizers.vocabulary.pad_with_eos(text, length)
        if condition is None:
            return Example.of_task(task, {TEXT: text}, len(beginning))
        return Example.of_task(task, {TEXT: text, condition: self._codes(condition, given[condition])})

    def decode(self, asked: Example, answer: Example) -> Any:
        """The generated medium of an answer to the example `asked`.

        A text ends at the first EOS after its last given token; EOS before that are left out.
        """
        target = answer.segments[-1]
        if answer.task != TEXT:
            return self.tokenizers.decode(target.modality, [target.codes])[0]
        vocabulary, given = self.tokenizers.vocabulary, asked.segments[-1].codes
        start = np.flatnonzero((given >= 0) & (given != vocabulary.eos_code)).max(initial=-1) + 1
        codes = np.concatenate([target.codes[:start], vocabulary.until_eos(target.codes[start:])])
        return self.tokenizers.text.decode(codes[codes != vocabulary.eos_code])

    def _encode(self, prompt: str) -> Int[np.ndarray, " n"]:
        if not prompt.strip():
            raise ValueError("a prompt must not be empty")
        return self.tokenizers.text.encode(prompt)

    def _caption(self, task: Task, prompt: str) -> Int[np.ndarray, " n"]:
        """Codes of a description, filled up to the length of its buffer."""
        codes = self._encode(prompt)
        layout = self._layout_with_room(task, len(codes), prompt)
        return self.tokenizers.vocabulary.pad_with_eos(codes, layout.shapes[TEXT][0])

    def _codes(self, medium: str, content: np.ndarray) -> np.ndarray:
        return self.tokenizers.encode(medium, [content])[0]

    def _layouts(self, task: Task) -> list[Layout]:
        """Layouts for a task, those in which texts have responses first."""
        layouts = [
            layout
            for name, layout in self.layouts.items()
            if set(layout.shapes) == set(task.modalities) and self.dataset in (None, name)
        ]
        return sorted(layouts, key=lambda layout: layout.fill == "none")

    def _layout_with_room(self, task: Task, num_tokens: int, prompt: str, is_whole: bool = False) -> Layout:
        """The first layout whose text buffer leaves a position after `num_tokens`: for an answer, or for EOS if whole.

        Raises ValueError, which shows the prompt, if there is none.
        """
        layouts = self._layouts(task)
        room = [layout.shapes[TEXT][0] - 1 if is_whole else layout.max_prompt_tokens for layout in layouts]
        for layout, most in zip(layouts, room, strict=True):
            if num_tokens <= most:
                return layout
        shown = prompt if len(prompt) <= 60 else f"{prompt[:59]}…"
        raise ValueError(
            f"the prompt {shown!r} has {num_tokens} tokens; at most {max(room)} fit this model's {task.name}"
        )


def parse_infill(pattern: str) -> list[str | int]:
    """Splits a pattern into plain texts and, for each hole between them, its number of masked tokens.

    Raises ValueError if there is no hole or one is malformed.
    """
    pieces: list[str | int] = []

    def add(piece: str | int) -> None:
        if pieces and type(pieces[-1]) is type(piece):
            pieces[-1] += piece  # type: ignore[operator]
        elif piece:
            pieces.append(piece)

    end = 0
    for hole in _HOLE.finditer(pattern):
        add(pattern[end : hole.start()])
        add(hole["plain"] or (1 if hole["one"] else _hole_length(hole[0], hole["many"])))
        end = hole.end()
    add(pattern[end:])
    if not any(isinstance(piece, int) for piece in pieces):
        raise ValueError(f"nothing is masked in {pattern!r}; write _ for one token or [MASK:n] for n")
    return pieces


def _hole_length(hole: str, argument: str) -> int:
    """n of `[MASK:n]`, whose part after MASK is `argument`."""
    number = re.fullmatch(r":([1-9]\d{0,8})", argument, re.ASCII)
    if number is None:
        raise ValueError(f"a hole is written [MASK:n] with n at least 1, got {hole!r}; \\[ is a plain bracket")
    return int(number[1])


def _touches_hole(is_hole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """True for every code whose part of the medium has a hole in it; codes divide each axis into equal parts."""
    grid = is_hole
    for axis, (size, count) in enumerate(zip(is_hole.shape, shape, strict=False)):
        part = np.minimum(np.arange(size) * count // size, count - 1)
        starts = np.searchsorted(part, np.arange(count))
        grid = np.logical_or.reduceat(grid, starts, axis=axis)
    return np.broadcast_to(grid.reshape(*grid.shape, *[1] * (len(shape) - grid.ndim)), shape)


def _masked(shape: tuple[int, ...]) -> Int[np.ndarray, "*shape"]:
    return np.full(shape, -1, np.int32)
