"""Named experiments: what to prepare, how to train, how to sample and evaluate."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.reading_config import PictureConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.mesh import MeshConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One whole story from data to numbers."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def vocabulary(self) -> Vocabulary:
        """What the preparation would make, were there data for all of it; of puzzles text alone."""
        prepare = self.prepare
        media = {
            "image": (prepare.codecs["image"].codebook_size,),
            "audio": (prepare.codecs["audio"].codebook_size,) * prepare.codecs["audio"].num_codebooks,
        }
        is_text = {source.kind for source in prepare.sources.values()} == {"puzzles"}
        return Vocabulary(text_size=prepare.text_vocabulary, codebook_sizes={} if is_text else media)


def tiny() -> Experiment:
    """Digits to draw, read, say and hear, and sums to add: some minutes on two CPU cores."""
    return Experiment(
        prepare=PrepareConfig(
            sources=_digits(handwritten="handwritten", spoken="spoken", sums="sums"),
            codecs={"audio": MelConfig(codebook_size=128)},
        ),
        train=_train(
            3_260_000,
            weights={"handwritten": 2.0, "spoken": 1.1, "sums": 1.1},
            image=GenerationConfig(strategy="entropy", steps=4, temperature=0.6, guidance=0.5),
            # Cooler and more guided than by default, or more words are not understood.
            audio=GenerationConfig(temperature=0.6, steps=24, guidance=2.0),
        ),
    )


def small() -> Experiment:
    """Two-digit pictures, spoken numbers to ninety-nine, and sums: some twenty minutes on two CPU cores."""
    return Experiment(
        prepare=PrepareConfig(
            sources=_digits(handwritten="handwritten_numbers", spoken="spoken_numbers", sums="all_sums"),
        ),
        train=_train(
            11_000_000,
            weights={"handwritten": 2.0, "spoken": 0.7, "sums": 1.1},
            image=GenerationConfig(strategy="entropy_bound", entropy_bound=4.0, guidance=1.0),
            audio=GenerationConfig(steps=8, guidance=1.0),
        ),
    )


def digits_real() -> Experiment:
    """Digits drawn at 28×28 and spoken at 8 kHz, and plain text, from your own folders: half an hour on two cores.

    Name the sources handwritten (--images), spoken (--audio) and prose (--text).
    """
    return Experiment(
        prepare=PrepareConfig(
            codecs={
                "image": PatchConfig(patch_side=4, codebook_size=256),
                "audio": MelConfig(codebook_size=512),
            },
            seconds=1.0,
            text_vocabulary=1024,
        ),
        train=_train(
            20_000_000,
            weights={"handwritten": 1.2, "spoken": 0.9, "prose": 0.9},
            image=GenerationConfig(steps=24, guidance=1.0),
            audio=GenerationConfig(steps=24, guidance=1.0),
        ),
    )


def addition() -> Experiment:
    """Sums worked out column by column, by a model that makes mistakes if it is hurried: three minutes on two cores."""
    return _puzzles("addition", num_layers=2, response_tokens=48, horizon_tokens=4_000_000)


def cups() -> Experiment:
    """The shell game, followed swap by swap or at a glance: two minutes on two cores."""
    return _puzzles("cups", num_layers=2, response_tokens=32, horizon_tokens=5_000_000)


def sudoku() -> Experiment:
    """4×4 sudoku, for a model of one layer, which has to look again and again: one minute on two cores."""
    return _puzzles("sudoku", num_layers=1, response_tokens=32, horizon_tokens=1_500_000)


def trimodal_320m() -> Experiment:
    """320M parameters, 218M of them embeddings: text, pictures and sound from your own folders, on accelerators."""
    return _trimodal(num_layers=8, fsdp=1, horizon_tokens=107_960_888_475)


def trimodal_1b() -> Experiment:
    """1.1B parameters; as trimodal_320m."""
    return _trimodal(num_layers=15, fsdp=8, horizon_tokens=298_670_441_618)


def trimodal_3b() -> Experiment:
    """3.0B parameters; as trimodal_320m."""
    return _trimodal(num_layers=23, fsdp=8, horizon_tokens=713_237_323_444)


PRESETS: dict[str, Callable[[], Experiment]] = {
    "tiny": tiny,
    "small": small,
    "digits_real": digits_real,
    "addition": addition,
    "cups": cups,
    "sudoku": sudoku,
    "trimodal_320m": trimodal_320m,
    "trimodal_1b": trimodal_1b,
    "trimodal_3b": trimodal_3b,
}


def preset(name: str | None) -> Experiment:
    """A named experiment; without a name, the defaults of every configuration."""
    if name is None:
        return Experiment()
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def _digits(**configs: str) -> dict[str, SourceConfig]:
    """Dataset name → config of the embedded dataset."""
    return {name: SourceConfig(kind="digits", where=(config,)) for name, config in configs.items()}


_FAST_EMBEDDINGS = dict.fromkeys(("embedding", "place_range", "place_scale", "place_map"), 8.0) | {"unembedding": 2.0}
"""Multipliers of learning rates, after what `trimask study search` found; measured in RESULTS.md."""


# How to sample was found by `trimask study sampling` on the validation split; see RESULTS.md.
_TEXTS = GenerationConfig(strategy="factor", factor=2.0, temperature=0.0)


def _train(
    horizon_tokens: int, *, weights: dict[str, float], image: GenerationConfig, audio: GenerationConfig
) -> TrainConfig:
    """What the digit presets share. Many small steps, and an unweighted loss, learn to read digits far sooner."""
    return TrainConfig(
        model=TransformerConfig(num_layers=4, width=128, num_heads=4),
        parametrization=ParametrizationConfig(multipliers=ModuleMultipliers(learning_rate=Family(of=_FAST_EMBEDDINGS))),
        loss=LossConfig(weighting="unweighted", modality_weights={"text": 2.0}),
        # The pictures are few: half-hidden ones and weight decay keep the model from learning them by heart.
        masking=MaskingConfig(joint_probability=0.3),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, weight_decay=0.1, horizon_tokens=horizon_tokens, warmup_tokens=50_000
        ),
        # Tuned at rows of 1,024 positions, 1,010 of them tokens: other batches and horizons are transferred from there.
        sde=SDEScaling(base_batch_tokens=1010.0, base_horizon_tokens=horizon_tokens),
        batch=BatchConfig(tokens=1024, weights=weights),
        loop=LoopConfig(log_every=20, checkpoint_every=500, sample_every=1000),
        generation={"text": _TEXTS, "image": image, "audio": audio},
    )


def _puzzles(name: str, *, num_layers: int, response_tokens: int, horizon_tokens: int) -> Experiment:
    """A small model of one kind of puzzle. Responses stand in a buffer that is longer than any, and filled with EOS.

    With more layers it sees the whole answer at a glance, and there is nothing to learn about when to reveal what.
    """
    return Experiment(
        prepare=PrepareConfig(
            sources={name: SourceConfig(kind="puzzles", where=(name,))},
            text_vocabulary=256,  # a character is a token
            response_tokens=response_tokens,
        ),
        train=TrainConfig(
            model=TransformerConfig(num_layers=num_layers, width=96, num_heads=4),
            parametrization=ParametrizationConfig(
                multipliers=ModuleMultipliers(learning_rate=Family(of=_FAST_EMBEDDINGS))
            ),
            loss=LossConfig(weighting="unweighted"),
            optimizer=OptimizerConfig(learning_rate=3e-3, horizon_tokens=horizon_tokens, warmup_tokens=50_000),
            sde=SDEScaling(base_batch_tokens=2048.0, base_horizon_tokens=horizon_tokens),
            batch=BatchConfig(tokens=2048),
            # Of a loss that is nearly zero, ten times its recent mean is no divergence.
            loop=LoopConfig(log_every=20, checkpoint_every=500, sample_every=1000, spike_factor=100.0),
            generation={"text": GenerationConfig(temperature=0.0, steps=response_tokens // 4)},
        ),
    )


def _trimodal(*, num_layers: int, fsdp: int, horizon_tokens: int) -> Experiment:
    """Width 128 for each layer, as in the tri-modal paper; compute-optimal horizons are 7754 · parameters^0.84 there.

    The paper does not say its tokenizers' sizes, nor with which hyperparameters: the text vocabulary is such that
    they have the parameters that it names, and learning rates are to be tuned at 4 layers of width 512, the base.
    """
    prepare = PrepareConfig(
        codecs={
            "image": PatchConfig(codebook_size=16_384, patch_side=16, max_patches=400_000),
            "audio": MelConfig(
                codebook_size=1024,
                num_codebooks=8,
                sample_rate_hz=16_000,
                window=512,
                hop=160,
                num_mels=80,
                max_frames=200_000,
            ),
        },
        text_vocabulary=81_920,
        max_text_tokens=2046,
        pictures=PictureConfig(height=256, width=256),
    )
    model = TransformerConfig(
        num_layers=num_layers,
        width=128 * num_layers,
        num_heads=num_layers,
        head_size=128,
        compute_dtype="bfloat16",
        blocks="scanned",
        remat="block",
    )
    return Experiment(
        prepare=prepare,
        train=TrainConfig(
            model=model,
            parametrization=ParametrizationConfig(base_width=512, base_layers=4, base_heads=4),
            loss=LossConfig(z_loss=1e-5),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, horizon_tokens=horizon_tokens, warmup_tokens=horizon_tokens // 100
            ),
            batch=BatchConfig(tokens=1_048_576, packed_length=2048),
            mesh=MeshConfig(fsdp=fsdp),
            loop=LoopConfig(log_every=10, checkpoint_every=1000, workers=4),
            generation={"text": _TEXTS},
        ),
    )
