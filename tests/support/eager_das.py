"""Dynamic architecture skipping written out by hand, block by block, from the weights of an adapted model."""

import torch
import torch.nn.functional as F
from eager_dvp import attend, heads, rotate
from torch import Tensor, nn


def bottleneck(adapter: nn.Module, x: Tensor) -> Tensor:
    return adapter.up_proj(torch.relu(adapter.down_proj(x)))


def ad(adapter: nn.Module, x: Tensor) -> Tensor:
    """The paper's adapter, LayerNorm first, without its residual."""
    return bottleneck(adapter, F.layer_norm(x, x.shape[-1:], adapter.norm.weight, adapter.norm.bias, 1e-5))


def at(host: nn.Module, child: str) -> nn.Module:
    return getattr(host, f"fast_prompt_{child}")["default"]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def self_attend(x: Tensor, source: Tensor, query, key, value, number: int, allowed: Tensor) -> Tensor:
    q, k, v = heads(query(x), number), heads(key(source), number), heads(value(source), number)
    return attend(q, k, v, allowed, q.shape[-1] ** -0.5)


def everywhere(*sizes: int) -> Tensor:
    return torch.ones(*sizes, dtype=torch.bool)


def vit(model: nn.Module, inputs: dict, skipped: set[int]) -> Tensor:
    """The classifier's logits."""
    x, number = model.vit.embeddings(inputs["pixel_values"]), model.config.num_attention_heads
    for index, block in enumerate(model.vit.layers):
        if index in skipped:
            x = x + ad(at(block, "skip"), x)
            continue
        part, normed = block.attention, block.layernorm_before(x)
        mixed = self_attend(normed, normed, part.q_proj, part.k_proj, part.v_proj, number, everywhere(1, 1, 1, 1))
        x = x + part.o_proj(mixed) + ad(at(block, "attention"), x)
        x = x + block.mlp(block.layernorm_after(x)) + ad(at(block, "mlp"), x)
    return model.classifier(model.vit.layernorm(x)[:, 0])


def vilt(model: nn.Module, inputs: dict, skipped: set[int]) -> Tensor:
    """The last hidden state; the order of the patches is drawn from torch's seed, as the model does."""
    torch.manual_seed(0)
    pixel_mask = torch.ones(2, 16, 16, dtype=torch.long)
    arguments = (inputs["input_ids"], inputs["attention_mask"], None, inputs["pixel_values"], pixel_mask, None, None)
    x, mask = model.embeddings(*arguments, image_token_type_idx=1)
    number, allowed = model.config.num_attention_heads, mask.bool()[:, None, None]
    for index, block in enumerate(model.encoder.layer):
        if index in skipped:
            x = x + ad(at(block, "skip"), x)
            continue
        part, normed = block.attention, block.layernorm_before(x)
        own = part.attention
        mixed = self_attend(normed, normed, own.query, own.key, own.value, number, allowed)
        x = x + part.output.dense(mixed) + ad(at(block, "attention"), x)
        wide = F.gelu(block.intermediate.dense(block.layernorm_after(x)))
        x = x + block.output.dense(wide) + ad(at(block, "mlp"), x)
    return model.layernorm(x)


def clip_tower(blocks: nn.ModuleList, x: Tensor, allowed: Tensor, skipped: set[int]) -> Tensor:
    for index, block in enumerate(blocks):
        if index in skipped:
            x = x + ad(at(block, "skip"), x)
            continue
        part, normed = block.self_attn, block.layer_norm1(x)
        mixed = self_attend(normed, normed, part.q_proj, part.k_proj, part.v_proj, part.num_heads, allowed)
        x = x + part.out_proj(mixed) + ad(at(block, "attention"), x)
        x = x + block.mlp(block.layer_norm2(x)) + ad(at(block, "mlp"), x)
    return x


def clip(model: nn.Module, inputs: dict, skipped: set[int]) -> tuple[Tensor, Tensor]:
    """The last hidden states of the text tower (blocks 0 and 1) and of the vision tower (2 and 3)."""
    text, vision = model.text_model, model.vision_model
    x, length = text.embeddings(input_ids=inputs["input_ids"]), inputs["input_ids"].shape[1]
    allowed = everywhere(length, length).tril() & inputs["attention_mask"].bool()[:, None, None]
    words = text.final_layer_norm(clip_tower(text.encoder.layers, x, allowed, skipped))
    x = vision.pre_layrnorm(vision.embeddings(inputs["pixel_values"]))
    return words, clip_tower(vision.encoder.layers, x, everywhere(1, 1, 1, 1), {each - 2 for each in skipped})


