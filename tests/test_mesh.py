"""Meshes of devices: every shape gives the same step, and no device holds more than its part."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from trimask.diffusion.mesh import MeshConfig, partition_spec

EIGHT = """
    import dataclasses, pathlib, sys
    import jax, numpy as np
    from trimask.diffusion.data.batches import BatchConfig, Batches
    from trimask.diffusion.data.prepared import Prepared
    from trimask.diffusion.masking import MaskingConfig
    from trimask.diffusion.mesh import MeshConfig, gather, rows_to_devices
    from trimask.diffusion.pretraining.description import TrainConfig
    from trimask.diffusion.pretraining.training_step import Pretraining
    from trimask.diffusion.transformer import TransformerConfig

    model = TransformerConfig(num_layers=1, width=16, num_heads=4, mlp_width=16)
    # 12 rows: no mesh divides them evenly.
    config = TrainConfig(model=model, batch=BatchConfig(tokens=168, weights={"spoken": 0.0, "sums": 0.0}))
    prepared = Prepared(pathlib.Path(sys.argv[1]))
    batch = Batches(prepared, config.batch, seed=0)(0)
    assert len(jax.devices()) == 8 and batch.tokens.shape[0] == 12

    def steps(mesh, accumulate, blocks="unrolled"):
        computed = dataclasses.replace(model, blocks=blocks)
        asked = dataclasses.replace(config, accumulate=accumulate, mesh=mesh, model=computed)
        mesh = mesh.over(jax.devices() if mesh.data is None else jax.devices()[:1])
        targets = {"text": 20.0, "image": 30.0}
        pretraining = Pretraining(asked, prepared.tokenizers.vocabulary, mean_targets=targets, mesh=mesh)
        state, losses = pretraining.init(), []
        for _ in range(2):
            state, metrics = pretraining.step(state, rows_to_devices(batch, mesh, accumulate))
            losses.append(float(metrics["loss"]))
        return losses, state, mesh

    one, alone, _ = steps(MeshConfig(data=1), 1)
    for fsdp, tensor, accumulate, blocks in ((8, 1, 1, "unrolled"), (2, 2, 2, "scanned")):
        losses, state, mesh = steps(MeshConfig(fsdp=fsdp, tensor=tensor), accumulate, blocks)
        np.testing.assert_allclose(one, losses, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, gather(state, mesh))
        copies = {"embedding": fsdp * tensor, "query": fsdp * tensor, "down": fsdp * tensor, "scale": 1}
        for tree in (state.parameters, state.average, state.optimizer.mu, state.optimizer.nu):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                parts = copies.get(path[-1].key)
                assert parts is None or leaf.size == parts * leaf.addressable_shards[0].data.size, (path, leaf.sharding)
    print("same")
"""


def run_on_eight_devices(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    places = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))  # ours first, and the trimask that we import
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        check=False,
    )


def test_every_mesh_takes_the_step_of_one_device(prepared):
    result = run_on_eight_devices(EIGHT, str(prepared.folder))
    assert result.stdout.strip() == "same", result.stderr
    assert "rematerialization" not in result.stderr


@pytest.mark.parametrize(
    ("name", "shape", "split"),
    [
        ("embedding", (23, 16), (None, ("fsdp", "tensor"))),
        ("unembedding", (16, 23), (("fsdp", "tensor"), None)),
        ("query", (16, 4, 6), (("fsdp",), ("tensor",), None)),
        ("key", (16, 4, 6), (("fsdp",), ("tensor",), None)),
        ("value", (16, 4, 6), (("fsdp",), ("tensor",), None)),
        ("out", (4, 6, 16), (("tensor",), None, ("fsdp",))),
        ("gate", (16, 28), (("fsdp",), ("tensor",))),
        ("up", (16, 28), (("fsdp",), ("tensor",))),
        ("down", (28, 16), (("tensor",), ("fsdp",))),
        ("scale", (16,), (None,)),
        # Axes that the mesh does not divide stay whole; an embedding's width is split only if fsdp · tensor divides it.
        ("query", (16, 3, 6), (("fsdp",), None, None)),
        ("down", (28, 15), (("tensor",), None)),
        ("embedding", (23, 12), (None, None)),
        # The blocks' parameters, stacked.
        ("down", (8, 28, 16), (None, ("tensor",), ("fsdp",))),
        ("scale", (8, 16), ()),
    ],
)
def test_a_parameter_is_split_as_its_name_and_its_shape_say(name, shape, split):
    mesh = AbstractMesh((3, 2, 4), ("data", "fsdp", "tensor"))
    assert partition_spec(name, shape, mesh) == PartitionSpec(*split)


def test_meshes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ValueError, match="fsdp 3 × tensor 1 does not use all 1 devices"):
        MeshConfig(fsdp=3).over(jax.devices())
    with pytest.raises(ValueError, match="a mesh of data 2 × fsdp 1"):
        MeshConfig(data=2).over(jax.devices())
    with pytest.raises(ValueError, match="must be at least 1"):
        MeshConfig(data=0, tensor=0)
