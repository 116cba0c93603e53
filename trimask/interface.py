"""The public classes: a trained model that generates from Python, its answers, and traces of their generation.

Requests are made and answered by the code of `trimask generate` (`scripts/questions.py`), so the same prompt, settings
and seed give the same tokens.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.judges import Judge
from trimask.diffusion.pretraining import trained_model
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.progress import silent
from trimask.diffusion.sampling import generator
from trimask.sampling_rl.environment import UnmaskingEnv
from trimask.sampling_rl.episode_batch import UnmaskingConfig
from trimask.sampling_rl.problem_sets import problems_of
from trimask.sampling_rl.reward import Reward, RewardConfig
from trimask.scripts.output.answers import FRAME_MILLISECONDS, write_media
from trimask.scripts.output.media_files import png_bytes, write_animation
from trimask.scripts.output.presentation import ending_of, frame_of, presentation_of
from trimask.scripts.output.trajectory import code_confidences, text_in_order, trace_of, write_page
from trimask.scripts.questions import Asked, Query, Question, default_sampling, prompts_of, query_of
from trimask.tokenizers.codec import SoundCodec
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import suggestion
from trimask.tokenizers.vocabulary import TEXT

_T = TypeVar("_T")
_SomeTexts = list[str] | tuple[str, ...]
_SomePaths = list[str] | list[Path] | list[str | Path] | tuple[str | Path, ...]

_UNMASKING, _REWARD = UnmaskingConfig(), RewardConfig()
_NAMED = ("image", "audio", TEXT)
"""Modalities for which an answer has an attribute of its own."""


def load(folder: str | Path, checkpoint: int | Literal["best"] | None = None) -> "TrainedModel":
    """Loads a run folder that `trimask train` wrote, at its newest checkpoint, that of a step, or the best one.

        model = trimask.load("runs/tiny")

    Raises FileNotFoundError if the folder holds no run, or the run has no checkpoint yet.
    """
    return TrainedModel(trained_model.load(Path(folder), checkpoint))


@dataclass(frozen=True, eq=False, repr=False)
class Answer:
    """Answer of a model. A notebook displays it as a picture, a player, or text with the order of its tokens.

        answer = model.generate("a handwritten seven", to="image")
        answer.image, answer.nfe
        answer.save("seven.png")

    A picture has `image`, a sound `audio` and `sample_rate_hz`, a text `text`; every answer has `content`.
    """

    prompt: str
    """Input that the answer is for: a text, a text with holes, or the path of a file."""
    modality: str
    """Generated modality: text, image, audio, or another one of the run."""
    tokens: Int[np.ndarray, "..."]
    """Codes of the answer, given ones included: [length] of a text, [rows, columns] of a picture, [frames, codebooks]
    of a sound."""
    steps: Int[np.ndarray, "..."]
    """Step, counted from 1, in which each token was revealed; 0 where the token was given."""
    nfe: int
    """Number of function evaluations: forward passes of the network, of which a guided step takes two."""
    content: Any
    """The text, or the medium that the codec decodes from the tokens."""
    tokenizers: MediaTokenizers
    """Tokenizers of the run."""

    @property
    def image(self) -> UInt8[np.ndarray, "height width channels"]:
        """The picture, grey or RGB. Raises AttributeError if the answer is none."""
        return self._as("image", "image")

    @property
    def audio(self) -> Float32[np.ndarray, " samples"]:
        """The waveform, in [-1, 1]. Raises AttributeError if the answer is no sound."""
        return self._as("audio", "audio")

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveform in Hz. Raises AttributeError if the answer is no sound."""
        self._as("audio", "sample_rate_hz")
        codec = self.tokenizers.codec("audio")
        if not isinstance(codec, SoundCodec):
            raise AttributeError(f"the codec for audio, {codec.kind}, has no sample rate")
        return codec.sample_rate_hz

    @property
    def text(self) -> str:
        """The text, given parts included. Raises AttributeError if the answer is no text."""
        return self._as(TEXT, "text")

    def _as(self, modality: str, attribute: str) -> Any:
        if self.modality != modality:
            own = self.modality if self.modality in _NAMED else "content"
            raise AttributeError(f"an answer in {self.modality} has .{own}, and no .{attribute}")
        return self.content

    def save(self, path: str | Path) -> None:
        """Writes the answer as `trimask generate` does: PNG (small pictures are enlarged), WAV or TXT.

        Raises ValueError if the path has another ending.
        """
        where = _ending(path, f"an answer in {self.modality}", f".{ending_of(self.modality)}")
        write_media(where, self.modality, self.content, self.tokenizers)

    def __repr__(self) -> str:
        shown = repr(self.content) if self.modality == TEXT else f"tokens {'×'.join(map(str, self.tokens.shape))}"
        return f"Answer({self.prompt!r} → {self.modality}: {shown}, nfe {self.nfe})"

    def _repr_png_(self) -> bytes | None:
        """PNG of the answer, for notebooks; None for texts, and for modalities that have a player."""
        if self.modality == TEXT or presentation_of(self.modality).player is not None:
            return None
        codec = self.tokenizers.codec(self.modality)
        return png_bytes(presentation_of(self.modality).picture_of(self.content, codec))

    def _repr_html_(self) -> str | None:
        """Text with the order in which its tokens were revealed, or a player, for notebooks; else None."""
        if self.modality == TEXT:
            return text_in_order(self.tokenizers, self.tokens, self.steps)
        player = presentation_of(self.modality).player
        return None if player is None else player(self.content, self.tokenizers.codec(self.modality))


