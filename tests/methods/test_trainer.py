"""``transformers.Trainer``, unchanged: training, evaluation, checkpoints, resuming, the best model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VISION, build_language_model
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from fast_prompt.methods import APTConfig, DVPConfig
from fast_prompt.tuning import FastPromptModel, get_fast_prompt_model

pytest.importorskip("accelerate")

HEAD = APTConfig(num_prompts=3, dropout=0.1, modules_to_save=["classifier"])


def base() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VISION, num_labels=2))


def adapted(config: APTConfig = HEAD) -> nn.Module:
    return get_fast_prompt_model(base(), config)


def examples(number: int = 16) -> list[dict]:
    """Dark and bright images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    pixels = torch.randn(number, 3, 16, 16, generator=generator) + 2 * labels.view(-1, 1, 1, 1) - 1
    return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]


def trainer(model: nn.Module, directory: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "learning_rate": 3e-3,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **options,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(8))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_evaluating_saving_and_resuming(tmp_path):
    """Resuming from the second checkpoint ends bit for bit where the uninterrupted run ended (PEFT #2256)."""
    model = adapted()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    whole = trainer(model, tmp_path / "run")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    assert whole.predict(examples(8)).predictions.shape == (8, 2)
    assert all(torch.equal(frozen[name], value) for name, value in model.named_parameters() if name in frozen)

    checkpoint = tmp_path / "run" / "checkpoint-8"
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 2 * 4 + 2
    resumed = adapted()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert_equal(state(resumed), state(model))

    whole.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    }
    loaded = FastPromptModel.from_pretrained(base(), tmp_path / "final", is_trainable=True)
    assert_equal(state(loaded), state(model))


def test_the_best_model_comes_back_at_the_end(tmp_path, recwarn):
    """A learning rate that grows ruins later epochs; the first checkpoint must return."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "steps_taken", "greater_is_better": False}
    model = adapted()
    run = trainer(model, tmp_path, **options)
    evaluate = run.evaluate

    def evaluate_by_age(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_steps_taken": run.state.global_step}

    run.evaluate = evaluate_by_age
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-4"
    best = FastPromptModel.from_pretrained(base(), tmp_path / "checkpoint-4", is_trainable=True)
    last = FastPromptModel.from_pretrained(base(), tmp_path / "checkpoint-12", is_trainable=True)
    assert_equal(state(model), state(best))
    assert not torch.equal(state(model)["classifier.weight"], state(last)["classifier.weight"])


def test_bfloat16_and_gradient_checkpointing(tmp_path):
    model = adapted()
    before = state(model)
    trainer(model, tmp_path, bf16=True, gradient_checkpointing=True, num_train_epochs=1).train()
    assert all(not torch.equal(before[name], value) for name, value in state(model).items())


def test_revert_after_mixed_precision_gives_the_base(tmp_path):
    """``Trainer`` leaves accelerate's forward on the model, which holds on to DVP's."""
    model, inputs = build_language_model("bert_classifier")
    with torch.no_grad():
        expected = model(**inputs).logits
    data = [
        {"input_ids": ids, "visual_embeds": torch.randn(4, 16), "labels": torch.tensor(1)}
        for ids in inputs["input_ids"]
    ]
    get_fast_prompt_model(model, DVPConfig(layer=1, visual_width=16))
    run = trainer(model, tmp_path, bf16=True, num_train_epochs=1, save_strategy="no", eval_strategy="no")
    run.train_dataset = data
    run.train()
    with torch.no_grad():
        torch.testing.assert_close(model.revert().eval()(**inputs).logits, expected, rtol=0.05, atol=0.05)


def test_without_a_head_only_the_adapter_moves(tmp_path):
    model = adapted(APTConfig(num_prompts=3))
    head = model.classifier.weight.clone()
    before = state(model)
    trainer(model, tmp_path, num_train_epochs=1).train()
    assert torch.equal(model.classifier.weight, head)
    assert all(not torch.equal(before[name], value) for name, value in state(model).items() if "prompts" in name)


LABELS = {
    "whole numbers": lambda number: torch.arange(number) % 3,
    "scores": lambda number: torch.rand(number, 3, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, kind):
    """``Trainer`` leaves it to a model that takes keywords to divide by the number of labels in all steps."""
    random = torch.Generator().manual_seed(0)
    ids, visual = torch.randint(2, 49, (8, 5), generator=random), torch.randn(8, 4, 16, generator=random)
    data = [
        {"input_ids": i, "visual_embeds": v, "labels": label}
        for i, v, label in zip(ids, visual, LABELS[kind](8), strict=True)
    ]
    steps = {}
    for accumulated in (1, 2, 4, 8):
        model, _ = build_language_model("bert")
        config = DVPConfig(layer=1, visual_width=16, num_answers=3, dropout=0.0)
        torch.manual_seed(0)
        model = get_fast_prompt_model(model, config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        before = state(model)
        run = trainer(
            model,
            tmp_path / str(accumulated),
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            eval_strategy="no",
        )
        run.train_dataset = data
        run.train()
        steps[accumulated] = {name: value - before[name] for name, value in state(model).items()}
    for accumulated in (2, 4, 8):
        for name, step in steps[accumulated].items():
            torch.testing.assert_close(step, steps[1][name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert any(step.abs().max() > 1e-4 for step in steps[1].values())
