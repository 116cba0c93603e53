"""Batch-size reparameterisation: a recipe is tuned at one batch size and horizon, and used at any other.

    κ = (B / B_base) · (D_base / D)^γ
    lr ← lr·√κ,   β1 ← β1^κ,   β2 ← β2^κ,   ε ← ε/√κ,   λ ← λ·√κ,   ρ ← ρ^κ

B is the batch size and D the horizon, both in non-padding tokens; ρ is the decay of the weight average; warmup is a
fixed number of tokens, at most a quarter of the horizon. The optimizer then follows the same stochastic differential
equation (tri-modal paper, arXiv 2602.21472; Malladi et al., arXiv 2205.10287), so the loss does not depend on B, up to
the critical batch size B_crit = D / S_crit. With fewer than S_crit steps the optimizer no longer follows the equation,
and the loss rises.

What the papers leave open, and what is done here:

1. λ is decoupled as in PyTorch: a step shrinks weights by lr × λ.
2. The clipping threshold is divided by √(B / B_base): it is compared with gradients, whose noise scales so. Unlike ε it
   does not depend on the horizon, which does not change the gradients.
3. γ = 0.44 is the tri-modal paper's fit for a cosine schedule; Complete(d)P's theory has γ = 1.
"""

from dataclasses import dataclass, replace

from trimask.diffusion.optimizer import OptimizerConfig
from trimask.tokenizers.storage.ranges import Checked, Positive, PositiveInt, Share


@dataclass(frozen=True, kw_only=True)
class SDEScaling(Checked):
    """Batch size and horizon at which the optimizer's hyperparameters were tuned, and the rule to rescale them."""

    base_batch_tokens: Positive | None = None
    """Mean number of non-padding tokens per step at which the hyperparameters were tuned. None: this run's."""
    base_horizon_tokens: PositiveInt | None = None
    """Horizon, in non-padding tokens, at which the hyperparameters were tuned. None: this run's."""
    gamma: Share = 0.44
    """Exponent γ of the horizon in κ: 0.44 is the tri-modal paper's measurement, 1 is the theory."""
    critical_steps: Positive | None = None
    """S_crit, the smallest number of steps for a run; `trimask study critical-batch` measures it. None: unknown."""

    def batch_ratio(self, batch_tokens: float) -> float:
        """B / B_base of a run with this mean number of non-padding tokens per step."""
        return 1.0 if self.base_batch_tokens is None else batch_tokens / self.base_batch_tokens

    def kappa(self, batch_tokens: float, horizon_tokens: int) -> float:
        """κ of a run with this mean number of non-padding tokens per step and this horizon."""
        duration_ratio = 1.0 if self.base_horizon_tokens is None else horizon_tokens / self.base_horizon_tokens
        return self.batch_ratio(batch_tokens) * duration_ratio**-self.gamma

    def rescale(self, optimizer: OptimizerConfig, batch_tokens: float, horizon_tokens: int) -> OptimizerConfig:
        """The optimizer for a run with this mean number of non-padding tokens per step, tuned to this horizon."""
        return rescaled(optimizer, self.kappa(batch_tokens, horizon_tokens), self.batch_ratio(batch_tokens))

    def critical_batch(self, horizon_tokens: int) -> float | None:
        """B_crit = D / S_crit in tokens; None if S_crit is unknown."""
        return None if self.critical_steps is None else horizon_tokens / self.critical_steps


def rescaled(optimizer: OptimizerConfig, kappa: float, batch_ratio: float) -> OptimizerConfig:
    """The optimizer configuration rescaled by κ; `batch_ratio` is B / B_base."""
    return replace(
        optimizer,
        learning_rate=optimizer.learning_rate * kappa**0.5,
        beta1=optimizer.beta1**kappa,
        beta2=optimizer.beta2**kappa,
        epsilon=optimizer.epsilon * kappa**-0.5,
        weight_decay=optimizer.weight_decay * kappa**0.5,
        clip_norm=optimizer.clip_norm * batch_ratio**-0.5,
        ema_decay=optimizer.ema_decay**kappa,
    )
