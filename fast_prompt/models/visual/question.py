"""Which tokens ask for the prompts: those of the question, whatever else the text of a call holds."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_prompt.models.checks import check_data
from fast_prompt.models.visual.call import text_in, two_dimensional
from fast_prompt.models.visual.prompter import VisualPrompter
from fast_prompt.tuning.site import CHILD


def marker_in(ids: Tensor, mask: Tensor | None, token: int) -> Tensor:
    """bool [B, n], True at the first place of ``token``, the answer's marker, among the real tokens of ``ids``."""
    found = ids.eq(token)
    found = found if mask is None else found & (mask != 0)
    return found & (found.cumsum(-1) == 1)


def question_in(prompter: VisualPrompter, text: Tensor | None, mask: Tensor | None) -> Tensor:
    """Where the question is in a text that ends with it: at the answer's marker in samples that have it, else all over.

    Args:
        prompter: the adapter in use.
        text: ids [B, n] or embeddings [B, n, d].
        mask: [B, n], 1 where a token is real, or None.

    Returns:
        bool [B, n].

    Raises:
        ValueError: there are no ids to find the marker in.
    """
    if prompter.answer_token_id is not None and (text is None or text.dim() != 2):
        raise ValueError(
            f"input_ids: expected the ids in which answer_token_id ({prompter.answer_token_id}) can be found, got "
            "none; visual_query_mask can say instead which tokens ask for the prompts"
        )
    if text is None:
        raise ValueError("input_ids: expected the text, or its embeddings as inputs_embeds, got neither")
    question = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if prompter.answer_token_id is None:
        return question
    marker = marker_in(text, mask, prompter.answer_token_id)
    return torch.where(marker.any(-1, keepdim=True), marker, question)


def asking(
    prompter: VisualPrompter, inputs: Mapping[str, Any], source: Tensor, mask: Tensor | None, given: object
) -> Tensor | None:
    """Which tokens of ``source`` the query is pooled from.

    Args:
        prompter: the adapter in use.
        inputs: the forward's arguments by name.
        source: what asks, [B, n] or [B, n, d].
        mask: [B, n], 1 where a token of it is real, or None.
        given: what came as ``visual_query_mask``.

    Returns:
        [B, n], or None where all do.

    Raises:
        TypeError: ``given`` is no tensor, or of a wrong dtype.
        ValueError: ``mask`` or ``given`` has a wrong shape; this call's text ends before the question does; or there
            are no ids to find the marker in.
    """
    if mask is not None and mask.shape[1] != source.shape[1]:
        raise ValueError(
            f"attention_mask: expected shape {list(source.shape[:2])} (as the text that asks for the prompts), got "
            f"{list(mask.shape)}"
        )
    if given is None and prompter.answer_token_id is None:
        return mask
    question = question_in(prompter, text_in(inputs), mask) if given is None else _checked(given, source)
    length, whole = source.shape[1], question.shape[1]
    here = F.pad(question, (0, length - whole))
    here = here if mask is None else here & (mask != 0)
    if whole > length:
        asked = here.any(-1).all()
        if prompter.pooling != "first":
            asked = asked & ~question[:, length:].any()
        check_data(
            asked,
            f"visual_query_mask: the first {length} of {whole} tokens end before the question does (query: "
            f"{prompter.pooling!r}), which the prompts before them are asked for with; in generate use a larger "
            "prefill_chunk_size, or none",
        )
    return here


def _checked(given: object, source: Tensor) -> Tensor:
    if not isinstance(given, Tensor) or given.is_floating_point():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"visual_query_mask: expected a bool or whole-number tensor, 1 = token that asks, got {got}")
    if given.dim() != 2 or given.shape[0] != source.shape[0]:
        raise ValueError(f"visual_query_mask: expected shape [{source.shape[0]}, n], got {list(given.shape)}")
    return given.to(source.device) != 0


def visual_generate(
    self: Any,
    generate: Callable[..., Any],
    *,
    inputs: Tensor | None = None,
    visual_query_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``generate``, whose every step asks with the question that came, however much text the step holds.

    Args:
        self: the adapted model.
        generate: the model's own.
        inputs: the text's ids, unless they come as ``input_ids`` or ``inputs_embeds``.
        visual_query_mask: [B, n], as in the model's forward; by default the answer's marker in samples that have it,
            and the whole text in others.
        kwargs: the method's own arguments, ``visual_embeds`` among them.

    Raises:
        ValueError: there is no text, or none in which the marker can be found.
    """
    prompter = getattr(self, CHILD).in_use()
    if prompter is not None and visual_query_mask is None and kwargs.get("encoder_outputs") is None:
        text, mask = text_in(kwargs) if inputs is None else inputs, two_dimensional(kwargs.get("attention_mask"))
        visual_query_mask = question_in(prompter, text, mask)
    if visual_query_mask is not None:
        kwargs["visual_query_mask"] = visual_query_mask
    return generate(self, inputs, **kwargs)
