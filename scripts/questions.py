"""Turns what a user asks of a trained model, by the command or from Python, into requests, and these into answers.

    Asked, as given  →  Query of a run: questions, settings  →  answers  →  media

Everything that determines an answer is determined here, so the same input and the same seed give the same tokens.
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
"""Title of answers to an empty prompt, from which their file names are made."""
_SHORT = ("image", "audio")
"""Modalities whose files can be given by a field of their own."""


@dataclass(frozen=True, kw_only=True)
class Asked(Checked):
    """Requests, of one kind (prompts, infills, or files of one modality), and sampling settings."""

    prompt: tuple[str, ...] = ()
    """Texts that describe what to generate, or, for text output, texts to continue. An empty prompt generates a picture
    or sound without a condition."""
    prompts: str | None = None
    """File of further prompts, one per line; - reads them from standard input."""
    infill: tuple[str, ...] = ()
    """Texts with holes to fill, as in "47+__=85": _ stands for one token, [MASK:n] for n tokens, and \\_ for an
    underscore."""
    image: tuple[Path, ...] = ()
    """Picture files to describe; short for --given image=FILE."""
    audio: tuple[Path, ...] = ()
    """Sound files to transcribe; short for --given audio=FILE."""
    given: tuple[str, ...] = ()
    """Files of any modality of the run to describe, each written MODALITY=FILE."""
    inpaint: Path | None = None
    """Mask for regenerating a part of each picture of --image, with --to image: a picture of the same size. The part is
    where the mask is opaque and its grey value at least 128; the rest of the pictures is kept."""
    span: tuple[NonNegative, NonNegative] | None = None
    """Start and end, in seconds, of the part of each sound of --audio to regenerate, with --to audio. For restored
    pictures and sounds a prompt may describe the whole; without one the model also generates a description."""
    to: str | None = None
    """Modality to generate: text, image, audio, or another one of the run. None: text; required for prompts."""
    num: Size = 1
    """Number of answers for each input."""
    seed: Seed = 0
    """Seed of the answers; an answer depends on the seed and its own input alone."""
    like: str | None = None
    """Dataset whose layout (shapes of media, length of texts) the answers have. None: the first that fits."""
    length: Size | None = None
    """Largest number of tokens to generate after a prompt; may exceed the length of the training texts. None: the
    length of the training texts."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""
    sampling: tyro.conf.OmitArgPrefixes[GenerationConfig] = GenerationConfig()
    """Sampling settings. The defaults are those of the run for the generated modality, not those shown here."""

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
            raise ValueError("`length` is only for continued texts: it needs a prompt and `to` text")
        if self.to not in (None, TEXT) and given[0] == "infill":
            raise ValueError(f"an infill generates text, got `to` {self.to}")

    def _require_a_medium_to_restore(self, given: list[str]) -> None:
        medium, field = ("image", "inpaint") if self.inpaint is not None else ("audio", "span")
        others = set(given) - {medium, "prompt"}
        is_ordered = self.span is None or self.span[0] < self.span[1]
        if (self.inpaint is None) == (self.span is None) or medium not in given or others or self.prompts:
            raise ValueError(
                f"`{field}` needs {medium}, and allows only a prompt besides; got {' and '.join(given) or 'no input'}"
            )
        if self.to != medium or len(self.prompt) > 1 or not is_ordered:
            raise ValueError(
                f"`{field}` needs `to` {medium}, one prompt at most, and a span that ends after it begins; got "
                f"`to` {self.to}, {len(self.prompt)} prompts, span {self.span}"
            )

    @property
    def files(self) -> dict[str, list[Path]]:
        """Modality → its given files. Raises ValueError for an entry of `given` that is not MODALITY=FILE."""
        files = {medium: list(getattr(self, medium)) for medium in _SHORT if getattr(self, medium)}
        for word in self.given:
            medium, equals, path = word.partition("=")
            if not (medium.isidentifier() and equals and path):
                raise ValueError(f"`given` is MODALITY=FILE, as in image=seven.png; got {word!r}")
            files.setdefault(medium, []).append(Path(path))
        return files

    @property
    def target(self) -> str:
        """Modality to generate: that of `to`; text by default."""
        return self.to or TEXT


