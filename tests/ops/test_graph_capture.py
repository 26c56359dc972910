"""What a CUDA graph cannot capture and a stream waits for: numbers copied from the host within a call.

No GPU is needed: tensors are fakes on one, and whatever goes there from the CPU is seen on its way. Only forward: torch
without CUDA aborts where autograd asks for the device, and the backward pass is given nothing that is not a tensor.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast_prompt import parity
from fast_prompt.backends import triton, use_backend
from fast_prompt.bench import apt_model, das_model
from fast_prompt.nn import SkipAdapter, route_block
from fast_prompt.ops import routes
from fast_prompt.ops.declaration import OPS
from fast_prompt.ops.seeds import seed_tensor

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """The operations that take a tensor of the CPU and leave one on another device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        before, after = (
            {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
            for values in ((arguments, options), result)
        )
        if "cpu" in before and after - {"cpu"}:
            self.found.append(str(function))
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors may be on a GPU, of which Triton takes every call; routes are remembered though they have no numbers."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "refuses", lambda call: None)
    monkeypatch.setattr(routes, "_is_capturing", lambda device: False)
    monkeypatch.setattr(routes, "_is_real", lambda tensor: True)
    monkeypatch.setattr(routes, "_recent", {})
    with use_backend("triton"):
        yield FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(problem):
    tensors = {name: tensor.to(GPU) for name, tensor in problem.tensors.items()}
    options = {name: value.to(GPU) if isinstance(value, Tensor) else value for name, value in problem.options.items()}
    return dataclasses.replace(problem, tensors=tensors, grad=problem.grad.to(GPU), options=options)


def copies_of(call):
    with Copies() as copies:
        call()
    return copies.found


def test_a_copy_is_seen(fake_gpu):
    with fake_gpu:
        assert copies_of(lambda: torch.tensor([1, 2], device=GPU)) and copies_of(lambda: torch.zeros(2).to(GPU))
        assert not copies_of(lambda: torch.zeros(2, device=GPU) + 1)


CASES = [
    (op, case)
    for op in OPS
    for case in parity.cases_of(op).CASES
    if (case.dropout_p or getattr(case, "route", None)) and getattr(case, "form", "absorbed") == "absorbed"
]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}, {case.name}" for op, case in CASES])
def test_no_op_copies_a_seed_or_a_known_route(op, case, fake_gpu):
    problem = parity.cases_of(op).build(case, torch.bfloat16, CPU)
    assert isinstance(problem.options.get("seed", 0), int)
    with fake_gpu:
        problem = on_gpu(problem)
        first, second = (copies_of(lambda: parity.evaluate(OPS[op].api, problem, backward=False)) for _ in "12")
    assert bool(first) == ("route" in problem.options) and not second


def test_a_routed_block_copies_nothing_after_its_first_call(fake_gpu):
    adapter, block = SkipAdapter(16, 4), torch.nn.Linear(16, 16)
    with fake_gpu:
        adapter, block, x = adapter.to(GPU), block.to(GPU), torch.zeros(3, 5, 16, device=GPU)
        mask, on_the_cpu = torch.zeros(3, 5, device=GPU), torch.zeros(3)

        @torch.no_grad()
        def call():
            route_block(x, [0, -1, 0], [adapter], lambda rows, *context: block(rows), mask, on_the_cpu)

        first, second = copies_of(call), copies_of(call)
    assert first and not second


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 17, 2**53 + 1, 2**63 - 1, -(2**63)])
def test_a_seed_is_made_exactly(seed):
    made = seed_tensor(seed, 0.5, CPU)
    assert made.item() == seed and made.dtype == torch.int64 and made.shape == ()
    compiled = torch.compile(lambda x: x + seed_tensor(seed, 0.5, x.device), backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros((), dtype=torch.int64)).item() == seed


# ---- Routes that are remembered ----


@pytest.fixture
def remembered(monkeypatch):
    for name, empty in (("_recent", {}), ("_captured", [])):
        monkeypatch.setattr(routes, name, empty)
    return routes._recent


def test_a_route_is_copied_once_for_each_device(remembered):
    first = routes.route_tensors([2, -1, 0, -1], CPU)
    assert first.adapters.tolist() == [2, -1, 0, -1] and first.kept.tolist() == [1, 3]
    assert routes.route_tensors((2, -1, 0, -1), CPU) is first
    assert routes.route_tensors([2, -1, 0, -1], torch.device("meta")) is not first


def test_the_routes_used_last_are_remembered(remembered, monkeypatch):
    monkeypatch.setattr(routes, "MOST_ROUTES", 2)
    first, second = routes.route_tensors([0], CPU), routes.route_tensors([1], CPU)
    assert routes.route_tensors([0], CPU) is first
    routes.route_tensors([2], CPU)
    assert len(remembered) == 2 and routes.route_tensors([0], CPU) is first
    assert routes.route_tensors([1], CPU) is not second


def test_a_graph_s_route_stays_and_its_first_call_must_come_before(remembered, monkeypatch):
    known = routes.route_tensors([0, -1], CPU)
    monkeypatch.setattr(routes, "_is_capturing", lambda device: True)
    assert all(routes.route_tensors([0, -1], CPU) is known for _ in range(2))
    assert routes._captured == [known]
    with pytest.raises(RuntimeError, match="^route: a CUDA graph cannot capture the first call with a route"):
        routes.route_tensors([1, -1], CPU)


def test_a_trace_leaves_no_route_behind(remembered):
    with FakeTensorMode():
        routes.route_tensors([0, -1], CPU)
    assert not remembered


def test_a_route_first_used_in_inference_may_train(remembered):
    adapter, x = SkipAdapter(8, 2), torch.randn(2, 3, 8)
    with torch.inference_mode():
        route_block(x, [0, -1], [adapter], torch.nn.Identity())
    route_block(x, [0, -1], [adapter], torch.nn.Identity()).sum().backward()
    assert adapter.down_proj.weight.grad.isfinite().all()


# ---- What is timed ----

META = torch.device("meta")  # where a whole model runs without a GPU, but nothing asks for autocast
ENCODER = {"B": 2, "n": 20, "p": 8, "layers": 1}
METER = {"B": 1, "image": 32, "text": 8, "k": 4}
FORMS = {
    "untouched": apt_model.untouched,
    "prompts as tokens": apt_model.prompts_as_tokens,
    "prompts as keys and values": apt_model.prompts_as_keys_values,
}


def copies_when_timed(form, model, shape, *size):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), use_backend("reference"):
        function, inputs = form(model, shape), torch.zeros(size, device=META)
        return copies_of(lambda: function(inputs))


@pytest.mark.gate
@pytest.mark.parametrize("name", FORMS)
def test_a_timed_vilt_has_all_on_its_device(name):
    with META:
        model = apt_model.encoder(ENCODER)
    assert not copies_when_timed(FORMS[name], model, ENCODER, 2, 20, apt_model.WIDTH)


@pytest.mark.gate
def test_a_timed_meter_has_all_on_its_device():
    model = das_model.build(METER, torch.float32, META)
    assert not copies_when_timed(das_model._function, model, METER, 1, 3, 32, 32)
