"""Every argument of every op and module, with what it should not be: an error that names it, or the right result."""

import logging
import re

import numpy
import pytest
import torch

from fast_prompt import ops, reference
from fast_prompt.nn import PromptCompressor, PromptDiffusion, SkipAdapter, route_block, run_adapters
from fast_prompt.nn.adapter import BottleneckAdapter
from fast_prompt.ops.declaration import OPS
from fast_prompt.tolerances import TOLERANCES, relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's own prototypes

D, W, V = 4, 3, 5


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def prompt_diffusion():
    tensors = {"hidden": normal(2, 3, D), "source": normal(2, 3, D), "prompts": normal(5, D), "keys": normal(5, D)}
    options = {"activation": "relu", "row_weight": "max", "dropout_p": 0.5, "seed": 3}
    return "prompt_diffusion", tensors | {"log_scale": torch.tensor(0.1)}, options


def prompt_compress(form, dropout_p):
    tensors = {"query": normal(2, 2, D), "visual": normal(2, 6, V), "key_weight": normal(D, V)}
    tensors |= {"value_weight": normal(D, V), "key_bias": normal(D), "value_bias": normal(D)}
    tensors |= {"key_padding_mask": torch.arange(6).expand(2, 6) > 3}
    return "prompt_compress", tensors, {"num_heads": 2, "form": form, "dropout_p": dropout_p, "seed": 3}


def skip_adapter(*lead, **others):
    shapes = {"x": (2, 3, D), "down_weight": (*lead, W, D), "up_weight": (*lead, D, W), "down_bias": (*lead, W)}
    shapes |= {"up_bias": (*lead, D), "scale": lead, **others}
    return {name: normal(*shape) for name, shape in shapes.items()}


NORMED = {"norm": "layer", "activation": "relu", "residual": "input", "eps": 1e-5, "dropout_p": 0.5, "seed": 3}
CASES = {
    "prompt_diffusion": prompt_diffusion(),
    "prompt_compress, absorbed": prompt_compress("absorbed", 0.5),
    "prompt_compress, projected": prompt_compress("projected", 0.0),
    "skip_adapter": ("skip_adapter", skip_adapter(norm_weight=(D,), norm_bias=(D,)), NORMED),
    "skip_adapter, run": ("skip_adapter", skip_adapter(2), {"activation": "gelu"}),
    "skip_adapter, route": ("skip_adapter", skip_adapter(2, kept=(1, 3, D)), {"route": [1, -1]}),
    "skip_adapter, gates": ("skip_adapter", skip_adapter(up_weight=(D, 2 * W), up_bias=(2, D), gates=(2, 2)), {}),
}

