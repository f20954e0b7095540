"""Reward models against independent computations of their formulas, on small random weights in the layouts
people share."""

import importlib.util
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import clip_tokenizer, small_clip
from PIL import Image
from safetensors.torch import save_file

import rewards
from scorers import hpsv3, judges, preference, servers

PROMPTS = ["a red fox", "two cats and a very long list of other animals that goes on"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def images():
    blocks = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return F.interpolate(blocks, 54, mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


def pixels(images, size):
    """Square pictures as the reference code feeds them: 8 bits, PIL's bicubic, CLIP's mean and spread."""
    out = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = np.array(picture.resize((size, size), Image.Resampling.BICUBIC))
        out.append((torch.from_numpy(picture).permute(2, 0, 1) / 255 - MEAN) / STD)
    return torch.stack(out)


def score(name, images, prompts=PROMPTS, metadata=None, **options):
    chosen = rewards.parse_rewards([name], [f"{name}.{k}={v}" for k, v in options.items()])
    batch = [("t", {"prompt": p} | row) for p, row in zip(prompts, metadata or [{}] * len(prompts))]
    return rewards.score_batch(images, batch, chosen, ["t"])[name]


def embeddings(folder, images):
    """The model and the normalised embeddings of a small CLIP, its towers run by hand on one prompt at a
    time, so without padding."""
    from transformers import CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), clip_tokenizer(folder)
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels(images, 28)).pooler_output)
        states = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids[:, :77]
            states.append(model.text_model(ids).pooler_output)
        read = model.text_projection(torch.cat(states))
    return model, F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def test_pickscore_and_clipscore(clip, images):
    model, seen, read = embeddings(clip, images)
    cosine = (seen * read).sum(-1)
    assert cosine.abs().max() > 0.05
    scaled = model.logit_scale.exp().detach() * cosine
    torch.testing.assert_close(score("pickscore", images, model=clip, tokenizer=clip), scaled / 26, **CLOSE)
    together = score("clipscore", images, model=clip)
    torch.testing.assert_close(together, scaled / 30, **CLOSE)
    one_by_one = [score("clipscore", images[k : k + 1], PROMPTS[k : k + 1], model=clip) for k in (0, 1)]
    torch.testing.assert_close(torch.cat(one_by_one), together, **CLOSE)


def linear_layers(prefix, width):
    """The state dict of the width-1024-128-64-16-1 head, and its arithmetic."""
    sizes, gen = (width, 1024, 128, 64, 16, 1), torch.Generator().manual_seed(5)
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(a, b), torch.nn.Dropout(0.2)] if b > 16 else [torch.nn.Linear(a, b)]
    layers = torch.nn.Sequential(*layers)
    for p in layers.parameters():
        p.data = torch.randn(p.shape, generator=gen) / p.shape[-1] ** 0.5
    return {f"{prefix}layers.{k}": v for k, v in layers.state_dict().items()}, layers.eval()


def test_aesthetic(clip, images, tmp_path):
    state, layers = linear_layers("", 24)
    names = {f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias")}  # the published file's
    assert set(state) == names
    torch.save(state, tmp_path / "head.pth")
    _, seen, _ = embeddings(clip, images)
    scores = score("aesthetic", images, model=clip, head=tmp_path / "head.pth")
    torch.testing.assert_close(scores, layers(seen)[:, 0].detach(), atol=1e-5, rtol=1e-4)
    two = state | {"layers.7.weight": torch.zeros(2, 16), "layers.7.bias": torch.zeros(2)}
    short = {k: v for k, v in state.items() if k != "layers.4.bias"}
    for name, bad, message in (
        ("short", short, "does not fit: .*4.bias"),
        ("wide", linear_layers("", 768)[0], r"does not fit: .*size mismatch for 0.weight"),
        ("two", two, r"does not fit: .*size mismatch for 7.weight"),
        ("list", list(state.values()), "list.pth: a list, not tensors by their names"),
        ("bare", torch.zeros(3), "bare.pth: a Tensor, not tensors by their names"),
        ("nested", {"state_dict": [1]}, "nested.pth: a list, not tensors"),
        ("words", {"epoch": 3, "note": "x"}, "does not fit"),
    ):
        torch.save(bad, tmp_path / f"{name}.pth")
        with pytest.raises(rewards.Unavailable, match=message):
            score("aesthetic", images, model=clip, head=tmp_path / f"{name}.pth")


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(shape) * 0.2)


