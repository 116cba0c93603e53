"""Generation: observe, choose, reveal, until nothing is masked.

    observe(keys, denoise, state, rules) -> Observation      the only caller of the denoiser
    strategy(keys, observation, memory) -> (Choice, memory)
    reveal(state, observation, choice, rules) -> state       the only writer of tokens

A denoiser is any callable `denoise(sequence) -> DenoiserOutput`; guidance and the ids allowed at a position are
transforms of it (`guidance.py`). Each row has its own random key and its own count of steps, so its tokens do not
depend on the other rows. The number of function evaluations (NFE) counts forward passes made while the row's block had
masks; a guided pass counts as two.

Blocks are filled from left to right, each by the strategy, which acts on nothing else (semi-autoregressive, LLaDA,
arXiv 2502.09992). The steps and evaluations planned for a row are divided evenly among its blocks.

Generation proceeds in rounds. A round begins with a pass over whole rows, whose keys and values the other passes of the
round may reuse (`Rules.cache`; Fast-dLLM, arXiv 2505.22618): `dual` reuses all but the block's, `prefix` those before
the block. A round ends after `refresh_every` passes, or when the block of every row is filled; rows whose block is
filled sooner wait, and get the same tokens as if they were alone. Without a cache, or with refresh_every = 1, a round
is one pass: it is exact, and no row waits. Keys and values of a token depend on all other tokens, so a round of several
passes is an approximation, as in Fast-dLLM.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from trimask.diffusion.denoiser import Cache, Denoiser
from trimask.diffusion.sampling.proposals import propose
from trimask.diffusion.sampling.state import Choice, Memory, Observation, RowKeys, Rules, State, Strategy
from trimask.diffusion.schedule import Schedule


def enter_blocks(state: State, rules: Rules) -> State:
    """Moves rows whose block needs no further step to their next block with masks."""
    enters = ~state.is_open & state.is_masked.any(axis=-1)
    block = jnp.zeros_like(state.block)
    if rules.block_length is not None:
        block = (jnp.argmax(state.is_masked, axis=-1) - state.origin) // rules.block_length
    return dataclasses.replace(
        state,
        block=jnp.where(enters, block, state.block),
        is_open=state.is_open | enters,
        block_step=jnp.where(enters, 0, state.block_step),
        block_nfe=jnp.where(enters, 0, state.block_nfe),
        stable_for=jnp.where(enters, 0, state.stable_for),
    )


def observe(
    keys: RowKeys, denoise: Denoiser, state: State, rules: Rules, cache: Cache = None, suffix: int | None = None
) -> tuple[Observation, Cache]:
    """Runs the denoiser once and proposes a token wherever the block is masked; `keys` has one key per row.

    With `shows_all` it does so wherever the row holds MASK, also at positions that were given up.

    With a cache only the positions whose keys and values it lacks are computed: for a prefix cache, `suffix` positions
    from the block's first one on (None: as many as a row has). Also returns the keys and values of this pass.
    """
    in_block = _in_block(state, rules)
    holds_mask = state.is_asked & (state.sequence.tokens == rules.mask_id)
    is_wanted = holds_mask & (state.is_open[:, None] if rules.shows_all else in_block)
    block, computed = _positions_to_compute(state, rules, cache, suffix)
    output = denoise(state.sequence, computed, cache)
    positions = jnp.broadcast_to(jnp.arange(state.sequence.length), is_wanted.shape)
    if block is not None:
        positions, is_wanted = block, jnp.take_along_axis(is_wanted, block, axis=1)
        if computed is not block:
            output = output.first(block.shape[1])
    proposals = propose(output, is_wanted, positions, keys, rules.token_sampling, rules.chunk, rules.num_top)
    hidden = jnp.where(is_wanted[..., None], output.hidden, 0) if rules.shows_hidden else None
    if block is not None:
        scatter = partial(_scatter_block, block_start=state.block_start(rules), length=state.sequence.length)
        proposals, hidden = jax.tree.map(scatter, (proposals, hidden))
    planned, time, next_time = _plan(state, rules)
    return Observation(
        proposal=proposals.token,
        confidence=proposals.confidence,
        entropy=proposals.entropy,
        margin=proposals.margin,
        is_masked=state.is_masked,
        holds_mask=holds_mask,
        in_block=in_block,
        is_asked=state.is_asked,
        modality=state.sequence.modality,
        step=state.block_step,
        steps_taken=state.step,
        num_steps=planned,
        time=time,
        next_time=next_time,
        commit_confidence=state.commit_confidence,
        num_passes=jnp.broadcast_to(jnp.asarray(output.num_passes), state.step.shape),
        top=proposals.top if rules.num_top else None,
        hidden=hidden,
    ), output.cache


def _in_block(state: State, rules: Rules) -> Bool[Array, "batch seq"]:
    """True in the current block of each row; False everywhere in rows that wait or are done."""
    in_block = jnp.broadcast_to(state.is_open[:, None], state.is_masked.shape)
    if rules.block_length is not None:
        positions, start = jnp.arange(state.sequence.length), state.block_start(rules)[:, None]
        in_block &= (positions >= start) & (positions < start + rules.block_length)
    return in_block


def _positions_to_compute(
    state: State, rules: Rules, cache: Cache, suffix: int | None
) -> tuple[Int[Array, "batch block"] | None, Int[Array, "batch computed"] | None]:
    """Positions of the current block, and those that the denoiser is to compute, which begin with the block's.

    Both are None where whole rows are computed.
    """
    length = state.sequence.length
    if rules.block_length is None or rules.block_length >= length or rules.shows_all:
        return None, None
    start = state.block_start(rules)[:, None]
    block = jnp.minimum(start + jnp.arange(rules.block_length), length - 1)
    if cache is not None and rules.cache == "prefix":
        return block, jnp.minimum(start + jnp.arange(suffix or length), length - 1)
    return block, block


def _scatter_block(
    values: Shaped[Array, "batch block *rest"], block_start: Int[Array, " batch"], length: int
) -> Shaped[Array, "batch seq *rest"]:
    """Values of the current block at their positions in the row, and 0 at all other positions."""
    block_length = values.shape[1]
    offset = jnp.arange(length) - block_start[:, None]
    is_inside = (offset >= 0) & (offset < block_length)
    offset, is_inside = (jax.lax.expand_dims(a, range(2, values.ndim)) for a in (offset, is_inside))
    gathered = jnp.take_along_axis(values, jnp.clip(offset, 0, block_length - 1), axis=1)
    return jnp.where(is_inside, gathered, 0)


def _plan(state: State, rules: Rules) -> tuple[Int[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
    """Number of steps planned for the current block, and the planned share of masks before and after this step."""
    # Of S steps over B blocks, block b has ⌊(b + 1)S/B⌋ − ⌊bS/B⌋, but one at least.
    blocks, block = state.num_blocks(rules), state.block
    planned = jnp.maximum((block + 1) * rules.num_steps // blocks - block * rules.num_steps // blocks, 1)
    modality = jnp.where(state.is_asked, state.sequence.modality, 0).max(axis=-1)
    share = partial(_left, rules.grid, modality)
    time = share(jnp.minimum(state.block_step / planned, 1.0))
    return planned, time, jnp.where(state.block_step + 1 >= planned, 0.0, share((state.block_step + 1) / planned))


def _left(grid: Schedule, modality: Int[Array, " batch"], u: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """Share of masks left after a share u of the steps, in rows that ask for these modalities."""
    return grid.mask_probability(1 - u, modality)


def reveal(state: State, observation: Observation, choice: Choice, rules: Rules) -> State:
    """Writes the chosen proposals, remasks, and counts the step and its evaluations.

    Also applies the rules that end a block early: `max_nfe`, `patience`, EOS and `gives_up_after`.
    """
    candidates = observation.candidates
    is_active = state.is_open
    had_masks = candidates.any(axis=-1)
    passes = jnp.where(had_masks, observation.num_passes, 0)
    block_nfe = state.block_nfe + passes
    is_same = ((observation.proposal == state.proposal) | ~candidates).all(axis=-1) & (state.block_step > 0)
    stable_for = jnp.where(had_masks, jnp.where(is_same, state.stable_for + 1, 0), state.stable_for)
    is_last = jnp.zeros_like(is_active)
    if rules.max_nfe is not None:
        is_last |= block_nfe + rules.passes_per_step > rules.max_nfe // state.num_blocks(rules)
    if rules.patience is not None:
        is_last |= had_masks & (stable_for + 1 >= rules.patience)
    revealed = (choice.reveal | is_last[:, None]) & candidates
    remasked = jnp.zeros_like(revealed)
    if choice.remask is not None:
        remasked = choice.remask & ~state.is_masked & state.is_asked & observation.in_block & ~is_last[:, None]
    tokens = jnp.where(revealed, observation.proposal, jnp.where(remasked, rules.mask_id, state.sequence.tokens))
    confidence = jnp.where(revealed, observation.confidence, jnp.where(remasked, 0.0, state.commit_confidence))
    commit_step = jnp.where(revealed, state.step[:, None] + 1, jnp.where(remasked, 0, state.commit_step))
    is_masked = (state.is_masked & ~revealed) | remasked
    if rules.eos_id is not None:
        ended = is_masked & _after_eos(tokens, is_masked, state, rules)
        tokens, is_masked = jnp.where(ended, rules.eos_id, tokens), is_masked & ~ended
        confidence = jnp.where(ended, 1.0, confidence)
        commit_step = jnp.where(ended, state.step[:, None] + 1, commit_step)
    goes_on = jnp.zeros_like(is_active) if choice.goes_on is None else choice.goes_on & ~is_last
    if rules.gives_up_after is not None:
        gives_up = is_active & (state.block_step + 1 >= rules.gives_up_after)
        is_masked &= ~(gives_up[:, None] & observation.in_block)
        goes_on &= ~gives_up
    return dataclasses.replace(
        state,
        sequence=state.sequence.replace(tokens=tokens),
        is_masked=is_masked,
        step=state.step + is_active,
        nfe=state.nfe + passes,
        is_open=is_active & ((is_masked & observation.in_block).any(axis=-1) | goes_on),
        block_step=state.block_step + is_active,
        block_nfe=block_nfe,
        proposal=jnp.where(candidates, observation.proposal, state.proposal),
        stable_for=stable_for,
        commit_confidence=confidence,
        commit_step=commit_step,
    )


def _after_eos(tokens, is_masked, state: State, rules: Rules) -> Bool[Array, "batch seq"]:
    """True after the last given token of each text that has ended.

    A text has ended if there is a generated EOS after its last given token, and no mask between these two.
    """
    length = tokens.shape[-1]
    positions = jnp.arange(length)
    is_given = ~state.is_asked & state.sequence.is_target & state.sequence.is_text
    last_given = jnp.max(jnp.where(is_given, positions, -1), axis=-1, keepdims=True)
    is_text = state.sequence.is_text
    is_hole = (tokens == rules.mask_id) & is_text & (positions > last_given)
    first_hole = jnp.min(jnp.where(is_hole, positions, length), axis=-1, keepdims=True)
    is_end = is_text & (tokens == rules.eos_id) & state.is_asked & ~is_masked & (positions > last_given)
    return (is_end & (positions < first_hole)).any(axis=-1, keepdims=True) & is_text & (positions > last_given)


def step_keys(state: State) -> tuple[RowKeys, RowKeys]:
    """Random keys of every row's next step: one to draw tokens, one for the strategy."""
    keys = jax.vmap(lambda key, step: jax.random.split(jax.random.fold_in(key, step)))(state.keys, state.step)
    return keys[:, 0], keys[:, 1]


