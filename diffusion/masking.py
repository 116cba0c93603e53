"""The forward process: which tokens of a batch are masked, and what each masked one weighs in the loss.

Every example (segment of a row) has its own time t, stratified over the batch by tokens:
t_s = (u + share of target tokens before example s) mod 1. Before means in the order of n · φ mod 1 (φ the golden ratio,
n the number of the example), so that the times of any run of rows are evenly spread, too, and devices that share the
rows have equal work.

In a conditional direction only the target is masked. With probability `joint_probability` an example is masked on both
sides instead, the condition at an independent time, so that the model also learns the pair's joint distribution; with
probability `drop_probability` its condition is hidden (all masked, no loss), which is what classifier-free guidance
needs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trimask.diffusion.schedule import ScheduleConfig, stratified_times
from trimask.tokenizers.sequence import TokenRows, example_starts, task_tokens
from trimask.tokenizers.storage.ranges import Checked, Share
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(Checked):
    """How training examples are masked."""

    schedule: ScheduleConfig = ScheduleConfig()
    """The noise schedule."""
    complementary: bool = False
    """Each example enters the batch twice, with a mask and its complement (the paper's anti-masking)."""
    joint_probability: Share = 0.2
    """Share of conditional examples masked on both sides, at independent times."""
    drop_probability: Share = 0.1
    """Share of conditional examples whose condition is hidden."""

    def __post_init__(self):
        super().__post_init__()
        if self.joint_probability + self.drop_probability > 1:
            raise ValueError(
                "joint_probability + drop_probability must not exceed 1, "
                f"got {self.joint_probability} + {self.drop_probability}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noised:
    """A batch after the forward process."""

    sequence: TokenRows
    """With MASK at the masked positions."""
    clean: Int[Array, "*batch seq"]
    """The tokens before."""
    is_target: Bool[Array, "*batch seq"]
    """True where the token could have been masked and carries loss: the loss's normaliser counts these."""
    is_masked: Bool[Array, "*batch seq"]
    """True where the loss is taken; a hidden condition is not."""
    weight: Float[Array, "*batch seq"]
    """The ELBO's weight of each position's cross-entropy, were it masked."""


def draw_is_masked(
    key: PRNGKeyArray,
    maskable: Bool[Array, "batch seq"],
    keep_probability: Float[Array, "batch seq"],
) -> Bool[Array, "batch seq"]:
    """True where a token is masked: each maskable one independently with probability 1 − α(t)."""
    return maskable & (jax.random.uniform(key, maskable.shape) >= keep_probability)


def forward_process(key: PRNGKeyArray, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig) -> Noised:
    """Masks a clean batch; with complementary masks the batch comes back twice as large, the complements last."""
    key_time, key_mode, key_mask = jax.random.split(key, 3)
    is_joint, is_dropped = _modes(key_mode, sequence, vocabulary, config)
    is_target = sequence.is_target | (sequence.is_condition & is_joint)
    is_hidden = sequence.is_condition & is_dropped
    times = _times(key_time, sequence, config.schedule)
    schedule, modality = config.schedule.of(vocabulary), sequence.modality
    is_masked = draw_is_masked(key_mask, is_target, schedule.kept(times, modality))

    def noised(is_masked, weight):
        tokens = jnp.where(is_masked | is_hidden, vocabulary.mask_id, sequence.tokens)
        return Noised(sequence.replace(tokens=tokens), sequence.tokens, is_target, is_masked, weight)

    first = noised(is_masked, schedule.weight(times, modality))
    if not config.complementary:
        return first
    second = noised(is_target & ~is_masked, schedule.complementary_weight(times, modality))
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)


def _per_example(values: Float[Array, "batch seq"], sequence: TokenRows) -> Float[Array, "batch seq"]:
    """Gives every position of an example the same value: the one at index `segment` of its row."""
    return jnp.take_along_axis(values, sequence.segment, axis=-1)


def _modes(key, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig):
    """Which positions belong to examples masked on both sides, and to examples whose condition is hidden.

    The beginning of a text, where it is a condition, is neither: what is a prompt is only ever given.
    """
    draw = _per_example(jax.random.uniform(key, sequence.tokens.shape), sequence)
    draw = jnp.where(task_tokens(sequence) == vocabulary.task_id(TEXT), jnp.inf, draw)
    is_joint = draw < config.joint_probability
    return is_joint, ~is_joint & (draw < config.joint_probability + config.drop_probability)


def _times(key, sequence: TokenRows, schedule: ScheduleConfig) -> Float[Array, "batch seq"]:
    """Each example's time, spread evenly over the batch's target tokens; a condition's is independent of it."""
    key_offset, key_condition = jax.random.split(key)
    starts = example_starts(sequence)
    number = jnp.cumsum(starts == jnp.arange(sequence.length)).astype(jnp.uint32)
    # The fraction of number · (√5 − 1)/2, exactly, in units of 2⁻³².
    order = jnp.argsort(number * jnp.uint32(2654435769), stable=True)
    in_order = sequence.is_target.reshape(-1)[order]
    before = jnp.zeros_like(order).at[order].set(jnp.cumsum(in_order) - in_order)
    before = jnp.take_along_axis(before.reshape(starts.shape), starts, axis=1)
    share = before / jnp.maximum(sequence.is_target.sum(), 1)
    condition_shift = _per_example(jax.random.uniform(key_condition, sequence.tokens.shape), sequence)
    offset = jax.random.uniform(key_offset)
    return stratified_times(offset, share + sequence.is_condition * condition_shift, schedule.min_time)