@dataclass(frozen=True)
class Question:
    """One input of the user, as a request to the model."""

    prompt: str
    """The prompt, infill pattern or path, as the user gave it."""
    example: Example
    """The request: an example with the asked tokens masked."""
    title: str
    """Text from which file names are made."""
    keep: Callable[[np.ndarray], np.ndarray] = lambda media: media
    """Function that puts the given part of a restored medium into the generated one."""


@dataclass(frozen=True)
class Query:
    """Questions to a run, with all that is needed to answer them."""

    prompts: Prompts
    questions: list[Question]
    config: GenerationConfig
    generator: Generator
    seed: int

    @property
    def requests(self) -> list[Example]:
        """Requests to the model, one per question."""
        return [question.example for question in self.questions]

    @property
    def numbers(self) -> list[int]:
        """Number of equal requests before each."""
        return occurrence_numbers(self.requests)

    def answers(self, report: Report) -> list[Answer]:
        """Generates the answers, in the order of the questions."""
        return self.generator.generate(self.requests, self.config, self.seed, partial(report, "answers"))

    def watch(self) -> Iterator[tuple[int, Answer]]:
        """Generates the answers step by step: index of a question and its state, before the first and after each step.

        The last state of a question is its answer.
        """
        return self.generator.watch(self.requests, self.config, self.seed)

    def media(self, question: Question, answer: Answer) -> Any:
        """The answer as a text, or as a medium that the codec decodes."""
        return question.keep(self.prompts.decode(question.example, answer.example))


def query_of(loaded: LoadedRun, asked: Asked) -> Query:
    """Reads the files and makes the requests. Raises ValueError for requests that the run cannot answer."""
    generated = loaded.vocabulary.modalities[1:]
    if asked.target not in generated:
        raise ValueError(f"this run generates {', '.join(generated)}; got `to` {asked.to!r}")
    if asked.to != TEXT and "" in asked.prompt and not loaded.description.train.masking.drop_probability:
        raise ValueError(
            "an empty prompt needs a run that was trained without conditions, too; its masking.drop_probability is 0"
        )
    prompts = prompts_of(loaded, asked.like)
    questions = [question for question in ask(asked, prompts) for _ in range(asked.num)]
    config = settings(asked, loaded, questions[0].example)
    loaded.require_trained_guidance(questions[0].example.task, config)
    generator = loaded.generator()
    query = Query(prompts, questions, config, generator, asked.seed)
    loaded.require_room(asked.limits, *generator.largest_batch(query.requests))
    return query


def prompts_of(loaded: LoadedRun, like: str | None = None) -> Prompts:
    """Maker of requests for a run; `like` names the dataset whose layout they have."""
    return Prompts(loaded.tokenizers, loaded.description.layouts, like)


def ask(asked: Asked, prompts: Prompts) -> list[Question]:
    """Requests for all inputs, in their order; reads the files."""
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
    """Requests to regenerate a region of pictures or a span of sounds."""
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


def default_sampling(loaded: LoadedRun, target: str, strategy: str | None = None) -> GenerationConfig:
    """The run's sampling settings for a modality; with the block length of the policy if the strategy is one."""
    default = loaded.generation(target)
    if strategy is None or not is_policy_path(strategy):
        return default
    return dataclasses.replace(default, block_length=describe_policy(strategy).block_length)


def settings(asked: Asked, loaded: LoadedRun, example: Example) -> GenerationConfig:
    """Sampling settings of the request. Raises ValueError if one that was given can have no effect."""
    default, config = loaded.generation(asked.target), asked.sampling
    require_used_fields(config, default)
    if not any((segment.codes.reshape(-1)[: segment.num_given] >= 0).any() for segment in example.segments):
        if config.guidance not in (0.0, default.guidance):
            raise ValueError(
                "guidance needs a condition to follow; a text without a beginning, or an empty prompt, has none"
            )
        config = dataclasses.replace(config, guidance=0.0)
    return config
