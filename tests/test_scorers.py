"""Reward models against independent computations of their formulas, on small random weights in the layouts people share."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import clip_tokenizer, small_clip
from PIL import Image

import rewards

PROMPTS = ["a red fox", "two cats and a very long list of other animals that goes on"]
MEAN, STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1),
)


@pytest.fixture(scope="module")
def images():
    return F.interpolate(
        torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(3)), 54, mode="bicubic"
    ).clamp(0, 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


def pixels(images, size):
    """Square pictures as the reference code feeds them: 8 bits, PIL's bicubic, CLIP's mean and spread."""
    out = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        out.append((torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - MEAN) / STD)
    return torch.stack(out)


def score(name, images, prompts=PROMPTS, metadata=None, **options):
    chosen = rewards.parse_rewards([name], [f"{name}.{k}={v}" for k, v in options.items()])
    batch = [("t", {"prompt": p} | row) for p, row in zip(prompts, metadata or [{}] * len(prompts))]
    return rewards.score_batch(images, batch, chosen, ["t"])[name]


def embeddings(folder, images):
    """Normalised embeddings of a small CLIP, its towers run by hand on one prompt at a time, so without padding."""
    from transformers import CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), clip_tokenizer(folder)
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels(images, 28)).pooler_output)
        read = torch.cat(
            [
                model.text_projection(
                    model.text_model(tokenizer(p, return_tensors="pt").input_ids[:, :77]).pooler_output
                )
                for p in PROMPTS
            ]
        )
    return model, seen / seen.norm(dim=-1, keepdim=True), read / read.norm(dim=-1, keepdim=True)


def test_pickscore_and_clipscore(clip, images):
    model, seen, read = embeddings(clip, images)
    cosine = (seen * read).sum(-1)
    assert cosine.abs().max() > 0.05
    torch.testing.assert_close(
        score("pickscore", images, model=clip, tokenizer=clip),
        model.logit_scale.exp().detach() * cosine / 26,
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        score("clipscore", images, model=clip),
        model.logit_scale.exp().detach() * cosine / 30,
        atol=1e-5,
        rtol=1e-5,
    )
    alone = torch.cat([score("clipscore", images[k : k + 1], PROMPTS[k : k + 1], model=clip) for k in (0, 1)])
    torch.testing.assert_close(alone, score("clipscore", images, model=clip), atol=1e-5, rtol=1e-5)


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
    assert set(state) == {
        f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias")
    }  # the published file's names
    torch.save(state, tmp_path / "head.pth")
    _, seen, _ = embeddings(clip, images)
    expected = layers(seen)[:, 0].detach()
    torch.testing.assert_close(
        score("aesthetic", images, model=clip, head=tmp_path / "head.pth"), expected, atol=1e-5, rtol=1e-4
    )
    wide = linear_layers("", 768)[0]
    two = state | {"layers.7.weight": torch.zeros(2, 16), "layers.7.bias": torch.zeros(2)}
    for name, bad, message in (
        ("short", {k: v for k, v in state.items() if k != "layers.4.bias"}, "does not fit: .*4.bias"),
        ("wide", wide, r"does not fit: .*size mismatch for 0.weight"),
        ("two", two, r"does not fit: .*size mismatch for 7.weight"),
        ("list", list(state.values()), "list.pth: a list, not tensors by their names"),
        ("bare", torch.zeros(3), "bare.pth: a Tensor, not tensors by their names"),
        ("nested", {"state_dict": [1]}, "nested.pth: a list, not tensors"),
        ("words", {"epoch": 3, "note": "x"}, "does not fit"),
    ):
        torch.save(bad, tmp_path / f"{name}.pth")
        with pytest.raises(rewards.Unavailable, match=message):
            score("aesthetic", images, model=clip, head=tmp_path / f"{name}.pth")


class OpenClip(torch.nn.Module):
    """open_clip's ViT, as its layers are defined: fused in_proj in nn.MultiheadAttention, projections as bare matrices applied from the right."""

    def __init__(self, words, width=32, seen=48, out=24):
        super().__init__()

        class Block(torch.nn.Module):
            def __init__(self, width):
                super().__init__()
                self.ln_1, self.ln_2, self.attn = (
                    torch.nn.LayerNorm(width),
                    torch.nn.LayerNorm(width),
                    torch.nn.MultiheadAttention(width, 2, batch_first=True),
                )
                self.mlp = torch.nn.ModuleDict(
                    {"c_fc": torch.nn.Linear(width, 64), "c_proj": torch.nn.Linear(64, width)}
                )

            def forward(self, x, mask=None):
                y = self.ln_1(x)
                x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
                return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))

        def tower(width):
            t = torch.nn.Module()
            t.resblocks = torch.nn.ModuleList([Block(width) for _ in range(2)])
            return t

        p = lambda *shape: torch.nn.Parameter(torch.randn(shape) * 0.2)
        v = self.visual = torch.nn.Module()
        v.conv1, v.class_embedding, v.positional_embedding = (
            torch.nn.Conv2d(3, seen, 14, 14, bias=False),
            p(seen),
            p(5, seen),
        )
        v.ln_pre, v.ln_post, v.transformer, v.proj = (
            torch.nn.LayerNorm(seen),
            torch.nn.LayerNorm(seen),
            tower(seen),
            p(seen, out),
        )
        self.token_embedding, self.positional_embedding, self.transformer = (
            torch.nn.Embedding(words, width),
            p(77, width),
            tower(width),
        )
        self.ln_final, self.text_projection, self.logit_scale = (
            torch.nn.LayerNorm(width),
            p(width, out),
            torch.nn.Parameter(torch.tensor(4.6)),
        )
        for module in self.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.data, module.bias.data = (
                    torch.rand_like(module.weight) + 0.5,
                    torch.randn_like(module.bias) * 0.3,
                )

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
    """Pictures as HPSv2's transform makes them: a tensor of 8 bits, its longer side resized in floating point, without clamping,
    then black beside it, the odd pixel to the right; here by Pillow's filter for pictures of one float channel."""
    out = []
    for image in images:
        width, height = (
            round(side * size / max(image.shape[1:])) for side in (image.shape[2], image.shape[1])
        )
        canvas = torch.zeros(3, size, size)
        left, top = (size - width) // 2, (size - height) // 2
        for channel, to in zip((image * 255).round() / 255, canvas):
            resized = Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            to[top : top + height, left : left + width] = torch.from_numpy(np.array(resized))
        out.append((canvas - MEAN) / STD)
    return torch.stack(out)


