"""Configuration of generation: the strategy and its parameters, sampling of tokens, guidance, blocks and caches."""

import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import tyro
from jax.tree_util import Partial

from trimask.diffusion.sampling.guidance import Guidance
from trimask.diffusion.sampling.learned import LearnedStrategy, open_policy
from trimask.diffusion.sampling.proposals import TokenSampling
from trimask.diffusion.sampling.state import Rules, Strategy
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.schedule import COSINE, LINEAR, Schedule
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Share, Size, real
from trimask.tokenizers.vocabulary import Vocabulary

_ANY_POLICY = "policies/…"
"""Stands for every policy in lists of strategies."""
_STRATEGY_HELP = (
    f"Rule that decides which masked positions each step reveals: {', '.join(STRATEGIES)}; or a trained policy, as the "
    "path of its folder: policies/fast (newest checkpoint), policies/fast@best or policies/fast@STEP."
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Checked):
    """How masked positions are filled. Parameters of strategies other than the chosen one have no effect."""

    strategy: Annotated[str, tyro.conf.arg(help=_STRATEGY_HELP)] = "confidence"
    """Name of a strategy in `STRATEGIES`, or the path of a policy's folder."""
    steps: Size = 16
    """Number of steps in which random, ancestral, confidence, margin, entropy, position, given and remdm_* reveal
    everything; fewer if there are fewer masks. The other strategies take as many steps as they need."""
    grid: Literal["linear", "cosine", "trained"] = "trained"
    """Share of masks left after a share u of the steps: linear is 1 − u; cosine is cos(π/2·u), which reveals few
    positions at first (MaskGIT); trained is that of the noise schedule s with which the modality was trained, s(1 − u).
    """
    threshold: Share = 0.9
    """Strategies threshold and leftmost: least confidence at which a position is revealed."""
    factor: NonNegative = 1.0
    """Strategy factor: reveals the largest n positions for which (n + 1)(1 − n-th largest confidence) is smaller than
    this."""
    entropy_bound: NonNegative = 0.1
    """Strategy entropy_bound: largest sum of entropies, in nats and not counting the largest, revealed in one step."""
    position_penalty: NonNegative = 0.02
    """Strategy position: penalty p; confidence is multiplied by e^−p from each position to the next."""
    order: tuple[NonNegativeInt, ...] | None = None
    """Strategy given: indices, from 0, of the masked positions in the order to reveal them. None: left to right."""
    remask: Share = 0.05
    """Strategies remdm_cap, remdm_rescale and remdm_loop: η, which sets the probability of masking a token again."""
    loop_from: Share = 0.55
    """Strategy remdm_loop: time (1 at the start, 0 at the end) from which it remasks as many tokens as it reveals."""
    loop_until: Share = 0.05
    """Strategy remdm_loop: time from which it only reveals again."""
    loop_kept: Share = 0.9
    """Strategy remdm_loop: share of positions that stays revealed between those two times."""
    policy_temperature: Positive | None = None
    """Temperature at which a policy draws positions, not tokens. None: the one stored with the policy."""
    policy_scale: NonNegative = 1.0
    """Factor β on a bernoulli policy's probabilities of revealing: below 1 it reveals fewer positions per step."""
    temperature: NonNegative = 1.0
    """Temperature at which tokens are drawn; 0 takes the most probable token."""
    top_k: Size | None = None
    """Number of most probable tokens to draw from. None: all."""
    top_p: Annotated[float, real(above=0, most=1)] | None = None
    """Draw from the smallest set of most probable tokens whose probabilities reach this sum. None: from all."""
    min_p: Share | None = None
    """Draw from the tokens whose probability is at least this share of the largest one. None: from all."""
    guidance: NonNegative = 0.0
    """Scale of classifier-free guidance; 0 turns it off."""
    guidance_interval: tuple[Share, Share] | None = None
    """Interval (low, high] of the share of masks in which guidance is applied. None: always."""
    block_length: Size | None = None
    """Number of tokens in a block; blocks are filled from left to right. None: one block."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Keys and values that a block reuses from its first pass: none; prefix, of the positions before it; dual, of those
    after it as well. Approximate unless none."""
    refresh_every: Size | None = None
    """Number of passes after which the cache is recomputed. None: once per block."""
    max_nfe: Size | None = None
    """Most function evaluations per answer, divided evenly among its blocks; a block that used up its share is revealed
    at once. None: no limit."""
    patience: Size | None = None
    """Number of consecutive evaluations with equal proposals that reveals the rest of a block. None: no such rule."""
    stop_at_eos: bool = True
    """Whether a text ends at its first EOS, so that nothing after it is computed."""

    def __post_init__(self):
        super().__post_init__()
        if self.strategy not in STRATEGIES and not is_policy_path(self.strategy):
            known = ", ".join(STRATEGIES)
            raise ValueError(f"no strategy {self.strategy!r}; there are {known}, and folders of policies, with a /")
        if not 0 < self.loop_until < self.loop_from < 1 or not 0 < self.loop_kept < 1:
            raise ValueError(
                "remdm_loop needs 0 < loop_until < loop_from < 1 and loop_kept in (0, 1), got "
                f"{self.loop_until}, {self.loop_from} and {self.loop_kept}"
            )
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must be 0 ≤ low < high ≤ 1, got {self.guidance_interval}")
        if self.guidance_interval is not None and self.cache != "none":
            raise ValueError(f"a cache ({self.cache}) needs guidance in every step; guidance_interval must be None")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"order must hold every index from 0 on exactly once, got {self.order}")

    @cached_property
    def strategy_function(self) -> Strategy:
        """The strategy as a function, with its parameters bound; a policy is loaded from its folder."""
        if is_policy_path(self.strategy):
            policy = open_policy(self.strategy)
            if self.policy_scale != 1 and policy.config.law != "bernoulli":
                raise ValueError(f"policy_scale needs law bernoulli; that of {self.strategy} is {policy.config.law}")
            temperature = self.policy_temperature or policy.temperature
            return replace(policy, temperature=temperature, scale=self.policy_scale)
        parameters = {name: getattr(self, name) for name in strategy_parameters(self.strategy)}
        return Partial(STRATEGIES[self.strategy], **parameters)

    @property
    def guidance_settings(self) -> Guidance | None:
        """Scale and interval of guidance; None if there is none."""
        return None if self.guidance == 0 else Guidance(self.guidance, self.guidance_interval)

    def rules(self, vocabulary: Vocabulary, trained: Schedule = LINEAR) -> Rules:
        """The sampler's rules, for a model trained with these noise schedules; for a policy, with what it observes."""
        rules = Rules(
            mask_id=vocabulary.mask_id,
            eos_id=vocabulary.eos_id if self.stop_at_eos else None,
            num_steps=self.steps,
            token_sampling=TokenSampling(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
            ),
            max_nfe=self.max_nfe,
            patience=self.patience,
            refresh_every=self.refresh_every,
            grid={"linear": LINEAR, "cosine": COSINE, "trained": trained}[self.grid],
            block_length=self.block_length,
            cache=self.cache,
            passes_per_step=1 if self.guidance == 0 else 2,
        )
        strategy = self.strategy_function
        return strategy.config.extended_rules(rules) if isinstance(strategy, LearnedStrategy) else rules


def is_policy_path(strategy: str) -> bool:
    """Whether a strategy is given as the path of a policy rather than by name."""
    return "/" in strategy or "\\" in strategy


def strategy_parameters(strategy: str) -> tuple[str, ...]:
    """Names of the `GenerationConfig` fields that are parameters of a strategy."""
    if is_policy_path(strategy):
        return ("policy_temperature", "policy_scale")
    parameters = inspect.signature(STRATEGIES[strategy]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def require_used_fields(config: GenerationConfig, default: GenerationConfig) -> None:
    """Raises ValueError if a field differs from the default and is a parameter of other strategies only."""
    users: dict[str, list[str]] = {"order": ["given"]}
    for strategy in (*STRATEGIES, _ANY_POLICY):
        for name in strategy_parameters(strategy):
            users.setdefault(name, []).append(strategy)
    chosen = _ANY_POLICY if is_policy_path(config.strategy) else config.strategy
    for name, strategies in users.items():
        if getattr(config, name) != getattr(default, name) and chosen not in strategies:
            raise ValueError(f"{name} is a parameter of {' or '.join(strategies)}, not of {config.strategy}")
