"""``prompt_compress`` whatever the backend: its definition, its API, its module."""

import importlib

import pytest
import torch
from compiled import assert_compiles_to_one_graph
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fast_prompt
from fast_prompt import backends, ops, reference
from fast_prompt.nn import PromptCompressor
from fast_prompt.ops.prompt_compress import KEPT_SHARE, cheaper_form, flops, kept_for_backward
from fast_prompt.parity import evaluate
from fast_prompt.parity.prompt_compress import CASES, build
from fast_prompt.tolerances import TOLERANCES, relative_error

NAMES = ("query", "visual", "key_weight", "value_weight", "key_bias", "value_bias")
CPU = torch.device("cpu")

needs_cpu_backend = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None, reason=f"CPU backend: {backends.BACKENDS['cpu'].unavailable()}"
)


def arguments(batch=2, queries=1, tokens=7, heads=2, head_dim=4, visual_width=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    width = heads * head_dim
    shapes = [(batch, queries, width), (batch, tokens, visual_width), *[(width, visual_width)] * 2, *[(width,)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def padding_of(*real, tokens=7):
    return torch.arange(tokens) >= torch.tensor(real)[:, None]


# The definition


def test_the_definition_is_multi_head_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=10, vdim=10, batch_first=True, dtype=torch.float64)
    nn.init.normal_(attention.in_proj_bias)
    query, visual = torch.randn(3, 2, 8).double(), torch.randn(3, 7, 10).double()
    padding = padding_of(7, 3, 1)
    expected, _ = attention(query, visual, visual, key_padding_mask=padding)
    bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
    projected = query @ attention.q_proj_weight.T + bias_q
    weights = attention.k_proj_weight, attention.v_proj_weight
    heads = reference.prompt_compress(
        projected, visual, *weights, bias_k, bias_v, num_heads=2, key_padding_mask=padding
    )
    torch.testing.assert_close(attention.out_proj(heads), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    def run(*tensors):
        options = {"key_padding_mask": padding_of(7, 3, 0), "dropout_p": dropout_p, "seed": 7}
        return reference.prompt_compress(*tensors, num_heads=2, **options)

    assert torch.autograd.gradcheck(run, arguments(3, 2, dtype=torch.float64))


def test_the_papers_formula_by_hand():
    query = torch.tensor([[[0.0, 2.0]]])  # two heads of width 1
    visual = torch.tensor([[[1.0], [3.0]]])
    ones = torch.ones(2, 1)
    output = reference.prompt_compress(query, visual, ones, ones, None, torch.tensor([10.0, 20.0]), num_heads=2)
    weight = 1 / (1 + torch.tensor(-4.0).exp())  # of the second token, for the second head: scores 2 and 6
    torch.testing.assert_close(output, torch.tensor([[[12.0, 21.0 + 2 * weight]]]))


def test_dropout_keeps_the_sum_of_the_weights_with_the_value_bias():
    query, visual, keys, values, _, bias = (tensor.detach() for tensor in arguments(400, 1, 16))
    zero = torch.zeros_like(values)
    output = reference.prompt_compress(
        query, visual, keys, zero, None, torch.ones_like(bias), num_heads=2, dropout_p=0.5, seed=1
    )
    sums = output.unflatten(-1, (2, 4))[..., 0]  # of the kept weights
    assert sums.std() > 0.1
    assert abs(sums.mean() - 1) < 0.1


# Both forms, all backends


@pytest.mark.parametrize("case", [case for case in CASES if case.form == "absorbed" and not case.dropout_p], ids=str)
def test_the_forms_agree(case):
    problem = build(case, torch.float32, CPU)
    expected = evaluate(reference.prompt_compress, problem.double())
    for form in ("absorbed", "projected", "auto"):
        problem.options["form"] = form
        actual = evaluate(ops.prompt_compress, problem)
        for name, wanted in expected.items():
            assert relative_error(actual[name], wanted) < TOLERANCES[torch.float32], (form, name)


def test_the_form_is_chosen_by_flops():
    assert flops(1, 197, 768, 768, 12) == 9_621_504  # methods.md: 9.6 MFLOP a sample, against 465
    assert cheaper_form(1, 197, 768, 768, 12) == "absorbed"
    assert cheaper_form(16, 197, 768, 768, 12) == "absorbed"
    assert cheaper_form(197, 197, 768, 768, 12) == "projected"


def test_what_is_kept_is_a_tenth_of_the_projected_keys_and_values():
    for queries in (1, 2, 4, 8, 16):
        probabilities, attended = kept_for_backward(queries, 197, 768, 768, 12)
        kept = queries * 12 * (197 * probabilities + 768 * attended)
        assert kept <= KEPT_SHARE * 2 * 197 * 768
    assert kept_for_backward(1, 197, 768, 768, 12) == (True, True)


@needs_cpu_backend
@pytest.mark.parametrize("queries", [1, 4, 16])
def test_saves_little_besides_its_inputs(queries):
    inputs = arguments(2, queries, 50, 4, 16, 64)
    own = {tensor.data_ptr() for tensor in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.prompt_compress(*inputs, num_heads=4, form="absorbed")
    extra = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in own)
    logsumexp = 2 * 4 * queries
    assert 0 < extra <= 2 * KEPT_SHARE * 2 * 50 * 64 + logsumexp


@pytest.mark.parametrize("form", ["absorbed", "projected"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_padding_alone_gives_zero_and_no_gradients(form, dropout_p):
    inputs = arguments()
    options = {"num_heads": 2, "key_padding_mask": padding_of(0, 7), "dropout_p": dropout_p, "form": form}
    output = ops.prompt_compress(*inputs, **options)
    assert not output[0].any()
    assert output[1].all()
    output[0].sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"tokens": 0}])
def test_empty_calls_give_zeros_and_zero_gradients(sizes):
    inputs = arguments(**sizes)
    output = ops.prompt_compress(*inputs, num_heads=2)
    assert output.shape == inputs[0].shape
    if "tokens" in sizes:
        assert not output.any()
    output.sum().backward()
    assert all(not tensor.grad.any() for tensor in inputs)


@needs_cpu_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_a_key_bias_changes_nothing_and_has_a_gradient_of_zero(form, dtype):
    """However large it is: keys that are rounded with it would lose what tells them apart."""
    inputs = [tensor.detach().to(dtype) for tensor in arguments()]
    without = ops.prompt_compress(*inputs[:4], None, inputs[5], num_heads=2, form=form)
    inputs[4] = (1000 * inputs[4]).requires_grad_()
    output = ops.prompt_compress(*inputs, num_heads=2, form=form)
    output.square().sum().backward()
    assert torch.equal(output, without)
    assert not inputs[4].grad.any()


def test_only_the_asked_gradients_are_computed():
    for wanted in range(6):
        inputs = arguments()
        for position, tensor in enumerate(inputs):
            tensor.requires_grad_(position == wanted)
        ops.prompt_compress(*inputs, num_heads=2).square().sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [position == wanted for position in range(6)]


def test_inputs_and_gradient_are_never_written_to():
    inputs = arguments()
    copies = [tensor.detach().clone() for tensor in inputs]
    output = ops.prompt_compress(*inputs, num_heads=2)
    grad = torch.randn_like(output)
    grad_copy = grad.clone()
    output.backward(grad)
    assert torch.equal(grad, grad_copy)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


def test_dropout_follows_torch_manual_seed():
    inputs = arguments()
    torch.manual_seed(5)
    first, second = (ops.prompt_compress(*inputs, num_heads=2, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, ops.prompt_compress(*inputs, num_heads=2, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_autocast_casts_activations_and_keeps_float32_weights():
    inputs = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.prompt_compress(inputs[0].bfloat16(), *inputs[1:], num_heads=2)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.float32] * 6


@needs_cpu_backend
def test_second_derivatives_of_the_kernels_are_refused():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(ops.prompt_compress(*inputs, num_heads=2).sum(), inputs[1], create_graph=True)
    with fast_prompt.use_backend("reference"):
        torch.autograd.grad(ops.prompt_compress(*inputs, num_heads=2).sum(), inputs[1], create_graph=True)


COMPILED = [
    ({}, "aot_eager"),
    ({"dropout_p": 0.25, "seed": 9}, "aot_eager"),
    ({"dropout_p": 0.25, "seed": 9}, "inductor"),
    ({"form": "projected"}, "aot_eager"),
]


# Inductor's C++ compiler takes many seconds: it gets one setting, without the reference, of which it makes much code.
@pytest.mark.gate
@pytest.mark.parametrize(("options", "compiler"), COMPILED, ids=["plain", "dropout", "dropout in C++", "projected"])
def test_compiles_to_one_graph(options, compiler):
    mask = padding_of(7, 3)

    def step(*tensors):
        return ops.prompt_compress(*tensors, num_heads=2, key_padding_mask=mask, **options).square().sum()

    inputs = arguments()
    assert_compiles_to_one_graph(step, inputs, compiler, ops.explain("prompt_compress", *inputs, num_heads=2))


@needs_cpu_backend
def test_flops_are_counted():
    importlib.import_module("fast_prompt.ops.flops")
    inputs = arguments()  # so small that probabilities and weighted tokens are kept or not by kept_for_backward
    probabilities, attended = kept_for_backward(1, 7, 8, 10, 2)
    with FlopCounterMode(display=False) as counter:
        ops.prompt_compress(*inputs, num_heads=2, form="absorbed").sum().backward()
    projection, tokens = 2 * 2 * 8 * 10, 2 * 2 * 2 * 7 * 10
    again = (not probabilities) + (not attended)
    assert counter.get_total_flops() == (2 + 5) * projection + (2 + 4 + again) * tokens


@needs_cpu_backend
def test_the_compiled_library_runs_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.explain("prompt_compress", *arguments(dtype=dtype), num_heads=2).chosen == "cpu"


# Bad calls


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, r"query: expected 3 dimensions .*, got shape \(1, 8\)"),
        (0, lambda t: t[:1], ValueError, r"visual: expected a batch of 1 \(that of query\), got 2"),
        (0, lambda t: t[..., :7], ValueError, "query: expected a width that num_heads=2 divides, got 7"),
        (1, lambda t: t[..., :3], ValueError, r"key_weight: expected shape \(8, 3\)"),
        (1, lambda t: t.bfloat16(), TypeError, "visual: expected dtype torch.float32"),
        (1, lambda t: t.int(), TypeError, "visual: expected float32"),
        (1, lambda t: t.to("meta"), ValueError, "visual: expected device cpu"),
        (2, lambda t: t.half(), TypeError, r"key_weight: expected dtype torch.float32 \(that of query, or float32\)"),
        (3, lambda t: t[:4], ValueError, r"value_weight: expected shape \(8, 10\)"),
        (3, lambda t: t.double(), TypeError, "value_weight: expected dtype torch.float32 .that of key_weight."),
        (3, lambda t: None, TypeError, "value_weight: expected a torch.Tensor, got NoneType"),
        (4, lambda t: t[:4], ValueError, r"key_bias: expected shape \(8,\)"),
        (5, lambda t: [1.0], TypeError, "value_bias: expected a torch.Tensor, got list"),
    ],
)
def test_bad_tensors_are_named(position, change, error, message):
    inputs = arguments()
    inputs[position] = change(inputs[position].detach())
    with pytest.raises(error, match=message):
        ops.prompt_compress(*inputs, num_heads=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads: expected a whole number of at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected a whole number of at least 1, got float"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"form": "folded"}, ValueError, "form: expected one of 'auto', 'absorbed', 'projected', got 'folded'"),
        ({"key_padding_mask": torch.zeros(2, 7)}, TypeError, "key_padding_mask: expected a bool tensor"),
        ({"key_padding_mask": padding_of(7)}, ValueError, r"key_padding_mask: expected shape \(2, 7\)"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.prompt_compress(*arguments(), **{"num_heads": 2, **options})


# The module


def test_the_module_is_the_definition_between_two_projections():
    torch.manual_seed(0)
    module = PromptCompressor(12, 2, 10, inner_dim=8, dtype=torch.float64)
    query, visual, padding = torch.randn(2, 3, 12).double(), torch.randn(2, 7, 10).double(), padding_of(7, 2)
    weights = module.k_proj.weight, module.v_proj.weight, module.k_proj.bias, module.v_proj.bias
    heads = reference.prompt_compress(module.q_proj(query), visual, *weights, num_heads=2, key_padding_mask=padding)
    torch.testing.assert_close(module(query, visual, padding), module.out_proj(heads))
    assert [name for name, _ in module.named_children()] == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_the_module_gives_zero_for_padding_alone():
    module = PromptCompressor(12, 2, 10)
    prompts = module(torch.randn(2, 1, 12), torch.randn(2, 7, 10), padding_of(0, 7))
    assert not prompts[0].any()
    assert prompts[1].any()


def test_the_module_drops_out_in_training_only():
    module = PromptCompressor(12, 2, dropout=0.5)
    query, visual = torch.randn(2, 1, 12), torch.randn(2, 7, 12)
    assert not torch.equal(module(query, visual), module(query, visual))
    module.eval()
    assert torch.equal(module(query, visual), module(query, visual))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: expected a whole number"),
        ({"num_heads": 5}, "num_heads: expected a divisor of the inner width 12, got 5"),
        ({"visual_dim": -1}, "visual_dim: expected"),
        ({"inner_dim": 7}, "num_heads: expected a divisor of the inner width 7"),
        ({"dropout": 1}, "dropout: expected a number in"),
        ({"bias": 1}, "bias: expected True or False"),
        ({"form": "best"}, "form: expected one of"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptCompressor(**{"dim": 12, "num_heads": 2, **arguments})
