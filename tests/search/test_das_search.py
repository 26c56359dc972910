"""The search for blocks to skip: what it draws, learns, survives, and finds; and training anew with it."""

import dataclasses
import json
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from ranks import together
from safetensors.torch import save_file
from test_search import Questions, assert_goes_on_as, tiny_bert
from tiny_models import TEXT
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fast_prompt import APTConfig, DASConfig, DVPConfig, FastPromptModel, cli
from fast_prompt.methods.das import skipped_now
from fast_prompt.search import DASSearch, DASSettings, TrainingSettings, train_anew
from fast_prompt.search.das import exponential_of_loss
from fast_prompt.search.plan import Plan
from fast_prompt.tuning import get_fast_prompt_model

LAYERS = 4
CONFIG = DASConfig(num_skipped=2, width=4, skip_width=6, modules_to_save=["classifier"])


def tiny_classifier(layers=LAYERS):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**TEXT, "num_hidden_layers": layers, "num_labels": 3})).eval()


class Texts:
    """The label is a token of the text."""

    def __init__(self, count=40):
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(3, (count,), generator=generator)
        self.text = torch.randint(5, 49, (count, 4), generator=generator)
        self.text[:, 1] = self.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": self.text[index], "labels": self.labels[index]}


def settings(**changed):
    chosen = {"steps": 6, "batch_size": 4, "reward_share": 0.25, "reward_batch": 5, "learning_rate": 3e-3}
    return DASSettings(**{**chosen, "reward_from": 0.0, "reward_every": 1, "save_every": 1, **changed})


def search(directory=None, model=None, config=CONFIG, examples=None, reward=exponential_of_loss, **changed):
    model, examples = model or tiny_classifier(), examples or Texts()
    return DASSearch(model, config, examples, settings(**changed), reward=reward, directory=directory)


def short(paths):
    return [int(path.rpartition(".")[2]) for path in paths]


def test_the_reward_is_the_papers():
    assert exponential_of_loss(SimpleNamespace(loss=torch.tensor(2.0)), {}) == pytest.approx(math.exp(-2))
    for bad in (math.nan, math.inf, -math.inf):
        assert math.isnan(exponential_of_loss(SimpleNamespace(loss=torch.tensor(bad)), {}))


def test_search_gives_the_config_with_the_blocks_found_and_the_model_back():
    model = tiny_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = search(model=model)
    found = blocks.run()
    assert found == dataclasses.replace(CONFIG, skipped=blocks.skipped)
    assert set(short(found.skipped)) == set(blocks.history[-1].topk(2).indices.tolist())
    assert blocks.history.shape == (6, LAYERS)
    assert blocks.history[-1].abs().max() > 0
    assert type(model) is BertForSequenceClassification
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_search_finds_the_blocks_whose_skipping_is_rewarded():
    def reward(output, batch):
        return len(set(short(skipped_now(blocks.model))) & {1, 3}) / 2

    blocks = search(reward=reward, steps=40, preference_rate=2.0)
    assert short(blocks.run().skipped) == [1, 3]


def test_every_step_skips_k_blocks_and_trains_their_adapters_and_the_kept_ones():
    blocks = search(steps=5)
    seen = []
    genuine = blocks.use
    blocks.use = lambda draw: (genuine(draw), seen.append((draw, skipped_now(blocks.model))))
    blocks.run()
    assert all(len(draw) == 2 and short(skipped) == list(draw) for draw, skipped in seen)


def test_rewards_are_measured_when_the_settings_say():
    blocks = search(steps=12, reward_from=0.5, reward_every=3)
    blocks.run()
    moved = (blocks.history.diff(dim=0).abs().sum(1) > 0).nonzero().flatten().add(1).tolist()
    assert not blocks.history[:6].any()
    assert set(moved) <= {6, 9}


def test_llamas_number_of_skipped_blocks_rises():
    blocks = search(steps=40, warmup=0.5, ramp=True, config=dataclasses.replace(CONFIG, num_skipped=3))
    assert [blocks._size(step) for step in (0, 3, 4, 6, 7, 39)] == [1, 1, 2, 2, 3, 3]
    assert search(warmup=0.5)._size(0) == 2


def test_draws_of_few_sets_end():
    blocks = search(model=tiny_classifier(3), draws=9)
    blocks.run()
    assert len(blocks.rewarded_draws()) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_counted_and_poison_nothing(bad):
    calls = []

    def reward(output, batch):
        calls.append(1)
        return bad if len(calls) % 3 == 0 else exponential_of_loss(output, batch)

    blocks = search(reward=reward)
    blocks.run()
    assert blocks.bandit.skipped == 6
    assert blocks.history.isfinite().all()


@pytest.mark.parametrize("stop", [1, 4])
def test_search_interrupted_ends_the_same(tmp_path, stop):
    whole = search(tmp_path / "whole")
    whole.run()
    calls = []

    def interrupted(output, batch):
        calls.append(1)
        if len(calls) > 3 * stop:
            raise KeyboardInterrupt
        return exponential_of_loss(output, batch)

    model = tiny_classifier()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts", model, reward=interrupted).run()
    assert type(model) is BertForSequenceClassification
    assert_goes_on_as(whole, search(tmp_path / "parts", model), tmp_path)


