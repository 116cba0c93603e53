"""Do complementary masks lower the variance of the gradient at equal compute?

    python -m trimask.diffusion.studies.mask_variance runs/tiny

For a trained model and each schedule: the trace of the gradient's covariance over random batches and masks, with n
independent examples, and with n/2 examples that enter with a mask and its complement. Both cost n rows.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.train import Loaded, Pretraining, load


def gradient_variance(loaded: Loaded, prepared: Prepared, masking: MaskingConfig, draws: int) -> float:
    """Trace of the covariance of the ELBO's gradient, by `draws` batches of one dataset."""
    train = dataclasses.replace(loaded.description.train, masking=masking, loss=LossConfig(weighting="elbo"))
    pretraining = Pretraining(train, loaded.vocabulary)
    others = {name: 0.0 for name in list(prepared.manifest.datasets)[1:]}
    batch_config = BatchConfig(tokens=train.batch.tokens, weights=others)
    batches = Batches(prepared, batch_config, seed=1, copies=2 if masking.complementary else 1)

    @jax.jit
    def gradient(key, batch):
        noised = forward_process(key, batch, loaded.vocabulary, masking)
        return ravel_pytree(pretraining.gradients(loaded.parameters, noised)[2])[0]

    keys = jax.random.split(jax.random.key(0), draws)
    total = squares = jnp.zeros(())
    for draw in range(draws):
        flat = gradient(keys[draw], batches(draw))
        total, squares = total + flat, squares + flat @ flat
    mean = total / draws
    return float((squares / draws - mean @ mean) * draws / (draws - 1))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model")
    parser.add_argument("--draws", type=int, default=200, help="batches per row of the table")
    arguments = parser.parse_args()
    loaded = load(arguments.run)
    prepared = Prepared(Path(loaded.description.data))
    print("| schedule | independent | complementary | ratio |\n|---|---|---|---|")
    for kind in ("linear", "cosine_md4", "cosine_mdlm", "polynomial"):
        schedule = ScheduleConfig(kind=kind)
        variances = np.array(
            [
                gradient_variance(
                    loaded, prepared, MaskingConfig(schedule=schedule, complementary=pairs), arguments.draws
                )
                for pairs in (False, True)
            ]
        )
        print(f"| {kind} | {variances[0]:.3g} | {variances[1]:.3g} | {variances[1] / variances[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
