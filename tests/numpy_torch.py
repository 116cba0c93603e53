"""What the scripts that run in a Python with PyTorch use of it, in NumPy, so that tests can run them without PyTorch.

There are no gradients: what belongs to training or to timing is noted in `Torch.calls`.
"""

import contextlib
import types
from typing import Any, ClassVar

import numpy as np


class Tensor(np.ndarray):
    """An array with the methods of a tensor that differ."""

    device = "cpu"
    calls: ClassVar[list[Any]] = []

    def view(self, *shape):
        return super().view(*shape) if shape and isinstance(shape[0], type) else self.reshape(*shape)

    def permute(self, *axes):
        return np.transpose(self, axes)

    def transpose(self, *axes):
        return np.swapaxes(self, *axes)

    def chunk(self, number, dim):
        return np.split(self, number, axis=dim)

    def flatten(self, first=0, last=-1):
        end = last % self.ndim
        return self.reshape(*self.shape[:first], -1, *self.shape[end + 1 :])

    def expand_as(self, other):
        return np.broadcast_to(self, other.shape, subok=True)

    def numel(self):
        return self.size

    def clamp(self, min):
        return np.maximum(self, min)

    def sum(self, axis=None, **options):
        return np.asarray(np.sum(np.asarray(self), axis, **options)).view(Tensor)

    def backward(self):
        Tensor.calls.append("backward")

    def item(self):
        Tensor.calls.append("item")
        return super().item()

    def any(self, dim):
        return np.any(np.asarray(self), axis=dim).view(Tensor)

    def nonzero(self):
        return np.argwhere(np.asarray(self)).view(Tensor)

    def max(self, dim):
        return np.max(np.asarray(self), axis=dim).view(Tensor), np.argmax(np.asarray(self), axis=dim).view(Tensor)

    def softmax(self, dim):
        powers = np.exp(self - np.max(np.asarray(self), axis=dim, keepdims=True))
        return powers / np.sum(powers, axis=dim, keepdims=True)

    def sigmoid(self):
        return 1 / (1 + np.exp(-self))

    def cos(self):
        return np.cos(self)

    def sin(self):
        return np.sin(self)

    def float(self):
        return self.astype(np.float32)

    def long(self):
        return self.astype(np.int64)

    def detach(self):
        return self

    def clone(self):
        return self.copy()


def tensor(values, dtype=None) -> Tensor:
    return np.array(values, dtype).view(Tensor)


class Module:
    """A network: its parameters are the arrays and the networks among its attributes, in order."""

    def __init__(self):
        self.is_begun = True

    def __setattr__(self, name, value):
        if name != "is_begun" and not hasattr(self, "is_begun"):
            raise AttributeError(f"{name} is assigned before Module.__init__()")
        super().__setattr__(name, value)

    def __call__(self, *arguments):
        return self.forward(*arguments)

    def register_buffer(self, name, value):
        setattr(self, name, value.view(Buffer))

    def to(self, device=None, dtype=None):
        return self

    def eval(self):
        Tensor.calls.append("eval")
        return self

    def parameters(self):
        for value in vars(self).values():
            if isinstance(value, Module):
                yield from value.parameters()
            elif isinstance(value, Tensor) and not isinstance(value, Buffer):
                yield value


class Buffer(Tensor):
    """An array of a network that is not trained."""


