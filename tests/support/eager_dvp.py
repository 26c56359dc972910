"""Dynamic visual prompting written out by hand, block by block, from the weights of an adapted model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def heads(x: Tensor, number: int) -> Tensor:
    return x.view(*x.shape[:2], number, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, bias: Tensor | float = 0.0):
    """Heads [B, h, n, d_h]; ``allowed`` [B, 1 or h, q, k] is True where a query sees a key."""
    scores = (query @ key.transpose(-1, -2) * scale + bias).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def prompts_of(prompter: nn.Module, pooled: Tensor, visual: Tensor, real: Tensor | None) -> Tensor:
    """The prompts [B, m, d] that ``pooled`` [B, d] asks for."""
    part = prompter.compressor
    query = pooled[:, None]
    if prompter.num_prompts > 1:
        query = query + prompter.query_offsets
    q, k, v = (
        heads(layer(x), part.num_heads)
        for layer, x in ((part.q_proj, query), (part.k_proj, visual), (part.v_proj, visual))
    )
    allowed = torch.ones(visual.shape[:2], dtype=torch.bool) if real is None else real.bool()
    prompts = part.out_proj(attend(q, k, v, allowed[:, None, None], q.shape[-1] ** -0.5))
    return prompts if prompter.type_embedding is None else prompts + prompter.type_embedding[1]


def enter(prompter: nn.Module, prompts: Tensor, hidden: Tensor) -> Tensor:
    marked = hidden if prompter.type_embedding is None else hidden + prompter.type_embedding[0]
    return torch.cat([prompts, marked], 1)


def see_prompts(mask: Tensor, number: int) -> Tensor:
    return torch.cat([torch.ones(len(mask), number, dtype=torch.bool), mask.bool()], 1)


def bert(model: nn.Module, prompter: nn.Module, inputs: dict, visual: Tensor, real: Tensor | None = None) -> Tensor:
    """BERT's or RoBERTa's last hidden state with the m prompts still before the text."""
    hidden, mask = model.embeddings(input_ids=inputs["input_ids"]), inputs["attention_mask"].bool()
    number = model.config.num_attention_heads
    for index, layer in enumerate(model.encoder.layer):
        if index == prompter.layer:
            prompts = prompts_of(prompter, hidden[:, 0], visual, real)
            hidden, mask = enter(prompter, prompts, hidden), see_prompts(mask, prompter.num_prompts)
        part = layer.attention
        q, k, v = (heads(project(hidden), number) for project in (part.self.query, part.self.key, part.self.value))
        attended = part.output.dense(attend(q, k, v, mask[:, None, None], q.shape[-1] ** -0.5))
        hidden = part.output.LayerNorm(hidden + adapted(part.output.dropout, attended))
        wide = F.gelu(layer.intermediate.dense(hidden))
        hidden = layer.output.LayerNorm(hidden + adapted(layer.output.dropout, layer.output.dense(wide)))
    return hidden


def adapted(host: nn.Module, x: Tensor) -> Tensor:
    """With the adapter that sits at ``host``, if any."""
    adapters = host._modules.get("fast_prompt")
    if adapters is None:
        return x
    adapter = adapters["default"]
    return x + adapter.up_proj(torch.relu(adapter.down_proj(x)))


def t5(model: nn.Module, prompter: nn.Module, inputs: dict, visual: Tensor, encoded: Tensor) -> Tensor:
    """T5's decoder over [prompts, start, more tokens]: prompts and start see each other, the rest is causal."""
    hidden, source = model.decoder.embed_tokens(inputs["decoder_input_ids"]), inputs["attention_mask"].bool()
    number, extra = model.config.num_heads, 0
    table = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for index, block in enumerate(model.decoder.block):
        if index == prompter.layer:
            lengths = source.sum(1, keepdim=True)
            pooled = (encoded * source[..., None]).sum(1) / lengths
            hidden, extra = enter(prompter, prompts_of(prompter, pooled, visual, None), hidden), prompter.num_prompts
        place = torch.arange(hidden.shape[1])
        behind = place[:, None] - place
        # All distances here are below 16, where each has a bucket of its own; what lies ahead counts as distance 0.
        bias = table[behind.clamp(min=0)].permute(2, 0, 1)[None]
        allowed = (behind >= 0) | ((place[:, None] <= extra) & (place <= extra))
        own, cross, last = block.layer
        x = own.layer_norm(hidden)
        q, k, v = (
            heads(project(x), number) for project in (own.SelfAttention.q, own.SelfAttention.k, own.SelfAttention.v)
        )
        attended = own.SelfAttention.o(attend(q, k, v, allowed[None, None], 1.0, bias))
        hidden = hidden + adapted(own.dropout, attended)
        part, x = cross.EncDecAttention, cross.layer_norm(hidden)
        q, k, v = heads(part.q(x), number), heads(part.k(encoded), number), heads(part.v(encoded), number)
        hidden = hidden + adapted(cross.dropout, part.o(attend(q, k, v, source[:, None, None], 1.0)))
        hidden = hidden + adapted(last.dropout, last.DenseReluDense(last.layer_norm(hidden)))
    return model.decoder.final_layer_norm(hidden)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of heads [B, h, n, d_h] at ``positions`` [B, n]."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def llama(model: nn.Module, prompter: nn.Module, inputs: dict, visual: Tensor, asks: Tensor) -> Tensor:
    """LLaMA over [prompts, text]: prompts at positions 0 to m - 1, the first real token at m; causal.

    ``asks`` [B] is the index of the token whose state is the query.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    hidden, config = model.embed_tokens(ids), model.config
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    for index, block in enumerate(model.layers):
        if index == prompter.layer:
            prompts = prompts_of(prompter, hidden[torch.arange(len(ids)), asks], visual, None)
            hidden, number = enter(prompter, prompts, hidden), prompter.num_prompts
            before = torch.arange(number).expand(len(ids), -1)
            first = mask.long().argmax(1, keepdim=True)
            positions, mask = torch.cat([before, positions - first + number], 1), see_prompts(mask, number)
        x, part = block.input_layernorm(hidden), block.self_attn
        q, k, v = heads(part.q_proj(x), config.num_attention_heads), part.k_proj(x)[:, None], part.v_proj(x)[:, None]
        theta = config.rope_parameters["rope_theta"]
        q, k = rotate(q, positions, theta), rotate(k, positions, theta)
        length = hidden.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]
        # A padded row that sees nothing is nobody's business: let it see itself.
        allowed = allowed | torch.eye(length, dtype=torch.bool)
        hidden = hidden + part.o_proj(attend(q, k, v, allowed, q.shape[-1] ** -0.5))
        x = block.post_attention_layernorm(hidden)
        hidden = hidden + block.mlp(x)
    return model.norm(hidden)
