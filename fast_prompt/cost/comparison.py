"""What the rows say of each other, beside what the papers say."""

from collections.abc import Callable, Sequence

import torch
import transformers

from fast_prompt.cost.counting import count_macs, without_memory
from fast_prompt.cost.rows import Row
from fast_prompt.models.subject import Subject

IMAGE_ENCODER = {"patch_size": 16}  # CLIP ViT-B/16 at 224 x 224, DVP's


def comparisons(subject: Subject, rows: Sequence[Row]) -> list[str]:
    """A sentence for each comparison that the papers make and the rows allow."""
    return [sentence for compare in COMPARISONS for sentence in compare(subject, rows)]


def _skipping(subject: Subject, rows: Sequence[Row]) -> list[str]:
    """DAS against the whole model."""
    return [
        f"das, {row.settings['num_skipped']} blocks skipped: {row.share:+.2%} of the model's MACs"
        + _paper(subject, "-11.97 % at k = 4, 384 x 384")
        for row in rows
        if row.method == "das"
    ]


def _prompting(subject: Subject, rows: Sequence[Row]) -> list[str]:
    """APT's additional arithmetic against that of deep prompt tuning."""
    return [
        f"apt against deep_prompts, {deep.settings['form']}: "
        f"{own.added_macs / deep.added_macs - 1:+.2%} additional MACs" + _paper(subject, "-82.30 % at p = 200")
        for own in rows
        if own.method == "apt"
        for deep in rows
        if deep.method == "deep_prompts"
    ]


def _paper(subject: Subject, figure: str, model_type: str = "meter") -> str:
    """The paper's figure, of the model that it is for."""
    return f" (the paper: {figure})" if subject.config.model_type == model_type else ""


def _compressing(subject: Subject, rows: Sequence[Row]) -> list[str]:
    """DVP against all visual tokens before the text, without and with the encoder that both need."""
    by_method = {row.method: row for row in rows}
    if "dvp" not in by_method:
        return []
    ours, theirs, encoder = by_method["dvp"].macs, by_method["visual_tokens"].macs, _image_encoder()
    with_encoder = (ours + encoder) / (theirs + encoder)
    return [
        f"dvp against all visual tokens: {ours / theirs - 1:+.2%} MACs in the language model"
        f"{_paper(subject, '-80 % on VQA2.0', 'bert')}; {with_encoder - 1:+.2%} with the image encoder that both need "
        f"(CLIP ViT-B/16, {encoder / 1e9:.2f} G)"
    ]


def _image_encoder() -> int:
    """MACs of DVP's image encoder."""
    with without_memory():
        encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE_ENCODER)).eval()
        pixels = torch.zeros(1, 3, encoder.config.image_size, encoder.config.image_size)
        return count_macs(encoder, pixel_values=pixels)


COMPARISONS: tuple[Callable[[Subject, Sequence[Row]], list[str]], ...] = (_skipping, _prompting, _compressing)