def test_the_seed_decides_everything():
    first, again, other = search(), search(), search(seed=1)
    for each in (first, again, other):
        each.run()
    assert torch.equal(first.history, again.history)
    assert not torch.equal(first.history, other.history)


def test_several_methods_are_searched_as_one():
    config = [DVPConfig(layer=1, visual_width=6, num_answers=3), APTConfig(num_prompts=2), DASConfig(num_skipped=1)]
    blocks = search(model=tiny_bert(3), config=config, examples=Questions())
    found = blocks.run()
    assert [part.method for part in found.configs] == ["DVP", "APT", "DAS"]
    assert found.configs[2].skipped == blocks.skipped
    assert found.configs[:2] == config[:2]


def test_gates_are_drawn(tmp_path):
    blocks = search()
    blocks.run()
    blocks.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": dataclasses.replace(CONFIG, num_skipped=4)}, "num_skipped: expected fewer than the 4 candidates"),
        ({"config": dataclasses.replace(CONFIG, skipped=[0])}, "config: expected skipped=None"),
        ({"config": APTConfig()}, "config: expected a DASConfig to search for, got APT"),
        ({"config": dataclasses.replace(CONFIG, candidates=["bert.pooler"])}, "candidates"),
        ({"reward_from": 1.0}, "reward_from"),
        ({"reward_every": 0}, "reward_every"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(changed, named):
    model = tiny_classifier()
    with pytest.raises(ValueError, match=named):
        search(model=model, **changed)
    assert type(model) is BertForSequenceClassification


# Training anew


def test_training_anew_learns_saves_and_loads(tmp_path):
    blocks = search(tmp_path)
    blocks.run()
    model = blocks.train_anew(TrainingSettings(steps=150, batch_size=20, learning_rate=1e-2, seed=1))
    assert not model.training
    texts = Texts()
    scores = model(input_ids=texts.text).logits
    assert (scores.argmax(-1) == texts.labels).float().mean() > 0.9
    model.save_pretrained(tmp_path / "adapter")
    loaded = FastPromptModel.from_pretrained(tiny_classifier(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=texts.text).logits, scores)
    assert short(skipped_paths(loaded)) == short(blocks.skipped)


def skipped_paths(model):
    return model.adapter_configs[model.active_adapter].skipped


def test_training_anew_waits_for_the_search():
    with pytest.raises(RuntimeError, match=r"0 of 6 steps were searched; call run\(\) first"):
        search().train_anew()


def test_training_anew_interrupted_ends_the_same(tmp_path):
    config = dataclasses.replace(CONFIG, skipped=[1])
    plan = TrainingSettings(steps=6, batch_size=4, learning_rate=1e-3, save_every=2)
    whole = train_anew(tiny_classifier(), config, Texts(), plan)

    class Stopping(Texts):
        calls = 0

        def __getitem__(self, index):
            Stopping.calls += 1
            if Stopping.calls > 4 * 4:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    model = tiny_classifier()
    with pytest.raises(KeyboardInterrupt):
        train_anew(model, config, Stopping(), plan, directory=tmp_path)
    assert type(model) is BertForSequenceClassification
    again = train_anew(model, config, Texts(), plan, directory=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# LLaMA, to the end


def test_search_train_save_load_and_generate_with_llama(tmp_path):
    def tiny_llama():
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        return LlamaForCausalLM(config).eval()

    class Counting:
        """Each text counts up from somewhere."""

        def __len__(self):
            return 48

        def __getitem__(self, index):
            text = (torch.arange(8) + index) % 18 + 2
            return {"input_ids": text, "labels": text}

    config = DASConfig(num_skipped=2, width=8, skip_width=16)
    plan = settings(steps=8, ramp=True)
    blocks = DASSearch(tiny_llama(), config, Counting(), plan, directory=tmp_path)
    blocks.run()
    model = blocks.train_anew(TrainingSettings(steps=40, batch_size=16, learning_rate=1e-2))
    prompt = torch.tensor([[4, 5, 6], [11, 12, 13]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(expected, model.generate(prompt, use_cache=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    loaded = FastPromptModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(loaded.generate(prompt, **options), expected)
    parameters = sum(each.numel() for each in loaded.parameters())
    dropped = sum(each.numel() for path in blocks.skipped for each in tiny_llama().get_submodule(path).parameters())
    loaded.compact()
    assert torch.equal(loaded.generate(prompt, **options), expected)
    assert sum(each.numel() for each in loaded.parameters()) == parameters - dropped


# Several processes


def searched(rank):
    blocks = search(reward_batch=6, seed=rank)  # the first rank's seed counts
    blocks.run()
    return blocks.history.tolist(), blocks.skipped


@pytest.mark.gate
def test_ranks_search_as_one(tmp_path):
    first, second = together(searched, tmp_path / "meeting")
    assert first == second
    _, skipped = first
    assert len(skipped) > 0 and all("layer" in path for path in skipped)


# From a file


def write_plan(directory, extra="", **changed):
    model = tiny_classifier()
    model.save_pretrained(directory / "model")
    texts = Texts()
    save_file({"input_ids": texts.text, "labels": texts.labels}, directory / "train.safetensors")
    values = {"model": "model", "examples": "train.safetensors", "output": "out", **changed}
    lines = [f'{name} = "{value}"' for name, value in values.items()]
    tables = """
[das]
num_skipped = 2
width = 4
skip_width = 6
modules_to_save = ["classifier"]
[search]
steps = 6
batch_size = 4
reward_share = 0.25
reward_batch = 5
reward_from = 0.0
reward_every = 1
"""
    path = directory / "search.toml"
    path.write_text("\n".join(lines) + tables + extra)
    return path


def test_search_from_a_file_trains_anew_and_leaves_everything_behind(tmp_path, capsys):
    path = write_plan(tmp_path, "[training]\nsteps = 3\nbatch_size = 4\n")
    assert cli.main(["search", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["found"]["skipped"]) == 2
    assert len(printed["preferences"]) == LAYERS
    out = tmp_path / "out"
    assert DASConfig.from_pretrained(out / "found").skipped == printed["found"]["skipped"]
    assert (out / "search.png").exists()
    loaded = FastPromptModel.from_pretrained(tiny_classifier(), out / "adapter")
    assert skipped_paths(loaded) == printed["found"]["skipped"]
    assert cli.main(["search", str(path)]) == 0  # it is through: nothing runs again
    shown = capsys.readouterr().out
    assert shown.count("found") >= 2
    assert "layer.0" in shown


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace("[das]", "[dass]"), "unknown dass"),
        (lambda text: text.replace('examples = "train.safetensors"', ""), "missing examples"),
        (lambda text: text.replace("num_skipped = 2", "num_skiped = 2"), r"\[das\]: unknown num_skiped; it may hold"),
        (lambda text: text.replace("num_skipped = 2", "num_skipped = 0"), r"\[das\]: num_skipped: expected"),
        (lambda text: text.replace("num_skipped = 2", "num_skipped = 9"), "num_skipped: expected fewer than the 4"),
        (
            lambda text: text.replace("steps = 6", "steps = -1"),
            r"\[search\]: steps: expected .*, got -1",
        ),
        (lambda text: text.replace("train.safe", "other.safe"), "examples: there is no file"),
        (lambda text: text.replace('"model"', '"elsewhere"'), "model: there is no file"),
        (lambda text: text.replace("[das]", "das"), "search.toml"),
        (lambda text: 'model_class = "NoSuchModel"\n' + text, "model_class: expected a model class of transformers"),
        (lambda text: 'model_class = "AutoConfig"\n' + text, "model_class: expected a model class"),
        (lambda text: "model_class = 5\n" + text, "model_class: expected some text, got 5"),
        (lambda text: text.replace("steps = 6", "steps = nan"), r"\[search\]: steps: expected .* got nan"),
        (lambda text: text + "head_rate = nan", r"\[search\]: head_rate: expected .* got nan"),
        (lambda text: text + "max_grad_norm = nan", r"\[search\]: max_grad_norm: expected .* got nan"),
        (lambda text: text + "[training]\nsteps = 2\nhead_rate = -1e-3", r"\[training\]: head_rate: expected"),
        (lambda text: "a = " + "[" * 5000, "search.toml"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, capsys, change, named):
    path = write_plan(tmp_path)
    path.write_text(change(path.read_text()))
    capsys.readouterr()
    assert cli.main(["search", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("fast-prompt search: error: ")] == said[-1:]
    assert re.search(named, said[-1]), said
    assert not (tmp_path / "out").exists()


def test_a_search_that_diverges_says_so_in_one_line(tmp_path, capsys):
    path = write_plan(tmp_path, "learning_rate = 1e30\nwarmup = 0\n[training]\nsteps = 3\nbatch_size = 4\n")
    capsys.readouterr()
    assert cli.main(["search", str(path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(r"fast-prompt search: error: step \d of 6: .* is not finite, .*", said[-1]), said
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_a_hub_is_refused_before_anything_is_loaded(tmp_path, key):
    path = write_plan(tmp_path)
    config = tmp_path / "model" / "config.json"
    for value in ("someone/kernel", {"": "sdpa", "text_config": "someone/kernel"}):
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json: {key}: expected one of eager, .* got 'someone/kernel'"):
            Plan.read(path).prepare()


def test_columns_must_agree(tmp_path):
    path = write_plan(tmp_path)
    save_file({"input_ids": torch.zeros(3, 2), "labels": torch.zeros(4)}, tmp_path / "train.safetensors")
    with pytest.raises(ValueError, match=r"agree in their first dimension, got input_ids \[3, 2\], labels \[4\]"):
        Plan.read(path).prepare()


def test_adapting_after_a_search_works_by_hand(tmp_path):
    found = search().run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_fast_prompt_model(tiny_classifier(), found)
    assert short(skipped_paths(model)) == short(found.skipped)
