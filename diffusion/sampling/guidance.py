"""Transforms of a denoiser: the ids allowed at a position, and classifier-free guidance."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trimask.diffusion.loss import restrict
from trimask.diffusion.sampling.loop import Denoiser
from trimask.tokenizers.vocabulary import Vocabulary


def restricted(denoise: Denoiser, vocabulary: Vocabulary) -> Denoiser:
    """Gives every id that is not allowed at its position probability zero."""

    def transformed(sequence, positions=None, cache=None):
        output = denoise(sequence, positions, cache)
        modality, place = sequence.modality, sequence.place
        if positions is not None:
            modality = jnp.take_along_axis(modality, positions, axis=1)
            place = jnp.take_along_axis(place, positions[..., None], axis=1)
        allowed = vocabulary.allowed_ids(modality, place)
        return dataclasses.replace(output, logits=restrict(output.logits, allowed))

    return transformed


def guided(denoise: Denoiser, scale: Float[Array, ""] | float, mask_id: int) -> Denoiser:
    """logits = u + (scale + 1)·(c − u), with c given the condition and u with the condition hidden (LLaDA, eq. 16).

    Scale 0 is no guidance. Both passes are one batch of twice the rows; a cache is then one of twice the rows too.
    """

    def transformed(sequence, positions=None, cache=None):
        hidden = sequence.replace(tokens=jnp.where(sequence.is_condition, mask_id, sequence.tokens))
        both = jax.tree.map(lambda *rows: jnp.concatenate(rows), sequence, hidden)
        twice = None if positions is None else jnp.concatenate([positions, positions])
        output = denoise(both, twice, cache)
        conditional, unconditional = jnp.split(output.logits, 2)
        logits = unconditional + (scale + 1) * (conditional - unconditional)
        kept = jnp.split(output.hidden, 2)[0]
        return dataclasses.replace(output, logits=logits, hidden=kept, num_passes=2 * output.num_passes)

    return transformed
