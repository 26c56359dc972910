"""DVP inside language models: what enters, where, who sees it, and what is refused."""

import copy
import pickle

import eager_dvp
import pytest
import torch
from cases import TOKENS, VISUAL_WIDTH, features, stir
from cases import dvp as config
from tiny_models import LANGUAGE_MODELS, LLAMA, WIDTH, bert_decoder, build_language_model, text_inputs
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForTokenClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from fast_prompt import DVPConfig, get_fast_prompt_model
from fast_prompt.models.cache import cache_in
from fast_prompt.tolerances import TOLERANCES, relative_error

DOUBLE, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]


def adapted(name: str, settings: DVPConfig, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict, nn.Module]:
    """The model, its text and its prompter."""
    model, inputs = build_language_model(name)
    get_fast_prompt_model(model.to(dtype), settings)
    stir(model)
    return model, inputs, model.fast_prompt["default"]


LAYERS_AND_PROMPTS = [(0, 1), (1, 1), (1, 3), (2, 2)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("layer", "number"), LAYERS_AND_PROMPTS)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_bert_is_the_hand_written_one(name, layer, number, attention):
    settings = config(layer, num_prompts=number, adapter_width=6, inner_width=48, num_heads=3)
    model, inputs, prompter = adapted(name, settings, torch.float64)
    model.set_attn_implementation(attention)
    visual, real = features().double(), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    output = model(**inputs, visual_embeds=visual, visual_attention_mask=real)
    expected = eager_dvp.bert(model, prompter, inputs, visual, real)
    assert relative_error(output.last_hidden_state, expected[:, number:]) < DOUBLE
    assert relative_error(output.pooler_output, model.pooler(expected[:, number:])) < DOUBLE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("layer", "number"), LAYERS_AND_PROMPTS)
def test_t5_is_the_hand_written_one(layer, number, attention):
    """The relative bias must reach every block, and the start token must see the prompts and be seen by them."""
    model, inputs, prompter = adapted("t5", config(layer, num_prompts=number, adapter_width=6))
    model.set_attn_implementation(attention)
    for tokens in (1, 3):
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :tokens]
        output = model(**inputs, visual_embeds=features())
        expected = eager_dvp.t5(model, prompter, inputs, features(), output.encoder_last_hidden_state)
        assert relative_error(output.last_hidden_state, expected[:, number:]) < SINGLE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("layer", "number"), LAYERS_AND_PROMPTS)
def test_llama_is_the_hand_written_one(layer, number, side, attention):
    model, _, prompter = adapted("llama", config(layer, num_prompts=number, inner_width=16, num_heads=4))
    model.set_attn_implementation(attention)
    inputs = text_inputs(side)
    last = torch.tensor([6, 3 if side == "right" else 6])
    output = model(**inputs, visual_embeds=features()).last_hidden_state
    expected = eager_dvp.llama(model, prompter, inputs, features(), last)[:, number:]
    real = inputs["attention_mask"].bool()
    assert relative_error(output[real], expected[real]) < SINGLE


def test_llama_asks_with_the_answers_marker_where_there_is_one():
    model, inputs, prompter = adapted("llama", config(answer_token_id=49))
    inputs["input_ids"][0, [2, 4]] = 49
    output = model(**inputs, visual_embeds=features()).last_hidden_state
    expected = eager_dvp.llama(model, prompter, inputs, features(), torch.tensor([2, 3]))[:, 1:]
    real = inputs["attention_mask"].bool()
    assert relative_error(output[real], expected[real]) < SINGLE


