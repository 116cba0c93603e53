"""The policy network: a transformer of one block from the denoiser's confidences to a logit per position.

The network is that of arXiv 2512.09106. Its input at each asked position, one that was masked at the start, is what the
denoiser predicts there (`PolicyConfig.inputs`); whether the position holds MASK, and the number of steps taken,
modulate the block (adaLN). `actions.py` draws an action from the logits, `learned.py` makes a strategy of the network,
and `sampling_rl` trains it.

Deviations from the paper's published code (github.com/apple/ml-rl-dllm, 35e4830). Weights of its networks that read
confidences give the same logits here, if `time_embedding` is published.
1. The time embedding has periods from 1/128 to 2 of the whole; the published code's has one frequency.
2. The output's weights are initialised at a tenth of the usual size, so that its bias determines how much is revealed
   at first. All other weights but those of the modulation, which are 0, have the default initialisation of Flax, not
   of PyTorch.
3. The initial bias of the law bernoulli depends on the block length (`PolicyConfig.initial_bias`); published is −2.
4. The input is 0 at positions that do not hold MASK: the denoiser's predictions there are not computed.
5. Without `sees_beyond` the input is also 0 outside the block. In the published code such a policy takes the block for
   the whole sequence.
6. The input hidden goes through the same network. The published code has another one for it, made of a layer of the
   denoiser.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trimask.diffusion.layers import rotary_sin_cos, rotate, sinusoids
from trimask.diffusion.sampling.state import Observation, Rules
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, Size, real

PolicyParameters = Any
"""Tree of the network's parameter arrays."""

_ROTARY_BASE = 10_000.0
_NORM_EPSILON = 1e-5
_TIME_UNITS = 256.0
"""Units that times in [0, 1] are measured in; the embedding's sinusoids have periods from 2 to 512 units."""
_LONG_BLOCK_BIAS = -2.0
"""Initial bias of the law bernoulli in the paper, whose blocks have 32 tokens and more."""
_UNREVEALED = 0.017
"""Share of a block of 32 masks that is left after 32 steps at this bias: (1 − σ(−2))³²."""


@dataclass(frozen=True, kw_only=True)
class InputsConfig(Checked):
    """Statistics of the denoiser that a policy, or an agent of the environment, observes at each position."""

    inputs: tuple[Literal["confidence", "top", "margin", "entropy", "hidden"], ...] = ("confidence",)
    """Inputs at each position: confidence is the probability of the proposed token, top the largest probabilities,
    margin the difference of the two largest, entropy is in nats, hidden is the denoiser's last hidden state."""
    num_top: Size = 8
    """Number of probabilities in the input top."""
    sees_beyond: bool = True
    """Whether the inputs cover masked positions of other blocks as well: of later blocks, and those given up."""

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
    time_embedding: Literal["periods", "published"] = added_field(as_before="periods", default="periods")
    """Embedding of the share of steps taken: sinusoids of different periods (periods), or those of the paper's
    published code, which all have one frequency and are rounded to bfloat16 (published)."""
    input_dtype: Literal["float32", "float16"] = added_field(as_before="float16", default="float32")
    """Type in which inputs are stored for training, and to which they are rounded before the policy acts on them."""
    initial_bias: Annotated[float, real()] | None = added_field(as_before=_LONG_BLOCK_BIAS, default=None)
    """Initial bias of the logits under the law bernoulli. None: the one at which a block is left with 1.7 % of its
    masks after as many steps as it has tokens, but at least -2. The law dpls has no such bias and begins at 0."""
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

    def bias_of(self, block_length: int) -> float:
        """Initial bias of the logits for blocks of that many tokens.

        For bernoulli max(−2, log((1 − k)/k)) with k = 0.017^(1/block_length), the probability that a step leaves a
        mask; a bias of −2 leaves 1.7 % of the masks in blocks of 32, but 36 % in blocks of 8.
        """
        if self.law == "dpls":
            return 0.0
        if self.initial_bias is not None:
            return self.initial_bias
        kept = _UNREVEALED ** (1 / block_length)
        return max(_LONG_BLOCK_BIAS, math.log((1 - kept) / kept))


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
        norm = partial(nnx.LayerNorm, width, epsilon=_NORM_EPSILON, rngs=rngs)
        self.attention_norm, self.mlp_norm, self.final_norm = norm(), norm(), norm()
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.output = nnx.Linear(width, 1, kernel_init=small, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "batch seq features"],
        is_masked: Bool[Array, "batch seq"],
        is_asked: Bool[Array, "batch seq"],
        time: Float[Array, " batch"],
    ) -> Float[Array, "batch seq"]:
        """A logit per position; attention is among asked positions only. `time` is steps taken / asked positions."""
        indices = jnp.maximum(jnp.cumsum(is_asked, axis=-1) - 1, 0)
        time_embedding = _TIME_EMBEDDINGS[self.config.time_embedding](time, self.config.width)
        time_embedding = self.time_out(jax.nn.silu(self.time_in(time_embedding)))
        condition = self.status(is_masked.astype(jnp.int32)) + time_embedding[:, None]
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = jnp.split(self.modulation(condition), 6, axis=-1)
        h = self.input(features)
        x = self.attention_norm(h) * (1 + scale) + shift
        h = h + (1 + gate) * self._attend(x, indices, is_asked)
        x = self.mlp_norm(h) * (1 + mlp_scale) + mlp_shift
        h = h + (1 + mlp_gate) * self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.output(self.final_norm(h))[..., 0]

    def _attend(self, x, indices, is_asked):
        heads = (*x.shape[:2], self.config.num_heads, -1)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.query_key_value(x), 3, axis=-1))
        sin_cos = rotary_sin_cos(indices, x.shape[1], query.shape[-1], _ROTARY_BASE)
        query, key = rotate(query, sin_cos), rotate(key, sin_cos)
        attended = jax.nn.dot_product_attention(query, key, value, mask=is_asked[:, None, None, :])
        return self.attention_out(attended.reshape(x.shape))


