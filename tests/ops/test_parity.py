"""The parity suite passes on every backend that exists here, and catches every kind of wrong backend."""

import pytest
import torch
from planted_backend import plant

from fast_prompt import parity, reference
from fast_prompt.ops.declaration import OPS
from fast_prompt.parity.prompt_diffusion import ARGUMENTS, CASES, build

CPU = torch.device("cpu")
RESULTS = ("forward", *ARGUMENTS)


def run_planted(*cases):
    return parity.run(["prompt_diffusion"], ["planted"], ["fp32"], cases or None)


@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_definition_itself_is_within_tolerance(op, dtype):
    """In every dtype, against itself in float64; the other backends: tests/backends."""
    report = parity.run([op], ["reference"], [dtype])
    assert report.failures == [] and report.refused == {}
    cases = [case for case in parity.cases_of(op).CASES if case.applies_to(parity.DTYPES[dtype])]
    assert {row.case for row in report.rows} == {case.name for case in cases}
    assert {row.what for row in report.rows} == {"forward"}.union(*(case.trained for case in cases))


def test_a_right_backend_passes_every_case(monkeypatch):
    plant(monkeypatch, lambda what, value, tensors: value)
    report = run_planted()
    assert report.failures == []
    assert {row.case for row in report.rows} == {case.name for case in CASES if case.applies_to(torch.float32)}


@pytest.mark.parametrize("wrong", RESULTS)
def test_an_error_in_one_result_is_caught_there_and_only_there(monkeypatch, wrong):
    plant(monkeypatch, lambda what, value, tensors: value * (1 + 1e-4 * (what == wrong)))
    report = run_planted("ragged")
    assert [row.what for row in report.failures] == [wrong]


def test_one_wrong_element_is_caught(monkeypatch):
    def last_element_off(what, value, tensors):
        value = value.clone()
        value.view(-1)[-1] += 1e-3 * value.abs().max()
        return value

    plant(monkeypatch, last_element_off)
    assert {row.what for row in run_planted("p 200").failures} == set(RESULTS)


def test_an_element_left_unwritten_is_caught(monkeypatch):
    def leave_last_row(what, value, tensors):
        if what != "forward":
            return value
        output = torch.empty_like(value)
        output[:, :-1] = value[:, :-1]
        return output

    plant(monkeypatch, leave_last_row)
    assert [(row.what, row.error) for row in run_planted("plain").failures] == [("forward", float("inf"))]


@pytest.mark.parametrize("case", ["rows sliced", "columns sliced", "batch second", "columns first", "expanded inputs"])
def test_ignored_strides_are_caught(monkeypatch, case):
    """A launcher that takes hidden's memory for contiguous must fail each strided case."""

    def as_if_contiguous(what, value, tensors):
        hidden = tensors[0]
        if what != "forward" or hidden.is_contiguous():
            return value
        memory = torch.empty(0, dtype=hidden.dtype).set_(hidden.untyped_storage())
        padded = torch.nn.functional.pad(memory, (0, max(0, hidden.numel() - memory.numel())))
        return value - hidden + padded[: hidden.numel()].view(hidden.shape)

    plant(monkeypatch, as_if_contiguous)
    assert [row.what for row in run_planted(case).failures] == ["forward"]


def test_a_wrong_dropout_mask_is_caught(monkeypatch):
    planted = plant(monkeypatch)
    right = planted.forward
    planted.forward = lambda *args: right(*args[:5], args[5] & 0xFFFFFFFF, *args[6:])
    assert [row.what for row in run_planted("dropout").failures] == ["forward"]


def test_a_result_of_the_wrong_shape_is_caught():
    errors = parity.compare({"forward": torch.ones(2, 3)}, {"forward": torch.ones(3, 2)})
    assert errors == {"forward": float("inf")}


@pytest.mark.parametrize("dtype", parity.DTYPES.values(), ids=list(parity.DTYPES))
def test_no_case_depends_on_the_sign_of_a_rounding_error(dtype):
    """float32 and float64 agree on which scores ReLU passes, so that comparing gradients is fair."""
    for case in CASES:
        tensors = build(case, dtype, CPU).tensors
        source, keys = tensors["source"].reshape(-1, case.width), tensors["keys"]
        narrow, wide = source.float() @ keys.float().T, source.double() @ keys.double().T
        assert torch.equal(narrow > 0, wide > 0), case.name


def test_the_diffusion_is_as_large_as_hidden():
    """Else a wrong diffusion would hide behind hidden."""
    for case in CASES:
        if case.arrangement == "negative scores" or 0 in case.rows:
            continue
        problem = build(case, torch.float32, CPU)
        tensors = problem.tensors | {"hidden": torch.zeros_like(problem.tensors["hidden"])}
        diffusion = reference.prompt_diffusion(**tensors, **problem.options)
        assert 0.3 < diffusion.square().mean().sqrt() < 4, case.name


def test_names_of_cases_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_backend_that_raises_fails_and_the_others_still_run(monkeypatch):
    plant(monkeypatch).backward = None
    report = parity.run(["prompt_diffusion"], ["planted", "reference"], ["fp32"], ["plain"])
    assert {(row.backend, row.ok) for row in report.rows} == {("planted", False), ("reference", True)}
    assert report.raised.keys() == {("prompt_diffusion", "planted", "fp32", "plain")}


def test_a_backend_that_cannot_run_is_listed_with_its_reason(monkeypatch):
    plant(monkeypatch).unavailable = lambda: "no such chip"
    report = run_planted("plain")
    assert report.rows == []
    assert report.refused == {("prompt_diffusion", "planted"): "no such chip"}


def test_threads_and_memory_filling_are_put_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    parity.run(["prompt_diffusion"], ["reference"], ["fp32"], ["plain"])
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
