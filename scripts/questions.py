"""What a user asks of a trained model, by the command or from Python, and how it becomes answers.

    Asked, as given  →  Query of a run: questions, settings  →  answers  →  media

Everything that decides an answer is decided here, so the same words and the same seed make the same tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.run.progress import Report
from trimask.diffusion.sampling.generation_config import GenerationConfig, is_policy_path, require_used_fields
from trimask.diffusion.sampling.generator import Answer, Generator, occurrence_numbers
from trimask.diffusion.sampling.learned import describe_policy
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts.inputs import medium_reader, read_mask, read_prompts, spliced
from trimask.tokenizers.codec import SoundCodec
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage.ranges import Checked, NonNegative, Seed, Size
from trimask.tokenizers.vocabulary import TEXT

_ANYTHING = "unconditional"
"""What answers to an empty prompt are called."""
_SHORT = ("image", "audio")
"""Modalities that have a field of their own."""


@dataclass(frozen=True, kw_only=True)
class Asked(Checked):
    """One kind of input: prompts, infills, or files of one modality."""

    prompt: tuple[str, ...] = ()
    """Texts: what to draw or say, or with --to text how the text begins. An empty one draws or says anything, as
    guidance imagines it."""
    prompts: str | None = None
    """File of more prompts, one per line; - reads them from standard input."""
    infill: tuple[str, ...] = ()
    """Texts with holes, as in "47+__=85": _ is one token, [MASK:n] are n, \\_ is an underscore."""
    image: tuple[Path, ...] = ()
    """Pictures to describe; short for --given image=FILE."""
    audio: tuple[Path, ...] = ()
    """Sounds to transcribe; short for --given audio=FILE."""
    given: tuple[str, ...] = ()
    """MODALITY=FILE: files of any modality of the run, to describe."""
    inpaint: Path | None = None
    """With --image and --to image: a mask, a picture of the same size that is bright where each of them is to be drawn
    anew: white, or any colour whose grey is 128 or more; what is darker or transparent stays as it is."""
    span: tuple[NonNegative, NonNegative] | None = None
    """With --audio and --to audio: from which to which second each of them is to be spoken anew. A --prompt may say
    what a restored picture or sound is of; without one the model finds a description, too."""
    to: str | None = None
    """Modality to make: text, image, audio, or what else the run has. None: text, for all but prompts, which have to
    say."""
    num: Size = 1
    """Answers to each input."""
    seed: Seed = 0
    """The same seed gives the same answers, whatever else is asked."""
    like: str | None = None
    """Dataset whose shapes and buffers the answers have. None: the first that fits."""
    length: Size | None = None
    """Tokens to write after a prompt, at most; more than the model's texts have, if you like. None: as many."""
    limits: WorkLimits = WorkLimits()
    """What it may take."""
    sampling: tyro.conf.OmitArgPrefixes[GenerationConfig] = GenerationConfig()
    """How. What is not given here is as the run was configured for what is asked, whatever default is shown."""

    def __post_init__(self):
        super().__post_init__()
        given = [kind for kind in ("prompt", "infill") if getattr(self, kind)] + list(self.files)
        if self.inpaint is not None or self.span is not None:
            self._require_a_medium_to_restore(given)
            return
        if self.prompts is not None and "prompt" not in given:
            given.insert(0, "prompts")
        if len(given) != 1:
            kinds = "prompts, infills, or files of one modality (image, audio or given)"
            raise ValueError(f"give one kind of input: {kinds}; got {' and '.join(given) or 'none'}")
        if self.to is None and given[0].startswith("prompt"):
            raise ValueError("a prompt needs `to`: text, image, audio, or another modality of the run")
        if self.length is not None and not (self.to == TEXT and given[0].startswith("prompt")):
            raise ValueError("`length` is of texts that a prompt begins, so it needs a prompt and `to` text")
        if self.to not in (None, TEXT) and given[0] == "infill":
            raise ValueError(f"an infill makes text, got `to` {self.to}")

    def _require_a_medium_to_restore(self, given: list[str]) -> None:
        medium, how = ("image", "inpaint") if self.inpaint is not None else ("audio", "span")
        others = set(given) - {medium, "prompt"}
        is_ordered = self.span is None or self.span[0] < self.span[1]
        if (self.inpaint is None) == (self.span is None) or medium not in given or others or self.prompts:
            raise ValueError(
                f"`{how}` goes with {medium}, with a prompt or without; got {' and '.join(given) or 'no input'}"
            )
        if self.to != medium or len(self.prompt) > 1 or not is_ordered:
            raise ValueError(
                f"`{how}` needs `to` {medium}, one prompt at most, and a span that ends after it begins; got "
                f"`to` {self.to}, {len(self.prompt)} prompts, span {self.span}"
            )

    @property
    def files(self) -> dict[str, list[Path]]:
        """Modality → the files of it that are given."""
        files = {medium: list(getattr(self, medium)) for medium in _SHORT if getattr(self, medium)}
        for word in self.given:
            medium, equals, path = word.partition("=")
            if not (medium.isidentifier() and equals and path):
                raise ValueError(f"`given` is MODALITY=FILE, as in image=seven.png; got {word!r}")
            files.setdefault(medium, []).append(Path(path))
        return files

    @property
    def target(self) -> str:
        """The modality that is made."""
        return self.to or TEXT


