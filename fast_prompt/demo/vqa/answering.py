"""A trained adapter with all it needs to answer a question about an image: saved, loaded, asked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_prompt.demo.vqa import encoder_files, language
from fast_prompt.demo.vqa.images import read_image
from fast_prompt.demo.vqa.vocabulary import Vocabulary
from fast_prompt.models.visual import VisualEncoder
from fast_prompt.tuning import FastPromptModel
from fast_prompt.tuning.files import read_json, write_atomically

# Beside the adapter's own files: what it answers with, and the image encoder.
ANSWERS_NAME = "answers.json"
VISION = "vision"


@dataclass(frozen=True)
class Answerer:
    """A language model with visual prompts, its image encoder and its answers.

    Attributes:
        model: the adapted language model.
        encoder: images to visual tokens.
        reader: questions to tokens.
        vocabulary: the answers to choose from.
    """

    model: Any
    encoder: VisualEncoder
    reader: language.Reader
    vocabulary: Vocabulary

    def save(self, directory: Path) -> None:
        """Write the adapter, the encoder and the vocabulary into `directory`; of the language model, only its name."""
        self.model.save_pretrained(directory)
        facts = {"language_model": language.DISTRIBUTION, "answers": self.vocabulary.answers}
        vision = {
            directory / VISION / name: data for name, data in encoder_files.file_contents(self.encoder.model).items()
        }
        write_atomically({directory / ANSWERS_NAME: (json.dumps(facts, indent=2) + "\n").encode()} | vision)

    @classmethod
    def load(cls, directory: Path) -> "Answerer":
        """Read what `save` wrote, into a fresh language model.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken or foreign; the message names it.
            ModuleNotFoundError: the language model is not installed.
        """
        facts = read_json(directory / ANSWERS_NAME)
        answers = facts.get("answers")
        if facts.get("language_model") != language.DISTRIBUTION or not isinstance(answers, list) or not answers:
            raise ValueError(f"{directory / ANSWERS_NAME}: expected answers of {language.DISTRIBUTION}, got {facts}")
        if not all(isinstance(each, str) for each in answers) or answers != Vocabulary(answers).answers:
            raise ValueError(f"{directory / ANSWERS_NAME}: answers: expected different texts in order, got {answers}")
        vision = encoder_files.load(directory / VISION)
        model = FastPromptModel.from_pretrained(language.pretrained(), directory).eval()
        vocabulary, expected = Vocabulary(answers), model.adapter_configs[model.active_adapter].num_answers
        if len(vocabulary) != expected:
            raise ValueError(f"{directory / ANSWERS_NAME}: {len(vocabulary)} answers, and the adapter has {expected}")
        return cls(model, frozen(vision), language.Reader(), vocabulary)

    @torch.no_grad()
    def probabilities(self, pixels: Tensor, question: str) -> dict[str, float]:
        """The probability of every answer to one question about one image [1, 8, 24], the likeliest first.

        Raises:
            ValueError: the question is empty, or longer than the model can read.
        """
        tokens = self.reader([question])
        logits = self.model(**tokens, visual_embeds=self.encoder(pixels[None])).logits[0]
        pairs = zip(self.vocabulary.answers, logits.softmax(-1).tolist(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))


def answer(adapter: Path, image: Path, question: str, max_pixels: int) -> dict[str, float]:
    """What the adapter in a directory answers to one question about one image file: see `fast_prompt.demo.answer`."""
    pixels = read_image(image, max_pixels)
    return Answerer.load(adapter).probabilities(pixels, question)


def frozen(vision: Any) -> VisualEncoder:
    """The vision transformer as the source of visual tokens: its normed last hidden states, CLS included."""
    return VisualEncoder(vision, hidden_state=None)
