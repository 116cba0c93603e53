"""Trains an agent of Stable-Baselines3 to unmask: `pip install 'trimask[agents]'`, then run this; two minutes.

The model is a toy: four pairs of equal bits. It is sure of a bit whose twin it sees and guesses otherwise, so both
bits of a pair must not be revealed at once. Everything in one step is right by half and worth 0.5; one of each pair
and then the others is right and worth 7/8. For a real model pass its denoiser, and problems that it can be asked.
"""

import gymnasium
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import trimask.sampling_rl  # noqa: F401 - registers the environment
from trimask.diffusion.denoiser import DenoiserOutput
from trimask.sampling_rl.environment import UnmaskingConfig
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.vocabulary import Vocabulary

vocabulary = Vocabulary(text_size=2)
zero = vocabulary.text_range.start
request = Example("text", (Segment("text", np.full(8, -1)),))


def denoise(sequence, positions=None, cache=None):
    """A bit's twin is before or after it; a row begins with two tokens of another kind."""
    places = jnp.arange(sequence.length)
    twin = sequence.tokens[:, jnp.clip(2 + ((places - 2) ^ 1), 0, sequence.length - 1)]
    ids = jnp.arange(vocabulary.size)
    is_twin = (ids == twin[..., None]) & (twin[..., None] != vocabulary.mask_id)
    logits = jnp.where(is_twin, 30.0, jnp.where((ids >= zero) & (ids < zero + 2), 0.0, -30.0))
    return DenoiserOutput(logits, Partial(lambda features: features), logits, ())


def share_of_equal_pairs(problems, examples):
    pairs = np.stack([example.segments[0].codes for example in examples]).reshape(len(examples), 4, 2)
    return ((pairs[..., 0] == pairs[..., 1]) & (pairs[..., 0] >= 0)).mean(axis=1)


environment = {
    "problems": ProblemSet("pairs", vocabulary, [Problem(request, {})], share_of_equal_pairs),
    "denoise": denoise,
    "config": UnmaskingConfig(temperature=1.0, stop_at_eos=False),
}
envs = make_vec_env(lambda: gymnasium.make("trimask/Unmasking-v0", **environment), n_envs=8, seed=0)
agent = PPO("MultiInputPolicy", envs, n_steps=64, batch_size=128, n_epochs=4, learning_rate=1e-3, gamma=1.0, seed=0)
print(f"before: {evaluate_policy(agent, envs, 100)[0]:.3f}")
agent.learn(total_timesteps=30_000)
print(f"after:  {evaluate_policy(agent, envs, 100)[0]:.3f}")
