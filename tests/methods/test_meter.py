"""``fast_prompt.models.meter``: against a plain forward written here, and the published checkpoint's names."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_meter import HEADS, LABELS, LAYERS, TEXT, VISION, WIDTH, inputs, tiny_config
from tiny_models import assert_same, snapshot, stir

from fast_prompt import APTConfig, get_fast_prompt_model
from fast_prompt.models import find_attention_sites
from fast_prompt.models.meter import MeterConfig, MeterForVisualQuestionAnswering, MeterModel, load_published
from fast_prompt.tolerances import TOLERANCES, relative_error


def stirred(config, seed=0):
    """A model of which every parameter matters, biases and norms included."""
    torch.manual_seed(seed)
    model = MeterForVisualQuestionAnswering(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model():
    return stirred(tiny_config())


# A plain forward, from the paper and the weights by name


class Plain:
    """METER in a few functions over a state dict."""

    def __init__(self, model):
        self.weights = {name.removeprefix("meter."): value for name, value in model.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, queries, keys, values, mask=None):
        """Heads of q [B, n, d] over k and v [B, m, d]; ``mask`` [B, m], 1 = real."""
        split = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, keys, values)]
        scores = split[0] @ split[1].mT / math.sqrt(split[0].shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    def attention(self, name, x, memory, mask, eps):
        """BERT's: projections, heads, projection, residual, norm."""
        queries, keys, values = (
            self.linear(f"{name}.self.{part}", source)
            for part, source in (("query", x), ("key", memory), ("value", memory))
        )
        return self.norm(
            f"{name}.output.LayerNorm",
            x + self.linear(f"{name}.output.dense", self.attend(queries, keys, values, mask)),
            eps,
        )

    def feed_forward(self, name, x, eps):
        inner = F.gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", inner), eps)

    def text(self, ids, mask):
        embeddings = "text_transformer.embeddings"
        real = (ids != 1).long()
        positions = real.cumsum(1) * real + 1
        x = self.weights[f"{embeddings}.word_embeddings.weight"][ids]
        x = x + self.weights[f"{embeddings}.position_embeddings.weight"][positions]
        x = self.norm(
            f"{embeddings}.LayerNorm", x + self.weights[f"{embeddings}.token_type_embeddings.weight"][0], 1e-5
        )
        for index in range(TEXT["num_hidden_layers"]):
            layer = f"text_transformer.encoder.layer.{index}"
            x = self.attention(f"{layer}.attention", x, x, mask, 1e-5)
            x = self.feed_forward(layer, x, 1e-5)
        x = self.linear("cross_modal_text_transform", x)
        if "classifier_token" in self.weights:
            x[:, 0] = self.weights["classifier_token"][0]
        return x + self.weights["token_type_embeddings.weight"][0]

    def image(self, pixels):
        patch, grid = VISION["patch_size"], pixels.shape[-1] // VISION["patch_size"]
        tiles = pixels.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        x = tiles.flatten(1, 2) @ self.weights["vision_model.embeddings.patch_embedding.weight"].flatten(1).T
        first = self.weights["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.weights["vision_model.embeddings.position_embedding.weight"]
        x = self.norm("vision_model.pre_layrnorm", x, 1e-5)
        for index in range(VISION["num_hidden_layers"]):
            layer = f"vision_model.encoder.layers.{index}"
            normed = self.norm(f"{layer}.layer_norm1", x, 1e-5)
            parts = [self.linear(f"{layer}.self_attn.{part}_proj", normed) for part in "qkv"]
            x = x + self.linear(f"{layer}.self_attn.out_proj", self.attend(*parts))
            inner = self.linear(f"{layer}.mlp.fc1", self.norm(f"{layer}.layer_norm2", x, 1e-5))
            x = x + self.linear(f"{layer}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
        x = self.linear("cross_modal_image_transform", self.norm("vision_model.post_layernorm", x, 1e-5))
        return x + self.weights["token_type_embeddings.weight"][1]

    def fusion(self, name, x, other, mask, other_mask):
        x = self.attention(f"{name}.attention", x, x, mask, 1e-12)
        x = self.attention(f"{name}.crossattention", x, other, other_mask, 1e-12)
        return self.feed_forward(name, x, 1e-12)

    def streams(self, input_ids, attention_mask, pixel_values):
        text, image = self.text(input_ids, attention_mask), self.image(pixel_values)
        for index in range(LAYERS):
            before = text
            text = self.fusion(f"cross_modal_text_layers.{index}", text, image, attention_mask, None)
            image = self.fusion(f"cross_modal_image_layers.{index}", image, before, None, attention_mask)
        return text, image

    def logits(self, **inputs):
        text, image = self.streams(**inputs)
        pooled = torch.cat(
            [
                self.linear("cross_modal_text_pooler.dense", text[:, 0]).tanh(),
                self.linear("cross_modal_image_pooler.dense", image[:, 0]).tanh(),
            ],
            -1,
        )
        hidden = F.gelu(self.norm("vqa_classifier.1", self.linear("vqa_classifier.0", pooled), 1e-5))
        return self.linear("vqa_classifier.3", hidden)


def close(actual, expected):
    return relative_error(actual, expected) <= TOLERANCES[actual.dtype]


@torch.no_grad()
def test_each_stream_enters_the_fusion_layers_as_defined(model):
    model, given = model.double(), inputs(dtype=torch.float64)
    plain = Plain(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    text = model.meter._text_features(ids, mask)
    assert close(text[mask == 1], plain.text(ids, mask)[mask == 1])
    assert close(model.meter._image_features(given["pixel_values"]), plain.image(given["pixel_values"]))


@torch.no_grad()
def test_a_fusion_layer_is_attention_cross_attention_and_feed_forward(model):
    model = model.double()
    text, image = torch.randn(2, 7, WIDTH).double(), torch.randn(2, 17, WIDTH).double()
    expected = Plain(model).fusion("cross_modal_text_layers.1", text, image, None, None)
    assert close(model.meter.cross_modal_text_layers[1](text, image), expected)


@pytest.mark.parametrize("classifier_token", [False, True])
@torch.no_grad()
def test_the_whole_model_is_as_defined(classifier_token):
    model, given = stirred(tiny_config(classifier_token=classifier_token)).double(), inputs(dtype=torch.float64)
    plain = Plain(model)
    text, image = plain.streams(**given)
    output = model.meter(**given)
    real = given["attention_mask"] == 1
    assert close(output.last_hidden_state[real], text[real])
    assert close(output.image_hidden_state, image)
    assert close(model(**given).logits, plain.logits(**given))


@torch.no_grad()
def test_every_attention_implementation_agrees(model):
    given = inputs()
    expected = model(**given).logits
    model.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    assert close(model(**given).logits, expected)


def test_the_loss_is_the_binary_cross_entropy_times_the_answers(model):
    labels = torch.rand(2, LABELS, generator=torch.Generator().manual_seed(2))
    output = model(**inputs(), labels=labels)
    shares = output.logits.sigmoid()
    terms = labels * shares.log() + (1 - labels) * (1 - shares).log()
    assert close(output.loss, -terms.sum(-1).mean())
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.return_dict = False
    assert torch.equal(model(**inputs(), labels=labels)[0], output.loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    labels = torch.rand(2, LABELS)
    for config in (model.config, model.config.text_config):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = model_like(model).train()
    model(**inputs(), labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(layers) >= TEXT["num_hidden_layers"] + VISION["num_hidden_layers"] + 2 * LAYERS
    model(**inputs(), labels=labels).loss.backward()
    for name, gradient in expected.items():
        if not name.endswith(("key.bias", "k_proj.bias")):  # which have none but by rounding
            assert close(model.get_parameter(name).grad, gradient), name


def model_like(model):
    """A new model of the same config and weights."""
    other = MeterForVisualQuestionAnswering(model.config)
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def test_it_comes_back_from_disk_bit_for_bit(model, tmp_path):
    expected = model(**inputs()).logits
    model.save_pretrained(tmp_path)
    back = MeterForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(back(**inputs()).logits, expected)
    body = MeterModel.from_pretrained(tmp_path)
    assert torch.equal(body(**inputs()).pooler_output, model.meter(**inputs()).pooler_output)


def test_a_config_comes_back_from_disk(tmp_path):
    config = tiny_config(classifier_token=True)
    config.save_pretrained(tmp_path)
    assert MeterConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_defaults_are_the_published_sizes():
    config = MeterConfig()
    with torch.device("meta"):
        model = MeterForVisualQuestionAnswering(config)
        given = {"input_ids": torch.zeros(1, 40, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 384, 384)}
    output = model.eval().meter(**given)
    assert output.last_hidden_state.shape == (1, 40, 768)
    assert output.image_hidden_state.shape == (1, 577, 768)
    assert model(**given).logits.shape == (1, 3129)
    assert (len(model.meter.vision_model.encoder.layers), len(model.meter.text_transformer.encoder.layer)) == (11, 12)
    assert MeterConfig(num_labels=5).num_labels == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input_ids": torch.zeros(2, dtype=torch.long)}, "input_ids: expected shape"),
        ({"input_ids": torch.full((2, 19), 5)}, "at most 18 tokens, got 19"),
        ({"pixel_values": None}, r"pixel_values: expected shape \[2, 3, 32, 32\].*None"),
        ({"pixel_values": torch.zeros(2, 3, 40, 40)}, r"got \[2, 3, 40, 40\]"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, r"got \[1, 3, 32, 32\]"),
        ({"labels": torch.zeros(2, 3)}, r"labels: expected shape \[2, 7\], got \[2, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(model, change, expected):
    with pytest.raises(ValueError, match=expected):
        model(**{**inputs(), **change})


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_attention_heads: expected a divisor of hidden_size 32, got 5"):
        tiny_config(num_attention_heads=5)


# Prompts


@torch.no_grad()
def test_apt_adapts_the_fusion_layers_and_folds(model):
    before = snapshot(model)
    expected = model(**inputs()).logits
    sites = find_attention_sites(model)
    assert len(sites) == 4 * LAYERS
    assert all(not site.unproven and ".cross_modal_" in site.name for site in sites)
    assert [site.is_cross for site in sites] == [False, True] * 2 * LAYERS
    adapted = get_fast_prompt_model(model, APTConfig(num_prompts=3))
    assert close(adapted(**inputs()).logits, expected) is False
    stir(adapted)
    prompted = adapted(**inputs()).logits
    adapted.fold()
    assert close(adapted(**inputs()).logits, prompted)
    adapted.revert()
    assert_same(before, snapshot(model))


# The published checkpoint


def published(model, twelfth_block=False):
    """The model's weights as METER's authors name them."""
    state = dict(model.state_dict())
    names = {}
    for name, value in state.items():
        short = name.removeprefix("meter.")
        if short.startswith("vision_model."):
            continue
        names["token4classifier" if short == "classifier_token" else short] = value
    visual, vision = "vit_model.visual", "meter.vision_model"
    names[f"{visual}.conv1.weight"] = state[f"{vision}.embeddings.patch_embedding.weight"]
    names[f"{visual}.class_embedding"] = state[f"{vision}.embeddings.class_embedding"]
    names[f"{visual}.positional_embedding"] = state[f"{vision}.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        names[f"{visual}.ln_pre.{kind}"] = state[f"{vision}.pre_layrnorm.{kind}"]
        names[f"{visual}.ln_post.{kind}"] = state[f"{vision}.post_layernorm.{kind}"]
        for index in range(VISION["num_hidden_layers"]):
            block, layer = f"{visual}.transformer.resblocks.{index}", f"{vision}.encoder.layers.{index}"
            parts = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            names[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            names[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
            names[f"{block}.ln_1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
            names[f"{block}.ln_2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
            names[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
            names[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return names


UNUSED = {
    "vit_model.token_embedding.weight": (9, 4),
    "vit_model.positional_embedding": (77, 4),
    "vit_model.ln_final.weight": (4,),
    "text_transformer.pooler.dense.weight": (24, 24),
    "text_transformer.embeddings.position_ids": (1, 20),
    "mlm_score.decoder.weight": (50, 32),
    "itm_score.fc.weight": (2, 64),
    "vit_model.visual.transformer.resblocks.3.mlp.c_fc.weight": (56, 40),
}


def write_pickle(tensors, path):
    torch.save({"state_dict": tensors, "epoch": 3, "hyper_parameters": {"config": {"image_size": 32}}}, path)


WRITERS = {"meter.ckpt": write_pickle, "meter.safetensors": save_file}


@pytest.fixture
def reload(tmp_path):
    """Writes tensors as a checkpoint and loads it."""

    def reload(tensors, config=None, name="meter.ckpt"):
        path = tmp_path / name
        WRITERS[name]({name: value.contiguous().clone() for name, value in tensors.items()}, path)
        return load_published(path, config or tiny_config())

    return reload


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("classifier_token", [False, True])
def test_a_published_checkpoint_comes_in_bit_for_bit(reload, name, classifier_token):
    config = tiny_config(classifier_token=classifier_token)
    model = stirred(config)
    unused = {name: torch.ones(shape) for name, shape in UNUSED.items()}
    loaded = reload(published(model) | unused, config, name)
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_half_weights_come_in_as_float32(reload, model):
    half = {name: value.half() for name, value in published(model).items()}
    loaded = reload(half).state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in model.state_dict().items())


def test_positions_are_interpolated_for_another_image_size(reload, model):
    config = tiny_config()
    config.vision_config.image_size = 48
    loaded = reload(published(model), config)
    before = model.meter.vision_model.embeddings.position_embedding.weight
    after = loaded.meter.vision_model.embeddings.position_embedding.weight
    grid = before[1:].detach().unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:], expected)
    assert loaded(**inputs(48)).logits.shape == (2, LABELS)


def test_a_pretrained_checkpoint_has_no_head_and_a_warning_says_so(reload, model):
    body = {name: value for name, value in published(model).items() if not name.startswith("vqa_classifier")}
    with pytest.warns(UserWarning, match="has no head for VQA.*vqa_classifier.0.weight"):
        loaded = reload(body)
    state = loaded.state_dict()
    kept = {name: value for name, value in model.state_dict().items() if name.startswith("meter.")}
    assert all(torch.equal(state[name], value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"adapter_list_v.0.weight": torch.ones(2)}, "not METER's: adapter_list_v.0.weight"),
        ({"vit_model.visual.transformer.resblocks.4.ln_1.bias": torch.ones(40)}, "not in the config's model: .*4.lay"),
        ({"token4classifier": torch.ones(1, 1, WIDTH)}, "not in the config's model: meter.classifier_token"),
        ({"vqa_classifier.3.bias": None}, "missing from the file: vqa_classifier.3.bias"),
        ({"vit_model.visual.ln_post.bias": None}, "missing from the file: meter.vision_model.post_layernorm.bias"),
        ({"vit_model.visual.positional_embedding": None}, "missing from the file: .*position_embedding.weight"),
        (
            {"vit_model.visual.positional_embedding": torch.ones(16, 40)},
            r"1 \+ a square number.*\[16, 40\]",
        ),
        ({"vit_model.visual.positional_embedding": torch.ones(10, 8)}, "of another shape: .*position_embedding"),
        ({"vqa_classifier.3.bias": torch.ones(7).char()}, "another kind of dtype: vqa_classifier.3.bias torch.int8 in"),
        ({"vqa_classifier.3.bias": torch.full([7], torch.nan)}, "NaN or infinity, .* in vqa_classifier.3.bias"),
        ({"vqa_classifier.3.bias": torch.ones(9)}, r"vqa_classifier.3.bias \[9\] in the file, \[7\] here"),
        ({"vit_model.visual.transformer.resblocks.0.attn.in_proj_bias": torch.ones(121)}, r"q_proj.bias \[41\]"),
        ({"vit_model.visual.transformer.resblocks.0.attn.in_proj_bias": torch.tensor(1.0)}, r"k_proj.bias \[0\]"),
    ],
)
def test_what_does_not_fit_is_named(reload, model, change, expected):
    tensors = {name: value for name, value in (published(model) | change).items() if value is not None}
    with pytest.raises(ValueError, match=expected):
        reload(tensors)


class Planted:
    """Code that a pickle would run."""

    def __reduce__(self):
        return (pytest.fail, ("code in the pickle ran",))


def test_no_code_in_a_checkpoint_runs(tmp_path):
    path = tmp_path / "meter.ckpt"
    torch.save({"state_dict": {}, "callbacks": Planted()}, path)
    with pytest.raises(ValueError, match=r"weights_only=True\) cannot read it"):
        load_published(path, tiny_config())


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"state_dict": {"a": 1}}])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "meter.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="under 'state_dict'"):
        load_published(path, tiny_config())


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.ckpt: no such file"):
        load_published(tmp_path / "none.ckpt")
    for name in ("broken.ckpt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=name):
            load_published(tmp_path / name, tiny_config())
