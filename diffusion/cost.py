"""What a training step costs, in closed form: parameters, floating-point operations, memory and communication.

    FLOPs of a token = 3 · (2·P + 4·L·n·h + 2·w·m·V)

P are the parameters of the blocks' matrices, L layers, n tokens of a row, h heads times their size, w the width, m the
share of masked positions and V the ids such a position may take: the backward pass is twice the forward pass, a product
is two operations, and everything that is not a product of matrices is left out. This is what *has* to be computed: a
step that unembeds other positions, or computes activations twice, does more, and its utilisation is lower for it.

    bytes of a device = state + gradients + activations + loss
    state = 16 of each parameter it has (itself, its average, two moments), gradients = 4
    activations = c · tokens · L · (7.3 w + 9.0 m / t) + 1.75 · c · rows · L · (heads / t) · n²
    loss = 2.8 · 4 · tile + (c + 4) · w · V

c are the bytes of an activation, m the hidden size of the SwiGLU, t the tensor axis, tile the logits that exist at a
time. The four coefficients are fitted to what XLA plans for a CPU in float32, of which they are within 7 % at 18 shapes
and meshes; `plan --check` asks XLA itself. The scores (n²) are not kept by a kernel such as flash attention, nor by
remat, which keeps w of a token and layer, and the rest of a single layer.

Communication of a device in a step, on a ring: every parameter is gathered twice over the fsdp axis (c bytes each) and
its gradient scattered once (4); over the data axis gradients are added (2 · 4); over the tensor axis activations are
added, twice in each direction and layer.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh

from trimask.diffusion.loss import LossConfig
from trimask.diffusion.mesh import AXES, shardings
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Parameters:
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


def parameters(model: TransformerConfig, vocabulary: Vocabulary) -> Parameters:
    """Of a network, without making it."""
    width, size = model.width, model.size_of_head
    heads, kv = model.num_heads * size, model.kv_heads * size
    block = width * (2 * heads + 2 * kv + 3 * model.size_of_mlp)
    rest = 2 * width + (2 * size if model.qk_norm else 0) + (heads + 2 * kv if model.attention_bias else 0)
    embeddings = vocabulary.size * width * (1 if model.tied_unembedding else 2)
    if model.place_embedding:
        embeddings += (2 * len(vocabulary.ranges) + model.place_features) * width
    return Parameters(model.num_layers * block, embeddings, model.num_layers * rest + width)


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


@dataclass(frozen=True)
class Memory:
    """Bytes of a device during a step."""

    state: int
    """Parameters, average and moments, exactly."""
    gradients: int
    activations: int
    loss: int
    """Tiles of logits, and the whole unembedding with its gradient."""

    @property
    def total(self) -> int:
        """All."""
        return self.state + self.gradients + self.activations + self.loss


@dataclass(frozen=True)
class Layout:
    """A step on a mesh."""

    model: TransformerConfig
    vocabulary: Vocabulary
    data: int
    fsdp: int
    tensor: int
    row_length: int
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

    def memory(self, abstract: Any, rows: int) -> Memory:
        """With so many rows on each device; `abstract` are the parameters' shapes."""
        model, c, own = self.model, self.bytes_of_activation, self.own_parameters(abstract)
        tokens, layers = rows * self.row_length, model.num_layers
        of_token = 7.3 * model.width + 9.0 * model.size_of_mlp / self.tensor
        of_row = 1.75 * model.num_heads / self.tensor * self.row_length**2
        activations = c * layers * (tokens * of_token + rows * of_row)
        if model.remat == "block":
            activations = activations / layers + c * tokens * layers * model.width
        tile = min(self.loss.rows, tokens) * min(self.loss.columns, self.vocabulary.size)
        loss = 2.8 * 4 * tile + (c + 4) * self.vocabulary.size * model.width
        return Memory(16 * own, 4 * own, round(activations), round(loss))

    def largest_rows(self, abstract: Any, bytes_of_device: float) -> int:
        """Rows that a device has room for; 0 if not one."""
        one, two = (self.memory(abstract, rows).total for rows in (1, 2))
        return max(0, int((bytes_of_device - one) // (two - one)) + 1)

    def communication(self, abstract: Any, rows: int) -> int:
        """Bytes that a device sends in a step."""
        model, c, own = self.model, self.bytes_of_activation, self.own_parameters(abstract)
        gathered = own * self.fsdp
        total = (2 * c + 4) * gathered * (self.fsdp - 1) / self.fsdp
        total += 2 * 4 * own * (self.data - 1) / self.data
        added = 2 * c * rows * self.row_length * model.width * (self.tensor - 1) / self.tensor
        return round(total + 4 * model.num_layers * added)
