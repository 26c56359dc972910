"""The answer head, and the forward of a model that has one."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_prompt.models.visual.target import visual_of

HEAD_CHILD = "fast_prompt_head"


class AnswerHead(nn.Module):
    """Linear(d, 2d), LayerNorm, GELU, Linear(2d, answers); weights from N(0, 0.02), biases 0.

    Args:
        dim: d, the width of the read-out.
        num_answers: how many answers there are.
        family: name of the architecture's family.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Source: the heads of "Adapting Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting",
    arXiv 2306.00409.
    """

    is_head = True  # to ``fast_prompt.tuning.parameter_groups``

    def __init__(
        self, dim: int, num_answers: int, family: str, *, device: torch.device | None = None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.family = family
        # An extra, and slow to import; a model to put the head on has imported it.
        self.output_class = importlib.import_module("transformers.modeling_outputs").SequenceClassifierOutput
        self.up_proj = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(2 * dim, device=device, dtype=dtype)
        self.classifier = nn.Linear(2 * dim, num_answers, device=device, dtype=dtype)
        for linear in (self.up_proj, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The read-out [B, d] to logits [B, answers], in the parameters' dtype (the autocast dtype under autocast)."""
        return self.classifier(F.gelu(self.norm(self.up_proj(hidden.to(self.up_proj.weight.dtype)))))


def answer_forward(
    self: Any,
    forward: Callable[..., Any],
    *,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> Any:
    """A backbone's forward that ends in the answer head.

    Args:
        self: the adapted model.
        forward: the model's own.
        labels: whole numbers [B], or scores [B, answers].
        num_items_in_batch: how many labels there are in all steps of a batch whose gradients ``Trainer`` accumulates;
            the loss is then the sum over this step divided by it, else this step's mean.
        inputs: the forward's own arguments.

    Returns:
        a ``SequenceClassifierOutput``: logits [B, answers], and the loss where ``labels`` came: cross-entropy for
        whole numbers [B]; binary cross-entropy times the number of answers for scores [B, answers].
    """
    head = getattr(self, HEAD_CHILD).in_use()
    if head is None:
        given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
        return forward(self, **inputs, **{name: value for name, value in given.items() if value is not None})
    family = visual_of(head.family)
    if labels is not None:
        check_labels(labels, head.classifier.out_features)
    return_dict = inputs.pop("return_dict", None)
    output = forward(self, **family.answer_inputs(self, inputs), return_dict=True)
    logits = head(family.read_out(output[0], inputs.get("attention_mask")))
    loss = None if labels is None else answer_loss(logits, labels, num_items_in_batch)
    answer = head.output_class(
        loss=loss,
        logits=logits,
        hidden_states=output.get("hidden_states", output.get("decoder_hidden_states")),
        attentions=output.get("attentions", output.get("decoder_attentions")),
    )
    return answer.to_tuple() if return_dict is False else answer


def check_labels(labels: Tensor, num_answers: int) -> None:
    """Whole numbers [B], or scores [B, answers]."""
    scores = labels.is_floating_point()
    if labels.dim() != (2 if scores else 1) or (scores and labels.shape[1] != num_answers):
        raise ValueError(
            f"labels: expected whole numbers [B] or scores [B, {num_answers}], got {labels.dtype} {list(labels.shape)}"
        )


def answer_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of whole numbers; binary cross-entropy of scores, times the number of answers.

    Args:
        logits: [B, answers].
        labels: whole numbers [B], or scores [B, answers].
        num_items: the sum over all labels is divided by it; by default the mean is taken.
    """
    reduction = "mean" if num_items is None else "sum"
    if labels.is_floating_point():
        scores = labels.to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, scores, reduction=reduction) * logits.shape[-1]
    else:
        loss = F.cross_entropy(logits, labels, reduction=reduction)
    return loss if num_items is None else loss / num_items
