"""Times training steps of MD4's published code, for `trimask benchmark train`, in a Python that has MD4's dependencies.

    python md4_train.py SPEC.json

prints one line of JSON: its name, and the duration of each step in seconds. `md4` in the spec is a checkout of
github.com/google-deepmind/md4 (Shi et al., 2024, arXiv:2406.04329). Nothing of trimask is imported.

Used unchanged: MD4's OpenWebText config, its network, its continuous-time loss, and from its train.py the creation of
the state and the whole step, with pmap on one device. So every step has rotary positions, layer norms modulated by an
embedding of the time (adaLN-zero), a sigmoid-gated MLP, no norm of queries and keys, no dropout, logits and one-hot
targets of all positions over the whole vocabulary, AdamW with warm-up and cosine schedule, and a weight average; no
gradient clipping, which that config turns off.

Changed: sizes and batch are those of the spec. MD4 chooses the width of the MLP itself, 8/3 of the width rounded up to
a multiple of 32; its mask is an id of its own, beside the vocabulary. The state, which MD4 passes by keyword so that
pmap does not donate it, is donated. Modules that import TensorFlow and that the step does not need are mocked.
"""

# mypy: ignore-errors
import json
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np


def step_and_state(spec: dict):
    """MD4's step, (state, batch) -> (state, metrics), and its initial state, with a leading axis of devices."""
    sys.path.insert(0, spec["md4"])
    for name in ("clu.metric_writers", "md4.input_pipeline", "md4.input_pipeline_v2"):
        sys.modules[name] = MagicMock()
    from md4 import train, utils
    from md4.configs.md4 import openwebtext

    config = openwebtext.get_config()
    config.update(vocab_size=spec["vocabulary"], data_shape=(spec["length"],), n_layers=spec["layers"])
    config.update(num_heads=spec["heads"], feature_dim=spec["width"] // spec["heads"])
    schedule = partial(
        train.get_learning_rate,
        base_learning_rate=config.learning_rate,
        num_steps=config.num_train_steps,
        warmup_steps=config.warmup_steps,
        schedule_type=config.learning_rate_schedule,
    )
    rng = utils.get_rng(config.seed)
    shape = (len(spec["tokens"]), spec["length"])
    model, optimizer, state, metrics = train.create_train_state(config, rng, shape, schedule)

    def step(state, batch):
        return train.train_step(
            model, optimizer, state, batch, schedule, metrics, config.ema_rate, config.num_microbatches
        )

    step = jax.pmap(step, "batch", donate_argnums=0, devices=jax.local_devices()[:1])
    return step, jax.tree.map(lambda x: np.asarray(x)[None], state)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec["dtype"] != "float32":
        raise ValueError(f"MD4 has no choice of dtype, it computes in float32; got {spec['dtype']}")
    step, state = step_and_state(spec)
    batch = {"text": np.array([spec["tokens"]], np.int32)}
    seconds = []
    for _ in range(spec["warmup"] + spec["repeats"]):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"code": "MD4", "seconds": seconds[spec["warmup"] :]}))


if __name__ == "__main__":
    main()
