"""Judges of what a model made. They know nothing of the model.

A judge is a function

    judge(media, references) -> scores

`media` is the list of what the model made: str, uint8 [height, width, channels], or float32 waveform [samples] in
[-1, 1] at the data's rate. `references` is the list of the real examples' media by modality, such as
{"text": "seven", "image": …}; of a text that begins with a question, media and "text" are the answer alone, and
"prompt" is the question. `scores` is one of

    a number or bool per item            the score is their mean
    Scores(totals, counts)               the score is Σ totals / Σ counts, as of word errors and words
    one number                           the score of the whole set

Whether higher is better is the judge's own business. A name is a key of JUDGES, or module:function for a function of
the user's; frechet@module:function is the Fréchet distance on features(media) -> [items, features] of the user's.
What is fitted is fitted on *real* training media of the same source, and its score on real held-out media says what
its verdicts are worth.
"""

import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from trimask.diffusion.evaluation.features import FEATURES, frechet_distance
from trimask.tokenizers.vocabulary import TEXT

Judge = Callable[[Sequence[Any], Sequence[Mapping[str, Any]]], Any]
FeatureFunction = Callable[[Sequence[Any]], Any]

_PER_LABEL = 3
"""Captions are labels where each occurs so often, on average, …"""
_MAX_LABELS = 500
"""… and there are no more than so many."""
_FRECHET_DIMENSIONS = 64
_NUMBER = re.compile(r"(?:-?\$?|\$-)(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
"""As in -1,234.50 or $3."""


@dataclass(frozen=True)
class Scores:
    """Scores that are quotients over the whole set."""

    totals: Any
    """One number per item."""
    counts: Any
    """Likewise; all ones make the score a mean."""


@dataclass(frozen=True)
class TrainingMedia:
    """Real training examples of a dataset, on which a judge is fitted."""

    dataset: str
    modality: str
    """Of what is judged."""
    media: Sequence[Any]
    references: Sequence[Mapping[str, Any]]
    codec: Any = None
    """Of the modality; None for text."""

    @property
    def texts(self) -> list[str]:
        """The captions."""
        return [reference[TEXT] for reference in self.references]


@dataclass(frozen=True, kw_only=True)
class JudgeKind:
    """A built-in judge."""

    fit: Callable[[Callable[[], TrainingMedia], FeatureFunction | None], Judge]
    """Makes the judge; reads the training examples only if it needs them."""
    judges: Literal["text", "media"]
    higher_is_better: bool
    yardstick: Literal["held_out", "train"] | None
    """The real media whose score says what a good one is. None: it is known."""


@dataclass(frozen=True)
class NamedJudge:
    """A judge, ready."""

    name: str
    judge: Judge
    higher_is_better: bool | None
    """None: only its author knows."""
    yardstick: Literal["held_out", "train"] | None

    def __call__(self, what: str, media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> Scores | float:
        """Its scores, checked; errors name the judge and `what` it was judging."""
        where = f"judge {self.name} of {what}"
        try:
            result = self.judge(media, references)
        except Exception as error:  # it may be anybody's function
            raise ValueError(f"{where} failed: {type(error).__name__}: {error}") from error
        return _checked(where, result, len(media))


def _checked(where: str, result: Any, num_items: int) -> Scores | float:
    pair = (result.totals, result.counts) if isinstance(result, Scores) else (result,)
    try:
        arrays = [np.asarray(value, np.float64) for value in pair]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must return numbers, got {type(result).__name__}") from error
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{where} returned NaN or infinite scores")
    if len(arrays) == 1 and arrays[0].ndim == 0:
        return float(arrays[0])
    for array in arrays:
        if array.shape != (num_items,):
            raise ValueError(
                f"{where} must return one number, or one per item, here {num_items}; got shape {array.shape}"
            )
    totals, counts = arrays if len(arrays) == 2 else (arrays[0], np.ones(num_items))
    if counts.min() < 0 or not counts.sum() > 0:
        raise ValueError(f"{where} returned counts that are negative or sum to zero")
    return Scores(totals, counts)


def exact_match(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[bool]:
    """True where two texts are equal."""
    return [text == reference[TEXT] for text, reference in zip(media, references, strict=True)]


def final_answer(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[bool]:
    """True where two texts come to the same answer, however they get there."""
    return [answer_of(text) == answer_of(reference[TEXT]) for text, reference in zip(media, references, strict=True)]


def answer_of(text: str) -> str:
    """What stands after the last space."""
    return text.rpartition(" ")[2]


def final_number(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[bool]:
    """True where two texts come to the same number."""
    numbers = [(number_of(text), number_of(reference[TEXT])) for text, reference in zip(media, references, strict=True)]
    return [ours is not None and ours == theirs for ours, theirs in numbers]


def number_of(text: str) -> Decimal | None:
    """The one number in the last <answer>…</answer>, else after the last #### of a text; None where there is none."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    stated = tagged[-1] if tagged else text.rpartition("####")[2].partition("\n")[0] if "####" in text else ""
    numbers = _NUMBER.findall(stated)
    return Decimal(re.sub("[$,]", "", numbers[0])) if len(numbers) == 1 else None


def word_error_rate(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> Scores:
    """Substituted, left-out and added words over words of the reference, of the whole set."""
    import jiwer  # loads RapidFuzz, and only this judge needs it

    errors, words = [], []
    for text, reference in zip(media, references, strict=True):
        words.append(len(reference[TEXT].split()))
        if words[-1]:
            found = jiwer.process_words(reference[TEXT], text)
            errors.append(found.substitutions + found.deletions + found.insertions)
        else:
            errors.append(len(text.split()))
    return Scores(errors, words)


def are_labels(texts: Sequence[str]) -> bool:
    """True where captions are few and each occurs several times."""
    return 2 <= len(set(texts)) <= min(_MAX_LABELS, len(texts) // _PER_LABEL)


def fit_label(training: Callable[[], TrainingMedia], features: FeatureFunction | None = None) -> Judge:
    """A support vector machine that tells which caption a medium has: a reference's caption, or not."""
    from sklearn.pipeline import make_pipeline  # takes seconds to load, and only fitting needs it
    from sklearn.svm import SVC

    given = training()
    if not are_labels(given.texts):
        counts = Counter(given.texts)
        once = sum(count == 1 for count in counts.values())
        raise ValueError(
            f"judge label needs captions that are labels: between 2 and {_MAX_LABELS}, each occurring at least "
            f"{_PER_LABEL} times on average; {given.dataset} has {len(counts):,} different captions of "
            f"{len(given.texts):,}, {once:,} of them once. Judge frechet needs none"
        )
    features = _own_features(given)
    classifier = make_pipeline(_scaling(given), SVC(C=10.0, gamma="scale")).fit(features(given.media), given.texts)

    def label(media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> Any:
        return classifier.predict(features(media)) == np.array([reference[TEXT] for reference in references])

    return label


def fit_frechet(training: Callable[[], TrainingMedia], features: FeatureFunction | None = None) -> Judge:
    """Fréchet distance between features of the media and of the references, by PCA of real training media."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline

    given = training()
    features, scaling = (features, "passthrough") if features else (_own_features(given), _scaling(given))
    known = _matrix(features(given.media), len(given.media))
    dimensions = min(_FRECHET_DIMENSIONS, len(known) - 1, known.shape[1])
    projection = make_pipeline(scaling, PCA(dimensions, random_state=0)).fit(known)

    def frechet(media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> float:
        real = [reference[given.modality] for reference in references]
        ours, theirs = (projection.transform(_matrix(features(items), len(items))) for items in (media, real))
        return frechet_distance(ours, theirs)

    return frechet


def _own_features(training: TrainingMedia) -> FeatureFunction:
    own = FEATURES.get(training.modality)
    if own is None:
        raise ValueError(f"there are no features of {training.modality}; give some with frechet@module:function")
    return lambda media: own.of(media, training.codec)


def _scaling(training: TrainingMedia) -> Any:
    """A step of a pipeline."""
    from sklearn.preprocessing import StandardScaler

    own = FEATURES.get(training.modality)
    return StandardScaler() if own is not None and own.is_scaled else "passthrough"


def _matrix(features: Any, num_items: int) -> Float[np.ndarray, "items features"]:
    matrix = np.asarray(features, np.float64)
    if matrix.ndim != 2 or len(matrix) != num_items:
        raise ValueError(f"features must be [items, features], here {num_items} items; got shape {matrix.shape}")
    return matrix


JUDGES: dict[str, JudgeKind] = {
    "exact_match": JudgeKind(fit=lambda *_: exact_match, judges="text", higher_is_better=True, yardstick=None),
    "final_answer": JudgeKind(fit=lambda *_: final_answer, judges="text", higher_is_better=True, yardstick=None),
    "final_number": JudgeKind(fit=lambda *_: final_number, judges="text", higher_is_better=True, yardstick=None),
    "word_error_rate": JudgeKind(fit=lambda *_: word_error_rate, judges="text", higher_is_better=False, yardstick=None),
    "label": JudgeKind(fit=fit_label, judges="media", higher_is_better=True, yardstick="held_out"),
    "frechet": JudgeKind(fit=fit_frechet, judges="media", higher_is_better=False, yardstick="train"),
}

DEFAULT_JUDGES: dict[str, tuple[str, ...]] = {TEXT: ("exact_match",)}
"""Modality → its judges where none is named. Of a modality that is not listed: label, or frechet where captions are no
labels."""


def open_judge(name: str, modality: str, training: Callable[[], TrainingMedia]) -> NamedJudge:
    """The judge of this name for what is of this modality; fitted, if it is of a kind that is."""
    own, at, given = name.partition("@")
    if own not in JUDGES:
        return NamedJudge(name, imported(name), None, None if modality == TEXT else "held_out")
    kind = JUDGES[own]
    if at and own != "frechet":
        raise ValueError(f"judge {name}: only frechet takes features of yours")
    if not given and not fits(name, modality):
        raise ValueError(f"judge {name} is of {kind.judges}, not of {modality}")
    return NamedJudge(name, kind.fit(training, imported(given) if at else None), kind.higher_is_better, kind.yardstick)


def fits(name: str, modality: str) -> bool:
    """False for a built-in judge of something else."""
    own = name.partition("@")[0]
    return own not in JUDGES or (JUDGES[own].judges == "text") == (modality == TEXT)


def imported(name: str) -> Callable[..., Any]:
    """The function that module:function names; modules are looked for in the working directory too."""
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ValueError(f"no judge {name!r}; there are {', '.join(JUDGES)}, and module:function of your own")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # it may be anybody's module
        raise ValueError(f"judge {name}: module {module!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"judge {name}: module {module!r} has no function {function!r}")
    return found
