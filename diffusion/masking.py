"""The forward process: which tokens of a batch are masked, and the loss weight of each masked token.

Of every example (segment of a row) the number of masked targets is drawn, and then a random set of that many
(`mask_counts.py`). Without `counts` a time t is drawn instead, at which every target is masked independently. Both are
the quantiles of a uniform number per example, stratified over the batch by target tokens: u_s = (u + share of target
tokens before example s) mod 1, with examples in the order of `schedule.low_discrepancy_shares`. The numbers of any
block of consecutive rows are then evenly spread as well, so devices that share the rows have equal work.

An example with a condition, which is another medium or the beginning of its text, has one of four modes:

    CONDITIONAL     only the target is masked
    JOINT           both sides are masked at one time, so that the model learns the joint distribution of the pair
    JOINT_TWICE     both sides are masked at independent times, so that it also learns conditions with holes
    UNCONDITIONAL   the condition is hidden (all masked, no loss), which classifier-free guidance needs

The second and the third have half of `joint_probability` each, the fourth has `drop_probability`. Examples without a
condition count as conditional. The expected loss of the first two modes is a bound, of the target given its condition
and of both sides together; that of the others is not.

Counts are those of the targets of both sides together in the mode JOINT, by the schedule of the example's target; of
each side, by its own schedule, in the mode JOINT_TWICE.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from trimask.diffusion.mask_counts import cumulative_counts, draw_counts, draw_uniform_counts, random_subsets
from trimask.diffusion.schedule import Schedule, ScheduleConfig, low_discrepancy_shares, stratified
from trimask.tokenizers.sequence import TokenRows, example_starts, task_tokens
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, Share
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

CONDITIONAL, JOINT, JOINT_TWICE, UNCONDITIONAL = range(4)
"""Modes of an example: which of its sides are masked, and at which times."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(Checked):
    """Configuration of the forward process: how training examples are masked."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule: the probability of masking a token at every time. A modality may have one of its own: its
    flags are those of masking.schedules.image, and so on."""
    schedules: dict[str, ScheduleConfig] = added_field(as_before={}, default_factory=dict)
    """Noise schedules of modalities that have one of their own, by name."""
    counts: bool = added_field(as_before=False, default=True)
    """Draw the number of masked tokens of an example, instead of a time at which each is masked independently. The
    weights of the ELBO are smaller, and no `min_share` is cut off. The default, since the study of masks found it best
    (`masks.py`)."""
    complementary: bool = False
    """Use each example twice per batch, with a mask and its complement (anti-masking in the tri-modal paper)."""
    joint_probability: Share = 0.2
    """Probability that an example with another medium as condition is masked on both sides; half of these examples at
    one time, half at two independent times."""
    drop_probability: Share = 0.1
    """Probability that the condition of an example is hidden, as classifier-free guidance needs; also the given
    beginning of a text."""

    def __hash__(self) -> int:
        return hash(repr(self))  # a dict has no hash

    def schedule_of(self, vocabulary: Vocabulary) -> Schedule:
        """The noise schedules of all modalities. Raises ValueError for a name that is none."""
        unknown = set(self.schedules) - set(vocabulary.modalities[1:])
        if unknown:
            raise ValueError(
                f"noise schedules for unknown {', '.join(sorted(unknown))}; there are "
                f"{', '.join(vocabulary.modalities[1:])}"
            )
        return Schedule(tuple(self.schedules.get(name, self.schedule) for name in vocabulary.modalities))

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
    """True where the token could have been masked with loss."""
    is_masked: Bool[Array, "*batch seq"]
    """True where the loss is taken: masked tokens, except those of a hidden condition."""
    weight: Float[Array, "*batch seq"]
    """Weight of the position's cross-entropy in the ELBO if the position is masked."""
    mode: Int[Array, "*batch seq"]
    """Mode of the position's example: CONDITIONAL, JOINT, JOINT_TWICE or UNCONDITIONAL."""


def draw_is_masked(
    key: PRNGKeyArray,
    maskable: Bool[Array, "batch seq"],
    mask_probability: Float[Array, "batch seq"],
) -> Bool[Array, "batch seq"]:
    """True where a token is masked: each maskable token independently with probability s(t)."""
    return maskable & (jax.random.uniform(key, maskable.shape) < mask_probability)


def forward_process(key: PRNGKeyArray, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig) -> Noised:
    """Masks a clean batch; with complementary masks the result has twice as many rows, the complements last."""
    key_time, key_mode, key_mask = jax.random.split(key, 3)
    mode = _modes(key_mode, sequence, vocabulary, config)
    is_target = sequence.is_target | (sequence.is_condition & ((mode == JOINT) | (mode == JOINT_TWICE)))
    is_hidden = sequence.is_condition & (mode == UNCONDITIONAL)
    share, schedule = _shares(key_time, sequence, mode), config.schedule_of(vocabulary)
    if config.counts:
        least = 0 if config.complementary else 1
        masked = _masked_by_counts(key_mask, sequence, is_target, mode, share, schedule, least)
    else:
        masked = _masked_by_times(key_mask, sequence.modality, is_target, share, schedule)
    is_masked, weight, weight_of_complement = masked

    def noised(is_masked, weight):
        tokens = jnp.where(is_masked | is_hidden, vocabulary.mask_id, sequence.tokens)
        return Noised(sequence.replace(tokens=tokens), sequence.tokens, is_target, is_masked, weight, mode)

    first = noised(is_masked, weight)
    if not config.complementary:
        return first
    second = noised(is_target & ~is_masked, weight_of_complement)
    return jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second)


