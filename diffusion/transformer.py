"""The denoiser's network: a bidirectional transformer over one stream of discrete tokens.

    h = E[token] + place(modality, coordinates)
    h ← h + r·Attention(RMSNorm(h)),   h ← h + r·SwiGLU(RMSNorm(h))  (per block; attention inside one example only)
    logits = u · RMSNorm(h) · U

r and u are 1 at the shape that was tuned; `parametrization.py` says what they, and initial weights, are at others.
There is no time input: how much is masked is in the tokens. A masked position knows its range (modality and codebook)
and its coordinates, given as sinusoids of both coordinates through one linear map per range, so that larger images and
longer texts than those trained on have an embedding. Options (grouped-query attention, biases, no QK norm, no position
embedding, rotary base, shifted logits, tied head) cover the architectures of LLaDA and Dream.
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
from trimask.diffusion.mesh import ROWS, constrained, embedding_lookup, laid_out
from trimask.diffusion.parametrization import AT_BASE, ParametrizationConfig, Site
from trimask.tokenizers.sequence import TokenRows, example_starts
from trimask.tokenizers.storage.ranges import Checked, Positive, Size, whole
from trimask.tokenizers.vocabulary import Vocabulary

Segments = tuple[Int[Array, "batch asked"], Int[Array, "batch seq"]]
"""The examples of the positions that are computed, and of all."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """Shape and options of the network."""

    num_layers: Annotated[int, whole(1, 4096)] = 4
    """Blocks."""
    width: Size = 128
    """Size of the residual stream."""
    num_heads: Size = 4
    """Query heads."""
    num_kv_heads: Size | None = None
    """Key and value heads; fewer than num_heads is grouped-query attention. None: num_heads."""
    head_size: Size | None = None
    """Size of a head. None: width / num_heads."""
    mlp_width: Size | None = None
    """Hidden size of the SwiGLU. None: 8/3 width, rounded up to a multiple of 32."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    attention_bias: bool = False
    """Biases on queries, keys and values (Dream)."""
    rotary_base: Positive | None = 10_000.0
    """Base of the rotary embedding of positions counted within an example. None: no rotary embedding."""
    place_embedding: bool = True
    """Add the embedding of range and coordinates; without it a masked position has only its rotary position (LLaDA)."""
    place_features: Size = 128
    """Number of sinusoids that encode the coordinates; it does not grow with the width, whose rules are not theirs."""
    tied_unembedding: bool = False
    """Use the input embedding as the unembedding."""
    shifted_logits: bool = False
    """Read the logits of position i at i − 1 (of 0 at 0), as in models that were autoregressive before (Dream)."""
    norm_epsilon: Positive = 1e-6
    """Added to the mean square in every RMSNorm."""
    embedding_scale: Positive = 0.5
    """Standard deviation of the input embeddings at initialisation; 0.02 learns far more slowly at small sizes."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products; parameters, norms, softmax and logits stay float32."""
    attention: Literal["plain", "kernel"] = "plain"
    """By what attention is computed: plain products of matrices, or the kernel of the device, where it has one."""
    blocks: Literal["unrolled", "scanned"] = "unrolled"
    """unrolled: every block is compiled; scanned: one, in a loop over stacked parameters, without which XLA for CPUs
    undoes remat."""
    remat: Literal["none", "block"] = "none"
    """What the backward pass computes again rather than keeps: nothing, or all within a block."""

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
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size_of_head(self) -> int:
        """Size of a head."""
        return self.width // self.num_heads if self.head_size is None else self.head_size

    @property
    def size_of_mlp(self) -> int:
        """Hidden size of the SwiGLU."""
        return -(-self.width * 8 // 3 // 32) * 32 if self.mlp_width is None else self.mlp_width

    def computed_as(self, other: "TransformerConfig") -> "TransformerConfig":
        """The same network, computed in the other's way."""
        return replace(self, attention=other.attention, blocks=other.blocks, remat=other.remat)

    def at_width(self, width: int) -> "TransformerConfig":
        """The network with more or fewer heads of the same size; what was given explicitly grows along."""

        def in_proportion(name: str, size: int) -> int:
            if size * width % self.width:
                raise ValueError(f"{name} {size} at width {self.width} cannot grow in proportion to width {width}")
            return size * width // self.width

        return replace(
            self,
            width=width,
            num_heads=in_proportion("num_heads", self.num_heads),
            num_kv_heads=self.num_kv_heads and in_proportion("num_kv_heads", self.num_kv_heads),
            mlp_width=self.mlp_width and in_proportion("mlp_width", self.mlp_width),
        )

    def base(self, parametrization: ParametrizationConfig) -> "TransformerConfig":
        """The network of the same kind from which hyperparameters are transferred: heads have one size in both."""
        width = parametrization.base_width or self.width

        def in_proportion(name: str, given: int | None, size: int) -> int:
            base = size * width / self.width if given is None else given
            if base != int(base):
                raise ValueError(
                    f"{name} {size} at width {self.width} would be {base:g} at base_width {width}; "
                    f"say what it was: parametrization.base_{name}"
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
    """A denoiser: `model(sequence) -> Output`."""

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
        site = Site(parametrization, width / base.width, layers / base.num_layers)
        self.logit_multiplier = site.logits(config.tied_unembedding)
        self.embedding = site.normal(next(keys), (vocab, width), "embedding", config.embedding_scale)
        if config.place_embedding:
            self.place = PlaceEmbedding(config, vocabulary, site, next(keys))
        blocks = [TransformerBlock(config, base, site.block(number, layers), next(keys)) for number in range(layers)]
        self.blocks = nnx.List(blocks)
        self.final_norm = RMSNorm(width, config.norm_epsilon, "final_norm", site)
        if not config.tied_unembedding:
            self.unembedding = site.matrix(next(keys), (width, vocab), "unembedding", width, base.width)

    def __call__(
        self,
        sequence: TokenRows,
        positions: Int[Array, "batch asked"] | None = None,
        cache: tuple[KeysValues, ...] | None = None,
    ) -> DenoiserOutput:
        """Logits and final hidden states, float32.

        `positions` asks for these only there. With a `cache` nothing but those positions is computed at all: keys and
        values elsewhere are the cache's, which is exact only if the other tokens have not changed since. Without
        positions a cache is ignored.
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
        self, sequence: TokenRows, computed: Int[Array, "batch asked"] | None, cache: tuple[KeysValues, ...] | None
    ) -> tuple[Float[Array, "batch asked width"], tuple[KeysValues, ...]]:
        """The residual stream after the last block at the computed positions (None: all), and the keys and values."""
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
        """A block, and the parameters of all of them, with the number of the block as first axis."""
        graph, *_ = nnx.split(self.blocks[0])
        states = [nnx.to_pure_dict(nnx.state(block)) for block in self.blocks]
        return graph, nnx.State(laid_out(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)))

    def embed(
        self, sequence: TokenRows, computed: Int[Array, "batch asked"] | None
    ) -> tuple[Float[Array, "batch asked width"], SinCos | None, Segments]:
        """What the first block gets: the residual stream, by how much to rotate, and who may see whom."""
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
        h = constrained(h.astype(jnp.dtype(self.config.compute_dtype)), ROWS)
        base, head = self.config.rotary_base, self.config.size_of_head
        sin_cos = None if base is None else rotary_sin_cos(positions, sequence.length, head, base)
        return h, sin_cos, (segment, sequence.segment)

    @property
    def unembed(self) -> Partial:
        """Makes hidden states logits over the whole vocabulary."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return Partial(_unembed, matrix=self.output_matrix.astype(dtype), multiplier=self.logit_multiplier)

    @property
    def output_matrix(self) -> Float[Array, "width vocab"]:
        """U, or the embedding transposed; logits are the hidden states times it and `logit_multiplier`."""
        return self.embedding[...].T if self.config.tied_unembedding else self.unembedding[...]


class PlaceEmbedding(nnx.Module):
    """e[range] + W · (s[range] ⊙ sinusoids of both coordinates): nearly a linear map per range at the price of one."""

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary, site: Site, key: jax.Array):
        keys = jax.random.split(key, 3)
        ranges, features = len(vocabulary.ranges), config.place_features
        self.vocabulary = vocabulary
        self.range = site.normal(keys[0], (ranges, config.width), "place_range", config.embedding_scale)
        self.scale = site.normal(keys[1], (ranges, features), "place_scale", 1.0)
        self.map = site.normal(keys[2], (features, config.width), "place_map", config.embedding_scale)

    def __call__(
        self, modality: Int[Array, "batch seq"], coordinates: Int[Array, "batch seq 2"]
    ) -> Float[Array, "batch seq width"]:
        """The embedding of what a position is, whatever token it holds."""
        ranges = self.vocabulary.range_numbers(modality, coordinates)
        features = sinusoids(coordinates, self.scale.shape[-1] // 2).reshape(*coordinates.shape[:-1], -1)
        # Of norm 1, as a token's one-hot vector: a step then moves a position hardly more than a token.
        features = features * (2 / features.shape[-1]) ** 0.5
        return self.range[...][ranges] + (features * self.scale[...][ranges]) @ self.map[...]


class TransformerBlock(nnx.Module):
    """Attention, then SwiGLU, each on the normalised residual stream."""

    def __init__(self, config: TransformerConfig, base: TransformerConfig, site: Site, key: jax.Array):
        key_attention, key_mlp = jax.random.split(key)
        self.residual = site.table().residual
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, "attention_norm", site)
        self.attention = Attention(config, base, site, key_attention)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon, "mlp_norm", site)
        self.mlp = SwiGLU(config.width, config.size_of_mlp, base.width, base.size_of_mlp, site, key_mlp)

    def __call__(self, h, sin_cos, segments, computed, cache):
        attended, keys_values = self.attention(self.attention_norm(h), sin_cos, segments, computed, cache)
        h = constrained(h + self.residual * attended, ROWS)
        return constrained(h + self.residual * self.mlp(self.mlp_norm(h)), ROWS), keys_values


