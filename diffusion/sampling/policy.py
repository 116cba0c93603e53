"""The policy network: a transformer of one block from the denoiser's confidences to a logit per position.

The network is that of arXiv 2512.09106. Its input at each asked position, one that was masked at the start, is what the
denoiser predicts there (`PolicyConfig.inputs`); whether the position is still masked, and the number of steps taken,
modulate the block (adaLN). `actions.py` draws an action from the logits, `learned.py` makes a strategy of the network,
and `sampling_rl` trains it.

Deviations from the paper's published code
1. The time embedding has periods from 1/128 to 2 of the whole; the published code's are all the same.
2. The output's weights are initialised at a tenth of the usual size, so that its bias determines how much is revealed
   at first.
3. Inputs are rounded to half precision, as they are stored for training, so that the policy acts on the same numbers
   that it learns from.
4. The input is 0 at positions that are not masked: the denoiser's predictions there are not computed.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Int, PRNGKeyArray

from trimask.diffusion.layers import rotary_sin_cos, rotate, sinusoids
from trimask.diffusion.sampling.state import Observation, Rules
from trimask.tokenizers.storage.ranges import Checked, Size

PolicyParameters = Any
"""Tree of the network's parameter arrays."""

_ROTARY_BASE = 10_000.0
_TIME_UNITS = 256.0
"""Units that times in [0, 1] are measured in; the embedding's sinusoids have periods from 2 to 512 units."""


@dataclass(frozen=True, kw_only=True)
class InputsConfig(Checked):
    """Statistics of the denoiser that a policy, or an agent of the environment, observes at each position."""

    inputs: tuple[Literal["confidence", "top", "margin", "entropy", "hidden"], ...] = ("confidence",)
    """Inputs at each position: confidence is the probability of the proposed token, top the largest probabilities,
    margin the difference of the two largest, entropy is in nats, hidden is the denoiser's last hidden state."""
    num_top: Size = 8
    """Number of probabilities in the input top."""
    sees_beyond: bool = True
    """Whether the inputs cover the masked positions of later blocks as well."""

    def __post_init__(self):
        super().__post_init__()
        if not self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs must be at least one, each once; got {self.inputs}")

    def extended_rules(self, rules: Rules) -> Rules:
        """The rules, extended so that observations hold these inputs."""
        return dataclasses.replace(
            rules,
            num_top=self.num_top if "top" in self.inputs else 0,
            shows_hidden="hidden" in self.inputs,
            shows_all=self.sees_beyond,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(InputsConfig):
    """Inputs, probability law of actions and shape of a policy network."""

    hidden_size: Size | None = None
    """Width of the denoiser, if hidden is among the inputs. None: it is not."""
    law: Literal["bernoulli", "dpls"] = "bernoulli"
    """Probability law of actions: independent per position (bernoulli), or without replacement until STOP (dpls)."""
    width: Size = 128
    """Width of the residual stream."""
    num_heads: Size = 2
    """Number of attention heads."""
    mlp_width: Size = 512
    """Hidden width of the feed-forward layer."""

    def __post_init__(self):
        super().__post_init__()
        if ("hidden" in self.inputs) != (self.hidden_size is not None):
            raise ValueError(f"hidden_size goes with the input hidden; got {self.hidden_size} and inputs {self.inputs}")
        if self.width % (2 * self.num_heads) or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 and of twice num_heads, got {self.width}/{self.num_heads}")

    @property
    def num_features(self) -> int:
        """Number of input features per position."""
        sizes = {"top": self.num_top, "hidden": self.hidden_size or 0}
        return sum(sizes.get(name, 1) for name in self.inputs)


class Policy(nnx.Module):
    """The network: `policy(features, is_masked, is_asked, time) -> logits`."""

    def __init__(self, config: PolicyConfig, key: PRNGKeyArray):
        rngs, width, zeros = nnx.Rngs(key), config.width, nnx.initializers.zeros_init()
        self.config = config
        self.input = nnx.Linear(config.num_features, width, rngs=rngs)
        self.status = nnx.Embed(2, width, rngs=rngs)
        self.time_in = nnx.Linear(width, width, rngs=rngs)
        self.time_out = nnx.Linear(width, width, rngs=rngs)
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zeros, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.up = nnx.Linear(width, config.mlp_width, rngs=rngs)
        self.down = nnx.Linear(config.mlp_width, width, rngs=rngs)
        self.attention_norm, self.mlp_norm = (
            nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs) for _ in range(2)
        )
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        start = nnx.initializers.constant(-2.0 if config.law == "bernoulli" else 0.0)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.output = nnx.Linear(width, 1, kernel_init=small, bias_init=start, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "batch seq features"],
        is_masked: Bool[Array, "batch seq"],
        is_asked: Bool[Array, "batch seq"],
        time: Float[Array, " batch"],
    ) -> Float[Array, "batch seq"]:
        """A logit per position; attention is among asked positions only. `time` is steps taken / asked positions."""
        indices = jnp.maximum(jnp.cumsum(is_asked, axis=-1) - 1, 0)
        time_embedding = self.time_out(jax.nn.silu(self.time_in(sinusoids(_TIME_UNITS * time, self.config.width))))
        condition = jax.nn.silu(self.status(is_masked.astype(jnp.int32)) + time_embedding[:, None])
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = jnp.split(self.modulation(condition), 6, axis=-1)
        h = self.input(features)
        x = self.attention_norm(h) * (1 + scale) + shift
        h = h + (1 + gate) * self._attend(x, indices, is_asked)
        x = self.mlp_norm(h) * (1 + mlp_scale) + mlp_shift
        h = h + (1 + mlp_gate) * self.down(jax.nn.gelu(self.up(x)))
        return self.output(self.final_norm(h))[..., 0]

    def _attend(self, x, indices, is_asked):
        heads = (*x.shape[:2], self.config.num_heads, -1)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.query_key_value(x), 3, axis=-1))
        sin_cos = rotary_sin_cos(indices, x.shape[1], query.shape[-1], _ROTARY_BASE)
        query, key = rotate(query, sin_cos), rotate(key, sin_cos)
        attended = jax.nn.dot_product_attention(query, key, value, mask=is_asked[:, None, None, :])
        return self.attention_out(attended.reshape(x.shape))


