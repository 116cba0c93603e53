"""What a user gives → examples with holes, laid out as the model was trained.

A layout says the shape of every modality's codes (`RunDescription.layouts`). Text stands in a buffer; a prompt must
leave at least one place in it, for EOS or for what is to be written.

    complete   text and then only masks, to the end of the buffer
    infill     text with holes: `_` is one masked token, `[MASK:n]` are n; the rest of the buffer is EOS.
               A backslash before `_`, `[` or another backslash makes it a plain character.
    from_text  text given, a medium masked            from_medium  a medium given, text masked
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
from trimask.tokenizers.sequence import Example, Segment, direct, fill_text, until_eos
from trimask.tokenizers.vocabulary import TEXT, Task

_HOLE = re.compile(r"\\(?P<plain>[_\[\\])|(?P<one>_)|\[MASK(?P<many>[^\]]*)\]")


@dataclass(frozen=True)
class Prompts:
    """What can be asked of a model, and how the question looks."""

    tokenizers: MediaTokenizers
    layouts: Mapping[str, Layout]
    """Dataset → layout of its examples."""
    dataset: str | None = None
    """Whose layouts alone are used. None: the first that fits, of a prompt's first those with responses."""

    def __post_init__(self):
        if self.dataset is not None and self.dataset not in self.layouts:
            raise ValueError(f"the model knows no dataset {self.dataset!r}, only {', '.join(self.layouts)}")

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that some layout fits."""
        known = {frozenset(layout.shapes) for n, layout in self.layouts.items() if self.dataset in (None, n)}
        tasks = self.tokenizers.vocabulary.tasks.values()
        return tuple(task for task in tasks if frozenset(task.modalities) in known)

    def task(self, condition: str | None, target: str) -> Task:
        """The task that makes `target` of `condition`; an error names those the model has."""
        for task in self.tasks:
            if (task.condition, task.target) == (condition, target):
                return task
        wanted = target if condition is None else f"{condition} to {target}"
        names = ", ".join(task.name.replace("_", " ") for task in self.tasks)
        raise ValueError(f"this model was not trained on {wanted}; it has {names or 'no tasks'}")

    def media_shape(self, medium: str) -> tuple[int, ...]:
        """Shape of the pictures or waveforms that the model reads."""
        layout = self.layout(self.task(medium, TEXT))
        return self.tokenizers.codec(medium).media_shape(tuple(layout.shapes[medium]))

    def layout(self, task: Task) -> Layout:
        """The first layout of a task."""
        return self._layouts(task)[0]

    def complete(self, prompt: str, length: int | None = None) -> Example:
        """A text that begins with the prompt and has `length` more tokens; None: as many as the layout has.

        It may be longer than those trained on: places and positions go on.
        """
        task, given = self.task(None, TEXT), self._encode(prompt)
        layout = self._fitting(task, len(given), prompt)
        if length is not None and length < 1:
            raise ValueError(f"after {prompt!r} there must be at least 1 token to write, not {length}")
        usual = layout.text_length(len(given)) - len(given)
        return direct(task, {TEXT: np.concatenate([given, _masked((length or usual,))])})

    def infill(self, pattern: str) -> Example:
        """The pattern with its holes masked."""
        task, pieces = self.task(None, TEXT), parse_infill(pattern)
        num_tokens = sum(p if isinstance(p, int) else len(self.tokenizers.text.encode(p)) for p in pieces)
        layout = self._fitting(task, num_tokens, pattern, is_whole=True)
        length = num_tokens + 1 if layout.fill == "none" else layout.shapes[TEXT][0]
        parts = [_masked((p,)) if isinstance(p, int) else self.tokenizers.text.encode(p) for p in pieces]
        return direct(task, {TEXT: fill_text(self.tokenizers.vocabulary, np.concatenate(parts), length)})

    def from_text(self, prompt: str, target: str) -> Example:
        """A medium asked for by its description; an empty one is hidden, as some are in training."""
        task = self.task(TEXT, target)
        if not prompt:
            layout = self.layout(task)
            return direct(task, {name: _masked(tuple(layout.shapes[name])) for name in (TEXT, target)})
        shape = tuple(self._fitting(task, len(self._encode(prompt)), prompt).shapes[target])
        return direct(task, {TEXT: self._caption(task, prompt), target: _masked(shape)})

    def from_medium(self, medium: str, content: np.ndarray) -> Example:
        """The description of a medium of shape `media_shape`."""
        task = self.task(medium, TEXT)
        text = _masked(tuple(self.layout(task).shapes[TEXT]))
        return direct(task, {medium: self._codes(medium, content), TEXT: text})

    def restored(self, medium: str, content: np.ndarray, is_hole: np.ndarray, prompt: str | None = None) -> Example:
        """A medium of shape `media_shape` whose codes are to be made anew where `is_hole`, an array over media_shape.

        Every code that a hole touches is. Without a prompt the description is to be found, too.
        """
        task, codes = self.task(TEXT, medium), self._codes(medium, content)
        touched = np.where(_over_codes(is_hole, codes.shape), -1, codes).astype(np.int32)
        if prompt is not None:
            return direct(task, {TEXT: self._caption(task, prompt), medium: touched})
        caption = Segment(TEXT, _masked(tuple(self.layout(task).shapes[TEXT])))
        return Example(task.name, (caption, Segment(medium, touched)))

    def scored(self, given: Mapping[str, Any], target: str, answer: Any) -> Example:
        """An answer that is known, laid out as the model would make it: what is given is condition, the rest is asked.

        `given` has one modality at most; text given with a text asked for is how it begins.
        """
        condition = next((modality for modality in given if modality != TEXT or target != TEXT), None)
        task = self.task(condition, target)
        if target != TEXT:
            return direct(task, {TEXT: self._caption(task, given[TEXT]), target: self._codes(target, answer)})
        if not answer:
            raise ValueError("an answer must not be empty")
        beginning = self._encode(given[TEXT]) if TEXT in given else np.zeros(0, np.int32)
        text = np.concatenate([beginning, self.tokenizers.text.encode(answer)])
        layout = self._fitting(task, len(beginning) if condition is None else len(text), answer)
        length = layout.text_length(len(beginning)) if condition is None else layout.shapes[TEXT][0]
        if layout.fill != "none":
            text = fill_text(self.tokenizers.vocabulary, text, length)
        if condition is None:
            return direct(task, {TEXT: text}, len(beginning))
        return direct(task, {TEXT: text, condition: self._codes(condition, given[condition])})

    def decode(self, asked: Example, answer: Example) -> Any:
        """What was asked for. A text ends at the first EOS after what was given; one before is nothing."""
        target = answer.segments[-1]
        if answer.task != TEXT:
            return self.tokenizers.decode(target.modality, [target.codes])[0]
        vocabulary, given = self.tokenizers.vocabulary, asked.segments[-1].codes
        start = np.flatnonzero((given >= 0) & (given != vocabulary.eos_code)).max(initial=-1) + 1
        codes = np.concatenate([target.codes[:start], until_eos(vocabulary, target.codes[start:])])
        return self.tokenizers.text.decode(codes[codes != vocabulary.eos_code])

    def _encode(self, prompt: str) -> Int[np.ndarray, " n"]:
        if not prompt.strip():
            raise ValueError("a prompt must not be empty")
        return self.tokenizers.text.encode(prompt)

    def _caption(self, task: Task, prompt: str) -> Int[np.ndarray, " n"]:
        """A text that describes a medium, filled as the layout it fits says."""
        codes = self._encode(prompt)
        layout = self._fitting(task, len(codes), prompt)
        return fill_text(self.tokenizers.vocabulary, codes, layout.shapes[TEXT][0])

    def _codes(self, medium: str, content: np.ndarray) -> np.ndarray:
        return self.tokenizers.encode(medium, [content])[0]

    def _layouts(self, task: Task) -> list[Layout]:
        fitting = [
            layout
            for name, layout in self.layouts.items()
            if set(layout.shapes) == set(task.modalities) and self.dataset in (None, name)
        ]
        return sorted(fitting, key=lambda layout: layout.fill == "none")

    def _fitting(self, task: Task, num_tokens: int, prompt: str, is_whole: bool = False) -> Layout:
        """The first of the layouts in which so much text leaves a place: for an answer, or of a whole text for EOS."""
        layouts = self._layouts(task)
        room = [layout.shapes[TEXT][0] - 1 if is_whole else layout.max_prompt_tokens for layout in layouts]
        for layout, most in zip(layouts, room, strict=True):
            if num_tokens <= most:
                return layout
        fit = max(room)
        shown = prompt if len(prompt) <= 60 else f"{prompt[:59]}…"
        raise ValueError(f"the prompt {shown!r} has {num_tokens} tokens; at most {fit} fit this model's {task.name}")


def parse_infill(pattern: str) -> list[str | int]:
    """Plain texts, and numbers of masked tokens between them."""
    pieces: list[str | int] = []

    def add(piece: str | int) -> None:
        if pieces and type(pieces[-1]) is type(piece):
            pieces[-1] += piece  # type: ignore[operator]
        elif piece:
            pieces.append(piece)

    end = 0
    for hole in _HOLE.finditer(pattern):
        add(pattern[end : hole.start()])
        add(hole["plain"] or (1 if hole["one"] else _count(hole[0], hole["many"])))
        end = hole.end()
    add(pattern[end:])
    if not any(isinstance(piece, int) for piece in pieces):
        raise ValueError(f"nothing is masked in {pattern!r}; write _ for one token or [MASK:n] for n")
    return pieces


def _count(hole: str, argument: str) -> int:
    number = re.fullmatch(r":([1-9]\d{0,8})", argument, re.ASCII)
    if number is None:
        raise ValueError(f"a hole is written [MASK:n] with n at least 1, got {hole!r}; \\[ is a plain bracket")
    return int(number[1])


def _over_codes(is_hole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """True for every code of which some part is a hole; codes cut each axis of the media into equal parts."""
    grid = is_hole
    for axis, (size, count) in enumerate(zip(is_hole.shape, shape, strict=False)):
        part = np.minimum(np.arange(size) * count // size, count - 1)
        starts = np.searchsorted(part, np.arange(count))
        grid = np.logical_or.reduceat(grid, starts, axis=axis)
    return np.broadcast_to(grid.reshape(*grid.shape, *[1] * (len(shape) - grid.ndim)), shape)


def _masked(shape: tuple[int, ...]) -> Int[np.ndarray, "*shape"]:
    return np.full(shape, -1, np.int32)
