"""Times episodes of an unmasking policy in PyTorch, for `trimask benchmark rollout`, in a Python that has it.

    python torch_rollout.py SPEC.json

prints a line of JSON: the duration in seconds and the number of evaluations of each repetition. Nothing of trimask is
imported; the networks are PyTorch's own transformer layers, of the same sizes and with random weights.
"""

# mypy: ignore-errors
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn


class Denoiser(nn.Module):
    def __init__(self, spec: dict):
        super().__init__()
        self.embedding = nn.Embedding(spec["vocabulary"], spec["width"])
        layer = nn.TransformerEncoderLayer(
            spec["width"], spec["heads"], 3 * spec["mlp_width"] // 2, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, spec["layers"], enable_nested_tensor=False)
        self.unembedding = nn.Linear(spec["width"], spec["vocabulary"], bias=False)

    def forward(self, tokens):
        return self.unembedding(self.layers(self.embedding(tokens)))


class Policy(nn.Module):
    def __init__(self, spec: dict):
        super().__init__()
        width = spec["policy_width"]
        self.input, self.status = nn.Linear(1, width), nn.Embedding(2, width)
        self.layer = nn.TransformerEncoderLayer(
            width, spec["policy_heads"], spec["policy_mlp_width"], 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, -2.0)

    def forward(self, confidence, is_masked):
        return self.output(self.layer(self.input(confidence[..., None]) + self.status(is_masked.long())))[..., 0]


@torch.no_grad()
def episodes(denoiser, policy, prompts, spec: dict) -> int:
    """Fills all rows, without evaluating rows that are done; returns the number of evaluations of all rows together."""
    length, total = spec["length"], 0
    masks = torch.full((len(prompts), length), spec["mask_id"], device=prompts.device)
    tokens = torch.cat([prompts, masks], dim=1)
    for _ in range(length):
        active = (tokens[:, -length:] == spec["mask_id"]).any(dim=1).nonzero()[:, 0]
        if not len(active):
            break
        rows = tokens[active]
        probabilities = denoiser(rows)[:, -length:].float().softmax(dim=-1)
        confidence, proposal = probabilities.max(dim=-1)
        is_masked = rows[:, -length:] == spec["mask_id"]
        reveal = is_masked & (torch.rand_like(confidence) < policy(confidence, is_masked).sigmoid())
        rows[:, -length:] = torch.where(reveal, proposal, rows[:, -length:])
        tokens[active] = rows
        total += len(active)
    return total


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, policy = Denoiser(spec).to(device).eval(), Policy(spec).to(device).eval()
    prompts, results = torch.tensor(spec["prompts"], device=device), []
    for _ in range(1 + spec["repeats"]):
        start = time.perf_counter()
        evaluations = episodes(denoiser, policy, prompts, spec)
        results.append([time.perf_counter() - start, evaluations])
    print(json.dumps({"results": results[1:]}), flush=True)


if __name__ == "__main__":
    main()