@lru_cache
def _graph(config: PolicyConfig) -> Any:
    """The network without its parameters, built once per configuration."""
    return nnx.split(nnx.eval_shape(lambda: Policy(config, jax.random.key(0))))[0]


@partial(jax.jit, static_argnums=0)
def new_policy_parameters(config: PolicyConfig, key: PRNGKeyArray) -> PolicyParameters:
    """Random initial parameters, with which an action reveals 12 % of the masks (bernoulli) or about half (dpls)."""
    return nnx.to_pure_dict(nnx.state(Policy(config, key)))


def policy_features(observation: Observation, config: PolicyConfig) -> Float16[Array, "batch seq features"]:
    """A policy's input features at every position, in the half precision in which they are stored."""
    parts = [jnp.asarray(getattr(observation, name)) for name in config.inputs]
    return jnp.concatenate([x if x.ndim == 3 else x[..., None] for x in parts], axis=-1).astype(jnp.float16)


def policy_logits(
    config: PolicyConfig,
    parameters: PolicyParameters,
    features: Float16[Array, "batch seq features"],
    is_masked: Bool[Array, "batch seq"],
    is_asked: Bool[Array, "batch seq"],
    steps_taken: Int[Array, " batch"],
) -> Float[Array, "batch seq"]:
    """Logit of revealing each position, from stored features; `steps_taken` is 0 in a row's first step."""
    time = steps_taken / jnp.maximum(is_asked.sum(axis=-1), 1)
    network = nnx.merge(_graph(config), nnx.State(parameters))
    return network(features.astype(jnp.float32), is_masked, is_asked, time)
