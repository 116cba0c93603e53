"""Registers the environment: `gymnasium.make("trimask/Unmasking-v0", problems=…, denoise=…)`, and `make_vec`."""

from gymnasium.envs.registration import register

register(
    id="trimask/Unmasking-v0",
    entry_point="trimask.sampling_rl.environment:UnmaskingEnv",
    vector_entry_point="trimask.sampling_rl.environment:UnmaskingVectorEnv",
)
