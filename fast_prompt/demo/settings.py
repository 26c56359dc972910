"""How large the demo's model is, and how long it trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result besides the seed. Every method trains under the same ones.

    Attributes:
        width, layers, heads, patch_size: of the vision transformer.
        pretraining_steps, pretraining_rate: AdamW steps, and their peak learning rate, that make the frozen base.
        num_prompts: p, prompts in every attention (APT) or tokens in every block (deep prompt tuning).
        lora_rank: of the queries' and values' updates.
        train_per_class, validation_per_class: images of each new digit; all others are the test.
        epochs, batch_size: of each adaptation.
        learning_rates: peak rates that every method tries; the best on the validation images is kept. The linear
            probe's best is the classifier's rate in all other methods.
        inference_batch: images in a timed inference batch.
        timing_rounds: times that every method is timed, in turn; medians are reported.
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    patch_size: int = 2
    pretraining_steps: int = 600
    pretraining_rate: float = 1e-3
    num_prompts: int = 16
    lora_rank: int = 8
    train_per_class: int = 40
    validation_per_class: int = 40
    epochs: int = 20
    batch_size: int = 50
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    inference_batch: int = 256
    timing_rounds: int = 11