class Block(torch.nn.Module):
    """A layer of open_clip's ViT: fused in_proj in nn.MultiheadAttention."""

    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        layers = {"c_fc": torch.nn.Linear(width, 64), "c_proj": torch.nn.Linear(64, width)}
        self.mlp = torch.nn.ModuleDict(layers)

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def tower(width):
    module = torch.nn.Module()
    module.resblocks = torch.nn.ModuleList([Block(width), Block(width)])
    return module


class OpenClip(torch.nn.Module):
    """open_clip's ViT, as its layers are defined: projections as bare matrices applied from the right."""

    def __init__(self, words, width=32, seen=48, out=24):
        super().__init__()
        self.visual = v = torch.nn.Module()
        v.conv1 = torch.nn.Conv2d(3, seen, 14, 14, bias=False)
        v.class_embedding, v.positional_embedding, v.proj = (
            parameter(seen),
            parameter(5, seen),
            parameter(seen, out),
        )
        v.ln_pre, v.ln_post, v.transformer = torch.nn.LayerNorm(seen), torch.nn.LayerNorm(seen), tower(seen)
        self.token_embedding, self.transformer = torch.nn.Embedding(words, width), tower(width)
        self.positional_embedding, self.text_projection = parameter(77, width), parameter(width, out)
        self.ln_final, self.logit_scale = torch.nn.LayerNorm(width), torch.nn.Parameter(torch.tensor(4.6))
        for module in self.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.data = torch.rand_like(module.weight) + 0.5
                module.bias.data = torch.randn_like(module.bias) * 0.3

    def see(self, x):
        v = self.visual
        x = v.conv1(x).flatten(2).mT
        x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x[:, 0]) @ v.proj

    def read(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, torch.full((ids.shape[1],) * 2, -torch.inf).triu(1))
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def float_pixels(images, size):
    """Pictures as HPSv2's transform makes them: a tensor of 8 bits, its longer side resized in floating
    point, without clamping, then black beside it, the odd pixel to the right; here by Pillow's filter for
    pictures of one float channel."""
    height, width = (round(side * size / max(images.shape[2:])) for side in images.shape[2:])
    left, top = (size - width) // 2, (size - height) // 2
    canvas = torch.zeros(len(images), 3, size, size)
    for image, out in zip((images * 255).round() / 255, canvas):
        for channel, to in zip(image, out):
            resized = Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            to[top : top + height, left : left + width] = torch.from_numpy(np.array(resized))
    return (canvas - MEAN) / STD


@pytest.mark.parametrize("height, width", [(54, 54), (28, 28), (54, 31), (17, 54), (10, 20)])
def test_hpsv2s_pixels(height, width):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(preference.padded(images, 28), float_pixels(images, 28), atol=2e-5, rtol=1e-4)
    assert preference.padded(images, 28).shape == (2, 3, 28, 28)


def test_hpsv2_is_open_clips_arithmetic(images, tmp_path):
    base = small_clip(tmp_path / "base", hidden_act="gelu")
    tokenizer = clip_tokenizer(base)
    torch.manual_seed(1)
    model = OpenClip(len(tokenizer)).eval()

    def scores(state):
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "hps.pt")
        preference.load_hpsv2.cache_clear()
        return score("hpsv2", images, weights=tmp_path / "hps.pt", base=base)

    ids = [tokenizer(p).input_ids[:77] for p in PROMPTS]
    ids = torch.tensor([i + [0] * (77 - len(i)) for i in ids])  # open_clip pads with zeros
    with torch.no_grad():
        expected = F.cosine_similarity(model.see(float_pixels(images, 28)), model.read(ids))
    assert expected.abs().max() > 0.05
    state = model.state_dict()
    torch.testing.assert_close(scores(state), expected, atol=2e-6, rtol=1e-5)
    for drop, name in (
        ("visual.ln_pre.weight", "pre_layrnorm.weight"),
        ("transformer.resblocks.1.attn.in_proj_bias", "q_proj.bias"),
        ("text_projection", "text_projection"),
    ):
        with pytest.raises(rewards.RewardError, match=f"does not fit.*{name}"):
            scores({k: v for k, v in state.items() if k != drop})
    with pytest.raises(rewards.RewardError, match="does not fit.*extra"):
        scores(state | {"visual.extra": torch.zeros(1)})


