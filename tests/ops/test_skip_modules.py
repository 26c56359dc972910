"""``SkipAdapter`` and what runs several of them: what they compute, refuse and start as."""

import pytest
import torch
from torch import Tensor, nn

from fast_prompt import reference
from fast_prompt.nn import SkipAdapter, route_block, run_adapters
from fast_prompt.tolerances import TOLERANCES, relative_error

DIM, WIDTH = 16, 6
FORMS = {
    "vilt": {},
    "scaled": {"norm": "layer_after", "activation": "silu", "scale": 0.5},
    "learnt": {"activation": "gelu", "scale": 0.5, "learn_scale": True},
    "bare": {"norm": "none", "residual": "none", "bias": False},
    "llama": {"norm": "rms", "residual": "normed", "eps": 1e-6},
    "router": {"norm": "rms", "num_experts": 2, "num_groups": 2, "temperature": 3.0},
}


def made(form: str = "vilt", seed: int = 0, **changes) -> SkipAdapter:
    """An adapter of random parameters, in double precision."""
    torch.manual_seed(seed)
    module = SkipAdapter(DIM, WIDTH, **FORMS[form], dtype=torch.float64, **changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module.eval()


def rows(*shape: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=generator)


def eager(module: SkipAdapter, form: str, x: Tensor) -> Tensor:
    """The formulas, from the module's parameters."""
    settings = {"norm": "layer", "activation": "relu", "residual": "input", "eps": 1e-5} | FORMS[form]
    z = x
    if settings["norm"] == "layer":
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + settings["eps"]).sqrt()
        z = z * module.norm.weight + module.norm.bias
    elif settings["norm"] == "rms":
        z = x / (x.square().mean(-1, keepdim=True) + settings["eps"]).sqrt() * module.norm.weight
    activation = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}[settings["activation"]]
    hidden = activation(module.down_proj(z))
    if form == "router":
        gates = torch.softmax(module.expert_gate(z[:, 0]) / settings["temperature"], -1)
        experts = [block_diagonal(each) for each in module.up_proj.weight.chunk(2, 1)]
        ups = [hidden @ weight.T + bias for weight, bias in zip(experts, module.up_proj.bias, strict=True)]
        result = sum(gates[:, e, None, None] * up for e, up in enumerate(ups))
    else:
        result = module.up_proj(hidden)
    result = result * (1 if module.scale is None else module.scale)
    if settings["norm"] == "layer_after":
        result = nn.functional.layer_norm(result, (DIM,), module.norm.weight, module.norm.bias, 1e-5)
    return result + {"input": x, "normed": x + z, "none": torch.zeros_like(x)}[settings["residual"]]


