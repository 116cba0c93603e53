"""Judges of generated media, independent of the model that generated them.

A judge is a function

    judge(media, references) -> scores

`media` is the list of generated media: str, uint8 [height, width, channels], or float32 waveform [samples] in [-1, 1]
at the data's sample rate. `references` is the list of the real examples' media by modality, such as {"text": "seven",
"image": …}; where the model continues a question, media and "text" are the answer alone, and "prompt" is the question.
`scores` is one of

    a number or bool per item            the score is their mean
    Scores(totals, counts)               the score is Σ totals / Σ counts, as for word errors and words
    one number                           the score of the whole set

Each judge has its own unit, and says whether higher is better. A judge is named by a key of JUDGES, or as
module:function if it is the user's; frechet@module:function is the Fréchet distance on the user's features(media) ->
[items, features]. A fitted judge is fitted on *real* training media of the same dataset, and its score of real held-out
media tells how far its scores can be trusted.
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
"""`judge(media, references) -> scores`, as above."""
FeatureFunction = Callable[[Sequence[Any]], Any]
"""`features(media) -> array [items, features]`."""

_PER_LABEL = 3
"""Least number of times that a caption occurs on average, for captions to be labels."""
_MAX_LABELS = 500
"""Most different captions, for captions to be labels."""
_BLANK = 0.1
"""Share of the least contrast among the real training media below which a medium shows or says nothing."""
_FRECHET_DIMENSIONS = 64
"""Most principal components that the Fréchet distance is computed on."""
_NUMBER = re.compile(r"(?:-?\$?|\$-)(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
"""A number, such as -1,234.50 or $3."""


@dataclass(frozen=True)
class Scores:
    """Scores whose total over the set is Σ totals / Σ counts."""

    totals: Any
    """One number per item."""
    counts: Any
    """One number per item; with ones the score is the mean of the totals."""


@dataclass(frozen=True)
class TrainingMedia:
    """Real training examples of a dataset, on which a judge is fitted."""

    dataset: str
    """Name of the dataset."""
    modality: str
    """Modality that is judged."""
    media: Sequence[Any]
    """Media of that modality."""
    references: Sequence[Mapping[str, Any]]
    """All media of the same examples, by modality."""
    codec: Any = None
    """Codec of the modality; None for text."""

    @property
    def texts(self) -> list[str]:
        """Captions of the media."""
        return [reference[TEXT] for reference in self.references]


@dataclass(frozen=True, kw_only=True)
class JudgeKind:
    """A built-in judge: how it is made, and what it judges."""

    fit: Callable[[Callable[[], TrainingMedia], FeatureFunction | None], Judge]
    """`fit(training, features) -> judge`: calls `training` only if needed; `features` are the user's, if any."""
    judges: Literal["text", "media"]
    """Media that it judges: texts, or media with built-in features."""
    higher_is_better: bool
    """Whether a higher score is better."""
    yardstick: Literal["held_out", "train"] | None
    """Split of the real media whose score is the yardstick for the model's. None: the best score is known."""


@dataclass(frozen=True)
class NamedJudge:
    """A judge, fitted if it needs to be, with its name."""

    name: str
    judge: Judge
    higher_is_better: bool | None
    """Whether a higher score is better. None: unknown, since the judge is the user's."""
    yardstick: Literal["held_out", "train"] | None
    """Split of the real media whose score is the yardstick for the model's. None: there is none."""

    def __call__(self, what: str, media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> Scores | float:
        """The scores, one per item or one number, checked; errors name the judge and `what` it judged."""
        where = f"judge {self.name} of {what}"
        try:
            result = self.judge(media, references)
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"{where} failed: {type(error).__name__}: {error}") from error
        return _checked(where, result, len(media))


def _checked(where: str, result: Any, num_items: int) -> Scores | float:
    """A judge's result as `Scores` or one number; raises ValueError, which begins with `where`, if it is neither."""
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
    """Whether each text equals the reference's."""
    return [text == reference[TEXT] for text, reference in zip(media, references, strict=True)]


