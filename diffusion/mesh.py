"""Sharding: a mesh of devices, and a table of the mesh axes along which each parameter is split.

    data     rows of the batch; each part has a copy of everything else
    fsdp     rows of the batch, and the widths of all matrices, which are gathered only while they are used
    tensor   heads and hidden units; the widths of the embeddings; and the positions whose logits are computed

Gradients, moments and the weight average are sharded like their parameters. An array axis whose length the mesh axis
does not divide is not split. The result of a step does not depend on the mesh, except for the order of sums.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from trimask.tokenizers.storage.ranges import Checked, whole

ROW_AXES = ("data", "fsdp")
"""Mesh axes along which the rows of a batch are split."""
AXES = (*ROW_AXES, "tensor")

_LOGICAL_AXES = {
    "embedding": (None, "embedding_width"),
    "unembedding": ("embedding_width", None),
    "query": ("width", "heads", None),
    "key": ("width", "heads", None),
    "value": ("width", "heads", None),
    "out": ("heads", None, "width"),
    "gate": ("width", "hidden"),
    "up": ("width", "hidden"),
    "down": ("hidden", "width"),
}
"""Parameter name → logical axes; parameters that are not listed are not split."""
_RULES = {
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "width": ("fsdp",),
    "embedding_width": ("fsdp", "tensor"),  # the vocabulary size is rarely divisible
}
"""Logical axis → mesh axes along which it is split."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Sharding of the work over devices."""

    data: Annotated[int, whole(1, 1 << 20)] | None = None
    """Number of parts into which rows are split, in addition to fsdp. None: as many as the number of devices allows."""
    fsdp: Annotated[int, whole(1, 1 << 20)] = 1
    """Number of parts into which rows and the widths of all matrices are split (fully sharded data parallelism)."""
    tensor: Annotated[int, whole(1, 1 << 20)] = 1
    """Number of parts into which heads and hidden units are split (tensor parallelism)."""

    def over(self, devices: Sequence[Any]) -> Mesh:
        """The mesh of these devices. Raises ValueError unless it uses all of them."""
        shape = self.sizes(len(devices))
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Sizes of the axes data, fsdp and tensor. Raises ValueError unless they use all of the `devices` devices."""
        rest = self.fsdp * self.tensor
        data = devices // rest if self.data is None else self.data
        if data * rest != devices:
            data_axis = "data (any)" if self.data is None else f"data {self.data}"
            raise ValueError(
                f"a mesh of {data_axis} × fsdp {self.fsdp} × tensor {self.tensor} does not use all {devices} devices"
            )
        return data, self.fsdp, self.tensor


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Context in which `constrain` and `constrain_parameters` use this mesh; None: no mesh."""
    return nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh in use; None if there is none, or if it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Sharding of every array in a tree of parameters, moments or the like, looked up by the last name in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(_name(path), leaf.shape, mesh)), tree
    )


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Mesh axes along which the axes of a parameter, or of several parameters stacked, are split."""
    logical = _LOGICAL_AXES.get(name, ())
    if len(logical) + 1 == len(shape):
        logical = (None, *logical)
    if len(logical) != len(shape):
        return PartitionSpec()
    split: list[tuple[str, ...] | None] = []
    for axis, size in zip(logical, shape, strict=True):
        axes = _RULES.get(axis or "")
        split.append(axes if axes and size % prod(mesh.shape[name] for name in axes) == 0 else None)
    return PartitionSpec(*split)


def _name(path: tuple[Any, ...]) -> str:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)]
    return names[-1] if names else ""


def constrain_parameters(tree: Any) -> Any:
    """The same arrays, sharded over the current mesh as the table says."""
    mesh = current_mesh()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def gather(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays from the mesh to the first device of this process; all processes must call this together."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf.addressable_data(0), jax.local_devices()[0]), _replicated(mesh, tree)
    )


@partial(jax.jit, static_argnums=0)
def _replicated(mesh: Mesh, tree: Any) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """The array, constrained to be split along these axes of the current mesh; unchanged without a mesh."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def embedding_lookup(
    table: Float[Array, "vocab width"], tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq width"]:
    """table[tokens], split along the rows of the batch although the table is split along its width.

    This takes several steps, each of which is a cheap exchange between devices. In one step the compiler finds no such
    exchange and would copy everything to all devices.
    """
    mesh = current_mesh()
    if mesh is None or partition_spec("embedding", table.shape, mesh)[1] is None:
        return constrain(table[tokens], ROW_AXES)
    data, fsdp, tensor = AXES
    h = constrain(table[constrain(tokens, data)], data, None, (fsdp, tensor))
    return constrain(constrain(h, ROW_AXES, None, tensor), ROW_AXES)


def rows_to_devices(batch: Any, mesh: Mesh, parts: int = 1) -> Any:
    """Copies a batch of NumPy arrays to the mesh, padded with empty rows so that each of `parts` can be divided evenly.

    Every process passes the whole batch; only its `local_rows` are read.
    """
    if mesh.size == 1:
        return jax.device_put(batch, mesh.devices.item())
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))

    def to_devices(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        x = np.pad(x, [(0, _padded_rows(len(x), mesh, parts) - len(x))] + [(0, 0)] * (x.ndim - 1))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(to_devices, batch)


def local_rows(num_rows: int, mesh: Mesh, parts: int = 1) -> Bool[np.ndarray, " rows"]:
    """True for the rows of a batch that `rows_to_devices` copies to the devices of this process."""
    total = _padded_rows(num_rows, mesh, parts)
    slices = NamedSharding(mesh, PartitionSpec(ROW_AXES)).addressable_devices_indices_map((total,))
    is_local = np.zeros(total, bool)
    for rows in slices.values():
        is_local[rows] = True
    return is_local[:num_rows]


def split_rows(x: Shaped[Array | np.ndarray, "rows *rest"]) -> Shaped[Array | np.ndarray, "rows *rest"]:
    """Splits rows over all devices if these divide them evenly; otherwise returns the array unchanged."""
    devices = jax.devices()
    if len(devices) == 1 or len(x) % len(devices):
        return x
    return jax.device_put(x, NamedSharding(MeshConfig().over(devices), PartitionSpec(ROW_AXES)))


def replicate(tree: Any) -> Any:
    """Copies arrays to all devices."""
    if len(jax.devices()) == 1:
        return tree
    return jax.device_put(tree, NamedSharding(MeshConfig().over(jax.devices()), PartitionSpec()))


def _padded_rows(num_rows: int, mesh: Mesh, parts: int) -> int:
    multiple = parts * prod(mesh.shape[axis] for axis in ROW_AXES)
    return num_rows + -num_rows % multiple