@pytest.mark.parametrize("query", ["first", "last", "mean"])
def test_the_query_can_be_pooled_otherwise(query):
    model, inputs, prompter = adapted("bert", config(query=query), torch.float64)
    states = model(**inputs, visual_embeds=features().double(), output_hidden_states=True).hidden_states
    text, mask = states[1], inputs["attention_mask"].double()
    pooled = {
        "first": text[:, 0],
        "last": torch.stack([text[0, 6], text[1, 3]]),
        "mean": (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    }[query]
    prompts = eager_dvp.prompts_of(prompter, pooled, features().double(), None)
    torch.testing.assert_close(
        prompter(text, inputs["attention_mask"], features().double(), None), prompts, rtol=DOUBLE, atol=DOUBLE
    )


def test_hidden_states_show_the_prompts_from_block_k_on():
    model, inputs, _ = adapted("bert", config(1, num_prompts=2))
    states = model(**inputs, visual_embeds=features(), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [7, 7, 9, 7]


def test_images_without_a_real_token_give_the_type_embedding_alone():
    model, inputs, prompter = adapted("bert", config())
    real = torch.tensor([[1] * TOKENS, [0] * TOKENS])
    visual = features().requires_grad_()
    model(**inputs, visual_embeds=visual, visual_attention_mask=real)[0].sum().backward()
    assert visual.grad[0].abs().sum() > 0
    assert visual.grad[1].abs().sum() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    prompts = prompter(torch.randn(2, 7, WIDTH), None, features(), real == 0)
    assert torch.equal(prompts[1, 0], prompter.type_embedding[1])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_image_matters_and_padding_of_it_does_not(name):
    model, inputs, _ = adapted(name, config())
    output = model(**inputs, visual_embeds=features())[0]
    assert not torch.allclose(output, model(**inputs, visual_embeds=2 * features())[0])
    longer = torch.cat([features(), torch.full((2, 2, VISUAL_WIDTH), 1e3)], 1)
    real = torch.tensor([[True] * TOKENS + [False] * 2] * 2)
    padded = model(**inputs, visual_embeds=longer, visual_attention_mask=real)[0]
    torch.testing.assert_close(padded, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForMaskedLM(BertConfig(**bert_sizes())),
        lambda: BertForTokenClassification(BertConfig(**bert_sizes())),
    ],
)
def test_ready_made_heads_see_the_text(make):
    model = get_fast_prompt_model(make().eval(), config())
    inputs = text_inputs()
    output = model(**inputs, visual_embeds=features(), labels=torch.zeros(2, 7, dtype=torch.long))
    assert output.logits.shape[:2] == (2, 7)
    assert output.loss.isfinite()


def bert_sizes() -> dict:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 50,
    }


