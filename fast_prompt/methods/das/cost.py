"""What DAS is counted by."""

from collections.abc import Iterator

from fast_prompt.methods.das.config import DASConfig
from fast_prompt.methods.das.spread import spread
from fast_prompt.methods.variant import Settings, Variant
from fast_prompt.models.subject import Subject
from fast_prompt.tuning import get_fast_prompt_model


def variants(subject: Subject, settings: Settings) -> Iterator[Variant]:
    """Dynamic architecture skipping; the skipped blocks' weights are dropped."""
    width, skip_width = settings.adapter_widths(subject)
    model = subject.model()
    config = DASConfig(num_skipped=settings.num_skipped, width=width, skip_width=skip_width)
    skipped = spread(config.candidates_of(model), settings.num_skipped)
    config = DASConfig(skipped=skipped, width=width, skip_width=skip_width)
    model = get_fast_prompt_model(model, config)
    model.compact()
    own = {"num_skipped": settings.num_skipped, "width": width, "skip_width": skip_width}
    yield Variant("das", own, model, subject.inputs())
