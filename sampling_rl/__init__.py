"""Learned unmasking. Importing it registers the Gymnasium environment trimask/Unmasking-v0.

gymnasium.make("trimask/Unmasking-v0", run="runs/cups", task="text")
gymnasium.make("trimask/Unmasking-v0", problems=…, denoise=…)
gymnasium.make_vec("trimask/Unmasking-v0", num_envs, …)
"""

from gymnasium.envs.registration import register

register(
    id="trimask/Unmasking-v0",
    entry_point="trimask.sampling_rl.environment:UnmaskingEnv",
    vector_entry_point="trimask.sampling_rl.environment:UnmaskingVectorEnv",
)
