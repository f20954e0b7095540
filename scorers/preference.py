"""Models of taste and of agreement with the prompt: PickScore, CLIPScore, Aesthetic, HPSv2, ImageReward and
BLIP-VQA. All run in float32 on the pictures' device and are loaded once."""

import math
import os
import pickle
import re
import threading

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from flow_sde import first_line
from rewards import Unavailable, need, pil, remembered

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's and BLIP's


def pickscore(images, prompts, metadata=None, model="yuvalkirstain/PickScore_v1", tokenizer=CLIP_H):
    """What people pick (arXiv 2305.01569). exp(logit scale) cos / 26, about 0.7 to 0.9; papers print it times
    26. No licence was seen on its page; its tokenizer is laion's CLIP ViT-H (MIT). Needs 4 GB."""
    return clip_logits(images, prompts, model, tokenizer) / 26


def clipscore(images, prompts, metadata=None, model=CLIP_L):
    """Agreement of picture and text (arXiv 2104.08718). exp(logit scale) cos / 30, about 100 cos / 30: 0.5 to
    1.1. OpenAI's CLIP ViT-L (MIT), pixels resized bicubically as CLIP asks; Flow-GRPO resizes bilinearly.
    Needs 1.7 GB."""
    return clip_logits(images, prompts, model, model) / 30


def clip_logits(images, prompts, model, tokenizer):
    """exp(logit scale) cos of picture and prompt. -> (B,)"""
    clip, tokenizer = load_clip(model, tokenizer, images.device)
    return clip.logit_scale.exp() * clip_cosine(clip, tokenizer, clip_pixels(clip, images), prompts)


def load_clip(model, tokenizer, device):
    return load("CLIPModel", model, device), load("AutoTokenizer", tokenizer)


@remembered
def load(kind, name, device=None):
    """A transformers class from a folder or hub id; a network is frozen, and on the device."""
    import transformers

    try:
        loaded = getattr(transformers, kind).from_pretrained(name)
    except Exception as error:  # a broken file can raise anything
        raise Unavailable(f"{name} could not be loaded ({first_line(error)})") from error
    if device is None:
        return loaded
    return loaded.eval().requires_grad_(False).to(device, torch.float32)


def clip_cosine(clip, tokenizer, pixels, prompts):
    """The cosine of picture and prompt in CLIP's space. -> (B,)"""
    texts = tokens(tokenizer, prompts, pixels.device, clip.config.text_config.max_position_embeddings)
    out = clip(pixel_values=pixels, **texts)
    return F.cosine_similarity(out.image_embeds, out.text_embeds)


_tokenizing = threading.Lock()


def tokens(tokenizer, texts, device, length=77, padding=True):
    """Token ids and mask of texts, padded to the longest and cut to `length`."""
    with _tokenizing:  # rewards share tokenizers, and those refuse two threads at once
        batch = tokenizer(texts, truncation=True, max_length=length, return_tensors="pt", padding=padding)
    return {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}


def clip_pixels(clip, images):
    """Pictures as this CLIP sees them."""
    return resized(pil(images), clip.config.vision_config.image_size).to(images.device)


def resized(pictures, size, crop=True):
    """PIL pictures -> (B, 3, size, size), CLIP's pixels, resized bicubically by PIL as the models' authors
    did: the shorter side becomes `size` and the middle is cut out; without `crop`, both sides."""
    out = []
    for picture in pictures:
        scale = size / min(picture.size)
        sides = [max(size, int(side * scale)) for side in picture.size] if crop else (size, size)
        left, top = (round((side - size) / 2) for side in sides)
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
        out.append(torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255)
    return normalize(torch.stack(out), MEAN, STD)


def normalize(pixels, mean, std):
    """(..., 3, H, W): each colour less its mean, over its spread."""
    mean, std = (torch.tensor(numbers, device=pixels.device)[:, None, None] for numbers in (mean, std))
    return (pixels - mean) / std


LAION_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"


