"""The denoiser network: a bidirectional transformer over one stream of discrete tokens.

    h = E[token] + place(modality, coordinates)
    h ← h + r·Attention(RMSNorm(h)),   h ← h + r·SwiGLU(RMSNorm(h))  (per block; attention inside one example only)
    logits = u · RMSNorm(h) · U

r and u are 1 at the shape at which hyperparameters were tuned; `parametrization.py` gives them, and the initial
weights, for other shapes. There is no time input, because the tokens show how much is masked. A masked position knows
its range (modality and codebook) and its coordinates. Both coordinates are encoded as sinusoids and mapped by one
linear map per range, so that larger images and longer texts than those of the training have embeddings. Options
(grouped-query attention, biases, no QK norm, no coordinate embedding, rotary base, shifted logits, tied head) cover the
architectures of LLaDA and Dream.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from trimask.diffusion.attention import attend
from trimask.diffusion.denoiser import DenoiserOutput, KeysValues
from trimask.diffusion.layers import RMSNorm, SinCos, SwiGLU, product, rotary_sin_cos, rotate, sinusoids
from trimask.diffusion.mesh import ROW_AXES, constrain, constrain_parameters, embedding_lookup
from trimask.diffusion.parametrization import AT_BASE, Initializer, ParametrizationConfig
from trimask.tokenizers.sequence import TokenRows, example_starts
from trimask.tokenizers.storage.ranges import Checked, Positive, Size, whole
from trimask.tokenizers.vocabulary import Vocabulary

Segments = tuple[Int[Array, "batch positions"], Int[Array, "batch seq"]]
"""Segment numbers of the positions that are computed, and of all positions."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """Shape and options of the network."""

    num_layers: Annotated[int, whole(1, 4096)] = 4
    """Number of blocks."""
    width: Size = 128
    """Width of the residual stream."""
    num_heads: Size = 4
    """Number of query heads."""
    num_kv_heads: Size | None = None
    """Number of key and value heads; with fewer than num_heads, grouped-query attention. None: num_heads."""
    head_size: Size | None = None
    """Size of a head. None: width / num_heads."""
    mlp_width: Size | None = None
    """Hidden width of the SwiGLU layer. None: 8/3 of the width, rounded up to a multiple of 32."""
    qk_norm: bool = True
    """Apply RMSNorm to queries and keys."""
    attention_bias: bool = False
    """Add biases to queries, keys and values (as Dream does)."""
    rotary_base: Positive | None = 10_000.0
    """Base of the rotary embedding of positions, which are counted within an example. None: no rotary embedding."""
    place_embedding: bool = True
    """Add an embedding of range and coordinates; without it a masked position has only its rotary position (as in
    LLaDA)."""
    place_features: Size = 128
    """Number of sinusoids that encode the coordinates. It does not grow with the width and has its own scaling
    rules."""
    tied_unembedding: bool = False
    """Use the input embedding as the unembedding."""
    shifted_logits: bool = False
    """Read the logits of position i at position i − 1 (of 0 at 0), as models converted from autoregressive ones do
    (Dream)."""
    norm_epsilon: Positive = 1e-6
    """ε added to the mean square in every RMSNorm."""
    embedding_scale: Positive = 0.5
    """Standard deviation of the initial input embeddings; with 0.02, small models learn far more slowly."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products; parameters, norms, softmax and logits stay float32."""
    attention: Literal["plain", "kernel"] = "plain"
    """Implementation of attention: plain matrix products, or the fused kernel of the device if it has one."""
    blocks: Literal["unrolled", "scanned"] = "unrolled"
    """How blocks are compiled: each one (unrolled), or one in a loop over stacked parameters (scanned), without which
    XLA for CPUs undoes remat."""
    remat: Literal["none", "block"] = "none"
    """What the backward pass recomputes instead of storing: nothing, or everything within a block."""

    def __post_init__(self):
        super().__post_init__()
        if self.place_features % 4:
            raise ValueError(f"place_features must be a multiple of 4, got {self.place_features}")
        if self.head_size is None and self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {self.num_heads}/{self.kv_heads}")
        if self.rotary_base is not None and self.size_of_head % 2:
            raise ValueError(f"rotary embeddings need an even head size, got {self.size_of_head}")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size_of_head(self) -> int:
        """Size of a head."""
        return self.width // self.num_heads if self.head_size is None else self.head_size

    @property
    def size_of_mlp(self) -> int:
        """Hidden width of the SwiGLU layer."""
        return -(-self.width * 8 // 3 // 32) * 32 if self.mlp_width is None else self.mlp_width

    def computed_as(self, other: "TransformerConfig") -> "TransformerConfig":
        """The same network, computed with the other's implementation of attention, blocks and remat."""
        return replace(self, attention=other.attention, blocks=other.blocks, remat=other.remat)

    def at_width(self, width: int) -> "TransformerConfig":
        """The network at another width, with as many more heads of the same size; explicitly given sizes scale along.

        Raises ValueError if a size would not be a whole number.
        """

        def in_proportion(name: str, size: int) -> int:
            if size * width % self.width:
                raise ValueError(
                    f"{name} {size} at width {self.width} cannot be scaled to a whole number at width {width}"
                )
            return size * width // self.width

        return replace(
            self,
            width=width,
            num_heads=in_proportion("num_heads", self.num_heads),
            num_kv_heads=self.num_kv_heads and in_proportion("num_kv_heads", self.num_kv_heads),
            mlp_width=self.mlp_width and in_proportion("mlp_width", self.mlp_width),
        )

    def base(self, parametrization: ParametrizationConfig) -> "TransformerConfig":
        """The base network, from which hyperparameters are transferred to this one; both have the same head size.

        Raises ValueError if a size in proportion to the width would not be a whole number.
        """
        width = parametrization.base_width or self.width

        def in_proportion(name: str, given: int | None, size: int) -> int:
            base = size * width / self.width if given is None else given
            if base != int(base):
                raise ValueError(
                    f"{name} {size} at width {self.width} would be {base:g} at base_width {width}; "
                    f"give it as parametrization.base_{name}"
                )
            return int(base)

        mlp_width = parametrization.base_mlp_width
        if self.mlp_width is not None:
            mlp_width = in_proportion("mlp_width", mlp_width, self.mlp_width)
        return replace(
            self,
            width=width,
            num_layers=parametrization.base_layers or self.num_layers,
            num_heads=in_proportion("heads", parametrization.base_heads, self.num_heads),
            num_kv_heads=None,
            head_size=self.size_of_head,
            mlp_width=mlp_width,
        )


class Transformer(nnx.Module):
    """The denoiser network; a `Denoiser`."""

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary: Vocabulary,
        parametrization: ParametrizationConfig = AT_BASE,
        *,
        key: jax.Array,
    ):
        keys = iter(jax.random.split(key, 3 + config.num_layers))
        self.config, self.vocabulary = config, vocabulary
        vocab, width, layers = vocabulary.size, config.width, config.num_layers
        base = config.base(parametrization)
        initializer = Initializer(parametrization, width / base.width, layers / base.num_layers)
        self.logit_multiplier = initializer.logits(config.tied_unembedding)
        self.embedding = initializer.normal(next(keys), (vocab, width), "embedding", config.embedding_scale)
        if config.place_embedding:
            self.place = PlaceEmbedding(config, vocabulary, initializer, next(keys))
        blocks = [
            TransformerBlock(config, base, initializer.for_block(number, layers), next(keys))
            for number in range(layers)
        ]
        self.blocks = nnx.List(blocks)
        self.final_norm = RMSNorm(width, config.norm_epsilon, "final_norm", initializer)
        if not config.tied_unembedding:
            self.unembedding = initializer.matrix(next(keys), (width, vocab), "unembedding", width, base.width)

    def __call__(
        self,
        sequence: TokenRows,
        positions: Int[Array, "batch positions"] | None = None,
        cache: tuple[KeysValues, ...] | None = None,
    ) -> DenoiserOutput:
        """Logits and final hidden states, in float32, at every position or only at `positions`.

        With a `cache` nothing but `positions` is computed; keys and values of all other positions are taken from the
        cache, which is exact only if their tokens have not changed since. Without `positions` a cache is ignored.
        """
        if positions is None:
            h, new_cache = self.encode(sequence, None, None)
            if self.config.shifted_logits:
                h = jnp.concatenate([h[:, :1], h[:, :-1]], axis=1)
        else:
            read = jnp.maximum(positions - 1, 0) if self.config.shifted_logits else positions
            if cache is None:
                h, new_cache = self.encode(sequence, None, None)
                h = jnp.take_along_axis(h, read[..., None], axis=1)
            else:
                computed = jnp.concatenate([read, positions], axis=1) if self.config.shifted_logits else positions
                h, new_cache = self.encode(sequence, computed, cache)
                h = h[:, : positions.shape[1]]
        hidden = self.final_norm(h).astype(jnp.float32)
        return DenoiserOutput(hidden, self.unembed, hidden, new_cache)

    def encode(
        self, sequence: TokenRows, computed: Int[Array, "batch positions"] | None, cache: tuple[KeysValues, ...] | None
    ) -> tuple[Float[Array, "batch positions width"], tuple[KeysValues, ...]]:
        """Residual stream after the last block at the `computed` positions (None: all), and keys and values of all."""
        h, sin_cos, segments = self.embed(sequence, computed)
        maybe_remat = jax.checkpoint if self.config.remat == "block" else lambda block: block
        if self.config.blocks == "scanned" and cache is None:
            graph, stacked = self._stacked()
            block = maybe_remat(lambda h, state: nnx.merge(graph, state)(h, sin_cos, segments, None, None))
            h, (keys, values) = jax.lax.scan(block, h, stacked)
            return h, tuple(zip(keys, values, strict=True))
        new_cache = []
        for layer, block in enumerate(self.blocks):
            old = None if cache is None else cache[layer]
            h, keys_values = maybe_remat(block.__call__)(h, sin_cos, segments, computed, old)
            new_cache.append(keys_values)
        return h, tuple(new_cache)

    def _stacked(self) -> tuple[nnx.GraphDef["TransformerBlock"], nnx.State]:
        """Graph of one block, and the parameters of all blocks, stacked along a first axis."""
        graph, *_ = nnx.split(self.blocks[0])
        states = [nnx.to_pure_dict(nnx.state(block)) for block in self.blocks]
        return graph, nnx.State(constrain_parameters(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)))

    def embed(
        self, sequence: TokenRows, computed: Int[Array, "batch positions"] | None
    ) -> tuple[Float[Array, "batch positions width"], SinCos | None, Segments]:
        """Input of the first block: the residual stream, the rotary sin and cos, and the segment numbers."""
        positions = jnp.arange(sequence.length) - example_starts(sequence)
        tokens, modality, coordinates, segment = (
            sequence.tokens,
            sequence.modality,
            sequence.coordinates,
            sequence.segment,
        )
        if computed is not None:
            at = partial(jnp.take_along_axis, indices=computed, axis=1)
            tokens, modality, positions, segment = map(at, (tokens, modality, positions, segment))
            coordinates = jnp.take_along_axis(coordinates, computed[..., None], axis=1)
        h = embedding_lookup(self.embedding[...], tokens)
        if self.config.place_embedding:
            h = h + self.place(modality, coordinates)
        h = constrain(h.astype(jnp.dtype(self.config.compute_dtype)), ROW_AXES)
        base, head = self.config.rotary_base, self.config.size_of_head
        sin_cos = None if base is None else rotary_sin_cos(positions, sequence.length, head, base)
        return h, sin_cos, (segment, sequence.segment)

    @property
    def unembed(self) -> Partial:
        """Function from hidden states to logits over the whole vocabulary."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return Partial(_unembed, matrix=self.output_matrix.astype(dtype), multiplier=self.logit_multiplier)

    @property
    def output_matrix(self) -> Float[Array, "width vocab"]:
        """U, or the transposed embedding; logits are hidden states · matrix · `logit_multiplier`."""
        return self.embedding[...].T if self.config.tied_unembedding else self.unembedding[...]


class PlaceEmbedding(nnx.Module):
    """Embedding of range and coordinates: e[range] + W · (s[range] ⊙ sinusoids of both coordinates).

    This approximates one linear map per range at the price of a single one.
    """

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary, initializer: Initializer, key: jax.Array):
        keys = jax.random.split(key, 3)
        ranges, features = len(vocabulary.ranges), config.place_features
        self.vocabulary = vocabulary
        self.range = initializer.normal(keys[0], (ranges, config.width), "place_range", config.embedding_scale)
        self.scale = initializer.normal(keys[1], (ranges, features), "place_scale", 1.0, ratio=1.0)  # at every width
        self.map = initializer.normal(keys[2], (features, config.width), "place_map", config.embedding_scale)

    def __call__(
        self, modality: Int[Array, "batch seq"], coordinates: Int[Array, "batch seq 2"]
    ) -> Float[Array, "batch seq width"]:
        """Embedding of each position's range and coordinates, which does not depend on its token."""
        ranges = self.vocabulary.range_numbers(modality, coordinates)
        features = sinusoids(coordinates, self.scale.shape[-1] // 2).reshape(*coordinates.shape[:-1], -1)
        # Norm 1, like a token's one-hot vector, so that a step changes this embedding hardly more than a token's.
        features = features * (2 / features.shape[-1]) ** 0.5
        return self.range[...][ranges] + (features * self.scale[...][ranges]) @ self.map[...]


class TransformerBlock(nnx.Module):
    """Attention, then SwiGLU, each applied to the normalised residual stream and added to it."""

    def __init__(self, config: TransformerConfig, base: TransformerConfig, initializer: Initializer, key: jax.Array):
        key_attention, key_mlp = jax.random.split(key)
        self.residual = initializer.table().residual
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, "attention_norm", initializer)
        self.attention = Attention(config, base, initializer, key_attention)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon, "mlp_norm", initializer)
        self.mlp = SwiGLU(config.width, config.size_of_mlp, base.width, base.size_of_mlp, initializer, key_mlp)

    def __call__(self, h, sin_cos, segments, computed, cache):
        attended, keys_values = self.attention(self.attention_norm(h), sin_cos, segments, computed, cache)
        h = constrain(h + self.residual * attended, ROW_AXES)
        return constrain(h + self.residual * self.mlp(self.mlp_norm(h)), ROW_AXES), keys_values


