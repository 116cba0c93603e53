"""Cost of a training step in closed form: parameters, floating-point operations, memory and communication.

    FLOPs per token = 3 · (2·P + 4·L·n·h + 2·w·p·V)

P is the number of parameters in the blocks' matrices, L the number of layers, n the tokens of a row, h the number of
heads times their size, w the width, p the share of masked positions and V the number of ids that such a position may
take. The backward pass costs twice the forward pass, a multiply-add is two operations, and everything but matrix
products is left out. These are the operations that are *necessary*: a step that unembeds other positions, or recomputes
activations, does more, and its utilisation is lower for it.

    bytes per device = state + max(activations, gradients) + weights, and the gradients again if they are accumulated
    state = 16 per parameter on the device (itself, its average, two moments), gradients = 4
    layer = c · tokens · (7.3 w + 8.6 m / t) + 1.2 · c · rows · (heads / t) · n²
    loss = 2.7 · 4 · tile + (c + 4) · w · V
    activations = L · layer + loss, or with remat c · tokens · L · w + max(layer, loss)
    weights = all-gathered: 2 c per parameter of a layer; with scanned blocks also 12 per parameter of all blocks

c is the number of bytes of an activation, m the hidden width of the SwiGLU, t the tensor axis, tile the number of
logits that exist at a time. The four coefficients are fitted to XLA's memory plans for a CPU in float32. The estimate
is within 10 % of them at 24 shapes and meshes of unrolled blocks and within 15 % at 12 of scanned ones, half of them
with remat, all with a single micro-batch and with more activations than gradients. Where gradients dominate, XLA has
needed up to twice as much, and even more if gathered weights are kept from one micro-batch to the next; `plan --check`
asks XLA itself. An attention kernel stores no scores (n²); cuDNN's stores a mask of 2 · rows · n² bytes, once for all
layers.

    bytes sent by a device per step, where r(k) = (k − 1) / k is the part of an array of k parts that a ring passes on
    blocks       P / t · ((2 c + 4) r(f) + 8 / f · r(d)): two all-gathers; gradients: reduce-scatter, all-reduce
    unembedding  w V · ((c + 4) r(f t) + 8 / (f t) · r(d)): one all-gather, then the same
    embedding    w V · 8 / (f t) · r(d) + 8 · tokens · w · (r(f) / t + r(t)), whose rows are exchanged
    rest         8 · r(d f) per other parameter, of which every device has a copy
    tensor       8 · c · L · tokens · w · r(t) + 8 · tokens · w · r(t): four all-reduces per layer, and the loss's

for a mesh of d × f × t devices (data, fsdp, tensor) that divides the widths; otherwise arrays are not split, and less
is sent. XLA for CPUs sends more: it adds the blocks' gradients before scattering them (2 c + 8 instead of 2 c + 4), and
sends the activations of a layer five times in the backward pass instead of twice (14 c instead of 8 c). With these
counts, its traffic is within 7 % of the formula at eight meshes of all three axes.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh

from trimask.diffusion.attention import kernel_for
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.mesh import AXES, shardings
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters of a network."""

    blocks: int
    """Number of parameters in the matrices of all blocks."""
    embeddings: int
    """Number of parameters in the embeddings of tokens, coordinates and ranges, and in the unembedding."""
    rest: int
    """Number of norm scales and biases."""

    @property
    def total(self) -> int:
        """Total number of parameters."""
        return self.blocks + self.embeddings + self.rest


def count_parameters(model: TransformerConfig, vocabulary: Vocabulary) -> ParameterCounts:
    """Parameter counts of a network, without creating it."""
    width, size = model.width, model.size_of_head
    heads, kv = model.num_heads * size, model.kv_heads * size
    block = width * (2 * heads + 2 * kv + 3 * model.size_of_mlp)
    rest = 2 * width + (2 * size if model.qk_norm else 0) + (heads + 2 * kv if model.attention_bias else 0)
    embeddings = vocabulary.size * width * (1 if model.tied_unembedding else 2)
    if model.place_embedding:
        ranges, features = len(vocabulary.ranges), model.place_features
        embeddings += ranges * width + (ranges + width) * features
    return ParameterCounts(model.num_layers * block, embeddings, model.num_layers * rest + width)


def mean_allowed_ids(vocabulary: Vocabulary) -> float:
    """V if all modalities have equally many tokens: mean over modalities of the size of a position's range."""
    sizes = {
        name: [r.stop - r.start for r in vocabulary.ranges if r.modality == name] for name in vocabulary.modalities[1:]
    }
    return sum(sum(of_one) / len(of_one) for of_one in sizes.values()) / len(sizes)


def flops_per_token(
    model: TransformerConfig, vocabulary: Vocabulary, row_length: int, masked: float = 0.5, ids: float | None = None
) -> float:
    """Floating-point operations of a training step per token.

    `masked` is the share of masked positions; `ids` is V, by default the mean over modalities.
    """
    ids = mean_allowed_ids(vocabulary) if ids is None else ids
    matrices = 2 * count_parameters(model, vocabulary).blocks
    attention = 4 * model.num_layers * row_length * model.num_heads * model.size_of_head
    return 3 * (matrices + attention + 2 * model.width * masked * ids)


