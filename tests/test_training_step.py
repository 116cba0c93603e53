"""Random numbers drawn from a seed stay the same from version to version."""

import fakes
import jax
import numpy as np
import pytest

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.sampling.policy import PolicyConfig, new_policy_parameters
from trimask.diffusion.transformer import TransformerConfig

SIZE = TransformerConfig(num_layers=2, width=16, num_heads=2, mlp_width=16, place_features=8)


def first_of(parameters) -> dict[str, float]:
    """Name of every array that is not constant → its first number."""
    named = jax.tree_util.tree_leaves_with_path(parameters)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.ravel(leaf) for path, leaf in named}
    return {name: float(array[0]) for name, array in arrays.items() if (array != array[0]).any()}


def test_a_network_begins_with_the_parameters_of_its_seed():
    parameters = Pretraining(TrainConfig(model=SIZE, seed=3), fakes.VOCABULARY).init().parameters
    assert first_of(parameters) == pytest.approx(
        {
            "blocks/0/attention/key": -0.1601,
            "blocks/0/attention/out": 0.1848,
            "blocks/0/attention/query": -0.0155,
            "blocks/0/attention/value": 0.0362,
            "blocks/0/mlp/down": 0.3874,
            "blocks/0/mlp/gate": 0.2210,
            "blocks/0/mlp/up": -0.0449,
            "blocks/1/attention/key": -0.0048,
            "blocks/1/attention/out": 0.0514,
            "blocks/1/attention/query": 0.2402,
            "blocks/1/attention/value": 0.3438,
            "blocks/1/mlp/down": -0.0036,
            "blocks/1/mlp/gate": 0.1574,
            "blocks/1/mlp/up": -0.2216,
            "embedding": 0.3874,
            "place/map": -0.8860,
            "place/range": -0.8419,
            "place/scale": -0.3740,
            "unembedding": -0.0498,
        },
        abs=1e-4,
    )


def test_a_policy_begins_with_the_parameters_of_its_seed():
    parameters = new_policy_parameters(PolicyConfig(width=8, mlp_width=8, num_heads=1), jax.random.key(3), 64)
    assert first_of(parameters) == pytest.approx(
        {
            "attention_out/kernel": -0.5777,
            "down/kernel": -0.4646,
            "input/kernel": -2.1209,
            "output/kernel": 0.0169,
            "query_key_value/kernel": -0.2871,
            "status/embedding": -0.2078,
            "time_in/kernel": -0.2296,
            "time_out/kernel": -0.1328,
            "up/kernel": -0.3963,
        },
        abs=1e-4,
    )
