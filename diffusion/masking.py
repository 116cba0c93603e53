"""The forward process: which tokens of a batch are masked, and the loss weight of each masked token.

Every example (segment of a row) has its own time t, stratified over the batch by target tokens: t_s = (u + share of
target tokens before example s) mod 1, with examples in the order of `schedule.low_discrepancy_shares`. The times of any
block of consecutive rows are then evenly spread as well, so devices that share the rows have equal work.

In a conditional task only the target is masked. With probability `joint_probability` both sides of an example are
masked instead, the condition at an independent time, so that the model also learns the joint distribution of the pair.
With probability `drop_probability` the condition is hidden (all masked, no loss), which classifier-free guidance needs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trimask.diffusion.schedule import ScheduleConfig, low_discrepancy_shares, stratified_times
from trimask.tokenizers.sequence import TokenRows, example_starts, task_tokens
from trimask.tokenizers.storage.ranges import Checked, Share
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(Checked):
    """Configuration of the forward process: how training examples are masked."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule: the probability of masking a token at every time."""
    complementary: bool = False
    """Use each example twice per batch, with a mask and its complement (anti-masking in the tri-modal paper)."""
    joint_probability: Share = 0.2
    """Probability that a conditional example is masked on both sides, at independent times."""
    drop_probability: Share = 0.1
    """Probability that the condition of a conditional example is hidden, as classifier-free guidance needs."""

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
    """The rows with MASK at the masked positions."""
    clean: Int[Array, "*batch seq"]
    """The tokens before masking."""
    is_target: Bool[Array, "*batch seq"]
    """True where the token could have been masked with loss; the loss is normalised by their number."""
    is_masked: Bool[Array, "*batch seq"]
    """True where the loss is taken: masked tokens, except those of a hidden condition."""
    weight: Float[Array, "*batch seq"]
    """Weight of the position's cross-entropy in the ELBO if the position is masked."""


def draw_is_masked(
    key: PRNGKeyArray,
    maskable: Bool[Array, "batch seq"],
    keep_probability: Float[Array, "batch seq"],
) -> Bool[Array, "batch seq"]:
    """True where a token is masked: each maskable token independently with probability 1 − α(t)."""
    return maskable & (jax.random.uniform(key, maskable.shape) >= keep_probability)


def forward_process(key: PRNGKeyArray, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig) -> Noised:
    """Masks a clean batch; with complementary masks the result has twice as many rows, the complements last."""
    key_time, key_mode, key_mask = jax.random.split(key, 3)
    is_joint, is_dropped = _modes(key_mode, sequence, vocabulary, config)
    is_target = sequence.is_target | (sequence.is_condition & is_joint)
    is_hidden = sequence.is_condition & is_dropped
    times = _times(key_time, sequence, config.schedule)
    schedule, modality = config.schedule.build(vocabulary), sequence.modality
    is_masked = draw_is_masked(key_mask, is_target, schedule.keep_probability(times, modality))

    def noised(is_masked, weight):
        tokens = jnp.where(is_masked | is_hidden, vocabulary.mask_id, sequence.tokens)
        return Noised(sequence.replace(tokens=tokens), sequence.tokens, is_target, is_masked, weight)

    first = noised(is_masked, schedule.weight(times, modality))
    if not config.complementary:
        return first
    second = noised(is_target & ~is_masked, schedule.complementary_weight(times, modality))
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)


def _per_example(values: Float[Array, "batch seq"], sequence: TokenRows) -> Float[Array, "batch seq"]:
    """Gives all positions of an example the same value: the one at index `segment` of its row."""
    return jnp.take_along_axis(values, sequence.segment, axis=-1)


def _modes(key, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig):
    """Masks of the positions of examples masked on both sides, and of examples whose condition is hidden.

    The given beginning of a text is a prompt, which is never masked, so such examples are in neither mask.
    """
    draw = _per_example(jax.random.uniform(key, sequence.tokens.shape), sequence)
    draw = jnp.where(task_tokens(sequence) == vocabulary.task_id(TEXT), jnp.inf, draw)
    is_joint = draw < config.joint_probability
    return is_joint, ~is_joint & (draw < config.joint_probability + config.drop_probability)


def _times(key, sequence: TokenRows, schedule: ScheduleConfig) -> Float[Array, "batch seq"]:
    """Time of each example, stratified over the batch's target tokens; a condition's time is shifted independently."""
    key_offset, key_condition = jax.random.split(key)
    starts = example_starts(sequence)
    number = jnp.cumsum(starts == jnp.arange(sequence.length))
    shares = low_discrepancy_shares(number, sequence.is_target.reshape(-1)).reshape(starts.shape)
    share = jnp.take_along_axis(shares, starts, axis=1)
    condition_shift = _per_example(jax.random.uniform(key_condition, sequence.tokens.shape), sequence)
    offset = jax.random.uniform(key_offset)
    return stratified_times(offset, share + sequence.is_condition * condition_shift, schedule.min_time)
