"""Where arrays lie: one mesh of devices, and one table that says along which of its axes each parameter is split.

    data     rows of the batch; each part has a copy of everything else
    fsdp     rows of the batch, and the widths of all matrices: whoever needs a matrix gathers it for as long
    tensor   heads and hidden units; the widths of the embeddings; and the positions whose logits are computed

Gradients, moments and the weight average lie as their parameters do. An axis of an array that the mesh does not divide
evenly stays whole. What a step computes does not depend on the mesh, but for the order of sums.
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

ROWS = ("data", "fsdp")
"""Mesh axes over which rows of a batch are split."""
AXES = (*ROWS, "tensor")

# Logical axes of every parameter by its name; a name that is not here stays whole on every device.
_LOGICAL = {
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
_RULES = {
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "width": ("fsdp",),
    "embedding_width": ("fsdp", "tensor"),  # the number of tokens is rarely one that can be divided
}


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Along which axes work is shared among devices."""

    data: Annotated[int, whole(1, 1 << 20)] | None = None
    """Parts into which rows are split, beside those of fsdp. None: as many as there are devices for."""
    fsdp: Annotated[int, whole(1, 1 << 20)] = 1
    """Parts into which rows and the width of every matrix are split."""
    tensor: Annotated[int, whole(1, 1 << 20)] = 1
    """Parts into which heads and hidden units are split."""

    def over(self, devices: Sequence[Any]) -> Mesh:
        """The mesh of these devices."""
        shape = self.sizes(len(devices))
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Of data, fsdp and tensor on so many devices, of which all must be used."""
        rest = self.fsdp * self.tensor
        data = devices // rest if self.data is None else self.data
        if data * rest != devices:
            asked = "devices for whole rows" if self.data is None else f"data {self.data}"
            raise ValueError(
                f"a mesh of {asked} × fsdp {self.fsdp} × tensor {self.tensor} does not use all of the {devices} devices"
            )
        return data, self.fsdp, self.tensor


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Makes it the mesh that `constrained` and `laid_out` go by; None: that there is none."""
    return nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh in use, if it has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Of every array of a tree of parameters, or of anything that holds such trees, by the last name of its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(_name(path), leaf.shape, mesh)), tree
    )


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Along which mesh axis each axis of a parameter, or of several stacked, is split."""
    logical = _LOGICAL.get(name, ())
    if len(logical) + 1 == len(shape):
        logical = (None, *logical)
    if len(logical) != len(shape):
        return PartitionSpec()

    def axes(name: str | None, size: int) -> tuple[str, ...] | None:
        split = _RULES.get(name or "")
        return split if split and size % prod(mesh.shape[axis] for axis in split) == 0 else None

    return PartitionSpec(*map(axes, logical, shape))


def _name(path: tuple[Any, ...]) -> str:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)]
    return names[-1] if names else ""


def laid_out(tree: Any) -> Any:
    """The same arrays, each split as the table says over the mesh in use."""
    mesh = current_mesh()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def gathered(tree: Any, mesh: Mesh) -> Any:
    """What lies on the mesh, whole on the first device of this process; all processes must ask for it."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf.addressable_data(0), jax.local_devices()[0]), _everywhere(mesh, tree)
    )


@partial(jax.jit, static_argnums=0)
def _everywhere(mesh: Mesh, tree: Any) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def constrained(x: jax.Array, *axes: Any) -> jax.Array:
    """The array, split along these axes of the mesh in use; without a mesh as it is."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def embedding_lookup(
    table: Float[Array, "vocab width"], tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq width"]:
    """table[tokens], split by rows of the batch, though the table is split along its width.

    In steps for each of which the devices have a cheap exchange; the compiler finds none for all of them at once, and
    would copy everything to everyone.
    """
    mesh = current_mesh()
    if mesh is None or partition_spec("embedding", table.shape, mesh)[1] is None:
        return constrained(table[tokens], ROWS)
    data, fsdp, tensor = AXES
    h = constrained(table[constrained(tokens, data)], data, None, (fsdp, tensor))
    return constrained(constrained(h, ROWS, None, tensor), ROWS)


def place_rows(batch: Any, mesh: Mesh, parts: int = 1) -> Any:
    """A batch of NumPy arrays on the mesh, filled up with empty rows so that each of `parts` divides evenly.

    Every process gives a whole batch, and of it only `own_rows` are looked at.
    """
    if mesh.size == 1:
        return jax.device_put(batch, mesh.devices.item())
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        x = np.pad(x, [(0, _filled_up(len(x), mesh, parts) - len(x))] + [(0, 0)] * (x.ndim - 1))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


def own_rows(num_rows: int, mesh: Mesh, parts: int = 1) -> Bool[np.ndarray, " rows"]:
    """Which rows of a batch of so many the devices of this process take, as `place_rows` places them."""
    total = _filled_up(num_rows, mesh, parts)
    places = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((total,))
    is_own = np.zeros(total, bool)
    for place in places.values():
        is_own[place] = True
    return is_own[:num_rows]


def rows_on_all_devices(x: Shaped[Array | np.ndarray, "rows *rest"]) -> Shaped[Array | np.ndarray, "rows *rest"]:
    """Rows shared out over the devices, where these divide them evenly; else the array as it is."""
    devices = jax.devices()
    if len(devices) == 1 or len(x) % len(devices):
        return x
    return jax.device_put(x, NamedSharding(MeshConfig().over(devices), PartitionSpec(ROWS)))


def copied_to_all_devices(tree: Any) -> Any:
    """The same arrays on each device."""
    if len(jax.devices()) == 1:
        return tree
    return jax.device_put(tree, NamedSharding(MeshConfig().over(jax.devices()), PartitionSpec()))


def _filled_up(num_rows: int, mesh: Mesh, parts: int) -> int:
    multiple = parts * prod(mesh.shape[axis] for axis in ROWS)
    return num_rows + -num_rows % multiple
