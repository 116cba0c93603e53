"""Transforms denoiser → denoiser: restriction to the ids allowed at a position, and classifier-free guidance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from trimask.diffusion.cross_entropy import restrict
from trimask.diffusion.denoiser import Denoiser, DenoiserOutput
from trimask.tokenizers.sequence import TokenRows
from trimask.tokenizers.vocabulary import Vocabulary


def restricted(denoise: Denoiser, vocabulary: Vocabulary) -> Denoiser:
    """The denoiser, with probability zero for every id that is not allowed at its position."""

    def transformed(sequence, positions=None, cache=None):
        output = denoise(sequence, positions, cache)
        modality, coordinates = sequence.modality, sequence.coordinates
        if positions is not None:
            modality = jnp.take_along_axis(modality, positions, axis=1)
            coordinates = jnp.take_along_axis(coordinates, positions[..., None], axis=1)

        def read(features, inner):
            inner_features, modality, coordinates = features
            return restrict(inner(inner_features), vocabulary.allowed_ids(modality, coordinates))

        return dataclasses.replace(
            output, features=(output.features, modality, coordinates), read=Partial(read, inner=output.read)
        )

    return transformed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """logits = u + (scale + 1)·(c − u), with c given the condition and u with the condition hidden (LLaDA, eq. 16)."""

    scale: Float[Array, ""] | float
    """0 has no effect: the logits are then c."""
    interval: tuple[Float[Array, ""] | float, Float[Array, ""] | float] | None = None
    """A row is guided while low < masked share of its targets ≤ high (arXiv 2404.07724). None: always."""


def guided(denoise: Denoiser, guidance: Guidance, mask_id: int) -> Denoiser:
    """The denoiser with classifier-free guidance; a guided pass counts as two.

    The conditional and the unconditional pass are one batch of twice the rows, and so is the cache. If no row is inside
    the interval, only the conditional pass is made.
    """

    def two_passes(sequence: TokenRows, positions, cache) -> DenoiserOutput:
        hidden = sequence.replace(tokens=jnp.where(sequence.is_condition, mask_id, sequence.tokens))
        both = jax.tree.map(lambda *rows: jnp.concatenate(rows), sequence, hidden)
        return denoise(both, None if positions is None else jnp.concatenate([positions, positions]), cache)

    def parts(output: DenoiserOutput):
        return _halves(output.features), _halves(output.hidden)[0], output.cache

    def one_pass(sequence: TokenRows, positions, cache):
        output = denoise(sequence, positions, None if cache is None else _halves(cache)[0])
        unconditional = output.cache if cache is None else _halves(cache)[1]
        rows = jax.tree.map(lambda *rows: jnp.concatenate(rows), output.cache, unconditional)
        return (output.features, output.features), output.hidden, rows

    def transformed(sequence: TokenRows, positions=None, cache=None):
        is_guided = _is_inside(sequence, guidance, mask_id)
        if guidance.interval is None:
            output = two_passes(sequence, positions, cache)
            features, hidden, new_cache = parts(output)
            inner = output.read
        else:
            features, hidden, new_cache = jax.lax.cond(
                is_guided.any(), lambda *arguments: parts(two_passes(*arguments)), one_pass, sequence, positions, cache
            )
            # This call provides only `read`; the compiler drops its computation.
            inner = denoise(sequence, positions, None if cache is None else _halves(cache)[0]).read

        def read(features, inner):
            (conditional, unconditional), is_guided = features
            c, u = inner(conditional), inner(unconditional)
            return jnp.where(is_guided[..., None], u + (guidance.scale + 1) * (c - u), c)

        rows = jnp.broadcast_to(is_guided[:, None], hidden.shape[:2])
        return DenoiserOutput((features, rows), Partial(read, inner=inner), hidden, new_cache, 1 + is_guided)

    return transformed


def generation_denoiser(denoise: Denoiser, vocabulary: Vocabulary, guidance: Guidance | None) -> Denoiser:
    """The denoiser that generation uses: guided, unless `guidance` is None, and restricted to the allowed ids."""
    denoise = denoise if guidance is None else guided(denoise, guidance, vocabulary.mask_id)
    return restricted(denoise, vocabulary)


def _is_inside(sequence: TokenRows, guidance: Guidance, mask_id: int) -> Bool[Array, " batch"]:
    """True for rows whose masked share lies in the interval of guidance."""
    if guidance.interval is None:
        return jnp.ones(sequence.tokens.shape[:1], bool)
    low, high = guidance.interval
    masked = ((sequence.tokens == mask_id) & sequence.is_target).sum(axis=-1)
    share = masked / jnp.maximum(sequence.is_target.sum(axis=-1), 1)
    return (share > low) & (share <= high)


def _halves(tree: Any) -> tuple[Any, Any]:
    """The first and the second half of the rows of every array."""
    return jax.tree.map(lambda x: x[: len(x) // 2], tree), jax.tree.map(lambda x: x[len(x) // 2 :], tree)
