"""Starting a run from another one's weights, under a vocabulary that may have grown.

Ids shift when a vocabulary grows, so whatever is indexed by them is mapped by meaning: a special token by its name, a
text id by itself, EOS to EOS, a code by its modality, codebook and number. Rows that are new stay as initialised; all
other parameters are taken over. A sequence of old tokens then has the logits it had, over the old ids.
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


def grown(parameters: Any, fresh: Any, old: Vocabulary, new: Vocabulary) -> Any:
    """The fresh parameters of a model with the new vocabulary, with the old model's put in where they belong."""

    def put(path, initial, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in _INDEXED:
            return jnp.copy(value)
        axis, places = _INDEXED[name]
        return initial.at[(slice(None),) * axis + (places(old, new),)].set(value)

    return jax.tree_util.tree_map_with_path(put, fresh, parameters)


def new_ids(old: Vocabulary, new: Vocabulary) -> Int[np.ndarray, " old_size"]:
    """The new id of every old id."""
    special = [new.special_tokens.index(name) for name in old.special_tokens]
    text = [*new.to_ids(TEXT, np.arange(old.text_size)), new.eos_id]
    ranges = zip(old.ranges[2:], new_ranges(old, new)[2:], strict=True)
    codes = [new.ranges[there].start + np.arange(here.stop - here.start) for here, there in ranges]
    return np.concatenate([np.array(part, np.int32) for part in (special, text, *codes)])


def new_ranges(old: Vocabulary, new: Vocabulary) -> Int[np.ndarray, " old_ranges"]:
    """The new number of every old range."""
    there = {key: number for number, key in enumerate(_range_keys(new))}
    return np.array([there[key] for key in _range_keys(old)], np.int32)


_INDEXED: dict[str, tuple[int, Callable[[Vocabulary, Vocabulary], Int[np.ndarray, " places"]]]] = {
    "embedding": (0, new_ids),
    "unembedding": (1, new_ids),
    "place/range": (0, new_ranges),
    "place/scale": (0, new_ranges),
}
"""Parameter → the axis that a vocabulary indexes, and where its old entries go."""


def require_same_model(old: TrainConfig, new: TrainConfig, run: Path) -> None:
    """Refuses another network than the run's; how it is computed may differ."""
    changed = configuration.changed_fields(old.model, new.model.computed_as(old.model), "model.")
    changed += configuration.changed_fields(old.parametrization, new.parametrization, "parametrization.")
    if changed:
        raise ValueError(f"{run}: a run can start from it only with its model. There → asked for: {'; '.join(changed)}")


def require_grown(old: Path, new: Path) -> None:
    """Refuses a folder of tokenizers in which an id or a code does not mean what it means in the old one."""
    there, here = media_tokenizers.load_tokenizers(old), media_tokenizers.load_tokenizers(new)
    before, after = there.fingerprints, here.fingerprints
    changed = [
        f"codec of {modality}: {fingerprint} → {after.get(modality, 'absent')}"
        for modality, fingerprint in before.items()
        if modality != TEXT and after.get(modality) != fingerprint
    ]
    tokens, new_tokens = there.text.tokens, here.text.tokens
    moved = [number for number in sorted(tokens) if new_tokens.get(number) != tokens[number]]
    changed += [f"text id {i}: {tokens[i]!r} → {new_tokens.get(i, 'absent')!r}" for i in moved[:3]]
    if len(moved) > 3:
        changed.append(f"{len(moved) - 3} more text ids")
    if changed:
        raise ValueError(
            f"{new}: tokenizers must be those of {old.parent}, or these grown. There → here: {'; '.join(changed)}"
        )


def _range_keys(vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Modality and codebook of every range."""
    names = [r.modality for r in vocabulary.ranges]
    return [(name, names[:place].count(name)) for place, name in enumerate(names)]
