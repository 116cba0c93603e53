"""Times LLaDA's or Fast-dLLM's own `generate`, for `trimask benchmark sample`, in a Python that has PyTorch.

    python llada_generate.py SPEC.json WEIGHTS.npz

prints a line of JSON per case: the duration of each repetition in seconds, and the tokens. Nothing of trimask is
imported. The model is that of Fast-dLLM's checkout (llada/model), which LLaDA publishes with its weights; `generate` is
that of the checkout that a case names.
"""

# mypy: ignore-errors
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch


def network(spec: dict, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """LLaDA's network with these weights."""
    from model.configuration_llada import LLaDAConfig
    from model.modeling_llada import LLaDAModelLM

    config = LLaDAConfig(
        d_model=spec["width"],
        n_heads=spec["heads"],
        n_layers=spec["layers"],
        mlp_hidden_size=spec["mlp_width"],
        vocab_size=spec["vocabulary"],
        embedding_size=spec["vocabulary"],
        rope_theta=spec["rotary_base"],
        rms_norm_eps=spec["norm_epsilon"],
        max_sequence_length=spec["longest"],
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rope=True,
        weight_tying=False,
        include_bias=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        init_device="cpu",
    )
    model = LLaDAModelLM(config, init_params=True).eval()
    missing, unknown = model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    if missing or unknown:
        raise ValueError(f"this checkout's model has other weights: missing {missing}, unknown {unknown}")
    return model.to(dtype=getattr(torch, spec["dtype"]), device="cuda" if torch.cuda.is_available() else "cpu")


def generator(spec: dict, case: dict):
    """Function (model, prompts) -> tokens that calls the `generate` of the case's checkout."""
    is_llada = case["code"] == "LLaDA"
    module_path = Path(spec["checkouts"][case["code"]]) / ("generate.py" if is_llada else "llada/generate.py")
    loader = importlib.util.spec_from_file_location(case["code"], module_path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    settings = {"steps": case["steps"], "gen_length": case["length"], "block_length": case["block"]}
    settings["mask_id"] = spec["mask_id"]
    if is_llada:
        return lambda model, prompts: module.generate(model, prompts, **settings)
    functions = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}
    function = getattr(module, functions[case["cache"]])
    # These functions return one row for any number of prompts.
    return lambda model, prompts: torch.cat([function(model, row[None], **settings)[0] for row in prompts])


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(Path(spec["checkouts"]["Fast-dLLM"]) / "llada"))
    torch.set_num_threads(os.cpu_count() or 1)
    model = network(spec, dict(np.load(sys.argv[2])))
    for case in spec["cases"]:
        generate = generator(spec, case)
        prompts, seconds = torch.tensor(spec["prompts"][: case["rows"]], device=model.device), []
        for _ in range(1 + spec["repeats"]):
            start = time.perf_counter()
            tokens = generate(model, prompts).tolist()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds[1:], "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
