"""Which backend is tried first on a GPU."""

import pytest
import torch

from fast_prompt import backends
from fast_prompt.backends import Call, fastest
from fast_prompt.backends.fastest import Faster
from fast_prompt.ops.declaration import OPS

CALL = Call(torch.device("cuda"), torch.bfloat16, torch.bfloat16, {"width": 768, "num_prompts": 64})


@pytest.fixture
def hopper(monkeypatch):
    """Both GPU backends can take any call, on a chip of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for backend in (backends.triton, backends.cuda):
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "refuses", lambda call: None)


def choose(**sizes):
    return backends.choose(OPS["prompt_diffusion"], CALL._replace(sizes=CALL.sizes | sizes), None)


@pytest.mark.usefixtures("hopper")
def test_triton_is_first_where_nothing_else_was_measured():
    assert choose() == fastest.DEFAULT == "triton"


@pytest.mark.usefixtures("hopper")
def test_a_measurement_holds_for_its_op_chip_and_size(monkeypatch):
    line = Faster("prompt_diffusion", (9, 0), "num_prompts", 64, "cuda", "as measured by this test")
    monkeypatch.setattr(fastest, "FASTER", (line,))
    assert choose() == "cuda" and choose(num_prompts=65) == "triton"
    monkeypatch.setattr(fastest, "FASTER", (line._replace(capability=(10, 0)),))
    assert choose() == "triton"
    monkeypatch.setattr(fastest, "FASTER", (line._replace(op="prompt_compress"),))
    assert choose() == "triton"


@pytest.mark.usefixtures("hopper")
def test_the_first_choice_is_passed_over_where_it_refuses(monkeypatch):
    monkeypatch.setattr(backends.triton, "refuses", lambda call: "too wide")
    assert choose() == "cuda"


def test_the_table_changes_nothing_on_a_cpu():
    assert fastest.first_choice("prompt_diffusion", CALL._replace(device=torch.device("cpu"))) is None
