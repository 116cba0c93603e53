"""Named experiments: data preparation, training, sampling and evaluation."""

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
    """Configurations of all stages, from preparing data to evaluation."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """What data to prepare, and how."""
    train: TrainConfig = TrainConfig()
    """How to train the model."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How to evaluate the trained model."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the prepared data, if there is data for every modality; puzzles have text alone."""
        prepare = self.prepare
        media = {
            "image": (prepare.codecs["image"].codebook_size,),
            "audio": (prepare.codecs["audio"].codebook_size,) * prepare.codecs["audio"].num_codebooks,
        }
        is_text = {source.kind for source in prepare.sources.values()} == {"puzzles"}
        return Vocabulary(text_size=prepare.text_vocabulary, codebook_sizes={} if is_text else media)


def tiny() -> Experiment:
    """Single digits to draw, read, say and hear, and sums to add. Trains in a few minutes on two CPU cores."""
    return Experiment(
        prepare=PrepareConfig(
            sources=_digits(handwritten="handwritten", spoken="spoken", sums="sums"),
            codecs={"audio": MelConfig(codebook_size=128)},
        ),
        train=_train(
            3_260_000,
            weights={"handwritten": 2.0, "spoken": 1.1, "sums": 1.1},
            text=GenerationConfig(strategy="random", temperature=0.0, steps=1),
            image=GenerationConfig(strategy="random", temperature=0.6, steps=8, guidance=0.5),
            audio=GenerationConfig(strategy="random", temperature=0.6, steps=24),
        ),
    )


def small() -> Experiment:
    """Two-digit pictures, spoken numbers up to ninety-nine, and sums. Trains in twenty minutes on two CPU cores."""
    return Experiment(
        prepare=PrepareConfig(
            sources=_digits(handwritten="handwritten_numbers", spoken="spoken_numbers", sums="all_sums"),
        ),
        train=_train(
            11_000_000,
            weights={"handwritten": 2.0, "spoken": 0.7, "sums": 1.1},
            text=GenerationConfig(strategy="threshold", threshold=0.9, temperature=0.0),
            image=GenerationConfig(strategy="random", steps=24, guidance=1.0),
            audio=GenerationConfig(strategy="confidence", steps=4, temperature=0.6, guidance=2.0),
        ),
    )


def digits_real() -> Experiment:
    """Drawn digits (28×28), spoken digits (8 kHz) and text from your own folders. Trains in half an hour on two cores.

    The sources must be named handwritten (--images), spoken (--audio) and prose (--text).
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
            # Texts keep their default, though a single step answers as well: it could not write prose.
            image=GenerationConfig(strategy="random", steps=16, guidance=1.0),
            audio=GenerationConfig(strategy="threshold", threshold=0.5, guidance=1.0),
        ),
    )


def addition() -> Experiment:
    """Sums worked out column by column, by a model that errs if it decodes too fast. Trains in 3 minutes on 2 cores."""
    return _puzzles("addition", num_layers=2, response_tokens=48, horizon_tokens=4_000_000)


def cups() -> Experiment:
    """The shell game, solved swap by swap or in one step. Trains in two minutes on two cores."""
    return _puzzles("cups", num_layers=2, response_tokens=32, horizon_tokens=5_000_000)


def sudoku() -> Experiment:
    """4×4 sudoku for a one-layer model, which needs many passes to solve one. Trains in one minute on two cores."""
    return _puzzles("sudoku", num_layers=1, response_tokens=32, horizon_tokens=1_500_000)


def trimodal_320m() -> Experiment:
    """320M parameters, 218M of them embeddings: text, pictures and sound from your own folders, on accelerators.

    The smallest number of steps, S_crit (`sde.critical_steps`), is unknown at this size; `trimask study critical-batch`
    measures it, with the flags that docs/training.md lists under Studies.
    """
    return _trimodal(num_layers=8, fsdp=1, horizon_tokens=107_960_888_475)


def trimodal_1b() -> Experiment:
    """1.1B parameters, otherwise like trimodal_320m, with fsdp over 8 devices."""
    return _trimodal(num_layers=15, fsdp=8, horizon_tokens=298_670_441_618)


def trimodal_3b() -> Experiment:
    """3.0B parameters, otherwise like trimodal_320m, with fsdp over 8 devices."""
    return _trimodal(num_layers=23, fsdp=8, horizon_tokens=713_237_323_444)


def fresh_voices() -> Experiment:
    """Digits spoken by two voices of no other preset, to evaluate `tiny` on; for `prepare --tokenizers data/tiny`."""
    return Experiment(
        prepare=PrepareConfig(
            sources={"fresh_voices": SourceConfig(kind="digits", where=("fresh_voices",))},
            codecs={"audio": MelConfig(codebook_size=128)},
        )
    )