ADAPTER = SkipAdapter(D, W)
MODULES = {
    "PromptDiffusion": (PromptDiffusion(D, 3), {"hidden": normal(2, 3, D), "source": normal(2, 3, D)}),
    "PromptCompressor": (
        PromptCompressor(D, 2, V),
        {"query": normal(2, 2, D), "visual": normal(2, 6, V), "key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
    ),
    "BottleneckAdapter": (BottleneckAdapter(D, W), {"x": normal(2, 3, D)}),
    "SkipAdapter": (ADAPTER, {"x": normal(2, 3, D)}),
    "SkipAdapter, experts": (SkipAdapter(D, W, num_experts=2), {"x": normal(2, 3, D), "gates": normal(2, 2)}),
    "run_adapters": (lambda x: run_adapters(x, [ADAPTER]), {"x": normal(2, 3, D)}),
    "route_block": (lambda x: route_block(x, [0, -1], [ADAPTER], torch.tanh), {"x": normal(2, 3, D)}),
}


def apart(tensor):
    return [tensor.clone() for _ in range(2)] if tensor.dim() < 2 else list(tensor)


OTHER_KINDS = {
    "nested": lambda tensor: torch.nested.nested_tensor(apart(tensor)),
    "nested, jagged": lambda tensor: torch.nested.nested_tensor(apart(tensor), layout=torch.jagged),
    "sparse": lambda tensor: tensor.to_sparse(),
    "sparse rows": lambda tensor: tensor.reshape(-1, 1).to_sparse_csr(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "int64": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "an array": lambda tensor: tensor.numpy(),
    "a list": lambda tensor: tensor.tolist(),
    "a string": lambda tensor: "x",
    "a number": lambda tensor: 1.0,
    "other numbers": lambda tensor: tensor if tensor.dtype == torch.bool else tensor.bool(),
}
OTHER_SHAPES = {
    "a dimension before": lambda tensor: tensor[None],
    "two dimensions before": lambda tensor: tensor[None, None],
    "a dimension behind": lambda tensor: tensor[..., None],
    "flat": lambda tensor: tensor.reshape(-1),
    "one number": lambda tensor: tensor.reshape(-1)[0],
    "one of the first": lambda tensor: tensor[:1],
    "one of the last": lambda tensor: tensor[..., :1],
    "none of the first": lambda tensor: tensor[:0],
    "none of the last": lambda tensor: tensor[..., :0],
    "twice": lambda tensor: torch.cat([tensor, tensor]),
    "transposed": lambda tensor: tensor.mT,
    "on meta": lambda tensor: tensor.to("meta"),
    "float64": lambda tensor: tensor.double(),
    "none": lambda tensor: None,
}
OTHER_OPTIONS = [
    *("x", "01", b"x", 1.5, -1, 2, 10**400, True, float("nan"), float("inf"), complex(1)),
    *([1], [[1, 2], [0, 1]], {}, {"a": 1}, (0.0, 1.0), range(2), [None]),
    *(numpy.float64(0.5), numpy.int64(1), numpy.array([0, 0])),
    *(torch.tensor(0.5), torch.tensor(1), torch.tensor([0, 1]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0])),
    *(torch.tensor([3, 3]).to_sparse(), torch.tensor([[3]]).to_sparse(), torch.nested.nested_tensor([torch.ones(2)])),
    *(torch.tensor([0, 1], device="meta"), torch.tensor(1, device="meta"), torch.tensor([True, False])),
]


def other(make, tensor):
    """What ``make`` makes of it, or what is no tensor at all where torch has no such tensor."""
    try:
        return make(tensor)
    except (RuntimeError, IndexError, TypeError):
        return object()


def names(error, argument):
    return re.search(rf"\b{argument}\b", str(error)) is not None


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_named_or_right(case, argument, value, described):
    """A refusal names the argument; what is not refused is what the definition makes of it."""
    op, tensors, options = CASES[case]
    given = tensors | options | {argument: value}
    try:
        output = OPS[op].api(**given)
    except (TypeError, ValueError) as error:
        assert names(error, argument), f"{described}: {error}"
        return
    expected = OPS[op].definition(**{name: wide(each) for name, each in given.items()})
    assert output.shape == expected.shape, described
    assert not expected.numel() or relative_error(output, expected) < 1e-4, described


ARGUMENTS = [(case, argument) for case, (_, tensors, _) in CASES.items() for argument in tensors]
OPTIONS = [(case, option) for case, (_, _, options) in CASES.items() for option in options]
MODULE_ARGUMENTS = [(module, argument) for module, (_, tensors) in MODULES.items() for argument in tensors]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="fast_prompt")


@pytest.mark.parametrize(("case", "argument"), ARGUMENTS)
def test_another_kind_of_value_is_refused_by_name(case, argument):
    op, tensors, options = CASES[case]
    for described, make in OTHER_KINDS.items():
        value = other(make, tensors[argument])
        if value is not tensors[argument]:
            with pytest.raises((TypeError, ValueError)) as caught:
                OPS[op].api(**tensors | options | {argument: value})
            assert names(caught.value, argument), f"{described}: {caught.value}"


@pytest.mark.parametrize(("case", "argument"), ARGUMENTS)
def test_another_shape_dtype_or_device_is_refused_by_name_or_right(case, argument):
    for described, make in OTHER_SHAPES.items():
        assert_named_or_right(case, argument, other(make, CASES[case][1][argument]), described)


@pytest.mark.parametrize(("case", "option"), OPTIONS)
def test_another_option_is_refused_by_name_or_right(case, option):
    for number, value in enumerate(OTHER_OPTIONS):
        assert_named_or_right(case, option, value, f"{number}: {type(value).__name__}")
    if option != "seed":
        assert_named_or_right(case, option, None, "None")