def block_diagonal(weight: Tensor) -> Tensor:
    """An expert's up projection [d, w / 2] of two groups as one matrix [d, w]."""
    return torch.block_diag(*weight.chunk(2, 0))


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradients_are_the_formulas(form):
    module, x = made(form), rows(2, 5).requires_grad_()
    output, expected = module(x), eager(module, form, x)
    torch.testing.assert_close(output, expected)
    upstream, leaves = torch.randn_like(output), [x, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_children_are_named_and_start_as_the_papers(form):
    torch.manual_seed(0)
    module = SkipAdapter(64, 48, **FORMS[form])
    assert module.down_proj.weight.shape == (48, 64)
    assert module.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module.up_proj.weight.shape == (64, 48)
    assert module.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(linear.bias is None or not linear.bias.any() for linear in module.linears())
    assert [name for name, _ in module.named_children()] == [
        *(["norm"] if form != "bare" else []),
        "down_proj",
        "up_proj",
        *(["expert_gate"] if form == "router" else []),
    ]
    assert ("scale" in dict(module.named_parameters())) == (form == "learnt")
    assert "scale" not in module.state_dict() or form == "learnt"


def test_lora_starts_as_the_residual_alone():
    module, x = SkipAdapter(DIM, WIDTH, init="lora"), rows(3, 4).float()
    assert torch.equal(module(x), x)
    assert module.down_proj.weight.any()


def test_dropout_acts_in_training_only_and_follows_torchs_seed():
    module, x = made(dropout=0.5).train(), rows(2, 5)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(module.eval()(x), made()(x))


BAD = {
    "dim": [0, 1.5],
    "width": [0, True],
    "norm": ["batch", None],
    "activation": ["tanh"],
    "residual": ["output"],
    "dropout": [1, -0.1, float("nan")],
    "scale": [float("inf"), float("nan"), "2"],
    "learn_scale": [1],
    "init": ["zeros"],
    "num_experts": [-1, 1.0],
    "num_groups": [0],
    "temperature": [0, float("inf")],
    "eps": [0, -1e-5],
    "bias": [None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        SkipAdapter(**{"dim": DIM, "width": WIDTH, name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 2}, "num_groups: expected 1 without experts, got 2"),
        ({"num_experts": 2, "num_groups": 4}, "num_groups: expected a divisor of 16 and of 6, got 4"),
        ({"norm": "none", "residual": "normed"}, "residual: expected a norm before .* got norm='none'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SkipAdapter(DIM, WIDTH, **settings)


def counted(monkeypatch) -> list:
    """Every call of the op, by its first weight's rank."""
    calls: list[int] = []

    def skip_adapter(x, down_weight, *args, **options):
        calls.append(down_weight.dim())
        return reference.skip_adapter(x, down_weight, *args, **options)

    monkeypatch.setattr("fast_prompt.nn.skip_adapter.skip_adapter", skip_adapter)
    monkeypatch.setattr("fast_prompt.nn.skip_routing.skip_adapter", skip_adapter)
    return calls


@pytest.mark.parametrize(
    ("forms", "ranks"),
    [
        (["vilt"] * 3, [3]),
        (["llama", "llama", "bare"], [3, 2]),
        (["learnt", "router", "router", "scaled", "scaled"], [2, 2, 2, 3]),
        ([], []),
    ],
)
def test_a_run_is_the_adapters_one_after_the_other(forms, ranks, monkeypatch):
    adapters, x = [made(form, seed) for seed, form in enumerate(forms)], rows(2, 3).requires_grad_()
    expected = x
    for adapter in adapters:
        expected = adapter(expected)
    calls = counted(monkeypatch)
    output = run_adapters(x, adapters)
    assert calls == ranks
    torch.testing.assert_close(output, expected)
    leaves = [x, *(parameter for adapter in adapters for parameter in adapter.parameters())]
    for got, want in zip(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


class Block(nn.Module):
    """Mixes the tokens of a sample, as an attention does, so that a sample in a wrong place shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.seen: list[tuple] = []

    def forward(self, x: Tensor, *context) -> Tensor:
        self.seen.append((x, *context))
        mask = context[0] if context else 1.0
        return x + self.linear((x * mask).mean(1, keepdim=True))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_a_routed_batch_is_its_samples_each_by_itself(number, as_tensor):
    adapters, block, x = [made(seed=seed) for seed in range(number)], Block(), rows(5, 4).requires_grad_()
    mask = torch.rand(5, 4, 1, dtype=torch.float64).round()
    route = [number - 1, -1, 0, -1, -1]
    output = route_block(x, torch.tensor(route) if as_tensor else route, adapters, block, mask, "anything")
    ((compacted, masks, other),) = block.seen
    assert torch.equal(compacted, x[[1, 3, 4]])
    assert torch.equal(masks, mask[[1, 3, 4]])
    assert other == "anything"
    expected = torch.cat(
        [
            block(x[i : i + 1], mask[i : i + 1]) if way < 0 else adapters[way](x[i : i + 1])
            for i, way in enumerate(route)
        ]
    )
    torch.testing.assert_close(output, expected)
    leaves = [x, *block.parameters(), *(p for adapter in adapters for p in adapter.parameters())]
    for got, want in zip(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_batch_that_goes_one_way_costs_nothing_extra(monkeypatch):
    adapters, block, x, mask = [made(seed=0), made(seed=1)], Block(), rows(3, 4), torch.ones(3, 1, 1)
    calls = counted(monkeypatch)
    route_block(x, [-1, -1, -1], adapters, block, mask)
    assert calls == []
    assert block.seen[0][0] is x
    assert block.seen[0][1] is mask
    torch.testing.assert_close(route_block(x, [1, 1, 1], adapters, block), adapters[1](x))
    assert len(block.seen) == 1
    calls.clear()
    torch.testing.assert_close(route_block(x, [1, 0, 1], adapters, block)[1], adapters[0](x)[1])
    assert len(block.seen) == 1
    assert calls[0] == 3
    assert route_block(x[:0], [], adapters, block).shape == (0, 4, DIM)


def test_bad_routes_are_refused_before_the_block_runs():
    adapters, block, x = [made()], Block(), rows(2, 3)
    for route, error, message in [
        ([0], ValueError, r"route: expected one number for each sample .* got 1 for x"),
        ([0, 1], ValueError, "route: expected adapters from 0 to 0, or -1 for none, got 1"),
        ([-2, 0], ValueError, "got -2"),
        ([0.0, 1.0], TypeError, r"route: expected whole numbers, got \[0.0, 1.0\]"),
        ([True, False], TypeError, r"route: expected whole numbers, got \[True, False\]"),
    ]:
        with pytest.raises(error, match=message):
            route_block(x, route, adapters, block)
    with pytest.raises(ValueError, match="adapters: expected one form"):
        route_block(x, [0, 1], [made(), made("bare")], block)
    with pytest.raises(ValueError, match="adapters: expected adapters without experts"):
        route_block(x, [0, -1], [made("router")], block)
    with pytest.raises(ValueError, match="adapters: expected at least one"):
        route_block(x, [-1, -1], [], block)
    assert block.seen == []


@pytest.mark.parametrize("form", ["vilt", "llama", "router"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_with_wide_parameters(form, dtype):
    module, x = made(form), rows(2, 5)
    expected = module(x.to(dtype).double())
    output = module.float()(x.to(dtype))
    assert output.dtype == dtype
    assert relative_error(output, expected) < TOLERANCES[dtype]


def test_autocast_reaches_the_gates_too():
    module, x = made("router").float(), rows(2, 5).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    output.sum().backward()
    assert module.expert_gate.weight.grad.isfinite().all()


@pytest.mark.gate
@pytest.mark.parametrize("form", ["vilt", "router"])
def test_it_compiles_to_one_graph(form):
    torch._dynamo.reset()
    module, x = made(form), rows(2, 5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))
    stack = [module, made(form, 1)]
    run = torch.compile(lambda x: run_adapters(x, stack), fullgraph=True, backend="eager")
    assert torch.equal(run(x), run_adapters(x, stack))


@pytest.mark.parametrize("residual", ["input", "normed"])
def test_autocast_leaves_the_residual_stream_as_wide_as_it_came(residual):
    adapter, x = SkipAdapter(16, 4, residual=residual), torch.randn(2, 5, 16)
    expected = adapter(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapter(x)
        assert SkipAdapter(16, 4, residual="none")(x).dtype == torch.bfloat16
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 2e-3  # of x + result, only the result is rounded
