"""What APT is counted by."""

from collections.abc import Iterator

from fast_prompt.methods.apt.config import APTConfig
from fast_prompt.methods.variant import Settings, Variant
from fast_prompt.models.subject import Subject
from fast_prompt.tuning import get_fast_prompt_model


def variants(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Approximated prompt tuning."""
    config = APTConfig(num_prompts=settings.prompts, target_modules=subject.attentions)
    model = get_fast_prompt_model(subject.model(), config)
    yield Variant("apt", {"prompts": settings.prompts, "rank": config.rank}, model, subject.inputs())