_Masked = tuple[Bool[Array, "batch seq"], Float[Array, "batch seq"], Float[Array, "batch seq"]]
"""True where a target is masked; weights of the masked tokens, and of those that the complement masks."""


def _masked_by_times(
    key: PRNGKeyArray,
    modality: Int[Array, "batch seq"],
    is_target: Bool[Array, "batch seq"],
    share: Float[Array, "batch seq"],
    schedule: Schedule,
) -> _Masked:
    """Masks every target independently at the time of its example, at this share of the schedule's times."""
    times = schedule.times(share, modality)
    is_masked = draw_is_masked(key, is_target, schedule.mask_probability(times, modality))
    return is_masked, schedule.weight(times, modality), schedule.complementary_weight(times, modality)


def _masked_by_counts(
    key: PRNGKeyArray,
    sequence: TokenRows,
    is_target: Bool[Array, "batch seq"],
    mode: Int[Array, "batch seq"],
    share: Float[Array, "batch seq"],
    schedule: Schedule,
    least: int,
) -> _Masked:
    """Masks, of each group of targets, the number at this share of its distribution, which is `least` or more.

    A group has the targets of an example; of one side of it, if the sides have independent times.
    """
    rows = jnp.arange(len(share))[:, None]
    is_apart = sequence.is_condition & (mode == JOINT_TWICE)
    group = 2 * sequence.segment + is_apart
    of_groups = jnp.zeros((len(share), 2 * (sequence.length + 1)), jnp.int32)
    num_targets = of_groups.at[rows, group].add(is_target)[rows, group]
    if schedule.is_linear:
        count, probability = draw_uniform_counts(share, num_targets, least)
    else:
        # Both sides of a joint example together have the schedule of its target.
        own = jnp.where(sequence.is_target | is_apart, sequence.modality, 0)
        tables, index_of = map(jnp.asarray, _tables(schedule, sequence.length))
        table_index = index_of[of_groups.at[rows, group].max(own)[rows, group]]
        count, probability = draw_counts(share, num_targets, tables, table_index, least)
    weight, weight_of_complement = (
        jnp.where(masked > 0, 1 / jnp.maximum(masked * probability, jnp.finfo(jnp.float32).tiny), 0.0)
        for masked in (count, num_targets - count)
    )
    return random_subsets(key, is_target, group, count), weight, weight_of_complement


@lru_cache(maxsize=8)
def _tables(schedule: Schedule, length: int) -> tuple[Float[np.ndarray, "table n l"], Int[np.ndarray, " modality"]]:
    """`cumulative_counts` of the distinct schedules, and the index of each modality's."""
    distinct = list(dict.fromkeys(schedule.of_modality))
    tables = np.stack([cumulative_counts(config, length) for config in distinct]).astype(np.float32)
    return tables, np.array([distinct.index(config) for config in schedule.of_modality])


def _per_example(values: Shaped[Array, "batch seq"], sequence: TokenRows) -> Shaped[Array, "batch seq"]:
    """Gives all positions of an example the same value: the one at index `segment` of its row."""
    return jnp.take_along_axis(values, sequence.segment, axis=-1)


def _modes(
    key: PRNGKeyArray, sequence: TokenRows, vocabulary: Vocabulary, config: MaskingConfig
) -> Int[Array, "batch seq"]:
    """Mode of each position's example. The given beginning of a text is never masked with loss."""
    draw = _per_example(jax.random.uniform(key, sequence.tokens.shape), sequence)
    rows = jnp.arange(len(sequence.tokens))[:, None]
    has_condition = _per_example(
        jnp.zeros_like(sequence.is_condition).at[rows, sequence.segment].max(sequence.is_condition), sequence
    )
    is_pair = has_condition & (task_tokens(sequence) != vocabulary.task_id(TEXT))
    joint = jnp.where(is_pair, config.joint_probability, 0.0)
    drop = jnp.where(has_condition, config.drop_probability, 0.0)
    bounds = jnp.stack([joint / 2, joint, joint + drop])
    return jnp.select(list(draw < bounds), [JOINT, JOINT_TWICE, UNCONDITIONAL], CONDITIONAL)


def _shares(key: PRNGKeyArray, sequence: TokenRows, mode: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    """Uniform number of each example, its share of all times or counts, stratified over the batch's target tokens.

    With two times, that of the condition is shifted.
    """
    key_offset, key_condition = jax.random.split(key)
    starts = example_starts(sequence)
    number = jnp.cumsum(starts == jnp.arange(sequence.length))
    shares = low_discrepancy_shares(number, sequence.is_target.reshape(-1)).reshape(starts.shape)
    share = jnp.take_along_axis(shares, starts, axis=1)
    shift = _per_example(jax.random.uniform(key_condition, sequence.tokens.shape), sequence)
    is_shifted = sequence.is_condition & (mode == JOINT_TWICE)
    return stratified(jax.random.uniform(key_offset), share + is_shifted * shift)