def final_answer(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each text ends in the same answer (`answer_of`) as the reference's; only the end counts."""
    return [answer_of(text) == answer_of(reference[TEXT]) for text, reference in zip(media, references, strict=True)]


def answer_of(text: str) -> str:
    """The part of a text after its last space."""
    return text.rpartition(" ")[2]


def final_number(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each text states the same final number (`number_of`) as the reference's."""
    numbers = [(number_of(text), number_of(reference[TEXT])) for text, reference in zip(media, references, strict=True)]
    return [ours is not None and ours == theirs for ours, theirs in numbers]


def number_of(text: str) -> Decimal | None:
    """The number in a text's last <answer>…</answer>, else after its last ####; None unless there is exactly one."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    stated = tagged[-1] if tagged else text.rpartition("####")[2].partition("\n")[0] if "####" in text else ""
    numbers = _NUMBER.findall(stated)
    return Decimal(re.sub("[$,]", "", numbers[0])) if len(numbers) == 1 else None


def word_error_rate(media: Sequence[str], references: Sequence[Mapping[str, Any]]) -> Scores:
    """Word error rate of the whole set: substituted, deleted and inserted words over words of the references."""
    import jiwer  # loads RapidFuzz, and only this judge needs it

    errors, words = [], []
    for text, reference in zip(media, references, strict=True):
        words.append(len(reference[TEXT].split()))
        if words[-1]:
            alignment = jiwer.process_words(reference[TEXT], text)
            errors.append(alignment.substitutions + alignment.deletions + alignment.insertions)
        else:
            errors.append(len(text.split()))
    return Scores(errors, words)


def are_labels(texts: Sequence[str]) -> bool:
    """Whether captions are class labels: few different ones, each of which occurs several times."""
    return 2 <= len(set(texts)) <= min(_MAX_LABELS, len(texts) // _PER_LABEL)


def fit_label(training: Callable[[], TrainingMedia], features: FeatureFunction | None = None) -> Judge:
    """A judge of media by a support vector machine that predicts the caption: whether it is the reference's.

    Media with next to no contrast (`_BLANK`), such as silence, are never right: a classifier would take them for the
    caption whose media they resemble most.
    """
    from sklearn.pipeline import make_pipeline  # takes seconds to load, and only fitting needs it
    from sklearn.svm import SVC

    examples = training()
    if not are_labels(examples.texts):
        counts = Counter(examples.texts)
        once = sum(count == 1 for count in counts.values())
        raise ValueError(
            f"judge label needs captions that are labels: between 2 and {_MAX_LABELS}, each occurring at least "
            f"{_PER_LABEL} times on average; {examples.dataset} has {len(counts):,} different captions of "
            f"{len(examples.texts):,}, {once:,} of them once. Judge frechet needs none"
        )
    features, svm = _builtin_features(examples), SVC(C=10.0, gamma="scale")
    classifier = make_pipeline(_scaling(examples), svm).fit(features(examples.media), examples.texts)
    least = _BLANK * min(map(_contrast, examples.media))

    def label(media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> Any:
        is_right = classifier.predict(features(media)) == np.array([reference[TEXT] for reference in references])
        return is_right & [_contrast(medium) >= least for medium in media]

    return label


def _contrast(medium: np.ndarray) -> float:
    """Standard deviation of all values of a picture or of a waveform; 0 for an even picture and for silence."""
    return float(np.std(medium))


def fit_frechet(training: Callable[[], TrainingMedia], features: FeatureFunction | None = None) -> Judge:
    """A judge by the Fréchet distance between features of media and references, reduced by PCA of training media."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline

    examples = training()
    if features is None:
        features, scaling = _builtin_features(examples), _scaling(examples)
    else:
        scaling = "passthrough"
    known = _matrix(features(examples.media), len(examples.media))
    dimensions = min(_FRECHET_DIMENSIONS, len(known) - 1, known.shape[1])
    projection = make_pipeline(scaling, PCA(dimensions, random_state=0)).fit(known)

    def frechet(media: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> float:
        real = [reference[examples.modality] for reference in references]
        ours, theirs = (projection.transform(_matrix(features(items), len(items))) for items in (media, real))
        return frechet_distance(ours, theirs)

    return frechet


def _builtin_features(training: TrainingMedia) -> FeatureFunction:
    """The features of `FEATURES` for a modality; raises ValueError if there are none."""
    builtin = FEATURES.get(training.modality)
    if builtin is None:
        raise ValueError(f"there are no features of {training.modality}; give some with frechet@module:function")
    return lambda media: builtin.extract(media, training.codec)


def _scaling(training: TrainingMedia) -> Any:
    """The step of a scikit-learn pipeline that scales built-in features."""
    from sklearn.preprocessing import StandardScaler

    builtin = FEATURES.get(training.modality)
    return StandardScaler() if builtin is not None and builtin.is_scaled else "passthrough"


def _matrix(features: Any, num_items: int) -> Float[np.ndarray, "items features"]:
    """Features as float64; raises ValueError unless their shape is [items, features]."""
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

"""Built-in judges, by name."""

DEFAULT_JUDGES: dict[str, tuple[str, ...]] = {TEXT: ("exact_match",)}
"""Judges by modality, if none is named; one that is not listed has label if captions are labels, else frechet."""


def open_judge(name: str, modality: str, training: Callable[[], TrainingMedia]) -> NamedJudge:
    """The judge of this name for a modality, fitted on `training()` if it needs to be.

    Raises ValueError if there is no such judge, or if it cannot judge the modality.
    """
    builtin, at, features = name.partition("@")
    if builtin not in JUDGES:
        return NamedJudge(name, import_function(name), None, None if modality == TEXT else "held_out")
    kind = JUDGES[builtin]
    if at and builtin != "frechet":
        raise ValueError(f"judge {name}: only frechet takes features of yours")
    if not features and not can_judge(name, modality):
        raise ValueError(f"judge {name} judges {kind.judges}, not {modality}")
    judge = kind.fit(training, import_function(features) if at else None)
    return NamedJudge(name, judge, kind.higher_is_better, kind.yardstick)


def can_judge(name: str, modality: str) -> bool:
    """Whether a judge can judge a modality; always true for the user's judges."""
    builtin = name.partition("@")[0]
    return builtin not in JUDGES or (JUDGES[builtin].judges == "text") == (modality == TEXT)


def import_function(name: str) -> Callable[..., Any]:
    """The function that module:function names; modules are looked for in the working directory first.

    Raises ValueError if it cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ValueError(f"no judge {name!r}; there are {', '.join(JUDGES)}, and module:function of your own")
    sys.path.insert(0, os.getcwd())
    try:
        imported = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"judge {name}: module {module!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(imported):
        raise ValueError(f"judge {name}: module {module!r} has no function {function!r}")
    return imported