class Step(NamedTuple):
    """State of an answer after a step. The first one of a trace holds only the given tokens."""

    tokens: Int[np.ndarray, "..."]
    """Codes of the answer; -1 where masked."""
    confidence: Float[np.ndarray, "..."]
    """Probability of each code when it was revealed; 1 where it was given, 0 where it is masked."""
    nfe: int
    """Number of function evaluations so far."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Generation of an answer, step by step.

        trace = model.trace("seven", to="image")
        trace.animate("seven.gif")
        trace.page("seven.html")

    The trace holds all states, so animation and page need no further evaluation of the model.
    """

    answer: Answer
    """Final answer, equal to that of `generate`."""
    states: tuple[generator.Answer, ...]
    """State of the request before the first step and after every step, as the generator yields it."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """States of the answer before the first step and after every step."""
        asked = self.states[0].example
        codes = [state.example.segments[-1].codes for state in self.states]
        return tuple(
            Step(known, code_confidences(asked, state).reshape(known.shape), state.nfe)
            for known, state in zip(codes, self.states, strict=True)
        )

    def animate(self, path: str | Path) -> None:
        """Writes an animation, by the ending of the path as GIF or MP4; MP4 needs the extra `video`."""
        where = _ending(path, "an animation", ".gif", ".mp4")
        frames = [frame_of(self.answer.tokenizers, state.example) for state in self.states]
        write_animation(where, frames, FRAME_MILLISECONDS)

    def page(self, path: str | Path) -> None:
        """Writes an HTML page with a slider over the steps; the path must end in .html."""
        trace = trace_of(self.answer.tokenizers, self.answer.prompt, self.states)
        write_page(_ending(path, "a page", ".html"), trace)

    def __repr__(self) -> str:
        return f"Trace({len(self.states) - 1} steps to {self.answer!r})"


@dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """A trained model, which generates text, pictures and sounds.

        model = trimask.load("runs/tiny")
        model.generate("a handwritten seven", to="image")
        model.generate(["three", "eight"], to="audio", strategy="threshold", threshold=0.9)
        model.generate(infill="47+38=__")
        model.generate(image="seven.png", to="text")

    The same input, settings and seed give the same tokens as `trimask generate`.
    """

    run: LoadedRun
    """Parameters, tokenizers and description of the run."""

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        infill: str | None = None,
        image: str | Path | None = None,
        audio: str | Path | None = None,
        **others: Any,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: _SomeTexts | None = None,
        *,
        infill: _SomeTexts | None = None,
        image: _SomePaths | None = None,
        audio: _SomePaths | None = None,
        **others: Any,
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: Any = None,
        *,
        to: str | None = None,
        infill: Any = None,
        image: Any = None,
        audio: Any = None,
        seed: int = 0,
        **others: Any,
    ) -> Answer | list[Answer]:
        """Generates an answer to one input, or a list of answers to a list of inputs.

            model.generate("seven", to="image", seed=3, steps=8, guidance=1.0)

        Inputs are of one kind:

        - `prompt`: a description of the picture or sound to generate, or with to="text" the beginning of a text. An
          empty prompt generates without a condition.
        - `infill`: a text with holes to fill: `_` stands for one token, `[MASK:n]` for n tokens.
        - `image`, `audio`: path of a file to describe.
        - `given`: {modality: path}, a file of any modality of the run to describe.

        Further keywords:

        - `to`: modality to generate. Prompts need it; for all other inputs the default is text.
        - `inpaint`: with `image` and to="image", path of a mask picture, bright where to regenerate each picture.
        - `span`: with `audio` and to="audio", start and end in seconds of the part of each sound to regenerate.
        - `length`: largest number of tokens to generate after a prompt.
        - `like`: name of the dataset whose layout (shapes of media, length of texts) the answers have.
        - `seed`: seed of the answers; an answer depends on it and on its own input alone. Equal inputs of a list have
          different answers.
        - every field of `GenerationConfig`: strategy, steps, temperature, guidance, and so on. The defaults are
          those of the run for the generated modality.

        Prints how a file had to be converted, for example to another size. Raises TypeError for an unknown keyword, and
        ValueError for a request that the run cannot answer.
        """
        query, is_list = self._query(prompt, to=to, infill=infill, image=image, audio=audio, seed=seed, **others)
        if query is None:
            return []
        answers = zip(query.questions, query.answers(silent), strict=True)
        found = [self._answer(query, question, answer) for question, answer in answers]
        return found if is_list else found[0]

    @overload
    def trace(self, prompt: str, **asked: Any) -> Trace: ...

    @overload
    def trace(self, prompt: _SomeTexts, **asked: Any) -> list[Trace]: ...

    @overload
    def trace(self, prompt: None = None, **asked: Any) -> Any: ...

    def trace(self, prompt: Any = None, **asked: Any) -> Trace | list[Trace]:
        """Generates like `generate`, with the same keywords, and keeps the state of each answer after every step.

        model.trace("seven", to="image").animate("seven.gif")
        """
        query, is_list = self._query(prompt, **asked)
        if query is None:
            return []
        paths: list[list[generator.Answer]] = [[] for _ in query.questions]
        for number, state in query.watch():
            paths[number].append(state)
        found = [
            Trace(self._answer(query, question, path[-1]), tuple(path))
            for question, path in zip(query.questions, paths, strict=True)
        ]
        return found if is_list else found[0]

    def environment(
        self,
        *,
        task: str = TEXT,
        dataset: str | None = None,
        split: str = TRAIN,
        data: str | Path | None = None,
        max_problems: int | None = None,
        judge: str | Judge | None = None,
        reward: Reward = _REWARD,
        render_mode: str | None = None,
        **settings: Any,
    ) -> UnmaskingEnv:
        """Gymnasium environment in which an agent decides which tokens of this model's answers to reveal in each step.

            env = model.environment(task="text", split="test", block_length=4)
            observation, info = env.reset(seed=0)

        The problems are the questions of `task` in a split of the prepared data in folder `data`; None: the data that
        the run was trained on. `dataset` names the dataset; None: the only one that has the task. `judge` is a name
        that `trimask evaluate` takes, or a function. All other keywords are fields of `UnmaskingConfig`: block_length,
        inputs, temperature, and so on. For environments in several processes, `gymnasium.make` takes the run's folder.

        Raises FileNotFoundError if there are no prepared data, and ValueError if their tokenizers are not the run's.
        """
        config = _configured(_UNMASKING, settings, self.environment)
        self.run.require_trained_guidance(task, config)
        problems = problems_of(
            self.run, data=data, dataset=dataset, task=task, split=split, max_problems=max_problems, judge=judge
        )
        return UnmaskingEnv(problems, self.run.denoise, config=config, reward=reward, render_mode=render_mode)

    def __repr__(self) -> str:
        tasks = ", ".join(task.name.replace("_", " ") for task in prompts_of(self.run).tasks)
        return f"TrainedModel({str(self.run.folder)!r}, step {self.run.step:,}: {tasks})"

    def _query(
        self,
        prompt: Any = None,
        *,
        to: str | None = None,
        infill: Any = None,
        image: Any = None,
        audio: Any = None,
        given: Mapping[str, Any] | None = None,
        inpaint: str | Path | None = None,
        span: Sequence[float] | None = None,
        length: int | None = None,
        like: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> tuple[Query | None, bool]:
        """The requests, None for an empty list of inputs; and whether the input was a list."""
        files = {"image": image, "audio": audio, **(given or {})}
        lists = [value for value in (prompt, infill, *files.values()) if isinstance(value, list | tuple)]
        strategy = _plain(settings.get("strategy"))
        usual = default_sampling(self.run, to or TEXT, strategy if isinstance(strategy, str) else None)
        sampling = _configured(usual, settings, self._query)
        texts = {name: _listed(name, value, str) for name, value in (("prompt", prompt), ("infill", infill))}
        paths = [f"{name}={path}" for name, value in files.items() for path in _listed(name, value, str, Path)]
        if lists and not any(lists):
            return None, True
        asked = Asked(
            prompt=texts["prompt"],
            infill=texts["infill"],
            given=tuple(paths),
            inpaint=None if inpaint is None else Path(inpaint),
            span=None if span is None else _span(*span),
            to=to,
            length=length,
            like=like,
            seed=seed,
            sampling=sampling,
        )
        return query_of(self.run, asked), bool(lists)

    def _answer(self, query: Query, question: Question, answer: generator.Answer) -> Answer:
        codes, is_asked = answer.example.segments[-1].codes, question.example.segments[-1].codes < 0
        steps = np.zeros(codes.shape, np.int32)
        steps[is_asked] = answer.steps[len(answer.steps) - is_asked.sum() :]
        return Answer(
            prompt=question.prompt,
            modality=answer.example.segments[-1].modality,
            tokens=codes,
            steps=steps,
            nfe=answer.nfe,
            content=query.media(question, answer),
            tokenizers=self.run.tokenizers,
        )


def _span(*seconds: float) -> tuple[float, float]:
    """Start and end in seconds. Raises ValueError for another number of values."""
    if len(seconds) != 2:
        raise ValueError(f"a span is two numbers, its start and end in seconds; got {len(seconds)}")
    return seconds[0], seconds[1]


def _configured(usual: _T, settings: Mapping[str, Any], method: Callable[..., Any]) -> _T:
    """The configuration with these settings. Raises TypeError, with a suggestion, for an unknown name of a setting."""
    fields = [field.name for field in dataclasses.fields(usual)]  # type: ignore[arg-type]
    named = [name for name, each in inspect.signature(method).parameters.items() if each.kind is each.KEYWORD_ONLY]
    for name in settings:
        if name not in fields:
            raise TypeError(f"there is no setting {name!r}; {suggestion(name, [*named, *fields])}")
    said = configuration.to_dict(usual) | {name: _plain(value) for name, value in settings.items()}
    return configuration.from_dict(said, type(usual), "settings")


def _plain(value: Any) -> Any:
    """Value of a setting in the form in which a file holds it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _listed(name: str, value: Any, *kinds: type) -> tuple[Any, ...]:
    """One input or several, as a tuple. Raises TypeError for inputs of another type."""
    if value is None:
        return ()
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in values:
        if not isinstance(one, kinds):
            what = "a text" if kinds == (str,) else "the path of a file"
            raise TypeError(f"{name} must be {what}, or a list of them; got {type(one).__name__}")
    return values


def _ending(path: str | Path, what: str, *endings: str) -> Path:
    """The path. Raises ValueError unless it has one of the endings; `what` names the content in the error."""
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"{path}: {what} is written as {' or '.join(endings)}")
    return Path(path)