@pytest.mark.parametrize("height, width", [(54, 54), (28, 28), (54, 31), (17, 54), (10, 20)])
def test_hpsv2s_pixels(height, width):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(rewards.padded(images, 28), float_pixels(images, 28), atol=2e-5, rtol=1e-4)
    assert rewards.padded(images, 28).shape == (2, 3, 28, 28)


def test_hpsv2_is_open_clips_arithmetic(images, tmp_path):
    base = small_clip(tmp_path / "base", hidden_act="gelu")
    tokenizer = clip_tokenizer(base)
    torch.manual_seed(1)
    model = OpenClip(len(tokenizer)).eval()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    ids = [tokenizer(p).input_ids[:77] for p in PROMPTS]
    ids = torch.tensor([i + [0] * (77 - len(i)) for i in ids])  # open_clip pads with zeros
    with torch.no_grad():
        expected = F.cosine_similarity(model.see(float_pixels(images, 28)), model.read(ids))
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(
        score("hpsv2", images, weights=tmp_path / "hps.pt", base=base), expected, atol=2e-6, rtol=1e-5
    )
    for drop, name in (
        ("visual.ln_pre.weight", "pre_layrnorm.weight"),
        ("transformer.resblocks.1.attn.in_proj_bias", "q_proj.bias"),
        ("text_projection", "text_projection"),
    ):
        state = {k: v for k, v in model.state_dict().items() if k != drop}
        torch.save({"state_dict": state}, tmp_path / f"short {drop}.pt")
        with pytest.raises(rewards.RewardError, match=f"does not fit.*{name}"):
            score("hpsv2", images, weights=tmp_path / f"short {drop}.pt", base=base)
    torch.save({"state_dict": model.state_dict() | {"visual.extra": torch.zeros(1)}}, tmp_path / "long.pt")
    with pytest.raises(rewards.RewardError, match="does not fit.*extra"):
        score("hpsv2", images, weights=tmp_path / "long.pt", base=base)