def evaluation_bytes(model: TransformerConfig, vocabulary: Vocabulary, rows: int, length: int) -> float:
    """Memory to evaluate a network, in bytes: parameters, one layer's activations in float32, and all logits twice."""
    tokens = rows * length
    layer = tokens * (7.3 * model.width + 8.6 * model.size_of_mlp)
    scores = 1.2 * tokens * length * model.num_heads if model.attention == "plain" else 0.0
    return 4 * (count_parameters(model, vocabulary).total + layer + scores + 2 * tokens * vocabulary.size)


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of a device during a training step, in bytes."""

    state: int
    """Parameters, weight average and moments; exact."""
    activations: int
    """Activations stored for the backward pass, and the loss. At least the size of the gradients, which reuse this
    memory, plus accumulated gradients."""
    weights: int
    """Copies of parameters: gathered from other devices, or stacked for a loop over blocks."""

    @property
    def total(self) -> int:
        """Total memory in bytes."""
        return self.state + self.activations + self.weights


@dataclass(frozen=True)
class StepOnMesh:
    """Shapes of a training step on a mesh of data × fsdp × tensor devices."""

    model: TransformerConfig
    vocabulary: Vocabulary
    data: int
    fsdp: int
    tensor: int
    row_length: int
    accumulate: int = 1
    platform: str = "cpu"
    """Platform of the devices: cpu, gpu or tpu."""
    loss: LossConfig = LossConfig()

    def __post_init__(self):
        for name, size in (("heads", self.model.num_heads), ("hidden units", self.model.size_of_mlp)):
            if size % self.tensor:
                raise ValueError(f"{size} {name} cannot be split evenly over a tensor axis of {self.tensor}")

    @property
    def bytes_of_activation(self) -> int:
        """c: number of bytes of an activation."""
        return 2 if self.model.compute_dtype == "bfloat16" else 4

    def parameters_per_device(self, abstract: Any) -> int:
        """Number of parameters that one device stores of a tree of parameters."""
        mesh = AbstractMesh((self.data, self.fsdp, self.tensor), AXES)
        leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings(abstract, mesh)), strict=True)
        return sum(prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)

    def memory(self, abstract: Any, rows: int) -> MemoryEstimate:
        """Memory with `rows` rows on each device; `abstract` are the parameters' shapes."""
        count, blocks = (self.parameters_per_device(tree) for tree in (abstract, abstract["blocks"]))
        return self._memory(count, blocks, rows)

    def estimate(self, rows: int) -> MemoryEstimate:
        """Memory as in `memory`, but without the parameters' shapes, as if all were split over fsdp and tensor axes."""
        count, parts = count_parameters(self.model, self.vocabulary), self.fsdp * self.tensor
        return self._memory(count.total // parts, count.blocks // parts, rows)

    def max_rows(self, abstract: Any, bytes_of_device: float) -> int:
        """Largest number of rows per device that fit into its memory; 0 if not even one does."""
        count, blocks = (self.parameters_per_device(tree) for tree in (abstract, abstract["blocks"]))
        return bisect_right(
            range(1, 1 << 24), bytes_of_device, key=lambda rows: self._memory(count, blocks, rows).total
        )

    def _memory(self, count: int, blocks: int, rows: int) -> MemoryEstimate:
        """Memory for these numbers of parameters per device, of which `blocks` belong to blocks."""
        model, c, width, layers = self.model, self.bytes_of_activation, self.model.width, self.model.num_layers
        tokens = rows * self.row_length
        pairs, kernel = rows * self.row_length**2, "plain"
        if model.attention == "kernel":
            kernel = kernel_for(
                self.platform, model.compute_dtype, self.row_length, self.row_length, model.size_of_head
            )
        scores = pairs * model.num_heads / self.tensor if kernel == "plain" else 0
        layer = c * (tokens * (7.3 * width + 8.6 * model.size_of_mlp / self.tensor) + 1.2 * scores)
        tile = min(self.loss.tile_positions, tokens) * min(self.loss.ids_of_tile(self.vocabulary), self.vocabulary.size)
        loss = 2.7 * 4 * tile + (c + 4) * self.vocabulary.size * width
        activations = layers * layer + loss
        if model.remat == "block":
            activations = c * tokens * layers * width + max(layer, loss)
        activations += 2 * pairs if kernel == "cudnn" else 0
        weights = 12 * blocks if model.blocks == "scanned" else 0
        if self.fsdp > 1:
            weights += 2 * c * blocks // layers * self.fsdp
        accumulated = 4 * count if self.accumulate > 1 else 0
        return MemoryEstimate(16 * count, round(max(activations, 4 * count)) + accumulated, weights)

    def communication(self, rows: int) -> int:
        """Number of bytes that a device sends in a step."""
        model, c, tokens, width = self.model, self.bytes_of_activation, rows * self.row_length, self.model.width
        d, f, t = self.data, self.fsdp, self.tensor
        table, count = self.vocabulary.size * width, count_parameters(model, self.vocabulary)

        def ring(parts: int) -> float:
            return (parts - 1) / parts

        gradient_bytes, layer_transfers = (8, 7) if self.platform == "cpu" else (4, 4)
        blocks = count.blocks / t * ((2 * c + gradient_bytes) * ring(f) + 8 / f * ring(d))
        unembedding = table * ((c + 4) * ring(f * t) + 8 / (f * t) * ring(d))
        embedding = table * 8 / (f * t) * ring(d) + 8 * tokens * width * (ring(f) / t + ring(t))
        rest = 8 * (count.total - count.blocks - (1 if model.tied_unembedding else 2) * table) * ring(d * f)
        tensor = (2 * layer_transfers * c * model.num_layers + 8) * tokens * width * ring(t)
        return round(blocks + unembedding + embedding + rest + tensor)
