"""From images and questions to what a model is called with. The encoder is frozen, so each image is encoded once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast_prompt.demo.vqa.data import Asked
from fast_prompt.demo.vqa.language import Reader
from fast_prompt.demo.vqa.vocabulary import Vocabulary

BATCH = 250

# A model's keyword arguments: `input_ids` and `attention_mask` [n, tokens], `visual_embeds` [n, Nv, d_v], `labels` [n].
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Encoding:
    """How questions about images become `Inputs`.

    Attributes:
        encode_images: pixels [n, 1, 8, 24] to visual tokens [n, Nv, d_v].
        reader: questions to tokens.
        vocabulary: answers to labels.
    """

    encode_images: Callable[[Tensor], Tensor]
    reader: Reader
    vocabulary: Vocabulary

    def __call__(self, asked: Asked) -> Inputs:
        """Everything about some questions.

        Raises:
            ValueError: an answer is not in the vocabulary, or a question too long; nothing has been encoded then.
        """
        inputs = {**self.reader(asked.questions), "labels": self.vocabulary.encode(asked.answers)}
        visual = [self.encode_images(pixels) for pixels in asked.pixels.split(BATCH)]
        return inputs | {"visual_embeds": torch.cat(visual)}


def take(inputs: Inputs, positions: Tensor | slice) -> Inputs:
    """Those at `positions`."""
    return {name: values[positions] for name, values in inputs.items()}


def lengths(inputs: Inputs) -> Tensor:
    """Tokens of each question [n]."""
    return inputs["attention_mask"].sum(1)


def batch_loss(model: nn.Module, inputs: Inputs, positions: Tensor) -> Tensor:
    """The mean loss of the questions at `positions` [B], less the padding after the longest of them."""
    batch = take(inputs, positions)
    longest = int(lengths(batch).max())
    return model(**batch | {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}).loss


@torch.no_grad()
def scores(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits [n, answers] of all questions, without a gradient."""
    places = torch.arange(len(inputs["labels"])).split(BATCH)
    return torch.cat([model(**take(inputs, place)).logits for place in places])