def bert_tokenizer(folder):
    """BERT's tokenizer with a vocabulary of letters and yes and no."""
    from transformers import BertTokenizer

    letters = [chr(c) for c in range(97, 123)] + ["?"]
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "yes",
        "no",
        *letters,
        *("##" + c for c in letters),
    ]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(vocab)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_imagereward_is_the_original_arithmetic(images, tmp_path):
    """timm's ViT and BLIP's BERT with cross-attention, written down as functions of ImageReward.pt's tensors. 128 wide, so two heads each."""
    tokenizer = bert_tokenizer(tmp_path / "bert")
    gen, W, B, words = torch.Generator().manual_seed(2), 128, 192, len(tokenizer) + 2
    state = {}

    def new(name, *shape, size=0.3):
        state[name] = torch.randn(shape, generator=gen) * (size if len(shape) < 2 else shape[-1] ** -0.5)

    def linear(name, out, inside):
        new(name + ".weight", out, inside), new(name + ".bias", out)

    def norm(name, width):
        new(name + ".bias", width)
        state[name + ".weight"] = torch.rand(width, generator=gen) + 0.5

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    (
        new(v + "cls_token", 1, 1, W),
        new(v + "pos_embed", 1, 5, W),
        new(v + "patch_embed.proj.weight", W, 3, 16, 16),
        new(v + "patch_embed.proj.bias", W),
        norm(v + "norm", W),
    )
    for i in range(2):
        block = f"{v}blocks.{i}."
        (
            norm(block + "norm1", W),
            norm(block + "norm2", W),
            linear(block + "attn.qkv", 3 * W, W),
            linear(block + "attn.proj", W, W),
        )
        linear(block + "mlp.fc1", 2 * W, W), linear(block + "mlp.fc2", W, 2 * W)
    (
        new(t + "embeddings.word_embeddings.weight", words, B),
        new(t + "embeddings.position_embeddings.weight", 40, B),
        norm(t + "embeddings.LayerNorm", B),
    )
    state[t + "embeddings.position_ids"] = torch.arange(40)[None]
    for i in range(2):
        layer = f"{t}encoder.layer.{i}."
        for kind, source in (("attention", B), ("crossattention", W)):
            (
                linear(f"{layer}{kind}.self.query", B, B),
                linear(f"{layer}{kind}.self.key", B, source),
                linear(f"{layer}{kind}.self.value", B, source),
            )
            linear(f"{layer}{kind}.output.dense", B, B), norm(f"{layer}{kind}.output.LayerNorm", B)
        (
            linear(layer + "intermediate.dense", 2 * B, B),
            linear(layer + "output.dense", B, 2 * B),
            norm(layer + "output.LayerNorm", B),
        )
    head, layers = linear_layers("mlp.", B)
    state |= head
    torch.save(state, tmp_path / "ImageReward.pt")

    lin = lambda name, x: x @ state[name + ".weight"].T + state[name + ".bias"]
    ln = lambda name, x, eps: F.layer_norm(
        x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps
    )

    def attention(q, k, v, mask=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / 8
        return (
            ((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v)
            .transpose(1, 2)
            .flatten(2)
        )

    x = (
        F.conv2d(
            pixels(images, 32),
            state[v + "patch_embed.proj.weight"],
            state[v + "patch_embed.proj.bias"],
            stride=16,
        )
        .flatten(2)
        .mT
    )
    x = torch.cat([state[v + "cls_token"].expand(2, -1, -1), x], 1) + state[v + "pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        x = x + lin(b + "attn.proj", attention(*lin(b + "attn.qkv", ln(b + "norm1", x, 1e-6)).chunk(3, -1)))
        x = x + lin(b + "mlp.fc2", F.gelu(lin(b + "mlp.fc1", ln(b + "norm2", x, 1e-6))))
    seen = ln(v + "norm", x, 1e-6)
    read = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    mask = read.attention_mask[:, None, None].bool()
    h = ln(
        t + "embeddings.LayerNorm",
        state[t + "embeddings.word_embeddings.weight"][read.input_ids]
        + state[t + "embeddings.position_embeddings.weight"][:35],
        1e-12,
    )
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, source, m in (("attention", None, mask), ("crossattention", seen, None)):
            s = b + kind + ".self."
            k = h if source is None else source
            a = attention(lin(s + "query", h), lin(s + "key", k), lin(s + "value", k), m)
            h = ln(b + kind + ".output.LayerNorm", lin(b + kind + ".output.dense", a) + h, 1e-12)
        h = ln(
            b + "output.LayerNorm",
            lin(b + "output.dense", F.gelu(lin(b + "intermediate.dense", h))) + h,
            1e-12,
        )
    expected = (layers(h[:, 0])[:, 0].detach() - 0.16717362830052426) / 1.0333394966054072

    options = dict(weights=tmp_path / "ImageReward.pt", tokenizer=tmp_path / "bert")
    torch.testing.assert_close(score("imagereward", images, **options), expected, atol=2e-5, rtol=1e-4)
    for drop in (
        v + "blocks.1.norm2.weight",
        t + "encoder.layer.0.crossattention.self.key.bias",
        "mlp.layers.0.weight",
        v + "cls_token",
    ):
        torch.save({k: value for k, value in state.items() if k != drop}, tmp_path / f"{drop}.pt")
        with pytest.raises(rewards.RewardError, match="does not fit"):
            score("imagereward", images, weights=tmp_path / f"{drop}.pt", tokenizer=tmp_path / "bert")


def test_blipvqa(images, tmp_path, monkeypatch):
    """The product over phrases of yes / (yes + no), one question at a time through the class's own parts; phrases from the row or from spaCy."""
    from transformers import BlipConfig, BlipForQuestionAnswering

    tokenizer = bert_tokenizer(tmp_path)
    torch.manual_seed(4)
    size = len(tokenizer) + 2
    BlipForQuestionAnswering(
        BlipConfig(
            text_config=dict(
                vocab_size=size,
                hidden_size=48,
                encoder_hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=size - 2,
                sep_token_id=3,
                pad_token_id=0,
                max_position_embeddings=64,
                initializer_range=0.5,
            ),
            vision_config=dict(
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
                initializer_range=0.3,
            ),
        )
    ).save_pretrained(tmp_path)
    model = BlipForQuestionAnswering.from_pretrained(tmp_path).eval()
    positions = (
        model.vision_model.embeddings.position_embedding.data
    )  # of 2 x 2 patches and the class: made 3 x 3
    grid = F.interpolate(
        positions[:, 1:].view(1, 2, 2, 48).permute(0, 3, 1, 2), (3, 3), mode="bicubic", align_corners=False
    )
    model.vision_model.embeddings.position_embedding.data = torch.cat(
        [positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1
    )
    long = " ".join(["abc"] * 51)
    asked = {
        "a red fox": "a red fox?",
        "two cats": "two cats?",
        'a "Very" (long) list: of other animals.': "a very long list of other animals?",
        long: long[:-4],
    }  # 50 words, so without the question mark
    rows = [
        {"phrases": ["a red fox", long]},
        {"phrases": ["two cats", 'a "Very" (long) list: of other animals.']},
    ]
    expected = []
    for image, row in zip(pixels(images, 48), rows):
        product = 1.0
        for phrase in row["phrases"]:
            ids = tokenizer(asked[phrase], return_tensors="pt", truncation=True, max_length=35).input_ids
            ids[0, 0] = size - 1
            with torch.no_grad():
                seen = model.vision_model(image[None]).last_hidden_state
                states = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
                logits = model.text_decoder(torch.tensor([[size - 2]]), encoder_hidden_states=states).logits[
                    0, 0
                ]
            yes, no = logits[[5, 6]].exp().tolist()
            product *= yes / (yes + no)
        expected.append(product)
    assert score("blipvqa", images, metadata=rows, model=tmp_path, size=48).tolist() == pytest.approx(
        expected, abs=1e-5
    )
    assert max(expected) < 1 and abs(expected[0] - 0.5) > 0.01
    chunks = {prompt: row["phrases"] for prompt, row in zip(PROMPTS, rows)}
    where = "top", "the side", "the left", "the right"  # left out, officially, so spelt

    def nlp(text):
        return types.SimpleNamespace(
            noun_chunks=[types.SimpleNamespace(text=c) for c in [*where, *chunks[text]]]
        )

    monkeypatch.setattr(rewards, "load_spacy", lambda: nlp)
    assert score("blipvqa", images, model=tmp_path, size=48).tolist() == pytest.approx(expected, abs=1e-5)
    chunks["p"] = ["The left", "Top"]
    assert rewards.noun_phrases({"prompt": "p"}) == ["The left", "Top"]
    with pytest.raises(SystemExit, match="--prompts t: blipvqa finds no noun phrase in 'p57'"):
        rewards.check_rewards(
            rewards.parse_rewards(["blipvqa"]),
            {"t": [{"prompt": PROMPTS[0]}, {"prompt": "p57", "phrases": []}]},
            32,
        )


def test_models_that_cannot_be_had(images, tmp_path):
    with pytest.raises(rewards.RewardError, match="clipscore: .*nothing could not be loaded"):
        score("clipscore", images, model=tmp_path / "nothing")
    with pytest.raises(rewards.Unavailable, match="missing.pth: no local file, nor to be had from the hub"):
        rewards.load_state("missing.pth")
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(rewards.RewardError, match="evil.pth: not a checkpoint of tensors"):
        rewards.load_state(str(tmp_path / "evil.pth"))


@pytest.mark.parametrize(
    "specs, options, message",
    [
        (["clipscore=0"], [], "a positive number"),
        (["clipscore=fast"], [], "expected NAME"),
        (["clipscore", "clipscore"], [], "given twice"),
        (["clipscore"], ["clipscore.speed=3"], "clipscore has model"),
        (["clipscore"], ["pickscore.model=x"], "not among --reward"),
        (["clipscore"], ["model"], "expected NAME.KEY"),
        (["deqa=http://x"], ["deqa.timeout=soon"], "could not convert"),
        (["jpeg"], ["jpeg.x=1"], "jpeg has no options"),
        (["jpeg=ftp://x"], [], "expected NAME"),
        (["jpeg=openai+http://x"], [], "openai[+] is for deqa"),
        (["qwenvl=openai+http://x"], ["qwenvl.pattern=("], "pattern=[(]"),
        (["smile"], [], "no such reward"),
        (["qwenvl=openai+http://x"], ["qwenvl.prompt=@/nowhere"], "No such file"),
        (["deqa=http://x"], ["deqa.retries=-1"], "at least 0"),
        (["qwenvl=openai+http://x"], ["qwenvl.pattern=(a)(b)"], "one group"),
        (["a=http://h:99999/x"], [], "Port out of range"),
        (["a=http://[::1/x"], [], "Invalid IPv6"),
        (["qwenvl=openai+http://x"], ["qwenvl.max_tokens=-1"], "at least 0"),
    ],
)
def test_wrong_specs_are_refused(specs, options, message):
    with pytest.raises(SystemExit, match=message):
        rewards.parse_rewards(specs, options)


def test_specs(tmp_path):
    (tmp_path / "p.txt").write_text("Rate {prompt}")
    chosen = rewards.parse_rewards(
        [
            "jpeg@scene=0.25",
            "toy.ocr",
            "deqa=0.2,openai+https://h:1/v1/",
            "mine=http://h/x",
            "geneval=pickle+http://h:1",
        ],
        ["deqa.timeout=3", f"deqa.prompt=@{tmp_path}/p.txt", "mine.retries=0"],
    )
    assert (
        list(chosen) == ["jpeg", "ocr", "deqa", "mine", "geneval"]
        and chosen["jpeg"].weight == 0.25
        and chosen["deqa"].weight == 0.2
    )
    assert chosen["deqa"].function.func is rewards.deqa and chosen["deqa"].function.keywords == {
        "url": "https://h:1/v1",
        "timeout": 3.0,
        "prompt": "Rate {prompt}",
    }
    assert chosen["mine"].function.func is rewards.served and chosen["mine"].function.keywords == {
        "url": "http://h/x",
        "name": "mine",
        "retries": 0,
    }
    assert chosen["geneval"].function.func is rewards.served_pickle
    tasks = ["ocr", "scene", "geneval"]
    assert rewards.rewards_of("scene", chosen, tasks) == ["jpeg", "deqa", "mine"] and rewards.rewards_of(
        "ocr", chosen, tasks
    ) == ["ocr", "deqa", "mine"]
    for tasks_too in (["ocr", "ocr_strict"], ["ocr_strict", "ocr"]):
        two = rewards.parse_rewards(["ocr", "ocr_strict=http://h"])
        assert rewards.rewards_of("ocr", two, tasks_too) == ["ocr"] and rewards.rewards_of(
            "ocr_strict", two, tasks_too
        ) == ["ocr_strict"]
    assert rewards.rewards_of(
        "geneval", rewards.parse_rewards(["geneval", "geneval_strict", "ocr"]), tasks
    ) == ["geneval", "geneval_strict"]


def test_cached_scores_are_of_the_same_weights_servers_and_versions(tmp_path, monkeypatch):
    """A reward's identity, by which cached scores are found: models by content, servers by address, rapidocr by version."""

    def of(spec, *options):
        [reward] = rewards.parse_rewards([spec], options).values()
        return reward.identity

    assert of("deqa=http://a/x") == of("deqa=http://a/x/", "deqa.timeout=9", "deqa.retries=0")
    assert (
        len(
            {
                of(f"deqa={url}")
                for url in ("http://a/x", "http://b/x", "http://a:9/x", "http://a/y", "pickle+http://a/x")
            }
        )
        == 5
    )
    assert of("qwenvl=openai+http://a/v1") != of("qwenvl=openai+http://a/v1", "qwenvl.model=another")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"one")
    before = of("clipscore", f"clipscore.model={tmp_path}/model")
    assert before == of("clipscore", f"clipscore.model={tmp_path}/model") != of("clipscore")
    (tmp_path / "model/weights").write_bytes(b"two")
    assert before != of("clipscore", f"clipscore.model={tmp_path}/model")
    (tmp_path / "a.txt").write_text("Rate {prompt}")
    assert (
        of("qwenvl", f"qwenvl.prompt=@{tmp_path}/a.txt")
        == of("qwenvl", "qwenvl.prompt=Rate {prompt}")
        != of("qwenvl")
    )
    before = of("ocr")
    monkeypatch.setattr(rewards.importlib.metadata, "version", lambda package: "9.9")
    assert before != of("ocr") and "9.9" in of("ocr") and of("jpeg") == "jpeg {}"