class Attention(nnx.Module):
    """Multi-head attention, bidirectional within an example."""

    def __init__(self, config: TransformerConfig, base: TransformerConfig, initializer: Initializer, key: jax.Array):
        keys = jax.random.split(key, 4)
        width, head = config.width, config.size_of_head
        shapes = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
        self.config = config
        for name, k in zip(shapes, keys, strict=False):
            setattr(self, name, initializer.matrix(k, (width, shapes[name], head), name, width, base.width))
            if config.attention_bias:
                setattr(self, f"{name}_bias", initializer.constant(jnp.zeros((shapes[name], head)), f"{name}_bias"))
        fan_in, base_fan_in = config.num_heads * head, base.num_heads * head
        self.out = initializer.matrix(keys[3], (config.num_heads, head, width), "out", fan_in, base_fan_in)
        if config.qk_norm:
            self.query_norm = RMSNorm(head, config.norm_epsilon, "query_norm", initializer)
            self.key_norm = RMSNorm(head, config.norm_epsilon, "key_norm", initializer)

    def __call__(
        self,
        x: Float[Array, "batch positions width"],
        sin_cos: SinCos | None,
        segments: Segments,
        computed: Int[Array, "batch positions"] | None,
        cache: KeysValues | None,
    ) -> tuple[Float[Array, "batch positions width"], KeysValues]:
        """Attends from x to x or, with a cache, to the cached keys and values updated at the `computed` positions."""
        q, k, v = (self._project(x, name) for name in ("query", "key", "value"))
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if sin_cos is not None:
            q, k = rotate(q, sin_cos), rotate(k, sin_cos)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            k, v = (old.at[rows, computed].set(new) for old, new in zip(cache, (k, v), strict=True))
        attended = attend(q, k, v, *segments, self.config.attention)
        return product(attended, self.out[...], axes=2), (k, v)

    def _project(self, x, name):
        y = product(x, getattr(self, name)[...])
        if self.config.attention_bias:
            y = y + getattr(self, f"{name}_bias")[...].astype(x.dtype)
        return constrain(y, ROW_AXES, None, "tensor")


def _unembed(
    hidden: Float[Array, "*shape width"], matrix: Float[Array, "width vocab"], multiplier: Float[Array, ""] | float
) -> Float[Array, "*shape vocab"]:
    return multiplier * jnp.matmul(hidden.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)


def num_parameters(tree) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