@dataclass(frozen=True)
class Question:
    """One input, as the user gave it, and what the model is asked."""

    prompt: str
    example: Example
    title: str
    """What the files are named after."""
    keep: Callable[[np.ndarray], np.ndarray] = lambda media: media
    """Puts back what was given of a restored medium."""


@dataclass(frozen=True)
class Query:
    """Questions that a run can answer, and how it does."""

    prompts: Prompts
    questions: list[Question]
    config: GenerationConfig
    generator: Generator
    seed: int

    @property
    def requests(self) -> list[Example]:
        """The questions as the model sees them."""
        return [question.example for question in self.questions]

    @property
    def numbers(self) -> list[int]:
        """How many equal questions came before each."""
        return occurrence_numbers(self.requests)

    def answers(self, report: Report) -> list[Answer]:
        """The answers in the order of the questions."""
        return self.generator.generate(self.requests, self.config, self.seed, partial(report, "answers"))

    def watch(self) -> Iterator[tuple[int, Answer]]:
        """Number and state of each question, before the first step and after each; the last is its answer."""
        return self.generator.watch(self.requests, self.config, self.seed)

    def media(self, question: Question, answer: Answer) -> Any:
        """The text, or what the codec decodes."""
        return question.keep(self.prompts.decode(question.example, answer.example))


def query_of(loaded: LoadedRun, asked: Asked) -> Query:
    """Reads the files and lays out the questions. Raises ValueError for what this run cannot be asked."""
    made = loaded.vocabulary.modalities[1:]
    if asked.target not in made:
        raise ValueError(f"this run makes {', '.join(made)}; got `to` {asked.to!r}")
    if asked.to != TEXT and "" in asked.prompt and not loaded.description.train.masking.drop_probability:
        raise ValueError("an empty prompt needs a run that was trained to go without: its drop_probability is 0")
    prompts = prompts_of(loaded, asked.like)
    questions = [question for question in ask(asked, prompts) for _ in range(asked.num)]
    config = settings(asked, loaded, questions[0].example)
    generator = Generator(loaded.denoise, loaded.vocabulary)
    query = Query(prompts, questions, config, generator, asked.seed)
    loaded.require_room(asked.limits, *generator.largest_batch(query.requests))
    return query


def prompts_of(loaded: LoadedRun, like: str | None = None) -> Prompts:
    """What the run's model can be asked."""
    return Prompts(loaded.tokenizers, loaded.description.layouts, like)


def ask(asked: Asked, prompts: Prompts) -> list[Question]:
    """The questions, in the order of the input; files are read here."""
    if asked.infill:
        return [Question(pattern, prompts.infill(pattern), pattern) for pattern in asked.infill]
    if asked.inpaint is not None or asked.span is not None:
        return _to_restore(asked, prompts)
    for medium, paths in asked.files.items():
        prompts.task(medium, asked.target)
        read = medium_reader(medium, prompts)
        return [Question(str(path), prompts.from_medium(medium, read(path)), path.stem) for path in paths]
    assert asked.to is not None
    texts = [*asked.prompt, *(() if asked.prompts is None else read_prompts(asked.prompts))]
    if asked.to == TEXT:
        return [Question(text, prompts.complete(text, asked.length), text) for text in texts]
    return [Question(text, prompts.from_text(text, asked.to), text or _ANYTHING) for text in texts]


def _to_restore(asked: Asked, prompts: Prompts) -> list[Question]:
    """Pictures with a region, or sounds with a span, to be made anew."""
    prompt = asked.prompt[0] if asked.prompt else None
    shape = prompts.media_shape(asked.target)
    read = medium_reader(asked.target, prompts)
    is_hole, layout = np.zeros(shape, bool), prompts.layout(prompts.task(asked.target, TEXT))
    if asked.span is not None:
        codec = prompts.tokenizers.codec("audio")
        if not isinstance(codec, SoundCodec):
            raise ValueError(f"a span counts seconds; the codec for audio, {codec.kind}, has no sample rate")
        seconds = np.arange(len(is_hole)) / codec.sample_rate_hz
        is_hole |= (seconds >= asked.span[0]) & (seconds < asked.span[1])
    questions = []
    for path in asked.files[asked.target]:
        content = read(path)
        if asked.inpaint is not None:
            is_hole = read_mask(asked.inpaint, path, shape[:2], layout.is_cropped)
        example = prompts.inpaint(asked.target, content, is_hole, prompt)
        questions.append(Question(str(path), example, path.stem, partial(spliced, content, is_hole)))
    return questions


def usual_sampling(loaded: LoadedRun, target: str, strategy: str | None = None) -> GenerationConfig:
    """How the run makes a modality where nothing else is said; by a policy, in the policy's blocks."""
    usual = loaded.generation(target)
    if strategy is None or not is_policy_path(strategy):
        return usual
    return dataclasses.replace(usual, block_length=describe_policy(strategy).block_length)


def settings(asked: Asked, loaded: LoadedRun, example: Example) -> GenerationConfig:
    """The way to sample that is asked for, refused where a part of it cannot have an effect."""
    default, config = loaded.generation(asked.target), asked.sampling
    require_used_fields(config, default)
    if not any(segment.is_condition and (segment.codes >= 0).any() for segment in example.segments):
        if config.guidance not in (0.0, default.guidance):
            raise ValueError("guidance needs a condition to follow; a text alone, or an empty prompt, has none")
        config = dataclasses.replace(config, guidance=0.0)
    return config