def aesthetic(images, prompts=None, metadata=None, model=CLIP_L, head=LAION_HEAD):
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE, Apache-2.0): five linear layers on the
    normalised CLIP ViT-L (MIT) embedding of the picture. About 1 to 10. Needs 1.7 GB."""
    clip, _ = load_clip(model, model, images.device)
    seen = clip.get_image_features(pixel_values=clip_pixels(clip, images)).pooler_output
    return load_head(head, "layers.", seen.shape[1], images.device)(F.normalize(seen, dim=-1))[:, 0]


@remembered
def load_head(file, prefix, width, device):
    """The head of the aesthetic predictor and of ImageReward: (B, width) -> (B, 1)."""
    from torch.nn import Dropout, Linear, Sequential

    layers = [Linear(width, 1024), Dropout(), Linear(1024, 128), Dropout(), Linear(128, 64), Dropout()]
    layers += [Linear(64, 16), Linear(16, 1)]
    state = {k.removeprefix(prefix): v for k, v in load_state(file).items() if k.startswith(prefix)}
    return fill(Sequential(*layers), state, file, device)


def load_state(file):
    """The tensors of a checkpoint, a local file or OWNER/REPOSITORY/FILE of the hub; no code is read. In
    float32, but those of a .safetensors as they are stored."""
    if not os.path.exists(file):
        from huggingface_hub import hf_hub_download

        try:
            owner, repository, path = file.split("/", 2)
            file = hf_hub_download(f"{owner}/{repository}", path)
        except Exception as error:
            reason = f"no local file, nor to be had from the hub ({type(error).__name__})"
            raise Unavailable(f"{file}: {reason}") from error
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise Unavailable(f"{file}: not a checkpoint of tensors ({type(error).__name__})") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise Unavailable(f"{file}: a {type(state).__name__}, not tensors by their names")
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def fill(model, state, file, device):
    """A state dict into a model; one with a key too few, too many or of another shape is refused."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise Unavailable(f"{file} does not fit: {' '.join(str(error).split()[:40])} ...") from error
    return model.eval().requires_grad_(False).to(device)


def renamed(key, table):
    """A tensor's name after {pattern: replacement}, one after the other."""
    for pattern, replacement in table.items():
        key = re.sub(pattern, replacement, key)
    return key


def hpsv2(images, prompts, metadata=None, weights="xswu/HPSv2/HPS_v2.1_compressed.pt", base=CLIP_H):
    """Human Preference Score v2.1 (arXiv 2306.09341, Apache-2.0). cos, about 0.2 to 0.35, of a fine-tuned
    CLIP ViT-H, converted from open_clip's layout to transformers' class; sizes and tokenizer are `base`'s
    (MIT). Pixels as its authors' with torchvision 0.17 or later, which antialiases. Needs 4 GB."""
    clip, tokenizer = load_hpsv2(weights, base, images.device)
    return clip_cosine(clip, tokenizer, padded(images, clip.config.vision_config.image_size), prompts)


def padded(images, size):
    """(B, 3, H, W) -> (B, 3, size, size), CLIP's pixels as HPSv2's authors make them: 8 bits, then the longer
    side resized as a tensor (bicubic, antialiased, not clamped), then black around it."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    pixels = (images.float() * 255).round() / 255
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return normalize(F.pad(pixels, (left, size - width - left, top, size - height - top)), MEAN, STD)


@remembered
def load_hpsv2(weights, base, device):
    from transformers import CLIPModel

    clip = CLIPModel(load("CLIPConfig", base))
    return fill(clip, from_open_clip(load_state(weights)), weights, device), load("AutoTokenizer", base)


OPEN_CLIP = {  # open_clip's names -> transformers'
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(?=transformer|token_emb|positional_emb|ln_final)": "text_model.",
    r"\.transformer\.resblocks\.": ".encoder.layers.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
    r"\.conv1\.": ".embeddings.patch_embedding.",
    r"\.class_embedding$": ".embeddings.class_embedding",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight",
    r"\.token_embedding\.": ".embeddings.token_embedding.",
    r"\.ln_pre\.": ".pre_layrnorm.",
    r"\.ln_post\.": ".post_layernorm.",
    r"\.ln_final\.": ".final_layer_norm.",
}


def from_open_clip(state):
    """An open_clip ViT's state dict -> transformers' CLIPModel's: q, k, v apart, other names and layouts."""
    out = {}
    for key, value in state.items():
        name = renamed(key, OPEN_CLIP)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3)):
                out[name.replace("in_proj_", f"{letter}_proj.")] = part
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out[name] = value.T
        elif name != "attn_mask":
            out[name] = value
    return out


IMAGEREWARD, BERT = "THUDM/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased"


def imagereward(images, prompts, metadata=None, weights=IMAGEREWARD, tokenizer=BERT):
    """ImageReward (arXiv 2304.05977, Apache-2.0). (five linear layers on BLIP's joint embedding - 0.1672) /
    1.0333, unbounded, about -2 to 2. A BLIP ViT-L converted to transformers' classes; BERT's tokenizer
    (Apache-2.0). Needs 1.8 GB."""
    vision, text, head, tokenizer = load_imagereward(weights, tokenizer, images.device)
    pixels = resized(pil(images), vision.config.image_size).to(images.device)
    seen = vision(pixel_values=pixels).last_hidden_state
    asked = tokens(tokenizer, prompts, images.device, 35, padding="max_length")
    asked |= {"encoder_hidden_states": seen, "encoder_attention_mask": torch.ones_like(seen[..., 0])}
    joint = text(**asked, is_decoder=False).last_hidden_state[:, 0]
    return (head(joint)[:, 0] - 0.16717362830052426) / 1.0333394966054072