def bert_tokenizer(folder):
    """BERT's tokenizer with a vocabulary of letters and yes and no."""
    from transformers import BertTokenizer

    letters = [chr(c) for c in range(97, 123)] + ["?"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no"]
    vocab = [*special, *letters, *("##" + letter for letter in letters)]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})
    tokenizer.save_pretrained(folder)
    return tokenizer


V, T = "blip.visual_encoder.", "blip.text_encoder."
WIDTH, DEPTH = 128, 192  # of the two towers, so two and three heads


def imagereward_state(words):
    """A random ImageReward.pt of two layers a tower, with its head."""
    gen, state = torch.Generator().manual_seed(2), {}

    def new(name, *shape):
        state[name] = torch.randn(shape, generator=gen) * (0.3 if len(shape) < 2 else shape[-1] ** -0.5)

    def linear(name, out, inside):
        new(name + ".weight", out, inside)
        new(name + ".bias", out)

    def norm(name, width):
        new(name + ".bias", width)
        state[name + ".weight"] = torch.rand(width, generator=gen) + 0.5

    new(V + "cls_token", 1, 1, WIDTH)
    new(V + "pos_embed", 1, 5, WIDTH)
    new(V + "patch_embed.proj.weight", WIDTH, 3, 16, 16)
    new(V + "patch_embed.proj.bias", WIDTH)
    norm(V + "norm", WIDTH)
    new(T + "embeddings.word_embeddings.weight", words, DEPTH)
    new(T + "embeddings.position_embeddings.weight", 40, DEPTH)
    norm(T + "embeddings.LayerNorm", DEPTH)
    state[T + "embeddings.position_ids"] = torch.arange(40)[None]
    for i in range(2):
        block, layer = f"{V}blocks.{i}.", f"{T}encoder.layer.{i}."
        norm(block + "norm1", WIDTH)
        norm(block + "norm2", WIDTH)
        linear(block + "attn.qkv", 3 * WIDTH, WIDTH)
        linear(block + "attn.proj", WIDTH, WIDTH)
        linear(block + "mlp.fc1", 2 * WIDTH, WIDTH)
        linear(block + "mlp.fc2", WIDTH, 2 * WIDTH)
        for kind, source in (("attention", DEPTH), ("crossattention", WIDTH)):
            linear(f"{layer}{kind}.self.query", DEPTH, DEPTH)
            linear(f"{layer}{kind}.self.key", DEPTH, source)
            linear(f"{layer}{kind}.self.value", DEPTH, source)
            linear(f"{layer}{kind}.output.dense", DEPTH, DEPTH)
            norm(f"{layer}{kind}.output.LayerNorm", DEPTH)
        linear(layer + "intermediate.dense", 2 * DEPTH, DEPTH)
        linear(layer + "output.dense", DEPTH, 2 * DEPTH)
        norm(layer + "output.LayerNorm", DEPTH)
    head, layers = linear_layers("mlp.", DEPTH)
    return state | head, layers