def stream() -> Experiment:
    """Digits warped and spoken anew, none of them twice, the data of studies."""
    return Experiment(
        prepare=PrepareConfig(
            sources={
                "drawn": SourceConfig(kind="stream", where=("drawn:65536",)),
                "spoken": SourceConfig(kind="stream", where=("spoken:40960",)),
            },
            codecs={"audio": MelConfig(codebook_size=128)},
        ),
        train=_train(
            800_000,
            weights={"drawn": 1.0, "spoken": 1.0},
            image=GenerationConfig(steps=8),
            audio=GenerationConfig(steps=16),
        ),
    )


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
    "fresh_voices": fresh_voices,
    "stream": stream,
}


def preset(name: str | None) -> Experiment:
    """A named experiment; None: the defaults of every configuration. Raises ValueError for an unknown name."""
    if name is None:
        return Experiment()
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def _digits(**configs: str) -> dict[str, SourceConfig]:
    """Sources of the embedded digits dataset: dataset name → its config."""
    return {name: SourceConfig(kind="digits", where=(config,)) for name, config in configs.items()}


_FAST_EMBEDDINGS = dict.fromkeys(("embedding", "place_range", "place_scale", "place_map"), 8.0) | {"unembedding": 2.0}
"""Learning-rate multipliers of embeddings, chosen after `trimask study search`; measured in RESULTS.md."""


# Sampling settings were chosen by `trimask study sampling` on the validation split; see RESULTS.md.
_TEXTS = GenerationConfig(strategy="factor", factor=2.0, temperature=0.0)


def _train(
    horizon_tokens: int,
    *,
    weights: dict[str, float],
    text: GenerationConfig = _TEXTS,
    image: GenerationConfig,
    audio: GenerationConfig,
) -> TrainConfig:
    """Training configuration shared by the digit presets.

    Many small steps and an unweighted loss learn to read digits far sooner than larger batches and the ELBO. Every
    modality has the same total weight, and text twice as much: with equal weights of all tokens, texts, of which there
    are few, are learned last (RESULTS.md).
    """
    return TrainConfig(
        model=TransformerConfig(num_layers=4, width=128, num_heads=4),
        parametrization=ParametrizationConfig(multipliers=ModuleMultipliers(learning_rate=Family(of=_FAST_EMBEDDINGS))),
        loss=LossConfig(weighting="unweighted", modality_weights={"text": 2.0}),
        # There are few pictures: joint masking and weight decay keep the model from memorising them.
        masking=MaskingConfig(joint_probability=0.3),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, weight_decay=0.1, horizon_tokens=horizon_tokens, warmup_tokens=50_000
        ),
        # Tuned at batches of 1,024 positions, 1,010 of them tokens; other batches and horizons are rescaled from these.
        sde=SDEScaling(base_batch_tokens=1010.0, base_horizon_tokens=horizon_tokens),
        batch=BatchConfig(tokens=1024, weights=weights),
        loop=LoopConfig(log_every=20, checkpoint_every=500, sample_every=1000),
        generation={"text": text, "image": image, "audio": audio},
    )


def _puzzles(name: str, *, num_layers: int, response_tokens: int, horizon_tokens: int) -> Experiment:
    """A small model for one kind of puzzle, whose responses are padded with EOS to a fixed length.

    With more layers a model would solve the puzzle in one pass, and no order of unmasking would be better than another.
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
            masking=MaskingConfig(drop_probability=0.0),  # policies use no guidance
            optimizer=OptimizerConfig(learning_rate=3e-3, horizon_tokens=horizon_tokens, warmup_tokens=50_000),
            sde=SDEScaling(base_batch_tokens=2048.0, base_horizon_tokens=horizon_tokens),
            batch=BatchConfig(tokens=2048),
            # Where the loss is nearly zero, ten times its recent mean is no sign of divergence.
            loop=LoopConfig(log_every=20, checkpoint_every=500, sample_every=1000, spike_factor=100.0),
            generation={"text": GenerationConfig(temperature=0.0, steps=response_tokens // 4)},
        ),
    )


def _trimodal(*, num_layers: int, fsdp: int, horizon_tokens: int) -> Experiment:
    """A model of the tri-modal paper's shape: width 128 · number of layers, horizon 7754 · parameters^0.84 tokens.

    The paper states neither the sizes of its tokenizers nor all hyperparameters. The text vocabulary is chosen to match
    its parameter counts; learning rates are to be tuned on the base network, 4 layers of width 512.
    """
    batch_tokens = 1_048_576
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
            # Other batches and horizons are rescaled from these. The batch is in positions, so padding makes κ smaller.
            sde=SDEScaling(base_batch_tokens=float(batch_tokens), base_horizon_tokens=horizon_tokens),
            batch=BatchConfig(tokens=batch_tokens, packed_length=2048),
            mesh=MeshConfig(fsdp=fsdp),
            loop=LoopConfig(log_every=10, checkpoint_every=1000, workers=4),
            generation={"text": _TEXTS},
        ),
    )