@pytest.mark.parametrize(("module", "argument"), MODULE_ARGUMENTS)
def test_a_module_refuses_another_kind_of_value_or_shape_by_name(module, argument):
    call, tensors = MODULES[module]
    shape = call(**tensors).shape
    makers = OTHER_KINDS | OTHER_SHAPES
    del makers["on meta"]  # where a module's own layers take it, theirs is the error
    for described, make in makers.items():
        value = other(make, tensors[argument])
        try:
            output = call(**tensors | {argument: value})
        except (TypeError, ValueError) as error:
            assert names(error, argument), f"{described}: {error}"
        else:  # as many leading dimensions as there may be
            assert output.shape == (value.shape if argument == "x" else shape), described


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
def test_one_element_scales_no_shape(shape):
    _, tensors, _ = CASES["prompt_diffusion"]
    for leading in (tensors["hidden"], tensors["hidden"][0], tensors["hidden"][0, 0]):
        given = tensors | {"hidden": leading, "source": leading, "log_scale": torch.full(shape, 0.3)}
        assert reference.prompt_diffusion(**given).shape == ops.prompt_diffusion(**given).shape == leading.shape
    _, tensors, _ = CASES["skip_adapter, gates"]
    given = tensors | {"scale": torch.full(shape, 0.3)}
    assert reference.skip_adapter(**given).shape == ops.skip_adapter(**given).shape == tensors["x"].shape
    stacked = {name: tensor[None] for name, tensor in skip_adapter().items() if name not in ("x", "scale")}
    given = stacked | {"x": tensors["x"], "scale": torch.full(shape, 0.3)}
    assert reference.skip_adapter(**given).shape == tensors["x"].shape


def test_a_scale_for_each_adapter_lies_in_one_dimension():
    tensors = skip_adapter(2)
    with pytest.raises(ValueError, match=r"scale: expected shape \(2,\)"):
        ops.skip_adapter(**tensors | {"scale": tensors["scale"][None]})


@pytest.mark.parametrize("module", MODULES)
def test_float32_parameters_take_bfloat16_activations(module):
    call, tensors = MODULES[module]
    narrow = {name: each.bfloat16() if each.is_floating_point() else each for name, each in tensors.items()}
    output = call(**narrow)
    assert output.dtype == torch.bfloat16
    expected = call(**{name: each.float() if each.is_floating_point() else each for name, each in narrow.items()})
    assert relative_error(output, expected) < TOLERANCES[torch.bfloat16]


OVERLAPPING = {
    "each row a step further": lambda tensor: tensor.reshape(-1).as_strided(tensor.shape, (1,) * tensor.dim()),
    "windows": lambda tensor: tensor.reshape(-1).as_strided(tensor.shape, (*range(tensor.dim(), 1, -1), 1)),
    "one for all": lambda tensor: tensor[..., :1].expand(tensor.shape),
    "the first for all": lambda tensor: tensor[:1].expand(tensor.shape),
}


@pytest.mark.parametrize("overlap", OVERLAPPING)
@pytest.mark.parametrize(("case", "argument"), ARGUMENTS)
def test_overlapping_strides_give_the_result_of_a_copy(case, argument, overlap):
    op, tensors, options = CASES[case]
    if tensors[argument].dim():
        given = tensors | options | {argument: OVERLAPPING[overlap](tensors[argument])}
        copied = given | {argument: given[argument].contiguous()}
        torch.testing.assert_close(OPS[op].api(**given), OPS[op].api(**copied))


@pytest.mark.parametrize("overlap", OVERLAPPING)
@pytest.mark.parametrize("argument", ["query", "visual", "key_weight", "value_weight", "gradient"])
def test_overlapping_strides_in_torchs_own_attention_too(argument, overlap):
    """On sizes that it takes in blocks."""
    shapes = {"query": (2, 40, 64), "visual": (2, 50, 48), "key_weight": (64, 48), "value_weight": (64, 48)}
    tensors = {name: normal(*shape) for name, shape in (shapes | {"gradient": (2, 40, 64)}).items()}

    def results(prepare):
        given = tensors | {argument: prepare(OVERLAPPING[overlap](tensors[argument]))}
        gradient = given.pop("gradient")
        given = {name: tensor.requires_grad_() for name, tensor in given.items()}
        output = ops.prompt_compress(**given, num_heads=4, form="projected")
        return output, *torch.autograd.grad(output, list(given.values()), gradient)

    torch.testing.assert_close(results(lambda tensor: tensor), results(torch.clone), rtol=1e-4, atol=1e-4)
