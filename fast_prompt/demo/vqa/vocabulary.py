"""The answers that a model chooses from."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Vocabulary:
    """The different answers to the training questions, sorted.

    Args:
        answers: of the training questions.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = sorted(set(answers))

    def __len__(self) -> int:
        return len(self.answers)

    def encode(self, answers: Sequence[str]) -> Tensor:
        """The answers' places in the vocabulary, int64 [n].

        Raises:
            ValueError: an answer is not among those trained on; the message says which, and to which question.
        """
        places = {answer: place for place, answer in enumerate(self.answers)}
        for number, answer in enumerate(answers):
            if answer not in places:
                raise ValueError(f"answer {number}: {answer!r} is not in the vocabulary ({', '.join(self.answers)})")
        return torch.tensor([places[answer] for answer in answers], dtype=torch.int64)