class Attention(nnx.Module):
    """Multi-head attention, bidirectional within an example."""

    def __init__(self, config: TransformerConfig, base: TransformerConfig, site: Site, key: jax.Array):
        keys = jax.random.split(key, 4)
        width, head = config.width, config.size_of_head
        shapes = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
        self.config = config
        for name, k in zip(shapes, keys, strict=False):
            setattr(self, name, site.matrix(k, (width, shapes[name], head), name, width, base.width))
            if config.attention_bias:
                setattr(self, f"{name}_bias", site.constant(jnp.zeros((shapes[name], head)), f"{name}_bias"))
        fan_in, base_fan_in = config.num_heads * head, base.num_heads * head
        self.out = site.matrix(keys[3], (config.num_heads, head, width), "out", fan_in, base_fan_in)
        if config.qk_norm:
            self.query_norm = RMSNorm(head, config.norm_epsilon, "query_norm", site)
            self.key_norm = RMSNorm(head, config.norm_epsilon, "key_norm", site)

    def __call__(
        self,
        x: Float[Array, "batch asked width"],
        sin_cos: SinCos | None,
        segments: Segments,
        computed: Int[Array, "batch asked"] | None,
        cache: KeysValues | None,
    ) -> tuple[Float[Array, "batch asked width"], KeysValues]:
        """Attends from x to x, or with a cache to the cache updated at the `computed` positions."""
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
        return constrained(y, ROWS, None, "tensor")


def _unembed(
    hidden: Float[Array, "*shape width"], matrix: Float[Array, "width vocab"], multiplier: Float[Array, ""] | float
) -> Float[Array, "*shape vocab"]:
    return multiplier * jnp.matmul(hidden.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)


def num_parameters(tree) -> int:
    """Scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
