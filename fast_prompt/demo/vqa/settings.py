"""How large the run is: everything that decides a result besides the seed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The size of a run of `digits-vqa`.

    Attributes:
        train_per_class, validation_per_class: handwritten digits of each class for these splits; all others are for
            the test. No digit is in two of them.
        train_questions, validation_questions, test_questions: questions asked of each split, each about an image of its
            own.
        vision_width, vision_layers, vision_heads, patch_size: of the vision transformer.
        vision_steps, vision_batch, vision_rate: AdamW steps that pretrain it, images in one, and the peak rate.
        layer: the language model's block that the prompt enters, in every row; what the search finds is shown beside.
        num_prompts: p, APT's prompts in every attention.
        adapter_width: of the bottleneck adapters.
        epochs, full_epochs: of methods that leave the language model frozen, and of those that train it in full, whose
            steps take up to three times as long.
        batch_size: questions in one step.
        rate, full_rate, head_rate: peak learning rates: of what a method adds, of a language model that trains in full,
            and of the new head.
        search_steps, preference_rate: of the search. All layers learn alike at first: of the validation questions they
            get 0.74 +- 0.02 after 600 steps, and 0.87 (the last) against 0.79 to 0.83 after 1,200.
        reward_from, reward_every: so rewards are measured late, and every few steps.
        reward_share, reward_batch: share of the training questions set aside for rewards, and how many of those one is
            measured on.
        timing_rounds: times that every method is timed, in turn; medians are reported.
        shown: questions in the picture of answers.
    """

    train_per_class: int = 110
    validation_per_class: int = 25
    train_questions: int = 6400
    validation_questions: int = 500
    test_questions: int = 1000
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    patch_size: int = 4
    vision_steps: int = 400
    vision_batch: int = 64
    vision_rate: float = 1e-3
    layer: int = 5
    num_prompts: int = 16
    adapter_width: int = 48
    epochs: float = 2
    full_epochs: float = 0.6
    batch_size: int = 32
    rate: float = 1e-3
    full_rate: float = 3e-4
    head_rate: float = 1e-3
    search_steps: int = 1500
    preference_rate: float = 0.02
    reward_from: float = 0.6
    reward_every: int = 4
    reward_share: float = 0.1
    reward_batch: int = 128
    timing_rounds: int = 5
    shown: int = 8