def post_norm_attention(part: nn.Module, x: Tensor, source: Tensor, allowed: Tensor, number: int) -> Tensor:
    own = part.self
    mixed = self_attend(x, source, own.query, own.key, own.value, number, allowed)
    return part.output.LayerNorm(part.output.dense(mixed) + x + ad(at(part.output, "residual"), x))


def post_norm_ffn(block: nn.Module, x: Tensor) -> Tensor:
    wide = F.gelu(block.intermediate.dense(x))
    return block.output.LayerNorm(block.output.dense(wide) + x) + ad(at(block.output, "parallel"), x)


def bert(model: nn.Module, inputs: dict, skipped: set[int]) -> Tensor:
    """The last hidden state of BERT, RoBERTa, or BERT as a decoder with cross-attention."""
    x, length, number = model.embeddings(input_ids=inputs["input_ids"]), 7, model.config.num_attention_heads
    allowed = inputs["attention_mask"].bool()[:, None, None]
    memory = inputs.get("encoder_hidden_states")
    if memory is not None:
        allowed = allowed & everywhere(length, length).tril()
    for index, block in enumerate(model.encoder.layer):
        if index in skipped:
            x = x + ad(at(block, "skip"), x)
            continue
        x = post_norm_attention(block.attention, x, x, allowed, number)
        if memory is not None:
            x = post_norm_attention(block.crossattention, x, memory, everywhere(1, 1, 1, 1), number)
        x = post_norm_ffn(block, x)
    return x


def meter(model: nn.Module, text: Tensor, image: Tensor, mask: Tensor, skipped: set[int]) -> tuple[Tensor, Tensor]:
    """Both streams after the fusion layers, from the features before: the text's layers come first in ``skipped``."""
    number, everything = model.config.num_attention_heads, everywhere(1, 1, 1, 1)
    words = mask.bool()[:, None, None]
    streams = (model.cross_modal_text_layers, model.cross_modal_image_layers)
    depth = len(streams[0])

    def step(number_of_block: int, block: nn.Module, x: Tensor, own: Tensor, other: Tensor, others: Tensor) -> Tensor:
        if number_of_block in skipped:
            return x + ad(at(block, "skip"), x)
        x = post_norm_attention(block.attention, x, x, own, number)
        x = post_norm_attention(block.crossattention, x, other, others, number)
        return post_norm_ffn(block, x)

    for index, (text_block, image_block) in enumerate(zip(*streams, strict=True)):
        text, image = (
            step(index, text_block, text, words, image, everything),
            step(depth + index, image_block, image, everything, text, words),
        )
    return text, image


def llama(model: nn.Module, ids: Tensor, skipped: set[int], experts: bool = False) -> Tensor:
    """LLaMA's last hidden state of whole sequences."""
    x, config = model.embed_tokens(ids), model.config
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    theta, allowed = config.rope_parameters["rope_theta"], everywhere(ids.shape[1], ids.shape[1]).tril()

    def inner(z: Tensor, adapter: nn.Module) -> Tensor:
        return z + bottleneck(adapter, z)

    for index, block in enumerate(model.layers):
        if index in skipped:
            adapter = at(block, "skip")
            z = rms(x, adapter.norm.weight, config.rms_norm_eps)
            x = x + (mixture(adapter, z) if experts else inner(z, adapter))
            continue
        first, second, part = block.input_layernorm, block.post_attention_layernorm, block.self_attn
        z = inner(rms(x, first.weight, config.rms_norm_eps), at(first, "after"))
        q, k, v = heads(part.q_proj(z), config.num_attention_heads), part.k_proj(z)[:, None], part.v_proj(z)[:, None]
        q, k = rotate(q, positions, theta), rotate(k, positions, theta)
        x = x + part.o_proj(attend(q, k, v, allowed, q.shape[-1] ** -0.5))
        x = x + block.mlp(inner(rms(x, second.weight, config.rms_norm_eps), at(second, "after")))
    return rms(x, model.norm.weight, config.rms_norm_eps)


def mixture(adapter: nn.Module, z: Tensor, groups: int = 2, temperature: float = 10.0) -> Tensor:
    """LaVIN's router of 2 experts: a shared down projection, up projections in groups, the first token's gates."""
    hidden = torch.relu(adapter.down_proj(z))
    gates = torch.softmax(adapter.expert_gate(z[:, 0]) / temperature, -1)
    total = torch.zeros_like(z)
    size = hidden.shape[-1] // groups
    for expert in range(2):
        weight = adapter.up_proj.weight[:, expert * size : (expert + 1) * size]
        outputs = [part @ rows.T for part, rows in zip(hidden.split(size, -1), weight.chunk(groups, 0), strict=True)]
        total = total + gates[:, expert, None, None] * (torch.cat(outputs, -1) + adapter.up_proj.bias[expert])
    return total
