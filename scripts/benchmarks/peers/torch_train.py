"""Times training steps of a masked diffusion model in PyTorch, for `trimask benchmark train`, in a Python that has it.

    python torch_train.py SPEC.json

prints a line of JSON for each way to compute logits, compiled or not: its name, and the duration of each step in
seconds. Nothing of trimask is imported. The model has RMSNorm, rotary positions, QK norm, PyTorch's attention and
SwiGLU, of the same sizes and with random weights; the step has AdamW with clipping and a weight average.
"""

# mypy: ignore-errors
import json
import os
import sys
import time
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, spec: dict):
        super().__init__()
        width, mlp, self.heads = spec["width"], spec["mlp_width"], spec["heads"]
        self.query_key_value, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * mlp, bias=False), nn.Linear(mlp, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.of_queries, self.of_keys = (nn.RMSNorm(width // self.heads) for _ in range(2))

    def forward(self, h, cos, sin):
        batch, length, _ = h.shape
        parts = self.query_key_value(self.norms[0](h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (rotated(norm(x), cos, sin) for norm, x in ((self.of_queries, parts[0]), (self.of_keys, parts[1])))
        attended = functional.scaled_dot_product_attention(query, key, parts[2])
        h = h + self.out(attended.transpose(1, 2).reshape(h.shape))
        gate, up = self.gate_up(self.norms[1](h)).chunk(2, dim=-1)
        return h + self.down(functional.silu(gate) * up)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Model(nn.Module):
    def __init__(self, spec: dict):
        super().__init__()
        self.embedding = nn.Embedding(spec["vocabulary"], spec["width"])
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec["layers"]))
        self.norm, self.unembedding = (
            nn.RMSNorm(spec["width"]),
            nn.Linear(spec["width"], spec["vocabulary"], bias=False),
        )
        size = spec["width"] // spec["heads"]
        angles = torch.outer(torch.arange(spec["length"]), 10_000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return self.norm(h)


def loss_of(model, clean, is_masked, weight, mask_id: int, only_masked: bool):
    hidden = model(torch.where(is_masked, mask_id, clean))
    if only_masked:
        nll = functional.cross_entropy(model.unembedding(hidden[is_masked]), clean[is_masked], reduction="none")
        return (weight.expand_as(clean)[is_masked] * nll).sum() / clean.numel()
    nll = functional.cross_entropy(model.unembedding(hidden).flatten(0, 1), clean.flatten(), reduction="none")
    return (weight * is_masked * nll.view(clean.shape)).sum() / clean.numel()


def seconds_of_steps(spec: dict, only_masked: bool, is_compiled: bool, device: str) -> list[float]:
    torch.manual_seed(0)
    model = Model(spec).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    average = [p.detach().clone() for p in model.parameters()]
    clean = torch.tensor(spec["tokens"], device=device)
    # The number of masked positions changes with every step.
    loss_function = torch.compile(loss_of, dynamic=only_masked) if is_compiled else loss_of
    seconds = []
    for _ in range(spec["warmup"] + spec["repeats"]):
        start = time.perf_counter()
        times = (torch.rand(1, device=device) + torch.arange(len(clean), device=device) / len(clean)) % 1
        times = times.clamp(min=1e-3)[:, None]
        is_masked = torch.rand(clean.shape, device=device) < times
        with torch.autocast(device, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            loss = loss_function(model, clean, is_masked, 1 / times, spec["mask_id"], only_masked)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.005)
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds[spec["warmup"] :]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for only_masked, is_compiled in product((False, True), (False, True) if spec["compiled"] else (False,)):
        seconds = seconds_of_steps(spec, only_masked, is_compiled, device)
        code = f"PyTorch, {'masked' if only_masked else 'all'} logits{', compiled' if is_compiled else ''}"
        print(json.dumps({"code": code, "seconds": seconds}), flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
