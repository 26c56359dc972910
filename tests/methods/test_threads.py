"""Several threads call one model, or one op, at once: each gets the answer to its own question."""

import functools
import itertools
import sys
import threading

import pytest
import torch
from tiny_models import LLAMA, T5, TEXT
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fast_prompt import APTConfig, DASConfig, DVPConfig, get_fast_prompt_model
from fast_prompt.ops import prompt_compress, prompt_diffusion, skip_adapter

pytestmark = pytest.mark.gate

THREADS, CALLS = 8, 30

BASES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 2}, pad_token_id=1)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5 | {"num_layers": 2}, decoder_start_token_id=0)),
}


def apt(**settings) -> APTConfig:
    return APTConfig(num_prompts=3, **settings)


def das(**settings) -> DASConfig:
    return DASConfig(skipped=[1], width=4, skip_width=4, **settings)


def dvp(**settings) -> DVPConfig:
    return DVPConfig(layer=1, visual_width=16, num_prompts=2, dropout=0.0, **settings)


EXPERTS = das(num_experts=2, num_groups=2)
# By name: the base, the adapter, and whether it is folded.
MODELS = {
    "APT": ("bert", apt(), False),
    "APT, folded": ("bert", apt(), True),
    "DAS": ("bert", das(), False),
    "DAS with experts": ("llama", EXPERTS, False),
    "DVP in BERT": ("bert", dvp(), False),
    "DVP in LLaMA": ("llama", dvp(answer_token_id=49), False),
    "DVP in T5": ("t5", dvp(), False),
    "all, folded": ("llama", [dvp(), apt(target_modules=["self_attn"]), EXPERTS], True),
}


@pytest.fixture
def impatient():
    """Threads that take turns as often as they can, each with one core."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def assert_alike_in_threads(calls) -> None:
    """Each of ``calls`` gives its tensors in a thread of its own, over and over, as it does alone."""
    expected, start, wrong = [call() for call in calls], threading.Barrier(len(calls)), []

    def repeat(call, right: list[Tensor]) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            for _ in range(CALLS):
                assert all(torch.allclose(*each, rtol=1e-4, atol=1e-5) for each in zip(call(), right, strict=True))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=each) for each in zip(calls, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {len(calls)} threads: {wrong[0]!r}"
    for one, other in itertools.pairwise(expected):
        assert one[0].shape != other[0].shape or not torch.allclose(one[0], other[0])


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    base, config, folded = MODELS[name]
    model = get_fast_prompt_model(BASES[base]().eval(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval().fold() if folded else model.eval()


def question(name: str, number: int) -> dict:
    """A question of its own length and padding for each thread."""
    generator = torch.Generator().manual_seed(number)
    length = 5 + number % 3
    ids = torch.randint(2, 49, (2, length), generator=generator)
    mask = (torch.arange(length) >= torch.tensor([[0], [number % 2]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if MODELS[name][0] == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    if "DVP" in name or "all" in name:
        inputs["visual_embeds"] = torch.randn(2, 4, 16, generator=generator)
    return inputs


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", MODELS)
def test_threads_share_a_model(name):
    model = model_of(name)

    @torch.no_grad()
    def call(inputs: dict) -> list[Tensor]:
        return [model(**inputs).logits]

    assert_alike_in_threads([functools.partial(call, question(name, number)) for number in range(THREADS)])


def op_calls() -> dict:
    """By name, what makes one call of an op with gradients: the arguments that are drawn, by shape, and the call."""
    d, w, p, n = 16, 4, 3, 6
    normed = functools.partial(skip_adapter, norm="layer")
    adapter = [(w, d), (d, w), (w,), (d,), (d,), (d,)]
    return {
        "prompt_diffusion": (
            [(2, n, d), (2, n, d), (p, d), (p, d), (1,)],
            lambda *tensors: prompt_diffusion(*tensors, dropout_p=0.3, seed=5),
        ),
        **{
            f"prompt_compress, {form}": (
                [(2, 2, 8), (2, n, d), (8, d), (8, d), (8,), (8,)],
                lambda *tensors, form=form: prompt_compress(*tensors, num_heads=2, form=form, dropout_p=0.2, seed=5),
            )
            for form in ("absorbed", "projected")
        },
        "skip_adapter with experts": (
            [(2, n, d), (w, d), (d, 2 * w), (w,), (2, d), (d,), (d,), (), (2, 2)],
            normed,
        ),
        "skip_adapter by sample": (
            [(2, n, d), *((2, *shape) for shape in adapter)],
            lambda *tensors: normed(*tensors, route=[1, 0]),
        ),
    }


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("op", op_calls())
def test_threads_share_an_op(op):
    shapes, run = op_calls()[op]

    def call(tensors: list[Tensor]) -> list[Tensor]:
        output = run(*tensors)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator).requires_grad_() for shape in shapes] for _ in range(THREADS)]
    assert_alike_in_threads([functools.partial(call, each) for each in drawn])