class Torch(types.SimpleNamespace):
    """The module `torch`; random numbers are of seed 0. `calls` lists the recorded calls."""

    def __init__(self):
        calls, dice = Tensor.calls, np.random.default_rng(0)
        self.calls = calls

        class Linear(Module):
            def __init__(self, inputs, outputs, bias=True):
                super().__init__()
                self.weight = tensor(dice.normal(0, inputs**-0.5, (outputs, inputs)), np.float32)
                if bias:
                    self.bias = tensor(np.zeros(outputs), np.float32)

            def forward(self, x):
                return x @ self.weight.T + getattr(self, "bias", 0)

        class Embedding(Module):
            def __init__(self, number, width):
                super().__init__()
                self.weight = tensor(dice.normal(size=(number, width)), np.float32)

            def forward(self, ids):
                return self.weight[ids]

        class RMSNorm(Module):
            def __init__(self, width):
                super().__init__()
                self.weight = tensor(np.ones(width), np.float32)

            def forward(self, x):
                return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * self.weight

        class ModuleList(Module, list):
            def __init__(self, modules):
                Module.__init__(self)
                list.__init__(self, modules)

            def parameters(self):
                for module in self:
                    yield from module.parameters()

        class TransformerEncoderLayer(Module):
            """Layer whose output is its input; its arguments are recorded."""

            def __init__(self, *arguments, **options):
                super().__init__()
                calls.append((arguments, options))

            def forward(self, x):
                return x

        class TransformerEncoder(TransformerEncoderLayer):
            """Encoder whose output is its input; its arguments are recorded."""

        class AdamW:
            def __init__(self, parameters, **options):
                self.parameters = list(parameters)
                calls.append(options)

            def step(self):
                calls.append("step")
                for parameter in self.parameters:
                    parameter += 1

            def zero_grad(self):
                calls.append("zero_grad")

        def fill(parameter, value):
            parameter[...] = value

        def attention(query, key, value):
            return (query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])).softmax(-1) @ value

        def cross_entropy(logits, ids, reduction):
            picked = np.take_along_axis(logits.softmax(-1), np.asarray(ids)[:, None], axis=-1)[:, 0]
            return -np.log(picked)

        def lerp(averages, parameters, weight):
            calls.append(("lerp", weight))
            for average, parameter in zip(averages, parameters, strict=True):
                average += weight * (parameter - average)

        self.manual_seed = lambda seed: calls.append(("seed", seed))
        self.set_num_threads = lambda _: None
        self.cuda = types.SimpleNamespace(is_available=lambda: False)
        self.tensor = lambda values, *, device: tensor(values)
        self.from_numpy = lambda array: array.view(Tensor)
        self.arange = lambda *limits, device=None: tensor(np.arange(*limits))
        self.outer = lambda a, b: np.outer(a, b).astype(np.float32).view(Tensor)
        self.cat = lambda parts, dim=0: np.concatenate(parts, axis=dim).view(Tensor)
        self.where = lambda condition, a, b: np.where(condition, a, b).view(Tensor)
        self.full = lambda shape, value, *, device: tensor(np.full(shape, value))
        self.rand = lambda *shape, device: tensor(dice.random(shape[0] if len(shape) == 1 else shape))
        self.rand_like = lambda x: tensor(dice.random(x.shape))
        self.no_grad = lambda: lambda function: function
        self.autocast = lambda *_, **options: contextlib.nullcontext(calls.append(options))
        self.compile = lambda function, dynamic: calls.append(("compile", dynamic)) or function
        self.compiler = types.SimpleNamespace(reset=lambda: calls.append("reset"))
        self.optim = types.SimpleNamespace(AdamW=AdamW)
        self._foreach_lerp_ = lerp
        self.float32, self.bfloat16 = "float32", "bfloat16"
        self.nn = types.SimpleNamespace(
            Module=Module,
            Linear=Linear,
            Embedding=Embedding,
            RMSNorm=RMSNorm,
            ModuleList=ModuleList,
            TransformerEncoderLayer=TransformerEncoderLayer,
            TransformerEncoder=TransformerEncoder,
            init=types.SimpleNamespace(zeros_=lambda p: fill(p, 0), constant_=fill),
            utils=types.SimpleNamespace(
                clip_grad_norm_=lambda parameters, norm, foreach: calls.append(("clip", len(list(parameters)), norm))
            ),
            functional=types.SimpleNamespace(
                scaled_dot_product_attention=attention,
                silu=lambda x: x * x.sigmoid(),
                cross_entropy=cross_entropy,
            ),
        )

    @property
    def modules(self) -> dict[str, Any]:
        """Module name → stand-in, for `sys.modules`."""
        return {"torch": self, "torch.nn": self.nn, "torch.nn.functional": self.nn.functional}
