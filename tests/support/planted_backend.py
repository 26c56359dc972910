"""A backend of the tests' own, right but for what a test makes of its results."""

from types import SimpleNamespace

import torch

from fast_prompt import reference
from fast_prompt.backends import BACKENDS, Kernels
from fast_prompt.ops.declaration import OPS

NAMES = ("hidden", "source", "prompts", "keys", "log_scale")


def plant(monkeypatch, change=lambda what, value, tensors: value, name="planted"):
    """Makes a backend of ``prompt_diffusion`` that is the definition but for ``change(what, value, tensors)``.

    Its ``forward`` and ``backward`` are what it runs; its ``unavailable`` and ``refuses`` are a backend's.
    """

    seen = {}  # what the backward of a call is not given: so an error in the output is one there alone

    def forward(*arguments):
        seen["hidden"] = arguments[0]
        *tensors, seed, activation, row_weight, dropout_p = arguments
        options = {"activation": activation, "row_weight": row_weight, "dropout_p": dropout_p, "seed": seed}
        return [change("forward", reference.prompt_diffusion(*tensors, **options), tensors)]

    def backward(grad, source, prompts, keys, log_scale, seed, output, activation, row_weight, dropout_p, needs):
        options = {"activation": activation, "row_weight": row_weight, "dropout_p": dropout_p, "seed": seed}
        inputs = (seen["hidden"], source, prompts, keys, log_scale)
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            gradients = torch.autograd.grad(reference.prompt_diffusion(*tensors, **options), tensors, grad)
        changed = [change(name, value, tensors) for name, value in zip(NAMES, gradients, strict=True)]
        return [value for value, need in zip(changed, needs, strict=True) if need]

    planted = SimpleNamespace(name=name, suffix=f"_{name}", compiled=False, forward=forward, backward=backward)
    planted.unavailable, planted.refuses = lambda: None, lambda call: None
    planted.run = lambda op, kernels, *args: (planted.backward if "_backward" in op else planted.forward)(*args)
    monkeypatch.setitem(BACKENDS, name, planted)
    monkeypatch.setitem(OPS["prompt_diffusion"].kernels, name, Kernels())
    monkeypatch.setattr(OPS["prompt_diffusion"], "_plans", {})
    OPS["prompt_diffusion"].define(name)
    return planted
