"""What holds a backend to the definition: parity's cases, through the API, and every way that a backend may run."""

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from simt import backend as simt

from fast_prompt.backends import BACKENDS, cpu, use_backend
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity import cases_of
from fast_prompt.parity.problem import compare, evaluate
from fast_prompt.tolerances import TOLERANCES

simt.install()

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
LEVELS = [] if cpu.unavailable() else cpu.isa_levels()


@dataclass(frozen=True)
class Way:
    """A backend, and how it runs: an instruction set, or an order of the emulated threads."""

    backend: str
    setting: str = ""

    def __str__(self):
        return f"{self.backend} {self.setting}".strip()

    def enter(self):
        if self.backend == "cpu":
            cpu.select_isa(self.setting)
        if self.backend == "simt":
            simt.configure(**simt.H100, **simt.ORDERS[self.setting])


def device_of(backend):
    return torch.device("cuda") if backend in ("triton", "cuda") and torch.cuda.is_available() else CPU


def ways(*backends):
    """As parameters, those that cannot run here as skips that say why; emulated and interpreted ones are gates."""
    found = [Way("cpu", level) for level in LEVELS] or [Way("cpu")]
    found += [Way("cuda"), Way("triton"), *(Way("simt", order) for order in simt.ORDERS)]
    marked = []
    for way in found:
        if not backends or way.backend in backends:
            reason = BACKENDS[way.backend].unavailable()
            marks = [pytest.mark.gate] * (way.backend != "cpu") + [pytest.mark.skip(reason=reason)] * bool(reason)
            marked.append(pytest.param(way, id=str(way), marks=marks))
    return marked


def build(op, case, dtype=F32, backend="cpu"):
    """A parity case's problem, where the backend runs."""
    return cases_of(op).build(case, dtype, device_of(backend))


@contextlib.contextmanager
def on(backend):
    """Every op on this backend, torch.empty and the kernels' own scratch full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if cpu.unavailable() is None:
        cpu.poison_scratch(True)
    try:
        with use_backend(backend):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if cpu.unavailable() is None:
            cpu.poison_scratch(False)


def results(op, problem, backend, **options):
    """The output and the gradients of what is trained, by name."""
    with on(backend):
        return evaluate(OPS[op].api, replace(problem, options=problem.options | options))


def errors(op, problem, backend):
    """By result: its error in units of what is allowed. Dtypes and layouts are checked on the way."""
    found = results(op, problem, backend)
    first = next(iter(problem.tensors.values()))
    for name, value in found.items():
        like = first if name == "forward" else problem.tensors[name]
        assert value.dtype == like.dtype and value.is_contiguous(), name
    right = evaluate(OPS[op].definition, problem.double())
    zero = {
        name for name, value in right.items() if value.numel() and value.abs().max() < 1e-9
    }  # only rounding is left
    found = {
        name: value for name, value in found.items() if name not in zero or value.abs().max() > TOLERANCES[first.dtype]
    }
    right = {name: value for name, value in right.items() if name in found}
    return {name: error / TOLERANCES[first.dtype] for name, error in compare(found, right).items()}


def assert_matches(op, case, dtype, backend):
    """A parity case, or a problem, is computed within the tolerance."""
    problem = case if hasattr(case, "tensors") else build(op, case, dtype, backend)
    found = errors(op, problem, backend)
    assert all(error <= 1 for error in found.values()), found


def same_bits(found, right):
    """Whether all results are equal, NaN where there is NaN."""
    assert found.keys() == right.keys()
    return [name for name in found if not torch.equal(found[name].nan_to_num(7), right[name].nan_to_num(7))] == []


def kept(op, problem, backend):
    """What a forward keeps for its backward, by name."""
    declared = OPS[op]
    named = declared.arguments_of(**problem.tensors, **problem.options)
    with on(backend):
        plan = declared.plan(*named.values())
        extra = {"seed": torch.tensor(problem.options["seed"])} if "seed" in problem.options else {}
        tensors = [(named | extra).get(tensor.name) for tensor in declared.tensors]
        _, *found = plan.forward(False, plan.cast(*tensors), plan.keep)
    return dict(zip((name for name, keep in zip(declared.kept, plan.keep, strict=True) if keep), found, strict=True))


def far_apart(tensor, folder):
    """The same values, its samples more than 2**31 elements apart, in a file of holes."""
    stride = 2**31 + 64
    storage = torch.from_file(str(folder / "sparse"), shared=True, size=stride + 1024, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, (stride, tensor.shape[-1], 1)).copy_(tensor)


def fenced(tensor):
    """The same values between NaNs."""
    fence = tensor.new_full((64,), torch.nan)
    return torch.cat([fence, tensor.flatten(), fence])[64 : 64 + tensor.numel()].view(tensor.shape)


def changed(problem, **tensors):
    """The problem with other tensors; ``grad`` is one of them."""
    grad = tensors.pop("grad", problem.grad)
    return replace(problem, tensors=problem.tensors | tensors, grad=grad)