# Generation


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["t5_generator", "llama_generator"])
def test_the_cache_gives_what_the_whole_sequence_gives(name, layer):
    """Step by step with key-value caches, against one forward over all tokens."""
    settings = config(layer, num_prompts=2, query="first")
    model, inputs, _ = adapted(name, settings)
    key = "decoder_input_ids" if name == "t5_generator" else "input_ids"
    if name == "llama_generator":
        inputs = text_inputs("left")
    tokens = inputs.pop(key)
    mask = inputs.pop("attention_mask")
    whole = model(**{key: tokens}, **inputs, attention_mask=mask, visual_embeds=features()).logits
    cache, steps = None, []
    for end in range(1 if name == "t5_generator" else 4, tokens.shape[1] + 1):
        start = 0 if cache is None else end - 1
        seen = mask if name == "t5_generator" else mask[:, :end]
        output = model(
            **{key: tokens[:, start:end]},
            **inputs,
            attention_mask=seen,
            visual_embeds=features() if cache is None else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    real = slice(None) if name == "t5_generator" else mask.bool()
    assert relative_error(torch.cat(steps, 1)[real], whole[real]) < SINGLE


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["t5_generator", "llama_generator"])
def test_generate_gives_the_same_with_and_without_a_cache(name, layer, beams):
    model, _, _ = adapted(name, config(layer, query="first"))
    inputs = text_inputs("left" if name == "llama_generator" else "right")

    def generate(**more) -> tuple[Tensor, Tensor]:
        output = model.generate(
            **{**inputs, "max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None, **more},
            pad_token_id=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return output.sequences, torch.stack(output.logits)

    sequences, logits = generate(visual_embeds=features())
    again, same = generate(visual_embeds=features(), use_cache=False)
    assert torch.equal(sequences, again)
    assert relative_error(logits, same) < SINGLE
    assert not torch.allclose(logits[0], generate(visual_embeds=-3 * features())[1][0])
    with model.disable_adapter():
        plain = generate()[1]
        assert torch.equal(plain, generate(visual_embeds=features())[1])
    assert not torch.allclose(plain[0], logits[0])


def test_caches_that_cannot_hold_the_prompts_are_refused():
    model, inputs, _ = adapted("llama_generator", config())
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="past_key_values: StaticCache"):
        model(**inputs, visual_embeds=features(), past_key_values=static)
    with model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: the cache was filled, or cropped, without"):
        model(**inputs, visual_embeds=features(), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["t5_generator", "llama_generator"])
def test_a_cache_with_prompts_serves_those_who_put_them_there(name, layer):
    model, inputs, _ = adapted(name, config(layer, num_prompts=2))
    model.add_adapter("one", config(layer))
    model.add_adapter("later", config(2, num_prompts=2))
    cache = cache_in(model(**inputs, visual_embeds=features(), use_cache=True))
    assert cache.get_seq_length() == (3 if name == "t5_generator" else 7)
    generated = "decoder_input_ids" if name == "t5_generator" else "input_ids"
    more = {**inputs, generated: inputs[generated][:, -1:], "use_cache": True}
    if name == "llama_generator":
        more["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for other in ("one", "later"):
        model.set_adapter(other)
        with pytest.raises(ValueError, match="past_key_values: the cache was filled, or cropped, without these"):
            model(**more, visual_embeds=features(), past_key_values=cache)
    with model.disable_adapter(), pytest.raises(ValueError, match="past_key_values: the cache holds visual prompts"):
        model(**more, past_key_values=cache)
    model.set_adapter("default")
    first, *others = (model(**more, past_key_values=each).logits for each in (cache, *copies))
    assert all(torch.equal(first, other) for other in others)
    assert {each.get_seq_length() for each in (cache, *copies)} == {cache.get_seq_length(2)}


def test_encoder_outputs_can_be_given():
    model, inputs, _ = adapted("t5", config())
    whole = model(**inputs, visual_embeds=features())
    encoded = BaseModelOutput(last_hidden_state=whole.encoder_last_hidden_state)
    del inputs["input_ids"]
    again = model(**inputs, encoder_outputs=encoded, visual_embeds=features())
    assert torch.equal(again.last_hidden_state, whole.last_hidden_state)


# The head


@pytest.mark.parametrize(("name", "position"), [("bert", (0, 0)), ("t5", (-1, -1)), ("llama", (6, 3))])
def test_the_answer_head_reads_the_papers_position(name, position):
    model, inputs, _ = adapted(name, config(num_answers=4))
    head = model.fast_prompt_head["default"]
    hidden = []
    head.register_forward_hook(lambda _, args, __: hidden.append(args[0]))
    output = model(**inputs, visual_embeds=features())
    model.add_adapter("headless", config())
    state = {n.replace(".default.", ".headless."): v for n, v in model.state_dict().items() if ".default." in n}
    model.load_state_dict(state | {n: v for n, v in model.state_dict().items() if n not in state}, strict=False)
    model.set_adapter("headless")
    states = model(**inputs, visual_embeds=features())[0]
    assert torch.equal(hidden[0], torch.stack([states[i, p] for i, p in enumerate(position)]))
    linear, norm, last = head.up_proj, head.norm, head.classifier
    by_hand = last(nn.functional.gelu(norm(linear(hidden[0]))))
    assert torch.equal(output.logits, by_hand)
    assert output.loss is None


def test_the_losses_are_the_papers():
    model, inputs, _ = adapted("bert", config(num_answers=4))
    scores = torch.rand(2, 4)
    output = model(**inputs, visual_embeds=features(), labels=scores)
    elementwise = -(scores * output.logits.sigmoid().log() + (1 - scores) * (-output.logits).sigmoid().log())
    torch.testing.assert_close(output.loss, elementwise.mean() * 4)
    answers = torch.tensor([3, 1])
    output = model(**inputs, visual_embeds=features(), labels=answers)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[[0, 1], answers].mean())
    loss, logits = model(**inputs, visual_embeds=features(), labels=answers, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert torch.equal(loss, output.loss)
    for bad in (torch.rand(2, 3), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"labels: expected whole numbers \[B\] or scores \[B, 4\]"):
            model(**inputs, visual_embeds=features(), labels=bad)


def test_t5_starts_to_answer_by_itself():
    model, inputs, _ = adapted("t5", config(num_answers=4))
    del inputs["decoder_input_ids"]
    start = torch.zeros(2, 1, dtype=torch.long)
    first = model(**inputs, visual_embeds=features()).logits
    assert torch.equal(first, model(**inputs, decoder_input_ids=start, visual_embeds=features()).logits)


# What is refused

BAD_INPUTS = {
    "nothing": (None, None, ValueError, r"visual_embeds: expected the image features \[2, n, 24\], got None"),
    "a list": ([1.0], None, TypeError, "visual_embeds: expected a floating-point tensor, got list"),
    "whole numbers": (torch.ones(2, 5, 24).long(), None, TypeError, "visual_embeds: .* got torch.int64"),
    "rank": (torch.ones(2, 24), None, ValueError, r"visual_embeds: expected shape \[2, n, 24\] .*got \[2, 24\]"),
    "batch": (torch.ones(3, 5, 24), None, ValueError, r"visual_embeds: expected shape .*got \[3, 5, 24\]"),
    "width": (torch.ones(2, 5, 25), None, ValueError, r"visual_embeds: expected shape .*got \[2, 5, 25\]"),
    "mask shape": (torch.ones(2, 5, 24), torch.ones(2, 4).long(), ValueError, r"visual_attention_mask: .*\[2, 5\]"),
    "mask dtype": (torch.ones(2, 5, 24), torch.ones(2, 5), TypeError, "visual_attention_mask: .*got torch.float32"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("name", ["bert_classifier", "t5_generator", "llama_generator"])
def test_bad_features_are_refused_before_anything_runs(name, case):
    visual, mask, error, message = BAD_INPUTS[case]
    model, inputs, _ = adapted(name, config())
    ran = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message):
        model(**inputs, visual_embeds=visual, visual_attention_mask=mask)
    assert not ran


@pytest.mark.parametrize(("name", "longest"), [("bert", 512), ("roberta", 510), ("llama", 62)])
def test_a_question_longer_than_the_models_limit_is_refused(name, longest):
    model, _, _ = adapted(name, config(num_prompts=2))
    for length in (longest, longest + 1):
        inputs = {"input_ids": torch.full((1, length), 7)}
        if length == longest:
            model(**inputs, visual_embeds=features(1))
        else:
            with pytest.raises(ValueError, match=f"input_ids: .* more than the (64|{longest}) that the model has"):
                model(**inputs, visual_embeds=features(1))


ANSWERS = [[9, 10, 11], [20, 21, 22]]
# The question, in which 49 is the marker; what else is given; and the error, or None where the answer stays untold.
LABELLED = {
    "a marker": ([5, 6, 7, 49], {}, None),
    "no marker": ([5, 6, 7, 8], {}, "labels: they lie in the text .*answer_token_id .*visual_query_mask"),
    "the marker in the answer": ([5, 6, 7, 8], {"answer_token_id": 10}, "labels: they lie in the text"),
    "the marker in the answer, else the first token": (
        [5, 6, 7, 8],
        {"answer_token_id": 10, "query": "first"},
        "labels: they lie in the text",
    ),
    "no marker set": ([5, 6, 7, 49], {"answer_token_id": None}, "labels: they lie in the text"),
    "the first token asks": ([5, 6, 7, 8], {"query": "first"}, None),
    "the question is told": ([5, 6, 7, 8], {"stated": True}, None),
    "embeddings": ([5, 6, 7, 49], {"embeds": True}, r"input_ids: expected the ids in which answer_token_id .49."),
    "embeddings, and the question is told": ([5, 6, 7, 49], {"embeds": True, "stated": True}, None),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LABELLED)
def test_prompts_never_tell_the_answer(case):
    question, more, message = LABELLED[case]
    settings = {name: more[name] for name in ("answer_token_id", "query") if name in more}
    model, _, _ = adapted("llama_generator", config(**{"answer_token_id": 49, **settings}))
    asked = []
    for answer in ANSWERS:
        ids = torch.tensor([question + answer])
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if "embeds" in more else {"input_ids": ids}
        if "stated" in more:
            inputs["visual_query_mask"] = torch.ones(1, 4, dtype=torch.long)
        labels = torch.where(torch.arange(7) < 4, -100, ids)
        if message is not None:
            with pytest.raises(ValueError, match=message):
                model(**inputs, labels=labels, visual_embeds=features(1))
            return
        output = model(**inputs, labels=labels, visual_embeds=features(1))
        assert output.loss.isfinite()
        asked.append(output.logits[:, :4])
    assert torch.equal(*asked)


def test_a_sample_without_an_answer_needs_no_marker():
    model, inputs, _ = adapted("llama_generator", config(answer_token_id=49))
    inputs["input_ids"][0, 2] = 49
    labels = torch.where(torch.arange(7) > 2, inputs["input_ids"], -100)
    labels[1] = -100
    assert model(**inputs, labels=labels, visual_embeds=features()).loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_the_question_can_be_told(name):
    """Prompts asked for with part of a text are those that this part alone would ask for, and mean what it does."""
    for query in ("first", "last", "mean"):
        model, inputs, prompter = adapted(name, config(0, query=query))
        came = []
        prompter.compressor.q_proj.register_forward_pre_hook(lambda _, args, came=came: came.append(args[0]))
        told = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
        model(**inputs, visual_embeds=features(), visual_query_mask=told)
        source = came_from(name, model, inputs)
        rows = {"first": ([1], [0]), "last": ([2], [1]), "mean": ([1, 2], [0, 1])}[query]
        expected = torch.stack([source[sample, places].mean(0) for sample, places in enumerate(rows)])
        torch.testing.assert_close(came[0][:, 0], expected, rtol=1e-5, atol=1e-6)


def came_from(name: str, model: nn.Module, inputs: dict) -> Tensor:
    """What is pooled where prompts enter the first block."""
    if name == "t5":
        return model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    return (
        model.embeddings(input_ids=inputs["input_ids"]) if name == "bert" else model.embed_tokens(inputs["input_ids"])
    )


BAD_QUESTIONS = {
    "a list": ([1, 1], TypeError, "visual_query_mask: expected a bool or whole-number tensor, .*got list"),
    "scores": (torch.ones(2, 7), TypeError, "visual_query_mask: .*got torch.float32"),
    "batch": (torch.ones(3, 7).bool(), ValueError, r"visual_query_mask: expected shape \[2, n\], got \[3, 7\]"),
    "rank": (torch.ones(2).bool(), ValueError, r"visual_query_mask: expected shape \[2, n\], got \[2\]"),
    "beyond the text": (torch.ones(2, 9).bool(), ValueError, "visual_query_mask: the first 7 of 9 tokens end before"),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
@pytest.mark.parametrize("name", ["bert_classifier", "t5_generator", "llama_generator"])
def test_a_bad_question_is_refused(name, case):
    mask, error, message = BAD_QUESTIONS[case]
    model, inputs, _ = adapted(name, config(query="last"))
    with pytest.raises(error, match=message):
        model(**inputs, visual_embeds=features(), visual_query_mask=mask)


def test_sequences_that_share_a_row_are_refused():
    model, _, _ = adapted("llama_generator", config())
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="position_ids: expected one sequence in each row"):
        model(**packed, visual_embeds=features(1), use_cache=False)


@pytest.mark.parametrize("name", ["t5_generator", "llama_generator"])
def test_nothing_is_generated_without_a_question(name):
    model, _, _ = adapted(name, config())
    with pytest.raises(ValueError, match="input_ids: expected the text, or its embeddings"):
        model.generate(visual_embeds=features(), max_new_tokens=2)


def test_a_marker_is_looked_for_in_ids_alone():
    """A T5 that is given its encoder's output generates with the marker no more than it runs with it."""
    model, inputs, _ = adapted("t5_generator", config(answer_token_id=49))
    encoded = model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    given = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"], "visual_embeds": features()}
    for call in (lambda **more: model(**given, **more), lambda **more: model.generate(**given, **more)):
        with pytest.raises(ValueError, match="input_ids: expected the ids in which answer_token_id"):
            call(decoder_input_ids=torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_batch_may_be_dynamic(name):
    model, inputs, _ = adapted(name, config(dropout=0.0, num_prompts=2))
    inputs = {**inputs, "visual_embeds": features()} | ({"use_cache": False} if name == "llama" else {})
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {key: {0: batch} if isinstance(value, Tensor) else None for key, value in inputs.items()}
    exported = torch.export.export(model, (), kwargs=inputs, strict=False, dynamic_shapes=shapes).module()
    more = {key: torch.cat([value, value[:1]]) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    torch.testing.assert_close(exported(**more)[0], model(**more)[0], rtol=1e-4, atol=1e-5)


def test_a_llama_that_calls_itself_a_decoder_takes_prompts():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, is_decoder=True)).eval()
    get_fast_prompt_model(model, config())
    assert model(**text_inputs(), visual_embeds=features()).logits.isfinite().all()


def test_a_dynamic_rope_goes_past_the_limit():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"max_position_embeddings": 5}, rope_parameters=rope)).eval()
    get_fast_prompt_model(model, config())
    assert model(**text_inputs(), visual_embeds=features()).logits.isfinite().all()


