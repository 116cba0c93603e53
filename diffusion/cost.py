"""What a training step costs, in closed form: parameters, floating-point operations, memory and communication.

    FLOPs of a token = 3 · (2·P + 4·L·n·h + 2·w·p·V)

P are the parameters of the blocks' matrices, L layers, n tokens of a row, h heads times their size, w the width, p the
share of masked positions and V the ids such a position may take: the backward pass is twice the forward pass, a product
is two operations, and everything that is not a product of matrices is left out. This is what *has* to be computed: a
step that unembeds other positions, or computes activations twice, does more, and its utilisation is lower for it.

    bytes of a device = state + max(activations, gradients) + weights, and the gradients again if they are accumulated
    state = 16 of each parameter it has (itself, its average, two moments), gradients = 4
    layer = c · tokens · (7.3 w + 8.6 m / t) + 1.2 · c · rows · (heads / t) · n²
    loss = 2.7 · 4 · tile + (c + 4) · w · V
    activations = L · layer + loss, or with remat c · tokens · L · w + max(layer, loss)
    weights = all-gathered: 2 c of each parameter of a layer; of scanned blocks also 12 of all

c are the bytes of an activation, m the hidden size of the SwiGLU, t the tensor axis, tile the logits that exist at a
time. The four coefficients are fitted to what XLA plans for a CPU in float32, of which they are within 10 % at 24
shapes and meshes of unrolled blocks and within 15 % at 12 of scanned ones, half of them with remat, all of a single
micro-batch and with more activations than gradients. Where gradients are most of it XLA has needed up to twice as much,
the more with gathered weights kept from one micro-batch to the next; `plan --check` asks XLA itself. With a kernel for
attention there are no scores, n²; with cuDNN's, 2 · rows · n² bytes of who may see whom, of all layers together.

    bytes sent by a device in a step, where r(k) = (k − 1) / k of an array of k parts is what a ring passes on
    blocks       P / t · ((2 c + 4) r(f) + 8 / f · r(d)): two all-gathers; of gradients reduce-scatter, all-reduce
    unembedding  w V · ((c + 4) r(f t) + 8 / (f t) · r(d)): one all-gather, then the same
    embedding    w V · 8 / (f t) · r(d) + 8 · tokens · w · (r(f) / t + r(t)), of which rows are exchanged
    rest         8 · r(d f) of each other parameter, of which all devices have a copy
    tensor       8 · c · L · tokens · w · r(t) + 8 · tokens · w · r(t): four all-reduces of a layer, and the loss's

for a mesh of d × f × t devices (data, fsdp, tensor) that divides the widths; else arrays stay whole, and less is sent.
XLA for CPUs does more: it adds the blocks' gradients before it scatters them, which makes 2 c + 4 of them 2 c + 8, and
the activations of a layer five times in the backward pass rather than twice, which makes 8 c of them 14 c. So counted,
it sends what this says to within 7 % at eight meshes of all three axes.
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
    """How many numbers a network learns."""

    blocks: int
    """Of the matrices of all blocks."""
    embeddings: int
    """Of tokens in, tokens out and places."""
    rest: int
    """Scales of norms, and biases."""

    @property
    def total(self) -> int:
        """All."""
        return self.blocks + self.embeddings + self.rest


def parameters(model: TransformerConfig, vocabulary: Vocabulary) -> ParameterCounts:
    """Of a network, without making it."""
    width, size = model.width, model.size_of_head
    heads, kv = model.num_heads * size, model.kv_heads * size
    block = width * (2 * heads + 2 * kv + 3 * model.size_of_mlp)
    rest = 2 * width + (2 * size if model.qk_norm else 0) + (heads + 2 * kv if model.attention_bias else 0)
    embeddings = vocabulary.size * width * (1 if model.tied_unembedding else 2)
    if model.place_embedding:
        ranges, features = len(vocabulary.ranges), model.place_features
        embeddings += ranges * width + (ranges + width) * features
    return ParameterCounts(model.num_layers * block, embeddings, model.num_layers * rest + width)


def mean_ids(vocabulary: Vocabulary) -> float:
    """V where every modality has as many tokens: the mean over modalities of the ids that a position may take."""
    of = {
        name: [r.stop - r.start for r in vocabulary.ranges if r.modality == name] for name in vocabulary.modalities[1:]
    }
    return sum(sum(sizes) / len(sizes) for sizes in of.values()) / len(of)


def flops_per_token(
    model: TransformerConfig, vocabulary: Vocabulary, row_length: int, masked: float = 0.5, ids: float | None = None
) -> float:
    """Of a training step; `ids` is V, the mean of modalities unless given."""
    ids = mean_ids(vocabulary) if ids is None else ids
    matrices = 2 * parameters(model, vocabulary).blocks
    attention = 4 * model.num_layers * row_length * model.num_heads * model.size_of_head
    return 3 * (matrices + attention + 2 * model.width * masked * ids)


def evaluation_bytes(model: TransformerConfig, vocabulary: Vocabulary, rows: int, length: int) -> float:
    """Memory in which a network is evaluated: parameters, a layer's activations in float32, and all logits twice."""
    tokens = rows * length
    layer = tokens * (7.3 * model.width + 8.6 * model.size_of_mlp)
    scores = 1.2 * tokens * length * model.num_heads if model.attention == "plain" else 0.0
    return 4 * (parameters(model, vocabulary).total + layer + scores + 2 * tokens * vocabulary.size)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a device during a step."""

    state: int
    """Parameters, average and moments, exactly."""
    activations: int
    """What the backward pass needs, and the loss; never less than the gradients, which take its place, and accumulated
    gradients."""
    weights: int
    """Copies of parameters: gathered from other devices, or stacked for a loop over blocks."""

    @property
    def total(self) -> int:
        """All."""
        return self.state + self.activations + self.weights


@dataclass(frozen=True)
class StepOnMesh:
    """The shapes of a step on a mesh of devices."""

    model: TransformerConfig
    vocabulary: Vocabulary
    data: int
    fsdp: int
    tensor: int
    row_length: int
    accumulate: int = 1
    platform: str = "cpu"
    """Of the devices: cpu, gpu or tpu."""
    loss: LossConfig = LossConfig()

    def __post_init__(self):
        for name, size in (("heads", self.model.num_heads), ("hidden units", self.model.size_of_mlp)):
            if size % self.tensor:
                raise ValueError(f"{size} {name} cannot be shared by a tensor axis of {self.tensor}")

    @property
    def bytes_of_activation(self) -> int:
        """c."""
        return 2 if self.model.compute_dtype == "bfloat16" else 4

    def own_parameters(self, abstract: Any) -> int:
        """Numbers that a device has of a tree of parameters."""
        mesh = AbstractMesh((self.data, self.fsdp, self.tensor), AXES)
        places = shardings(abstract, mesh)
        return sum(
            prod(place.shard_shape(leaf.shape))
            for leaf, place in zip(jax.tree.leaves(abstract), jax.tree.leaves(places), strict=True)
        )

    def memory(self, abstract: Any, rows: int) -> MemoryEstimate:
        """With so many rows on each device; `abstract` are the parameters' shapes."""
        own, blocks = (self.own_parameters(tree) for tree in (abstract, abstract["blocks"]))
        return self._memory(own, blocks, rows)

    def estimate(self, rows: int) -> MemoryEstimate:
        """`memory` without the shapes of parameters: as if each were split over fsdp and tensor axes."""
        count, parts = parameters(self.model, self.vocabulary), self.fsdp * self.tensor
        return self._memory(count.total // parts, count.blocks // parts, rows)

    def largest_rows(self, abstract: Any, bytes_of_device: float) -> int:
        """Rows that a device has room for; 0 if not one."""
        own, blocks = (self.own_parameters(tree) for tree in (abstract, abstract["blocks"]))
        return bisect_right(range(1, 1 << 24), bytes_of_device, key=lambda rows: self._memory(own, blocks, rows).total)

    def _memory(self, own: int, blocks: int, rows: int) -> MemoryEstimate:
        """The same of the numbers of parameters that a device has."""
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
        accumulated = 4 * own if self.accumulate > 1 else 0
        return MemoryEstimate(16 * own, round(max(activations, 4 * own)) + accumulated, weights)

    def communication(self, rows: int) -> int:
        """Bytes that a device sends in a step."""
        model, c, tokens, width = self.model, self.bytes_of_activation, rows * self.row_length, self.model.width
        d, f, t = self.data, self.fsdp, self.tensor
        table, count = self.vocabulary.size * width, parameters(model, self.vocabulary)

        def ring(parts: int) -> float:
            return (parts - 1) / parts

        of_gradients, of_layer = (8, 7) if self.platform == "cpu" else (4, 4)
        blocks = count.blocks / t * ((2 * c + of_gradients) * ring(f) + 8 / f * ring(d))
        unembedding = table * ((c + 4) * ring(f * t) + 8 / (f * t) * ring(d))
        embedding = table * 8 / (f * t) * ring(d) + 8 * tokens * width * (ring(f) / t + ring(t))
        rest = 8 * (count.total - count.blocks - (1 if model.tied_unembedding else 2) * table) * ring(d * f)
        tensor = (2 * of_layer * c * model.num_layers + 8) * tokens * width * ring(t)
        return round(blocks + unembedding + embedding + rest + tensor)