def _sinusoids_of_all_periods(time: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    return sinusoids(_TIME_UNITS * time, width)


def _published_sinusoids(time: Float[Array, " batch"], width: int) -> Float[Array, "batch width"]:
    """cos t, then sin t, each width/2 times, with the 8 significant bits of bfloat16."""
    both = jnp.repeat(jnp.stack([jnp.cos(time), jnp.sin(time)], axis=-1), width // 2, axis=-1)
    # XLA may leave out a conversion to bfloat16 and back.
    return jax.lax.reduce_precision(both, exponent_bits=8, mantissa_bits=7)


_TIME_EMBEDDINGS: dict[str, Callable[[Float[Array, " batch"], int], Float[Array, "batch width"]]] = {
    "periods": _sinusoids_of_all_periods,
    "published": _published_sinusoids,
}


@lru_cache
def _graph_and_shapes(config: PolicyConfig) -> tuple[Any, Any]:
    """The network without its parameters, and their shapes, built once per configuration."""
    return nnx.split(nnx.eval_shape(lambda: Policy(config, jax.random.key(0))))


def policy_shapes(config: PolicyConfig) -> PolicyParameters:
    """Tree of the shapes and dtypes of the network's parameters."""
    return nnx.to_pure_dict(_graph_and_shapes(config)[1])


@partial(jax.jit, static_argnums=0)
def _random_parameters(config: PolicyConfig, key: PRNGKeyArray) -> PolicyParameters:
    return nnx.to_pure_dict(nnx.state(Policy(config, key)))


def new_policy_parameters(config: PolicyConfig, key: PRNGKeyArray, block_length: int) -> PolicyParameters:
    """Random initial parameters for blocks of that many tokens, of which the first logits are about `config.bias_of`.

    An action then reveals 12 % of the masks of a block of 32 or more, 40 % of one of 8 (bernoulli).
    """
    parameters = _random_parameters(config, key)
    parameters["output"]["bias"] = jnp.full(1, config.bias_of(block_length), jnp.float32)
    return parameters


def policy_features(observation: Observation, config: PolicyConfig) -> Float[Array, "batch seq features"]:
    """A policy's input features at every position, in the type in which they are stored."""
    parts = [jnp.asarray(getattr(observation, name)) for name in config.inputs]
    features = jnp.concatenate([x if x.ndim == 3 else x[..., None] for x in parts], axis=-1)
    # XLA may leave out a conversion to float16 and back, so that the policy would act on other numbers than are stored.
    rounding = jnp.finfo(config.input_dtype)
    return jax.lax.reduce_precision(features, rounding.nexp, rounding.nmant).astype(config.input_dtype)


def policy_logits(
    config: PolicyConfig,
    parameters: PolicyParameters,
    features: Float[Array, "batch seq features"],
    is_masked: Bool[Array, "batch seq"],
    is_asked: Bool[Array, "batch seq"],
    steps_taken: Int[Array, " batch"],
) -> Float[Array, "batch seq"]:
    """Logit of revealing each position, from stored features; `is_masked` says where MASK is held, given up or not.

    `steps_taken` is 0 in a row's first step.
    """
    time = steps_taken / jnp.maximum(is_asked.sum(axis=-1), 1)
    network = nnx.merge(_graph_and_shapes(config)[0], nnx.State(parameters))
    return network(features.astype(jnp.float32), is_masked, is_asked, time)