TIMM = {  # timm's names of a vision transformer -> transformers'
    "^cls_token": "embeddings.class_embedding",
    "^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


@remembered
def load_imagereward(weights, tokenizer, device):
    """ImageReward.pt holds a BLIP whose vision tower has timm's names, and `mlp`; the sizes are read off the
    tensors, 64 to a head."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    tower, text = {}, {}
    for key, value in load_state(weights).items():
        side, _, name = key.removeprefix("blip.").partition(".")
        if side == "text_encoder" and "position_ids" not in name:
            text[name] = value
        if side == "visual_encoder":
            tower[renamed(name, TIMM)] = value

    def layers(state, prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    try:
        width, _, _, patch = tower["embeddings.patch_embedding.weight"].shape
        positions = tower["embeddings.position_embedding"].shape[1]
        words, depth = text["embeddings.word_embeddings.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(tower["encoder.layers.0.mlp.fc1.weight"]),
            num_attention_heads=max(1, width // 64),
            num_hidden_layers=layers(tower, "encoder.layers."),
            image_size=patch * math.isqrt(positions - 1),
            patch_size=patch,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
        text_config = BlipTextConfig(
            hidden_size=depth,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_attention_heads=max(1, depth // 64),
            num_hidden_layers=layers(text, "encoder.layer."),
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            vocab_size=words,
            encoder_hidden_size=width,
        )
        vision, bert = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    except (KeyError, ValueError) as error:
        raise Unavailable(f"{weights} does not fit: {error}") from error
    vision, bert = fill(vision, tower, weights, device), fill(bert, text, weights, device)
    return vision, bert, load_head(weights, "mlp.layers.", depth, device), load("AutoTokenizer", tokenizer)


def blipvqa(images, prompts, metadata=None, model="Salesforce/blip-vqa-capfilt-large", size=480, length=35):
    """T2I-CompBench's BLIP-VQA (arXiv 2307.06350), for colour, shape and texture: the product, over the
    prompt's noun phrases (at most 8), of P(yes) / (P(yes) + P(no)) when asked "PHRASE?"; in [0, 1]. BLIP
    (BSD-3), at the official 480 pixels; the hub's copy of it keeps position embeddings for 384, so they are
    interpolated twice where the official ones are not at all. The phrases are the row's "phrases", or spaCy's
    as in the official scorer: needs spacy and its en_core_web_sm for that, and 1.5 GB."""
    blip = load("BlipForQuestionAnswering", model, images.device)
    tokenizer = load("AutoTokenizer", model)
    config = blip.config.text_config
    yes_no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    start = torch.full((1, 1), config.bos_token_id, device=images.device)
    pixels = resized(pil(images), size, crop=False).to(images.device)
    scores = []
    for picture, prompt, row in zip(pixels, prompts, metadata or [{}] * len(prompts)):
        seen = blip.vision_model(pixel_values=picture[None], interpolate_pos_encoding=True)[0]
        score = torch.ones((), device=images.device)
        for phrase in noun_phrases(row | {"prompt": prompt})[:8]:  # one by one: the decoder ignores a mask
            words = re.sub(r'[.!"()*#:;~]', "", f"{phrase}?".lower()).split(" ")[:50]
            question = tokens(tokenizer, [" ".join(words)], images.device, length)["input_ids"]
            question[:, 0] = config.bos_token_id + 1  # BLIP's [ENC]
            asked = blip.text_encoder(question, encoder_hidden_states=seen, return_dict=False)[0]
            logits = blip.text_decoder(start, encoder_hidden_states=asked).logits[0, 0, yes_no]
            score = score * logits.softmax(-1)[0]
        scores.append(score)
    return torch.stack(scores)


def noun_phrases(row, **_):
    """What a prompt's BLIP-VQA questions are about: its row's "phrases", or spaCy's noun chunks but for those
    that only say where. A prompt without any is refused (the official scorer gives it 1)."""
    phrases = row.get("phrases")
    if phrases is None:
        phrases = [chunk.text for chunk in load_spacy()(row["prompt"]).noun_chunks]
        phrases = [phrase for phrase in phrases if phrase not in ("top", "the side", "the left", "the right")]
    are_texts = isinstance(phrases, list) and all(isinstance(p, str) and p.strip() for p in phrases)
    if not phrases or not are_texts:
        raise ValueError(f"blipvqa finds no noun phrase in {row['prompt']!r}")
    return phrases


blipvqa.check, blipvqa.package = noun_phrases, "en_core_web_sm"


@remembered
def load_spacy():
    need("spacy")
    import spacy

    try:
        return spacy.load("en_core_web_sm")
    except OSError as error:
        raise Unavailable("python -m spacy download en_core_web_sm") from error
