"""Starting a run from the weights of another run, whose vocabulary may be a part of the new one.

Ids shift when a vocabulary grows, so whatever they index is mapped by meaning: a special token by its name, a text id
by itself, EOS to EOS, a code by its modality, codebook and number. Rows for new ids keep their random initial values;
all other parameters are copied. A sequence of old tokens then has the same logits as before, over the old ids.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


def grown_parameters(parameters: Any, fresh: Any, old: Vocabulary, new: Vocabulary) -> Any:
    """The parameters `fresh` of a model with the new vocabulary, overwritten by those of the old model.

    Both are trees as of `Pretraining.new_parameters`.
    """

    def put(path, initial, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in _INDEXED:
            return jnp.copy(value)
        axis, new_indices = _INDEXED[name]
        return initial.at[(slice(None),) * axis + (new_indices(old, new),)].set(value)

    return jax.tree_util.tree_map_with_path(put, fresh, parameters)


def new_ids(old: Vocabulary, new: Vocabulary) -> Int[np.ndarray, " old_size"]:
    """New id of every old id."""
    special = [new.special_tokens.index(name) for name in old.special_tokens]
    text = [*new.to_ids(TEXT, np.arange(old.text_size)), new.eos_id]
    ranges = zip(old.ranges[2:], new_ranges(old, new)[2:], strict=True)
    codes = [new.ranges[number].start + np.arange(old_ids.stop - old_ids.start) for old_ids, number in ranges]
    return np.concatenate([np.array(part, np.int32) for part in (special, text, *codes)])


def new_ranges(old: Vocabulary, new: Vocabulary) -> Int[np.ndarray, " old_ranges"]:
    """New number of every old range."""
    new_numbers = {key: number for number, key in enumerate(_range_keys(new))}
    return np.array([new_numbers[key] for key in _range_keys(old)], np.int32)


_INDEXED: dict[str, tuple[int, Callable[[Vocabulary, Vocabulary], Int[np.ndarray, " indices"]]]] = {
    "embedding": (0, new_ids),
    "unembedding": (1, new_ids),
    "place/range": (0, new_ranges),
    "place/scale": (0, new_ranges),
}
"""Axis of each parameter that the vocabulary indexes, and the function that gives its old entries' new indices."""


def require_same_model(old: TrainConfig, new: TrainConfig, run: Path) -> None:
    """Raises ValueError if the network is not that of `run`; how it is computed may differ."""
    changed = configuration.changed_fields(old.model, new.model.computed_as(old.model), "model.")
    changed += configuration.changed_fields(old.parametrization, new.parametrization, "parametrization.")
    if changed:
        raise ValueError(
            f"{run}: a run can start from it only with its model. Its model → this one: {'; '.join(changed)}"
        )


def require_grown(old: Path, new: Path) -> None:
    """Raises ValueError if an id or code of the tokenizers in folder `old` means something else in folder `new`."""
    old_tokenizers, new_tokenizers = media_tokenizers.load_tokenizers(old), media_tokenizers.load_tokenizers(new)
    before, after = old_tokenizers.fingerprints, new_tokenizers.fingerprints
    changed = [
        f"codec of {modality}: {fingerprint} → {after.get(modality, 'absent')}"
        for modality, fingerprint in before.items()
        if modality != TEXT and after.get(modality) != fingerprint
    ]
    tokens, new_tokens = old_tokenizers.text.tokens, new_tokenizers.text.tokens
    moved = [number for number in sorted(tokens) if new_tokens.get(number) != tokens[number]]
    changed += [f"text id {i}: {tokens[i]!r} → {new_tokens.get(i, 'absent')!r}" for i in moved[:3]]
    if len(moved) > 3:
        changed.append(f"{len(moved) - 3} more text ids")
    if changed:
        raise ValueError(
            f"{new}: tokenizers must be those of {old.parent}, or an extension of them. "
            f"There → here: {'; '.join(changed)}"
        )


def _range_keys(vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Modality and codebook of every range."""
    names = [r.modality for r in vocabulary.ranges]
    return [(name, names[:number].count(name)) for number, name in enumerate(names)]