def advance(
    denoise: Denoiser,
    strategy: Strategy,
    rules: Rules,
    state: State,
    memory: Memory,
    cache: Cache = None,
    suffix: int | None = None,
) -> tuple[State, Memory, Cache]:
    """One step of every row; without a cache it is the first of a round, whose keys and values are returned."""
    if cache is None:
        state = enter_blocks(state, rules)
    token_keys, strategy_keys = step_keys(state)
    observation, new_cache = observe(token_keys, denoise, state, rules, cache, suffix)
    choice, memory = strategy(strategy_keys, observation, memory)
    return reveal(state, observation, choice, rules), memory, new_cache if cache is None else cache


def sample(
    denoise: Denoiser,
    strategy: Strategy,
    rules: Rules,
    state: State,
    memory: Memory = None,
    max_unfinished: Int[Array, ""] | int = 0,
) -> tuple[State, Memory]:
    """Repeats rounds until at most `max_unfinished` rows are unfinished, in one loop on the device."""

    def is_unfinished(carry):
        return (~carry[0].is_done).sum() > max_unfinished

    def rest_of_round(suffix, state, memory, cache):
        def goes_on(carry):
            state, _, passes = carry
            is_fresh = True if rules.refresh_every is None else passes < rules.refresh_every
            return state.is_open.any() & is_fresh

        def one_step(carry):
            state, memory, passes = carry
            state, memory, _ = advance(denoise, strategy, rules, state, memory, cache, suffix)
            return state, memory, passes + 1

        return jax.lax.while_loop(goes_on, one_step, (state, memory, jnp.ones((), jnp.int32)))[:2]

    def one_round(carry):
        state, memory, cache = advance(denoise, strategy, rules, *carry)
        if rules.cache == "none":
            return state, memory
        if rules.cache == "dual":
            return rest_of_round(None, state, memory, cache)
        # Compiled shapes are fixed, so the number of positions after the prefix is rounded up to one of four.
        length = state.sequence.length
        suffixes = sorted(
            {max(-(-length * part // 4), min(rules.block_length or length, length)) for part in (1, 2, 3, 4)}
        )
        needed = jnp.max(jnp.where(state.is_open, length - state.block_start(rules), 0))
        choice = jnp.searchsorted(jnp.array(suffixes), needed)
        return jax.lax.switch(choice, [partial(rest_of_round, n) for n in suffixes], state, memory, cache)

    return jax.lax.while_loop(is_unfinished, one_round, (state, memory))