BAD_MODELS = {
    "layer": ("bert", {"layer": 3}, "layer: expected one of the 3 blocks from 0, got 3"),
    "heads": ("bert", {"num_heads": 5}, "num_heads: expected a divisor of the inner width 32, got 5"),
    "a head": ("bert_classifier", {"num_answers": 3}, "num_answers: expected a model without a head .BertModel"),
    "a generator": ("t5_generator", {"num_answers": 3}, "num_answers: .*got T5ForConditionalGeneration"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_settings_that_do_not_fit_the_model_are_refused(case):
    name, settings, message = BAD_MODELS[case]
    model, _ = build_language_model(name)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_fast_prompt_model(model, config(**settings))
    assert list(model.state_dict()) == before


def test_unknown_architectures_learn_what_is_known():
    gpt = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    t5_encoder = T5EncoderModel(T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=50))
    known = r"known: BERT \(BertEncoder\); RoBERTa \(RobertaEncoder\); LLaMA \(LlamaModel\); T5 \(T5Stack\)"
    for model in (gpt, bert_decoder()[0], t5_encoder):
        with pytest.raises(ValueError, match=known):
            get_fast_prompt_model(model, config(0))
    with pytest.raises(ValueError, match="BertForMultipleChoice: expected a model that takes one text for an image"):
        get_fast_prompt_model(BertForMultipleChoice(BertConfig(**bert_sizes())), config(0))


BAD_FIELDS = {
    "layer": [-1, 1.0, True, None],
    "visual_width": [0, "4"],
    "num_prompts": [0, None],
    "query": ["max", None],
    "answer_token_id": [-1, 2.0],
    "num_heads": [0],
    "inner_width": [0],
    "dropout": [1, -0.1],
    "type_embedding": [1],
    "adapter_width": [0],
    "train_base": ["all", None],
    "num_answers": [0],
    "modules_to_save": ["classifier"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_FIELDS.items() for v in values])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got "):
        DVPConfig(**{"layer": 0, field: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_model_takes_features_of_either_dtype(dtype):
    model, inputs = build_language_model("bert")
    get_fast_prompt_model(model.to(torch.bfloat16), config())
    assert model(**inputs, visual_embeds=features().to(dtype))[0].dtype == torch.bfloat16
