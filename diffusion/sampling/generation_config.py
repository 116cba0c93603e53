"""How masked positions are filled, as a user says it."""

import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

from jax.tree_util import Partial

from trimask.diffusion.sampling.guidance import Guidance
from trimask.diffusion.sampling.learned import LearnedStrategy, open_policy
from trimask.diffusion.sampling.proposals import Draw
from trimask.diffusion.sampling.state import Rules, Strategy
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Share, Size, real
from trimask.tokenizers.vocabulary import Vocabulary

_ANY_POLICY = "policies/…"


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Checked):
    """How masked positions are filled."""

    strategy: str = "confidence"
    """Which positions are revealed first: random, ancestral, first_hitting, confidence, margin, entropy, position,
    entropy_bound, threshold, leftmost, factor, given, remdm_cap, remdm_rescale, remdm_confidence or remdm_loop; or a
    policy, as the path of its folder, such as policies/fast, policies/fast@best or policies/fast@STEP."""
    steps: Size = 16
    """Steps in which random, ancestral, confidence, margin, entropy, position, given and remdm_* reveal everything;
    fewer where there are fewer masks. Others take what they need."""
    grid: Literal["linear", "cosine"] = "linear"
    """Share of masks left after the share u of the steps: 1 − u, or cos(π/2·u), which reveals few at first."""
    threshold: Share = 0.9
    """Confidence from which threshold and leftmost reveal."""
    factor: NonNegative = 1.0
    """Of factor: n are revealed if (n + 1)(1 − the n-th confidence) is smaller."""
    entropy_bound: NonNegative = 0.1
    """Of entropy_bound, in nats: the entropies revealed at once, but for the largest, sum up to this at most."""
    position_penalty: NonNegative = 0.02
    """Of position: a place's confidence counts e^−penalty times that of the place before."""
    order: tuple[NonNegativeInt, ...] | None = None
    """Of given: the places of what is asked, in the order to reveal them. None: from left to right."""
    remask: Share = 0.05
    """η of remdm_cap, remdm_rescale and remdm_loop: how readily tokens are masked again."""
    loop_from: Share = 0.55
    """Time at which remdm_loop begins to hold what it has."""
    loop_until: Share = 0.05
    """Time from which remdm_loop reveals the rest."""
    loop_kept: Share = 0.9
    """Share that is known while remdm_loop holds it."""
    policy_temperature: Positive | None = None
    """Of a policy's draw of positions, not of tokens. None: that of the policy."""
    policy_scale: NonNegative = 1.0
    """β of a policy: it reveals with β times the probability, so more or fewer positions at a time."""
    temperature: NonNegative = 1.0
    """Of the tokens' draw; 0 takes the most probable."""
    top_k: Size | None = None
    """Draw among so many most probable tokens."""
    top_p: Annotated[float, real(above=0, most=1)] | None = None
    """Draw among the most probable tokens that together have this probability."""
    min_p: Share | None = None
    """Draw among the tokens at least so many times as probable as the most probable one."""
    guidance: NonNegative = 0.0
    """Classifier-free guidance: 0 is none."""
    guidance_interval: tuple[Share, Share] | None = None
    """Guide only while the share of masks lies in (low, high]. None: always."""
    block_length: Size | None = None
    """Fill blocks of so many tokens from left to right. None: everything at once."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """What a block keeps of its first pass: nothing; keys and values before it; those after it too. Approximate."""
    refresh_every: Size | None = None
    """Passes after which the cache is computed anew even within a block. None: for every block."""
    max_nfe: Size | None = None
    """Function evaluations of an answer at most, shared out among its blocks; what is left then is revealed at once."""
    patience: Size | None = None
    """Reveal the rest of a block when its proposals were the same in so many evaluations."""
    stop_at_eos: bool = True
    """A text is over at its first EOS: nothing is computed for what comes after."""

    def __post_init__(self):
        super().__post_init__()
        if self.strategy not in STRATEGIES and not is_policy(self.strategy):
            known = ", ".join(STRATEGIES)
            raise ValueError(f"no strategy {self.strategy!r}; there are {known}, and paths of policies, with a /")
        if not 0 < self.loop_until < self.loop_from < 1 or not 0 < self.loop_kept < 1:
            raise ValueError(
                "remdm_loop needs 0 < loop_until < loop_from < 1 and loop_kept in (0, 1), got "
                f"{self.loop_until}, {self.loop_from} and {self.loop_kept}"
            )
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must be 0 ≤ low < high ≤ 1, got {self.guidance_interval}")
        if self.guidance_interval is not None and self.cache != "none":
            raise ValueError(f"a cache ({self.cache}) needs both passes of guidance always, so no guidance_interval")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"order must hold every place from 0 on once, got {self.order}")

    @cached_property
    def chosen(self) -> Strategy:
        """The strategy with its numbers; a policy is read from its folder."""
        if is_policy(self.strategy):
            policy = open_policy(self.strategy)
            if self.policy_scale != 1 and policy.config.law != "bernoulli":
                raise ValueError(f"policy_scale is of bernoulli; the law of {self.strategy} is {policy.config.law}")
            temperature = self.policy_temperature or policy.temperature
            return replace(policy, temperature=temperature, scale=self.policy_scale)
        return Partial(STRATEGIES[self.strategy], **{name: getattr(self, name) for name in numbers_of(self.strategy)})

    @property
    def guide(self) -> Guidance | None:
        """Guidance, if there is any."""
        return None if self.guidance == 0 else Guidance(self.guidance, self.guidance_interval)

    def rules(self, vocabulary: Vocabulary) -> Rules:
        """What holds whatever the strategy, and what the strategy wants to see."""
        rules = Rules(
            mask_id=vocabulary.mask_id,
            eos_id=vocabulary.eos_id if self.stop_at_eos else None,
            num_steps=self.steps,
            draw=Draw(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p),
            max_nfe=self.max_nfe,
            patience=self.patience,
            refresh_every=self.refresh_every,
            grid=self.grid,
            block_length=self.block_length,
            cache=self.cache,
            passes_per_step=1 if self.guidance == 0 else 2,
        )
        chosen = self.chosen
        return chosen.config.watching(rules) if isinstance(chosen, LearnedStrategy) else rules


def is_policy(strategy: str) -> bool:
    """Whether this is a path rather than a name."""
    return "/" in strategy or "\\" in strategy


def numbers_of(strategy: str) -> tuple[str, ...]:
    """The fields of a configuration that a strategy takes as its numbers."""
    if is_policy(strategy):
        return ("policy_temperature", "policy_scale")
    parameters = inspect.signature(STRATEGIES[strategy]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def require_used(config: GenerationConfig, default: GenerationConfig) -> None:
    """Refuses what differs from the default and has no part in the strategy."""
    of: dict[str, list[str]] = {"order": ["given"]}
    for strategy in (*STRATEGIES, _ANY_POLICY):
        for name in numbers_of(strategy):
            of.setdefault(name, []).append(strategy)
    chosen = _ANY_POLICY if is_policy(config.strategy) else config.strategy
    for name, strategies in of.items():
        if getattr(config, name) != getattr(default, name) and chosen not in strategies:
            raise ValueError(f"{name} is of the strategy {' or '.join(strategies)}; this is {config.strategy}")