def attention(q, k, v, mask=None):
    """Of heads of 64 dimensions."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / 8
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_imagereward_is_the_original_arithmetic(images, tmp_path):
    """timm's ViT and BLIP's BERT with cross-attention, written down as functions of ImageReward.pt's
    tensors."""
    tokenizer = bert_tokenizer(tmp_path / "bert")
    state, layers = imagereward_state(len(tokenizer) + 2)

    def lin(name, x):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def ln(name, x, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    kernel, bias = (state[f"{V}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = F.conv2d(pixels(images, 32), kernel, bias, stride=16).flatten(2).mT
    x = torch.cat([state[V + "cls_token"].expand(2, -1, -1), x], 1) + state[V + "pos_embed"]
    for i in range(2):
        b = f"{V}blocks.{i}."
        x = x + lin(b + "attn.proj", attention(*lin(b + "attn.qkv", ln(b + "norm1", x, 1e-6)).chunk(3, -1)))
        x = x + lin(b + "mlp.fc2", F.gelu(lin(b + "mlp.fc1", ln(b + "norm2", x, 1e-6))))
    seen = ln(V + "norm", x, 1e-6)
    read = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    mask = read.attention_mask[:, None, None].bool()
    h = state[T + "embeddings.word_embeddings.weight"][read.input_ids]
    h = ln(T + "embeddings.LayerNorm", h + state[T + "embeddings.position_embeddings.weight"][:35])
    for i in range(2):
        b = f"{T}encoder.layer.{i}."
        for kind, source, its_mask in (("attention", None, mask), ("crossattention", seen, None)):
            s, source = f"{b}{kind}.self.", h if source is None else source
            a = attention(lin(s + "query", h), lin(s + "key", source), lin(s + "value", source), its_mask)
            h = ln(f"{b}{kind}.output.LayerNorm", lin(f"{b}{kind}.output.dense", a) + h)
        inner = F.gelu(lin(b + "intermediate.dense", h))
        h = ln(b + "output.LayerNorm", lin(b + "output.dense", inner) + h)
    expected = (layers(h[:, 0])[:, 0].detach() - 0.16717362830052426) / 1.0333394966054072

    def scores(state):
        torch.save(state, tmp_path / "ImageReward.pt")
        preference.load_imagereward.cache_clear()
        preference.load_head.cache_clear()
        return score("imagereward", images, weights=tmp_path / "ImageReward.pt", tokenizer=tmp_path / "bert")

    torch.testing.assert_close(scores(state), expected, atol=2e-5, rtol=1e-4)
    key = T + "encoder.layer.0.crossattention.self.key.bias"
    for drop in (V + "blocks.1.norm2.weight", key, "mlp.layers.0.weight", V + "cls_token"):
        with pytest.raises(rewards.RewardError, match="does not fit"):
            scores({name: value for name, value in state.items() if name != drop})


def test_blipvqa(images, tmp_path, monkeypatch):
    """The product over phrases of yes / (yes + no), one question at a time through the class's own parts;
    phrases from the row or from spaCy."""
    from transformers import BlipConfig, BlipForQuestionAnswering

    tokenizer = bert_tokenizer(tmp_path)
    torch.manual_seed(4)
    size = len(tokenizer) + 2
    shared = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=size, encoder_hidden_size=48, bos_token_id=size - 2, sep_token_id=3, pad_token_id=0
    )
    text |= shared | dict(max_position_embeddings=64, initializer_range=0.5)
    vision = shared | dict(image_size=32, patch_size=16, initializer_range=0.3)
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    model = BlipForQuestionAnswering.from_pretrained(tmp_path).eval()
    positions = model.vision_model.embeddings.position_embedding  # of 2 x 2 patches and the class: made 3 x 3
    grid = positions.data[:, 1:].view(1, 2, 2, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (3, 3), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    positions.data = torch.cat([positions.data[:, :1], grid], 1)
    long = " ".join(["abc"] * 51)
    listed = 'a "Very" (long) list: of other animals.'
    asked = {"a red fox": "a red fox?", "two cats": "two cats?", listed: "a very long list of other animals?"}
    asked[long] = long[:-4]  # 50 words, so without the question mark
    rows = [{"phrases": ["a red fox", long]}, {"phrases": ["two cats", listed]}]
    expected = []
    for image, row in zip(pixels(images, 48), rows):
        product = 1.0
        for phrase in row["phrases"]:
            ids = tokenizer(asked[phrase], return_tensors="pt", truncation=True, max_length=35).input_ids
            ids[0, 0] = size - 1
            with torch.no_grad():
                seen = model.vision_model(image[None]).last_hidden_state
                states = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
                out = model.text_decoder(torch.tensor([[size - 2]]), encoder_hidden_states=states)
            yes, no = out.logits[0, 0, [5, 6]].exp().tolist()
            product *= yes / (yes + no)
        expected.append(product)
    scores = score("blipvqa", images, metadata=rows, model=tmp_path, size=48)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 1 and abs(expected[0] - 0.5) > 0.01
    chunks = {prompt: row["phrases"] for prompt, row in zip(PROMPTS, rows)} | {"p": ["The left", "Top"]}
    where = "top", "the side", "the left", "the right"  # left out, officially, so spelt

    def nlp(text):
        found = [types.SimpleNamespace(text=chunk) for chunk in (*where, *chunks[text])]
        return types.SimpleNamespace(noun_chunks=found)

    monkeypatch.setattr(preference, "load_spacy", lambda: nlp)
    assert score("blipvqa", images, model=tmp_path, size=48).tolist() == pytest.approx(expected, abs=1e-5)
    assert preference.noun_phrases({"prompt": "p"}) == ["The left", "Top"]
    prompts = {"t": [{"prompt": PROMPTS[0]}, {"prompt": "p57", "phrases": []}]}
    with pytest.raises(SystemExit, match="--prompts t: blipvqa finds no noun phrase in 'p57'"):
        rewards.check_rewards(rewards.parse_rewards(["blipvqa"]), prompts, 32)


QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
# Qwen2-VL's chat template around the official text
OFFICIAL_START = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
OFFICIAL_END = "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory):
    """A Qwen2-VL's tokenizer of single bytes and a small config in a folder, and random weights in the layout
    of the published HPSv3.safetensors: {name: tensor}."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen")
    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="left")  # as the published one
    tokenizer.add_tokens(QWEN_TOKENS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    ids = dict(zip(QWEN_TOKENS, tokenizer.convert_tokens_to_ids(QWEN_TOKENS)))
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, vocab_size=len(tokenizer) + 9, rms_norm_eps=1e-6, bos_token_id=None)
    text |= dict(eos_token_id=None, rope_parameters={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1  # with <|Reward|>
    gen, state = torch.Generator().manual_seed(6), {}
    for name, like in Qwen2VLForConditionalGeneration(config).state_dict().items():
        value = torch.randn(like.shape, generator=gen) * (0.2 if like.ndim < 2 else like[0].numel() ** -0.5)
        if like.ndim == 1 and name.endswith("weight"):
            value += 1
        state[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = value
    assert {"visual.merger.mlp.2.weight", "model.embed_tokens.weight", "lm_head.weight"} <= set(state)
    for number, (a, b) in {0: (32, 1024), 3: (1024, 16), 5: (16, 2)}.items():
        state[f"rm_head.{number}.weight"] = torch.randn(b, a, generator=gen) * (2 / a) ** 0.5
        state[f"rm_head.{number}.bias"] = torch.randn(b, generator=gen)
    return folder, state


def hpsv3_by_hand(state, patches, rows, ids, image_token, reward_token, rounded=False):
    """(mu, sigma) of one picture: Qwen2-VL's layers as functions of the file's tensors, with positions that
    count on, and the head of the token <|Reward|>. rounded: the positions' frequencies are bfloat16's."""

    def frequencies(base):  # of heads of 8; in the vision tower half of a head is for rows, half for columns
        found = base ** -(torch.arange(0, 8, 2) / 8)
        return found.bfloat16().float() if rounded else found

    def lin(name, x):
        y = x @ state[name + ".weight"].T
        return y + state[name + ".bias"] if name + ".bias" in state else y

    def ln(name, x):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)

    def rms(name, x):
        return state[name + ".weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, angles):  # (heads, length, width); the halves of a head are a pair's two numbers
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(q, k, v, angles, heads, causal):
        q, k, v = (x.unflatten(1, (-1, q.shape[1] // heads)).transpose(0, 1) for x in (q, k, v))
        q, k, v = (
            turned(q, angles),
            *(x.repeat_interleave(heads // len(k), 0) for x in (turned(k, angles), v)),
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if causal:
            scores += torch.full_like(scores, -torch.inf).triu(1)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    x = patches @ state["visual.patch_embed.proj.weight"].flatten(1).T
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(len(patches) // rows))
    places = places.view(rows // 2, 2, -1, 2, 2).transpose(1, 2).reshape(-1, 2, 1)  # squares of four
    angles = (places * frequencies(1e4)).flatten(1)
    for i in range(2):
        b = f"visual.blocks.{i}."
        y = lin(b + "attn.qkv", ln(b + "norm1", x)).chunk(3, -1)
        x = x + lin(b + "attn.proj", attend(*y, angles, 2, causal=False))
        y = lin(b + "mlp.fc1", ln(b + "norm2", x))
        x = x + lin(b + "mlp.fc2", y * (1.702 * y).sigmoid())
    x = ln("visual.merger.ln_q", x).reshape(-1, 4 * 32)
    seen = lin("visual.merger.mlp.2", F.gelu(lin("visual.merger.mlp.0", x)))
    x = state["model.embed_tokens.weight"][ids]
    x[ids == image_token] = seen
    angles = torch.arange(len(ids))[:, None] * frequencies(1e6)
    for i in range(2):
        b = f"model.layers.{i}."
        y = rms(b + "input_layernorm", x)
        y = attend(*(lin(f"{b}self_attn.{k}_proj", y) for k in "qkv"), angles, 4, causal=True)
        x = x + lin(b + "self_attn.o_proj", y)
        y = rms(b + "post_attention_layernorm", x)
        x = x + lin(b + "mlp.down_proj", F.silu(lin(b + "mlp.gate_proj", y)) * lin(b + "mlp.up_proj", y))
    x = rms("model.norm", x)[ids == reward_token]
    return lin("rm_head.5", lin("rm_head.3", lin("rm_head.0", x).relu()).relu())[0]


@pytest.mark.parametrize("height, width", [(54, 54), (512, 512), (300, 900), (700, 500), (28, 30)])
def test_hpsv3s_pixels(height, width):
    """The official code resizes before Qwen2-VL's own processor, which then finds nothing to resize."""
    from transformers import Qwen2VLImageProcessorPil

    blocks = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(height))
    pictures = rewards.pil(F.interpolate(blocks, (height, width), mode="bicubic").clamp(0, 1))
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)
    expected = processor(images=pictures, return_tensors="pt")
    patches, rows, columns = hpsv3.qwen_patches(pictures)
    assert expected["image_grid_thw"].tolist() == [[1, rows, columns]] * 2
    torch.testing.assert_close(patches, expected["pixel_values"], **CLOSE)


def test_hpsv3_is_qwens_arithmetic(images, small_qwen, tmp_path, monkeypatch):
    """With other words than the authors' package has, in the same places."""
    from transformers import AutoTokenizer

    if not importlib.util.find_spec("hpsv3"):
        with pytest.raises(rewards.Unavailable, match="pip install --no-deps hpsv3"):
            hpsv3.official_texts()
    package, about = tmp_path / "hpsv3", tmp_path / "hpsv3-9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hpsv3\nVersion: 9\n")
    (package / "dataset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be run')")
    source = 'import nowhere\nINSTRUCTION = "\\nRate, from 0 to 10:\\n{text_prompt}.\\n\\n"\n'
    source += 'prompt_with_special_token = "\\nScore: <|Reward|>\\n\\nEND\\n"\n'
    (package / "dataset/data_collator_qwen.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    hpsv3.official_texts.cache_clear()

    (folder, state), file, close = small_qwen, tmp_path / "HPSv3.safetensors", dict(atol=2e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    image_token, reward_token = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|Reward|>"])
    patches, rows, _ = hpsv3.qwen_patches(rewards.pil(images))

    def by_hand(state, rounded=False):
        found = []
        for seen, prompt in zip(patches.chunk(2), PROMPTS):
            text = OFFICIAL_START + "<|image_pad|>" * 256 + "<|vision_end|>\nRate, from 0 to 10:\n" + prompt
            text += ".\n\n\nScore: <|Reward|>" + OFFICIAL_END
            ids = tokenizer(text, return_tensors="pt").input_ids[0]
            mu, sigma = hpsv3_by_hand(state, seen, rows, ids, image_token, reward_token, rounded)
            found.append(mu)
        return torch.stack(found)

    def scores(state):
        save_file(state, file)
        hpsv3.load_hpsv3.cache_clear()
        return score("hpsv3", images, weights=file, base=folder)

    expected = by_hand(state)
    assert (expected[0] - expected[1]).abs() > 0.01
    torch.testing.assert_close(scores(state), expected, **close)
    new = {re.sub("^model", "model.language_model", name): value for name, value in state.items()}
    new = {re.sub("^visual", "model.visual", name): value for name, value in new.items()}
    torch.testing.assert_close(scores(new), expected, **close)
    halves = {name: v if name.startswith("rm_head") else v.bfloat16() for name, v in state.items()}
    rough = scores(halves)  # as the published file is stored, and computed
    assert (rough - expected).abs().max() < 0.1
    hpsv3.load_hpsv3(str(file), str(folder), images.device)[0].float()  # the same weights and frequencies
    exact = by_hand({name: v.float() for name, v in halves.items()}, rounded=True)
    torch.testing.assert_close(score("hpsv3", images, weights=file, base=folder), exact, **close)
    for drop in ("visual.blocks.1.norm2.weight", "model.layers.0.self_attn.k_proj.bias", "rm_head.3.weight"):
        with pytest.raises(rewards.RewardError, match=f"does not fit.*{drop.rpartition('.')[0][-8:]}"):
            scores({name: value for name, value in state.items() if name != drop})
    with pytest.raises(rewards.RewardError, match="does not fit.*extra"):
        scores(state | {"rm_head.extra": torch.zeros(1)})
    with pytest.raises(rewards.RewardError, match="does not fit.*size mismatch.*embed_tokens"):
        scores(state | {"model.embed_tokens.weight": torch.zeros(99, 32)})
    file.write_bytes(b"not one")
    hpsv3.load_hpsv3.cache_clear()
    with pytest.raises(rewards.RewardError, match="not a checkpoint of tensors"):
        score("hpsv3", images, weights=file, base=folder)


def test_models_that_cannot_be_had(images, tmp_path):
    with pytest.raises(rewards.RewardError, match="clipscore: .*nothing could not be loaded"):
        score("clipscore", images, model=tmp_path / "nothing")
    with pytest.raises(rewards.Unavailable, match="missing.pth: no local file, nor to be had from the hub"):
        preference.load_state("missing.pth")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(rewards.RewardError, match="evil.pth: not a checkpoint of tensors"):
        preference.load_state(str(tmp_path / "evil.pth"))


WRONG = [
    ("clipscore=0", [], "a positive number"),
    ("clipscore=fast", [], "expected NAME"),
    ("clipscore clipscore", [], "given twice"),
    ("clipscore", ["clipscore.speed=3"], "clipscore has model"),
    ("clipscore", ["pickscore.model=x"], "not among --reward"),
    ("clipscore", ["model"], "expected NAME.KEY"),
    ("deqa=http://x", ["deqa.timeout=soon"], "could not convert"),
    ("jpeg", ["jpeg.x=1"], "jpeg has no options"),
    ("jpeg=ftp://x", [], "expected NAME"),
    ("jpeg=openai+http://x", [], "openai[+] is for judges"),
    ("qwenvl=openai+http://x", ["qwenvl.pattern=("], "pattern=[(]"),
    ("smile", [], "no such reward"),
    ("qwenvl=openai+http://x", ["qwenvl.prompt=@/nowhere"], "No such file"),
    ("deqa=http://x", ["deqa.retries=-1"], "at least 0"),
    ("deqa=http://x", ["deqa.timeout=0"], "more than 0"),
    ("qwenvl=openai+http://x", ["qwenvl.pattern=(a)(b)"], "one group"),
    ("a=http://h:99999/x", [], "Port out of range"),
    ("a=http://[::1/x", [], "Invalid IPv6"),
    ("qwenvl=openai+http://x", ["qwenvl.max_tokens=-1"], "at least 0"),
    ("qwenvl=openai+http://x", ["qwenvl.image=GIF"], "PNG or JPEG"),
    ("diversity=http://x", [], "its own column diversity"),
    ("mine.average=http://x", [], "its own column average"),
    ("a=http://me:secret@h:99999", [], r"a=http://\*\*\*@h:99999: Port"),
]


@pytest.mark.parametrize("specs, options, message", WRONG)
def test_wrong_specs_are_refused(specs, options, message):
    with pytest.raises(SystemExit, match=message):
        rewards.parse_rewards(specs.split(), options)


def test_specs(tmp_path):
    (tmp_path / "p.txt").write_text("Rate {prompt}")
    specs = (
        "jpeg@scene=0.25 toy.ocr deqa=0.2,openai+https://h:1/v1/ mine=http://h/x geneval=pickle+http://h:1"
    )
    options = f"deqa.timeout=3 deqa.prompt=@{tmp_path}/p.txt mine.retries=0"
    chosen = rewards.parse_rewards(specs.split(), options.split())
    assert list(chosen) == ["jpeg", "ocr", "deqa", "mine", "geneval"]
    assert [reward.weight for reward in chosen.values()] == [0.25, 1, 0.2, 1, 1]
    assert chosen["jpeg"].task == "scene"
    deqa, mine, geneval = (chosen[name].function for name in ("deqa", "mine", "geneval"))
    assert deqa.func is judges.deqa
    assert deqa.keywords == {"url": "https://h:1/v1", "timeout": 3.0, "prompt": "Rate {prompt}"}
    assert mine.func is servers.served and mine.keywords == {
        "url": "http://h/x",
        "name": "mine",
        "retries": 0,
    }
    assert geneval.func is servers.served_pickle


def test_rewards_of_a_task():
    def names(task, specs, tasks):
        return " ".join(rewards.rewards_of(task, rewards.parse_rewards(specs.split()), tasks.split()))

    tasks, specs = "ocr scene geneval", "jpeg@scene toy.ocr mine=http://h geneval=pickle+http://h:1"
    assert names("scene", specs, tasks) == "jpeg mine"
    assert names("ocr", specs, tasks) == "ocr mine"
    assert names("geneval", "geneval geneval_strict ocr", tasks) == "geneval geneval_strict"
    for tasks in ("ocr ocr_strict", "ocr_strict ocr"):
        assert names("ocr", "ocr ocr_strict=http://h", tasks) == "ocr"
        assert names("ocr_strict", "ocr ocr_strict=http://h", tasks) == "ocr_strict"


def test_cached_scores_are_of_the_same_weights_servers_and_versions(tmp_path, monkeypatch):
    """A reward's identity, by which cached scores are found: models by content, servers by address, rapidocr
    by version."""

    def of(spec, *options):
        [reward] = rewards.parse_rewards([spec], options).values()
        return reward.identity

    assert of("deqa=http://a/x") == of("deqa=http://a/x/", "deqa.timeout=9", "deqa.retries=0")
    urls = "http://a/x", "http://b/x", "http://a:9/x", "http://a/y", "pickle+http://a/x"
    assert len({of(f"deqa={url}") for url in urls}) == 5
    assert of("deqa=http://me:secret@a/x") == of("deqa=http://***@a/x") and "secret" not in of(
        "deqa=http://me:secret@a/x"
    )
    assert of("qwenvl=openai+http://a/v1") != of("qwenvl=openai+http://a/v1", "qwenvl.model=another")
    (tmp_path / "model").mkdir()
    option = f"clipscore.model={tmp_path}/model"
    (tmp_path / "model/weights").write_bytes(b"one")
    before = of("clipscore", option)
    assert before == of("clipscore", option) != of("clipscore")
    (tmp_path / "model/weights").write_bytes(b"two")
    assert before != of("clipscore", option)
    (tmp_path / "a.txt").write_text("Rate {prompt}")
    from_file = of("qwenvl", f"qwenvl.prompt=@{tmp_path}/a.txt")
    assert from_file == of("qwenvl", "qwenvl.prompt=Rate {prompt}") != of("qwenvl")
    before = of("ocr")
    monkeypatch.setattr(rewards.importlib.metadata, "version", lambda package: "9.9")
    assert before != of("ocr") and "9.9" in of("ocr") and of("jpeg") == "jpeg {}"
