"""What ``torch.compile`` makes of a step is what the step computes."""

import torch

import fast_prompt


def assert_compiles_to_one_graph(step, inputs, compiler, explanation):
    """The gradients of ``step(*inputs)``, compiled whole, on every backend that can run the call explained here."""
    inputs = list(inputs)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for name, reason in explanation.reasons.items():
        if reason is None and name not in ("triton", "simt", "reference" if compiler == "inductor" else ""):
            with fast_prompt.use_backend(name):
                expected = torch.autograd.grad(step(*inputs), inputs)
                actual = torch.autograd.grad(compiled(*inputs), inputs)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
