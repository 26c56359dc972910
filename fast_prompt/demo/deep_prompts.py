"""Deep visual prompt tuning, the baseline: prompts as tokens in every block (VPT-deep, arXiv 2203.12119).

Written the usual way, so that its cost is the one people pay: each block runs on `n + p` tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of blocks: its first `ModuleList`."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no ModuleList of transformer blocks")


class DeepPromptModel(nn.Module):
    """A frozen vision transformer with p learned tokens after CLS in every block, new ones for each block.

    Args:
        model: a `transformers` vision model that reads CLS (position 0). Its blocks get hooks; everything but its
            `classifier` is frozen.
        num_prompts: p, tokens in each block.

    Parameters: `prompts` [blocks, p, d].
    """

    def __init__(self, model: Any, num_prompts: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        model.get_submodule("classifier").requires_grad_(True)
        blocks = transformer_blocks(model)
        config = model.config
        bound = math.sqrt(6 / (3 * config.patch_size**2 + config.hidden_size))  # the published initialisation
        self.prompts = nn.Parameter(torch.empty(len(blocks), num_prompts, config.hidden_size).uniform_(-bound, bound))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: (self._prompted(args[0], index), *args[1:]))

    def _prompted(self, hidden: Tensor, index: int) -> Tensor:
        """Puts block `index`'s prompts in the place of those of the block before: [B, n (+ p), d] -> [B, n + p, d]."""
        prompts = self.prompts[index].expand(len(hidden), -1, -1)
        first_image_token = 1 if index == 0 else 1 + prompts.shape[1]
        return torch.cat([hidden[:, :1], prompts, hidden[:, first_image_token:]], dim=1)

    def forward(self, pixel_values: Tensor) -> Any:
        """The model's output for pixels [B, channels, height, width]."""
        return self.model(pixel_values=pixel_values)
