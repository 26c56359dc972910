"""The op that ``docs/adding-an-op.md`` adds: this runs the page's code, which touches no file of the package."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fast_prompt import explain, parity, use_backend
from fast_prompt.ops import flops
from fast_prompt.ops.declaration import OPS
from fast_prompt.tolerances import TOLERANCES, relative_error

pytest.importorskip("triton")

PAGE = Path(__file__).parents[2] / "docs/adding-an-op.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The package that the page's code makes."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "gated_add").mkdir()
    for name, code in re.findall(
        r"^```python\n# (gated_add/\w+\.py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    ):
        (folder / name).write_text(code)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("gated_add")
    finally:
        sys.path.remove(str(folder))
        OPS.pop("gated_add", None)
        for name in [name for name in sys.modules if name.split(".")[0] == "gated_add"]:
            del sys.modules[name]


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in ((3, 5), (3, 5), (5,))]


def test_parity_on_every_backend_that_can_run(toy):
    report = parity.run(["gated_add"])
    assert report.failures == [] and report.raised == {}
    assert {row.backend for row in report.rows} == {"triton", "reference"}
    cases = {case.name for case in importlib.import_module("gated_add.cases").CASES}
    assert {row.case for row in report.rows if row.backend == "triton"} == cases
    assert report.refused["gated_add", "cpu"] == "has no gated_add"


def test_its_definition_has_the_right_gradients(toy):
    for activation in ("sigmoid", "tanh"):
        inputs = [tensor.requires_grad_() for tensor in arguments(torch.float64)]
        assert torch.autograd.gradcheck(lambda *given, name=activation: toy.gated_add(*given, activation=name), inputs)


def test_explain_autocast_and_the_flop_counter(toy):
    assert explain("gated_add", *arguments()).reasons["cuda" if DEVICE == "cpu" else "cpu"] == "has no gated_add"
    flops.count(toy.GATED_ADD)
    with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16), FlopCounterMode(display=False) as counter:
        output = toy.gated_add(*arguments())
    assert output.dtype == torch.bfloat16
    assert counter.get_total_flops() == 2 * 15
    assert relative_error(output, toy.gated_add(*arguments())) < TOLERANCES[torch.bfloat16]


def test_it_compiles_to_one_graph(toy):
    torch._dynamo.reset()
    compiled = torch.compile(toy.gated_add, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        given = [tensor.requires_grad_() for tensor in arguments()]
        compiled(*given).sum().backward()
        again = [tensor.detach().requires_grad_() for tensor in given]
        toy.gated_add(*again).sum().backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(given, again, strict=True))


def test_bad_arguments_are_named(toy):
    hidden, update, gate = arguments()
    for given, message in (
        ((hidden, update[:2], gate), "update: expected shape"),
        ((hidden, update, gate[:4]), "gate: expected shape"),
        ((hidden, update.double(), gate), "update: expected"),
        ((hidden, update, 1.0), "gate: expected a torch.Tensor, got float"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            toy.gated_add(*given)
    with pytest.raises(ValueError, match="activation: expected one of 'sigmoid', 'tanh'"):
        toy.gated_add(hidden, update, gate, activation="relu")
