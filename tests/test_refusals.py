"""The limits of every configuration: the last value that is allowed, and the first that is refused, in words."""

import sys
from pathlib import Path

import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers.tfds_records import EmbeddedDigits
from trimask.diffusion.data.reading_config import PictureConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.mesh import MeshConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.diffusion.sampling.state import Rules
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.studies.batch_invariance import BatchInvariance
from trimask.diffusion.studies.coordinate_check import CoordinateCheck
from trimask.diffusion.studies.critical_batch import CriticalBatch
from trimask.diffusion.studies.kill_and_resume import KillAndResume
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer
from trimask.diffusion.studies.mask_variance import MaskVariance
from trimask.diffusion.studies.multiplier_search import MultiplierSearch
from trimask.diffusion.studies.sampling_fronts import SamplingStudy
from trimask.diffusion.transformer import TransformerConfig
from trimask.sampling_rl.episode_batch import UnmaskingConfig
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.studies.unmasking import UnmaskingStudy
from trimask.sampling_rl.train_policy import PolicyTrainConfig
from trimask.scripts import generate, plan
from trimask.scripts.benchmarks import attention, checkpoint, data, loss, rollout, sample, train
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig
from trimask.tokenizers.vocabulary import Vocabulary

BASE, OUT = TrainConfig(), Path("out")
GREEDY = GenerationConfig(temperature=0.0)
PLANNED = {
    "preset": "tiny", "model": BASE.model, "mesh": BASE.mesh,
    "batch_tokens": 1, "accumulate": 1, "horizon_tokens": 1, "devices": 1, "row_length": 1,
}  # fmt: skip
LIMITS = [
    (PatchConfig, {}, {"patch_side": 1}, {"patch_side": 0}),
    (PatchConfig, {}, {"codebook_size": 1}, {"codebook_size": 0}),
    (MelConfig, {}, {"codebook_size": 2}, {"codebook_size": 1}),
    (MelConfig, {}, {"hop": 64, "window": 128}, {"hop": 64, "window": 126}),
    (MelConfig, {}, {"hop": 64, "window": 130}, {"hop": 64, "window": 131}),
    (Vocabulary, {}, {"text_size": 1}, {"text_size": 0}),
    (Vocabulary, {"text_size": 3}, {"codebook_sizes": {"image": (1,)}}, {"codebook_sizes": {"image": (0,)}}),
    (Vocabulary, {"text_size": 3}, {"codebook_sizes": {}}, {"codebook_sizes": {"image": ()}}),
    (Vocabulary, {"text_size": 3}, {"codebook_sizes": {"texts": (1,)}}, {"codebook_sizes": {"text": (1,)}}),
    (Vocabulary, {"text_size": 3}, {"codebook_sizes": {"a_b": (1,)}}, {"codebook_sizes": {"a-b": (1,)}}),
    (Family, {}, {"of": {"query": 0.0}}, {"of": {"query": -0.1}}),
    (Family, {}, {"depth": (0.1,)}, {"depth": (0.0,)}),
    (ModuleMultipliers, {}, {"weight_decay": Family(of={"query": 0.0})}, {"init": Family(of={"query": 0.0})}),
    (ModuleMultipliers, {}, {"residual": Family(of={"mlp": 2.0})}, {"residual": Family(of={"up": 2.0})}),
    (ModuleMultipliers, {}, {"init": Family(of={"up": 2.0})}, {"init": Family(of={"mlp": 2.0})}),
    (ParametrizationConfig, {}, {"alpha": 0.5}, {"alpha": 0.49}),
    (ParametrizationConfig, {}, {"alpha": 1.0}, {"alpha": 1.01}),
    *((ParametrizationConfig, {}, {f"base_{n}": 1}, {f"base_{n}": 0}) for n in ("width", "layers", "heads")),
    (TrainConfig, {}, {"accumulate": 1}, {"accumulate": 0}),
    *((MeshConfig, {}, {name: 1}, {name: 0}) for name in ("data", "fsdp", "tensor")),
    (ScheduleConfig, {}, {"power": 0.01}, {"power": 0.0}),
    (ScheduleConfig, {}, {"min_share": 1e-9}, {"min_share": 0.0}),
    (ScheduleConfig, {}, {"min_share": 0.49}, {"min_share": 0.5}),
    *((LoopConfig, {}, {name: 1}, {name: 0}) for name in ("log_every", "checkpoint_every", "keep_last", "keep_every")),
    *((LoopConfig, {}, {name: 0}, {name: -1}) for name in ("sample_every", "keep_best", "workers")),
    (LoopConfig, {}, {"spike_factor": 1.01}, {"spike_factor": 1.0}),
    (OptimizerConfig, {}, {"warmup_tokens": 0}, {"warmup_tokens": -1}),
    *((OptimizerConfig, {}, {name: 0.0}, {name: -0.1}) for name in ("beta1", "beta2", "ema_decay", "weight_decay")),
    *((OptimizerConfig, {}, {name: 0.99}, {name: 1.0}) for name in ("beta1", "beta2", "ema_decay")),
    *((OptimizerConfig, {}, {name: 1e-9}, {name: 0.0}) for name in ("learning_rate", "epsilon", "clip_norm")),
    (OptimizerConfig, {}, {"final_fraction": 1.0}, {"final_fraction": 1.1}),
    (
        OptimizerConfig,
        {"horizon_tokens": 9, "warmup_tokens": 4, "schedule": "warmup_stable_decay"},
        {"decay_tokens": 7},
        {"decay_tokens": 8},
    ),
    (LearningRateTransfer, {"base": BASE}, {"seeds": 1}, {"seeds": 0}),
    (LearningRateTransfer, {"base": BASE}, {"log2_learning_rates": (-7,)}, {"log2_learning_rates": ()}),
    (MaskVariance, {"base": TrainConfig()}, {"examples": 5}, {"examples": 4}),
    (SamplingStudy, {}, {"draws": 2}, {"draws": 1}),
    (SamplingStudy, {}, {"blocks": (1,)}, {"blocks": (0,)}),
    *((SamplingStudy, {}, {name: (1.0,)}, {name: ()}) for name in ("guidances", "temperatures")),
    (SamplingStudy, {}, {"steps": (1,)}, {"steps": ()}),
    (CriticalBatch, {"base": BASE}, {"horizons": (10,)}, {"horizons": ()}),
    (CriticalBatch, {"base": BASE}, {"batches": (1, 2, 3)}, {"batches": (1, 2)}),
    (KillAndResume, {"steps": 12}, {"kills": 8}, {"kills": 9}),
    (KillAndResume, {"steps": 12}, {"kills": 1}, {"kills": 0}),
    *((MultiplierSearch, {"base": BASE}, {name: 1}, {name: 0}) for name in ("per_round", "runs", "seeds")),
    *((MultiplierSearch, {"base": BASE}, {name: 1}, {name: 0}) for name in ("width_factor", "depth_factor")),
    (MultiplierSearch, {"base": BASE}, {"radius": 0.1}, {"radius": 0.0}),
    (MultiplierSearch, {"base": BASE}, {"changed": 1.0}, {"changed": 1.1}),
    (MultiplierSearch, {"base": BASE}, {"changed": 0.1}, {"changed": 0.0}),
    (BatchInvariance, {"base": BASE}, {"seeds": 1}, {"seeds": 0}),
    (BatchInvariance, {"base": BASE}, {"log2_factors": (0,)}, {"log2_factors": (1,)}),
    (CoordinateCheck, {"base": BASE}, {"widths": (1, 2)}, {"widths": (1,)}),
    (CoordinateCheck, {"base": BASE}, {"depths": (1, 2)}, {"depths": (1,)}),
    (CoordinateCheck, {"base": BASE}, {"kinds": (("mup", 1.0),)}, {"kinds": (("mup", 1.0), ("mup", 1.0))}),
    (PictureConfig, {}, {"height": 1, "width": 1}, {"height": 1, "width": 0}),
    (PictureConfig, {}, {"height": 1, "width": 1}, {"height": 0, "width": 1}),
    (PictureConfig, {}, {}, {"width": 1}),
    (EmbeddedDigits, {"folder": OUT}, {"name": "sums"}, {"name": "sum"}),
    (SplitConfig, {}, {"validation": 0.0, "test": 0.9}, {"validation": -0.1, "test": 0.9}),
    (SplitConfig, {}, {"validation": 0.5, "test": 0.4}, {"validation": 0.5, "test": 0.5}),
    (
        PrepareConfig,
        {},
        {"sources": {"a_b": SourceConfig(kind="text", where=("x",))}},
        {"sources": {"a/b": SourceConfig(kind="text", where=("x",))}},
    ),
    *((PrepareConfig, {}, {name: 1}, {name: 0}) for name in ("max_text_tokens", "fit_examples", "shard_records")),
    *((PrepareConfig, {}, {name: 1}, {name: 0}) for name in ("response_tokens", "workers")),
    (PrepareConfig, {}, {"seconds": 0.1}, {"seconds": 0.0}),
    (BatchConfig, {}, {"weights": {"a": 0.0}}, {"weights": {"a": -0.1}}),
    (BatchConfig, {}, {"task_weights": {"a": 0.0}}, {"task_weights": {"a": -0.1}}),
    (BatchConfig, {}, {"masked_prompt_share": 0.0}, {"masked_prompt_share": -0.1}),
    (BatchConfig, {}, {"masked_prompt_share": 1.0}, {"masked_prompt_share": 1.1}),
    (BatchConfig, {"final_weights": {"a": 1.0}}, {"anneal_tokens": (0, 0)}, {"anneal_tokens": (1, 0)}),
    (BatchConfig, {"final_weights": {"a": 1.0}}, {"anneal_tokens": (0, 0)}, {"anneal_tokens": (-1, 0)}),
    (BatchConfig, {"anneal_tokens": (0, 1)}, {"final_weights": {"a": 1.0}}, {"final_weights": {}}),
    *((EvaluateConfig, {}, {name: 1}, {name: 0}) for name in ("max_examples", "bound_samples", "fit_examples", "rows")),
    (MaskingConfig, {"drop_probability": 0.0}, {"joint_probability": 0.0}, {"joint_probability": -0.1}),
    (MaskingConfig, {"joint_probability": 0.0}, {"drop_probability": 0.0}, {"drop_probability": -0.1}),
    (MaskingConfig, {"drop_probability": 0.5}, {"joint_probability": 0.5}, {"joint_probability": 0.6}),
    *((TransformerConfig, {}, {name: 1}, {name: 0}) for name in ("num_layers", "num_heads", "num_kv_heads")),
    (TransformerConfig, {"num_heads": 1}, {"width": 2}, {"width": 0}),
    (TransformerConfig, {}, {"place_features": 4}, {"place_features": 0}),
    (TransformerConfig, {}, {"place_features": 8}, {"place_features": 6}),
    (TransformerConfig, {"num_heads": 4}, {"num_kv_heads": 2}, {"num_kv_heads": 3}),
    (TransformerConfig, {"num_heads": 4}, {"width": 24}, {"width": 26}),
    (TransformerConfig, {}, {"head_size": 4}, {"head_size": 3}),
    (TransformerConfig, {"rotary_base": None}, {"head_size": 3}, {"head_size": 0}),
    (LossConfig, {}, {"z_loss": 0.0}, {"z_loss": -0.1}),
    (LossConfig, {}, {"modality_weights": {"text": 0.0}}, {"modality_weights": {"text": -0.1}}),
    *((LossConfig, {}, {name: 1}, {name: 0}) for name in ("tile_positions", "tile_ids")),
    (GenerationConfig, {}, {"strategy": "random"}, {"strategy": "randomly"}),
    (GenerationConfig, {}, {"steps": 1}, {"steps": 0}),
    *((GenerationConfig, {}, {name: 0.0}, {name: -0.1}) for name in ("temperature", "guidance", "threshold", "min_p")),
    (GenerationConfig, {}, {"threshold": 1.0}, {"threshold": 1.1}),
    (GenerationConfig, {}, {"temperature": 9.0}, {"temperature": float("inf")}),
    (GenerationConfig, {}, {"top_p": 0.1}, {"top_p": 0.0}),
    (GenerationConfig, {}, {"top_p": 1.0}, {"top_p": 1.1}),
    (GenerationConfig, {}, {"loop_until": 0.1, "loop_from": 0.2}, {"loop_until": 0.2, "loop_from": 0.2}),
    (GenerationConfig, {}, {"loop_from": 0.9}, {"loop_from": 1.0}),
    (GenerationConfig, {}, {"loop_kept": 0.1}, {"loop_kept": 0.0}),
    (GenerationConfig, {}, {"loop_kept": 0.9}, {"loop_kept": 1.0}),
    (Rules, {"mask_id": 0}, {"block_length": 1}, {"block_length": 0}),
    (Rules, {"mask_id": 0, "cache": "dual"}, {"block_length": 1}, {"block_length": None}),
    (Rules, {"mask_id": 0, "block_length": 2, "cache": "dual"}, {"shows_all": False}, {"shows_all": True}),
    (PolicyConfig, {}, {"inputs": ("top",)}, {"inputs": ("top", "top")}),
    (PolicyConfig, {}, {"inputs": ("top",)}, {"inputs": ()}),
    (PolicyConfig, {"inputs": ("hidden",)}, {"hidden_size": 1}, {"hidden_size": None}),
    (PolicyConfig, {"inputs": ("hidden",)}, {"hidden_size": 1}, {"hidden_size": 0}),
    (PolicyConfig, {}, {"hidden_size": None}, {"hidden_size": 1}),
    *((PolicyConfig, {}, {name: 1}, {name: 0}) for name in ("num_top", "num_heads", "mlp_width")),
    (PolicyConfig, {"num_heads": 3}, {"width": 12}, {"width": 16}),
    (PolicyConfig, {"num_heads": 1}, {"width": 4}, {"width": 6}),
    (Layout, {"fill": "whole"}, {"shapes": {"text": [2**24 - 2]}}, {"shapes": {"text": [2**24 - 1]}}),
    (Layout, {"fill": "whole"}, {"shapes": {"text": [1]}}, {"shapes": {"text": [1], "image": [2**24, 2**24, 2**24]}}),
    (Layout, {"fill": "whole"}, {"shapes": {"text": [1]}}, {"shapes": {"image": [1, 1]}}),
    (Layout, {"fill": "whole"}, {"shapes": {"text": [1]}}, {"shapes": {"text": [0]}}),
    (Layout, {"fill": "answer", "shapes": {"text": [9]}}, {"answer_length": 1}, {"answer_length": 0}),
    (SDEScaling, {}, {"base_batch_tokens": 0.1}, {"base_batch_tokens": 0.0}),
    (SDEScaling, {}, {"base_horizon_tokens": 1}, {"base_horizon_tokens": 0}),
    (SDEScaling, {}, {"gamma": 0.0}, {"gamma": -0.1}),
    (SDEScaling, {}, {"gamma": 1.0}, {"gamma": 1.1}),
    *((GRPOConfig, {}, {name: 1}, {name: 0}) for name in ("updates", "chunk")),
    (GRPOConfig, {}, {"group": 2}, {"group": 1}),
    (GRPOConfig, {}, {"warmup": 0}, {"warmup": -1}),
    *((GRPOConfig, {}, {name: 0.0}, {name: -0.1}) for name in ("kl", "entropy", "weight_decay")),
    *((GRPOConfig, {}, {name: 1e-9}, {name: 0.0}) for name in ("clip", "learning_rate")),
    (UnmaskingConfig, {"inputs": ("top",)}, {"num_top": 1}, {"num_top": 0}),
    (UnmaskingStudy, {}, {"blocks": (0,)}, {"blocks": (-1,)}),
    (UnmaskingStudy, {}, {"blocks": (0,)}, {"blocks": ()}),
    (UnmaskingStudy, {}, {"shown": 1}, {"shown": 0}),
    (RewardConfig, {}, {"alpha": 0.0}, {"alpha": -0.1}),
    (RewardConfig, {}, {"alpha": 1e9}, {"alpha": float("inf")}),
    *((PolicyTrainConfig, {"generation": GREEDY}, {n: 1}, {n: 0}) for n in ("problems_per_step", "expert_block")),
    *((PolicyTrainConfig, {"generation": GREEDY}, {n: 1e-9}, {n: 0.0}) for n in ("epochs", "temperature")),
    (PolicyTrainConfig, {"generation": GREEDY}, {"experts": (0.0, 1.0)}, {"experts": (-0.1,)}),
    (PolicyTrainConfig, {"generation": GREEDY}, {"experts": (1.0,)}, {"experts": (1.1,)}),
    (PolicyTrainConfig, {"generation": GREEDY, "learns_from": "experts"}, {"experts": (1.0,)}, {"experts": ()}),
    (PolicyTrainConfig, {}, {"generation": GREEDY}, {"generation": GenerationConfig(temperature=0.1)}),
    *(
        (rollout.Arguments, {"out": OUT}, {name: 1}, {name: 0})
        for name in ("vocabulary", "episodes", "prompt", "length", "repeats")
    ),
    *(
        (loss.Arguments, {"out": OUT, "masked": 1.0}, {name: 1}, {name: 0})
        for name in ("tokens", "width", "tile_positions", "tile_ids", "repeats")
    ),
    (loss.Arguments, {"out": OUT}, {"vocabularies": (3,)}, {"vocabularies": (2,)}),
    (loss.Arguments, {"out": OUT}, {"vocabularies": (3,)}, {"vocabularies": ()}),
    (loss.Arguments, {"out": OUT}, {"masked": 1.0}, {"masked": 1.1}),
    (loss.Arguments, {"out": OUT, "tokens": 10}, {"masked": 0.1}, {"masked": 0.0}),
    *((checkpoint.Arguments, {"out": OUT}, {name: 1}, {name: 0}) for name in ("vocabulary", "repeats")),
    *((train.Arguments, {"out": OUT}, {name: 1}, {name: 0}) for name in ("rows", "repeats")),
    (train.Arguments, {"out": OUT}, {"vocabularies": (64,)}, {"vocabularies": (63,)}),
    (train.Arguments, {"out": OUT}, {"length": 4}, {"length": 6}),
    (train.Arguments, {"out": OUT}, {"peak_tflops": 0.1}, {"peak_tflops": 0.0}),
    (train.Arguments, {"out": OUT, "md4": OUT}, {"md4_python": Path(sys.executable)}, {"md4_python": None}),
    *((data.Arguments, {"out": OUT, "data": OUT}, {name: 1}, {name: 0}) for name in ("packed_length", "batches")),
    (data.Arguments, {"out": OUT, "data": OUT}, {"tokens": (1,)}, {"tokens": (0,)}),
    (data.Arguments, {"out": OUT, "data": OUT}, {"tokens": (1,)}, {"tokens": ()}),
    (data.Arguments, {"out": OUT, "data": OUT}, {"workers": (0,)}, {"workers": (-1,)}),
    (data.Arguments, {"out": OUT, "data": OUT}, {"workers": (0,)}, {"workers": ()}),
    (attention.Arguments, {"out": OUT, "heads": 4}, {"kv_heads": 2}, {"kv_heads": 3}),
    *(
        (attention.Arguments, {"out": OUT, "kv_heads": 1}, {name: 1}, {name: 0})
        for name in ("tokens", "heads", "kv_heads", "head_size", "repeats")
    ),
    *(
        (attention.Arguments, {"out": OUT}, {name: (1,)}, {name: refused})
        for name in ("lengths", "examples")
        for refused in ((), (0,))
    ),
    *(
        (sample.Arguments, {"out": OUT}, {name: 1}, {name: 0})
        for name in ("vocabulary", "prompt", "per_evaluation", "repeats")
    ),
    *(
        (sample.Arguments, {"out": OUT, "per_evaluation": 1, "blocks": (1,)}, {name: (1,)}, {name: refused})
        for name in ("rows", "lengths", "blocks")
        for refused in ((), (0,))
    ),
    (sample.Arguments, {"out": OUT}, {"caches": ("none",)}, {"caches": ()}),
    *(
        (module.Arguments, {"out": OUT}, {"sizes": ("64x1",)}, {"sizes": refused})
        for module in (sample, train, checkpoint)
        for refused in ((), ("65x1",))
    ),
    (rollout.Arguments, {"out": OUT}, {"size": "64x1"}, {"size": "64x0"}),
    *((plan.Arguments, PLANNED, {n: 1}, {n: 0}) for n in PLANNED if PLANNED[n] == 1),
    (plan.Arguments, PLANNED, {"mfu": 1.0}, {"mfu": 1.1}),
    (plan.Arguments, PLANNED, {"mfu": 0.1}, {"mfu": 0.0}),
    (generate.Arguments, {"run": OUT, "prompt": ("a",), "to": "text"}, {"num": 1}, {"num": 0}),
    (generate.Arguments, {"run": OUT, "prompt": ("a",), "to": "text"}, {"seed": 2**32 - 1}, {"seed": 2**32}),
    (generate.Arguments, {"run": OUT, "prompt": ("a",), "to": "text"}, {"seed": 0}, {"seed": -1}),
    (generate.Arguments, {"run": OUT, "prompt": ("a",), "length": 3}, {"to": "text"}, {"to": "image"}),
    (generate.Arguments, {"run": OUT, "prompts": OUT, "to": "text"}, {"infill": ()}, {"infill": ("a_",)}),
]


def _name(limit):
    kind, _, _, refused = limit
    return f"{kind.__module__.rsplit('.', 1)[-1]}-{kind.__name__}-{refused}"


@pytest.mark.parametrize("limit", LIMITS, ids=_name)
def test_the_last_value_is_allowed_and_the_first_beyond_is_refused(limit):
    kind, given, allowed, refused = limit
    kind(**{**given, **allowed})
    with pytest.raises(ValueError) as error:
        kind(**{**given, **refused})
    # It says what came, or what is unknown.
    assert "got" in str(error.value) or any(f"{leaf}" in str(error.value) for leaf in _leaves(refused))


def _leaves(value):
    if isinstance(value, dict):
        value = (*value, *value.values())
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, tuple) else [value]
