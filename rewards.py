"""Every reward and metric by name. Each is a function (images, prompts, metadata) -> (B,) float32, higher is
better: images (B, 3, H, W) float in [0, 1], prompts B strings, metadata B dicts (rows of the prompt files).

To add one, write such a function here or in a mine.py beside this file, and ask for --reward mine.smile:

    def smile(images, prompts, metadata, model="someone/smiles"):
        \"\"\"The share of people who smile; in [0, 1]. Needs 1 GB.\"\"\"
        return torch.tensor([...])

What follows `metadata` are its options, each with a default. A picture it cannot score gets NaN; when a
package, a model or a server is missing, it raises Unavailable.

    python rewards.py                     # list the rewards, yours too: formula, range, model, licence, needs
    python rewards.py NAME PICTURE PROMPT [KEY=VALUE ...] # one score; PROMPT may be a JSON row, as GenEval's

In the scripts, `--reward` takes NAME[@TASK][=WEIGHT][,URL] ..., and --reward-option a reward's options:

    geneval=0.8 qwenvl=0.2,openai+http://localhost:8000/v1 # weights; a judge at an OpenAI-compatible endpoint
    taste=http://localhost:9000             # a server of your own: `served` says what it gets and answers
    deqa=pickle+http://localhost:18086      # Flow-GRPO's reward servers
    toy.ocr mine.smile                      # the function `ocr` of toy/, `smile` of mine.py
    --reward-option mine.smile.model=DIR qwenvl.timeout=30 qwenvl.prompt=@prompt.txt

Rewards and tasks meet by name: a reward called like a task (`ocr`, `toy.ocr`, `ocr_strict` for the task
`ocr`) or tied to one (`pickscore@drawbench`) scores that task's prompts only; any other scores all prompts.
"""

import ast
import asyncio
import base64
import contextlib
import email.utils
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import re
import sys
import threading
import time
import typing
import unicodedata
import urllib.parse
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from flow_sde import HERE, check, die, fingerprint, first_line, generators, listing, reduce_sum


class RewardError(Exception):
    """A score could not be had, and why. It never counts as 0: training stops, a table calls it missing."""


class Unavailable(RewardError):
    """A server, a model or a package is not there: the next picture would fare no better."""


class NoAnswer(RewardError):
    """A judge answered, but not with a score that can be read."""


# -- 1. Pictures, and the simplest reward --------------------------------------------------------------------


def jpeg(images, prompts=None, metadata=None):
    """JPEG compressibility (DDPO, arXiv 2305.13301). -kB / 500 at quality 95; below 0. Needs nothing."""
    sizes = [len(encoded(picture, "JPEG", quality=95)) for picture in pil(images)]
    return -torch.tensor(sizes, dtype=torch.float32) / 1000 / 500


def pil(images):
    """(B, 3, H, W) in [0, 1] -> B PIL pictures."""
    pixels = images.float().mul(255).round_().byte().movedim(1, -1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def encoded(picture, kind="PNG", **options):
    """A PIL picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def read_picture(file):
    """A picture file -> (3, H, W) in [0, 1]: turned as its EXIF data say, transparency over white, 16 bits
    scaled to 8. Raises RewardError where it cannot be read."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them at 255
                picture = Image.fromarray((np.array(picture) / 257).round().clip(0, 255).astype(np.uint8))
            if picture.mode == "F":
                raise ValueError("floating-point pixels, whose range is not known")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # a broken file can raise anything
        raise RewardError(f"{file}: not a picture that can be read ({first_line(error)})") from error
    return torch.from_numpy(pixels).movedim(-1, 0).float().div_(255)


def need(*packages):
    """Refuse to go on without these packages."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f"pip install {' '.join(missing)}")


# -- 2. Can the text be read? --------------------------------------------------------------------------------


def ocr(images, prompts, metadata=None, language=""):
    """Text rendering. 1 - min(edit distance, n) / n between the text read and the prompt's quoted text of n
    letters, case, spaces and the typography of quotes, dashes and accents ignored, a substring is perfect; in
    [0, 1]. The first text in straight double quotes counts, without one the first in other quotes. Needs
    rapidocr and onnxruntime (PP-OCR's models, Apache-2.0, come with it, for Latin, Greek, Chinese and
    Japanese); `language` names another of its recognisers, which it downloads: arabic, cyrillic, devanagari,
    korean, ta, te or th."""
    engine = load_ocr(language)

    def read(picture):
        found = engine(np.array(picture))
        if found.boxes is None:
            return ""
        return "".join(found.txts[i] for i in reading_order(np.array(found.boxes)))

    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(cores) as pool:
        texts = list(pool.map(read, pil(images)))
    return torch.tensor(list(map(text_score, texts, prompts)), dtype=torch.float32)


@functools.cache
def load_ocr(language=""):
    """The OCR engine: detection and recognition, for upright text, one thread a picture."""
    need("rapidocr", "onnxruntime")
    from rapidocr import LangRec, ModelType, OCRVersion, RapidOCR

    params = {"Global.use_cls": False, "Global.log_level": "error"}
    params["EngineConfig.onnxruntime.intra_op_num_threads"] = 1
    try:
        if language:
            params["Rec.lang_type"] = LangRec(language)
            params["Rec.ocr_version"] = OCRVersion.PPOCRV5
            params["Rec.model_type"] = ModelType.MOBILE
        engine = RapidOCR(params=params)
        engine.recognize_txt([np.zeros((48, 320, 3), np.uint8)])  # its models are loaded only now
    except Exception as error:  # no such language, or no way to download its model
        wanted = f"RapidOCR for {language}" if language else "RapidOCR"
        raise Unavailable(f"{wanted} could not be loaded ({first_line(error)})") from error
    return engine


def reading_order(boxes):
    """The order in which people read the pieces of a text: from the top line to the lowest, each from the
    left. boxes: (N, 4, 2), corners clockwise from the top left, seen in a frame that is turned by their
    median slope. A piece is on a line if it overlaps the piece next to it by half the height of the smaller
    one. -> N numbers"""
    along = boxes[:, 1] - boxes[:, 0] + boxes[:, 2] - boxes[:, 3]
    down = boxes[:, 3] - boxes[:, 0] + boxes[:, 2] - boxes[:, 1]
    slope = np.median(np.arctan2(along[:, 1], along[:, 0]))
    middles, heights = boxes.mean(1), np.linalg.norm(down, axis=1) / 2
    x = middles[:, 0] * np.cos(slope) + middles[:, 1] * np.sin(slope)
    y = middles[:, 1] * np.cos(slope) - middles[:, 0] * np.sin(slope)
    lines = []
    for i in y.argsort(kind="stable"):
        for line in lines:
            next_to = line[np.abs(x[line] - x[i]).argmin()]
            overlap = (heights[i] + heights[next_to]) / 2 - abs(y[i] - y[next_to])
            if overlap >= min(heights[i], heights[next_to]) / 2:
                line.append(i)
                break
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=x.__getitem__)]


QUOTES = '"([^"]*)"', "“([^”]*)”", "„([^“”]*)[“”]", "«([^»]*)»", "「([^」]*)」"
TYPEWRITER = {"'": "‘’‚‛′`´", '"': "“”„‟″«»", "-": "‐‑‒–—―−", "/": "⁄"}
PLAIN = {ord(sign): plain for plain, signs in TYPEWRITER.items() for sign in signs}


def quoted_text(prompt):
    """The text that a prompt asks for: the first in straight quotes (Flow-GRPO's rule), or else in others."""
    for pair in QUOTES:
        found = re.search(pair, prompt)
        if found and found[1].strip():
            return found[1]
    raise ValueError(f"an ocr prompt needs its text in double quotes: {prompt!r}")


def plain_text(text):
    """A text without spaces and case, its accents composed, its punctuation as on a typewriter."""
    text = unicodedata.normalize("NFKC", text.translate(PLAIN))
    return re.sub(r"\s", "", text).translate(PLAIN).lower()


def text_score(read, prompt):
    """How well the text read off a picture matches its prompt: ocr's formula."""
    target, read = plain_text(quoted_text(prompt)), plain_text(read)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a, b):
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def check_ocr(row, language=""):
    """Refuse a prompt whose text the recogniser could never write, however well it is drawn."""
    for letter in plain_text(quoted_text(row["prompt"])):
        if letter.isalpha() and letter.casefold() not in letters(language):
            raise ValueError(
                f"ocr cannot read the {letter!r} of {row['prompt']!r}; with --reward-option "
                "ocr.language=cyrillic it may, or arabic, devanagari, korean, ta, te, th"
            )


@functools.cache
def letters(language):
    """What the recogniser can write."""
    known = "".join(load_ocr(language).text_rec.postprocess_op.character)
    return {letter.casefold() for letter in plain_text(known)}


# -- 3. CLIP and its kin: all in float32, on the pictures' device, loaded once -------------------------------

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's and BLIP's
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


@functools.cache
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


@functools.cache
def load_head(file, prefix, width, device):
    """The head of the aesthetic predictor and of ImageReward: (B, width) -> (B, 1)."""
    from torch.nn import Dropout, Linear, Sequential

    layers = [Linear(width, 1024), Dropout(), Linear(1024, 128), Dropout(), Linear(128, 64), Dropout()]
    layers += [Linear(64, 16), Linear(16, 1)]
    state = {k.removeprefix(prefix): v for k, v in load_state(file).items() if k.startswith(prefix)}
    return fill(Sequential(*layers), state, file, device)


def load_state(file):
    """The tensors of a checkpoint, a local file or OWNER/REPOSITORY/FILE of the hub; no code is read."""
    if not os.path.exists(file):
        from huggingface_hub import hf_hub_download

        try:
            owner, repository, path = file.split("/", 2)
            file = hf_hub_download(f"{owner}/{repository}", path)
        except Exception as error:
            reason = f"no local file, nor to be had from the hub ({type(error).__name__})"
            raise Unavailable(f"{file}: {reason}") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
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
        model.load_state_dict(state)
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


@functools.cache
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


@functools.cache
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


@functools.cache
def load_spacy():
    need("spacy")
    import spacy

    try:
        return spacy.load("en_core_web_sm")
    except OSError as error:
        raise Unavailable("python -m spacy download en_core_web_sm") from error


# -- 4. GenEval (arXiv 2310.11513): a detector finds the objects, CLIP their colours, and rules judge --------

# COCO's classes in COCO's order, with GenEval's names
OBJECTS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
OBJECTS = OBJECTS.replace("\n", " ").split(", ")
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
RELATIONS = "left of", "right of", "above", "below"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"


def geneval(images, prompts, metadata, detector=DETECTOR, clip=CLIP_L):
    """GenEval with partial credit, the training reward; in [0, 1]: `geneval_credit`. Mask2Former Swin-S from
    transformers (code MIT, weights "other"), not the official evaluator's mmdetection weights, so not its
    exact numbers; CLIP ViT-L (MIT). Needs scipy, 2 GB, and the metadata of GenEval's *_metadata.jsonl. The
    paper's GenEval column is most likely this one."""
    return torch.tensor([credit for _, credit in geneval_verdicts(images, metadata, detector, clip)])


def geneval_strict(images, prompts, metadata, detector=DETECTOR, clip=CLIP_L):
    """GenEval as its authors score it: 1 if everything asked for is there, else 0: `geneval_correct`. Models
    and needs as `geneval`."""
    return torch.tensor([float(right) for right, _ in geneval_verdicts(images, metadata, detector, clip)])


class Object(typing.NamedTuple):
    score: float
    box: tuple  # x1, y1, x2, y2 in pixels
    mask: object  # (H, W) bool


_verdicts, _verdicts_lock = {}, threading.Lock()


def geneval_verdicts(images, metadata, detector=DETECTOR, clip=CLIP_L):
    """[(correct, credit)] of a batch. The last one is remembered, so that both scores cost one detection."""
    key = hashlib.sha256(images.cpu().numpy().tobytes()).digest(), json.dumps(metadata), detector, clip
    with _verdicts_lock:
        if key not in _verdicts:
            load_clip(clip, clip, images.device)  # a missing one shows now, not with the first colour
            verdicts = []
            for picture, objects, row in zip(pil(images), detect(images, detector), metadata):
                found = confident(objects, row["tag"])
                colors = functools.partial(object_colors, picture, clip=clip, device=images.device)
                correct, _ = geneval_correct(found, colors, row)
                verdicts.append((correct, geneval_credit(found, colors, row)))
            _verdicts.clear()
            _verdicts[key] = verdicts
        return _verdicts[key]


def check_geneval(row, **_):
    """Refuse a prompt's row that is not GenEval's metadata: {"tag", "include": [{"class", "count", "color"?,
    "position"?}], "exclude"?}."""
    include, exclude = row.get("include"), row.get("exclude", [])
    has_lists = isinstance(include, list) and isinstance(exclude, list) and include
    if not has_lists or not isinstance(row.get("tag"), str):
        needs = 'a geneval prompt needs the "tag" and "include" of GenEval\'s metadata files'
        raise ValueError(f"{needs}: {row.get('prompt')!r}")
    for number, thing in enumerate(include + exclude):
        if not can_be_sought(thing, number):
            raise ValueError(f"not something geneval can look for (class, count, color, position): {thing}")


def can_be_sought(thing, number):
    """Whether the thing of this number in a row is one of GenEval's: {"class", "count", "color"?,
    "position"?: [relation, number of an earlier thing]}."""
    if not isinstance(thing, dict) or thing.get("class") not in OBJECTS:
        return False
    if type(thing.get("count")) is not int or thing["count"] < 1 or thing.get("color", "red") not in COLORS:
        return False
    position = thing.get("position")
    if position is None:
        return True
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and type(target) is int and 0 <= target < number


@torch.no_grad()
def detect(images, detector=DETECTOR):
    """The objects in pictures (B, 3, H, W): for each {class: [Object, ...]}, most certain first, with scores
    above 0.3. Computed as mmdetection's Mask2Former head does: the 100 best (query, class) pairs; masks
    enlarged to the padded input, cropped, resized; score = class probability x mean mask probability inside
    the mask. (transformers' own post-processing makes one overlapping map of 384 x 384.)"""
    network = load_detector(detector, images.device)
    resize = functools.partial(F.interpolate, mode="bilinear")
    height, width = images.shape[-2:]
    scale = min(800 / min(height, width), 1333 / max(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    pictures = []
    for image in images.float():
        x = normalize(resize(image[None], (h, w)), IMAGENET_MEAN, IMAGENET_STD)
        x = F.pad(x, (0, -w % 32, 0, -h % 32))
        out = network(pixel_values=x)
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]  # the last class is "nothing"
        scores, best = classes.flatten().topk(min(100, classes.numel()))
        best, scores = best[scores > 0.3], scores[scores > 0.3]  # masks can only lower a score
        objects = {}
        pictures.append(objects)
        if not len(best):
            continue
        masks = resize(out.masks_queries_logits[:, best // len(OBJECTS)], x.shape[-2:])[..., :h, :w]
        logits = resize(masks, (height, width))[0]
        masks = logits > 0  # (N, H, W)
        scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        for i in scores.argsort(descending=True).tolist():
            if scores[i] > 0.3:
                rows, columns = masks[i].any(1).nonzero(), masks[i].any(0).nonzero()
                box = columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1
                found = Object(scores[i].item(), box, masks[i].cpu().numpy())
                objects.setdefault(OBJECTS[best[i] % len(OBJECTS)], []).append(found)
    return pictures


def load_detector(detector, device):
    need("scipy")  # transformers' class refuses to be made without it
    network = load("Mask2FormerForUniversalSegmentation", detector, device)
    if network.config.num_labels != len(OBJECTS):
        raise Unavailable(f"{detector} knows {network.config.num_labels} classes, not COCO's 80")
    return network


def confident(objects, tag):
    """The detections GenEval looks at: above 0.3 (0.9 when counting), at most 16 a class, most certain
    first."""
    threshold = 0.9 if tag == "counting" else 0.3
    found = {}
    for name, group in objects.items():
        sure = sorted((o for o in group if o.score > threshold), key=lambda o: -o.score)[:16]
        if sure:
            found[name] = sure
    return found


@torch.no_grad()
def object_colors(picture, objects, name, clip, device):
    """The colour of each object, by zero-shot CLIP on the picture's crop with everything but the object
    grey."""
    grey = Image.new("RGB", picture.size, "#999")
    crops = [Image.composite(picture, grey, Image.fromarray(o.mask)).crop(o.box) for o in objects]
    model, _ = load_clip(clip, clip, device)
    pixels = resized(crops, model.config.vision_config.image_size).to(device)
    seen = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    return [COLORS[i] for i in (seen @ color_words(clip, name, device).T).argmax(1).tolist()]


@functools.cache
def color_words(clip, name, device):
    """CLIP's embeddings of the ten colours of a thing, each the mean of three phrases. -> (10, D)"""
    model, tokenizer = load_clip(clip, clip, device)
    texts = []
    for color in COLORS:
        for words in (f"{color} {name}", f"{color}-colored {name}", f"{color} object"):
            texts.append(f"a photo of a {words}")
    texts = tokens(tokenizer, texts, device, model.config.text_config.max_position_embeddings)
    words = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
    return F.normalize(words.view(len(COLORS), 3, -1).mean(1), dim=-1)


def geneval_correct(found, colors, row):
    """The official verdict, (correct, reason). For every thing to include: enough of them, of which the most
    certain `count` all have the colour and the position asked for; too many is wrong only where `exclude`
    says so. found: {class: [Object]}, colors: (objects, class) -> [color]."""
    reasons, groups = [], []
    for r in row["include"]:
        group, reason = found.get(r["class"], [])[: r["count"]], None
        if len(group) < r["count"]:
            reason = f"{len(group)} of {r['count']}"
        elif "color" in r:
            shown = colors(group, r["class"])
            if shown != [r["color"]] * r["count"]:
                reason = f"{', '.join(shown)}, not {r['color']}"
        if not reason and "position" in r:
            reason = misplaced(group, r["position"], groups)
        groups.append(None if reason else group)
        if reason:
            reasons.append(f"{r['class']}: {reason}")
    for r in row.get("exclude", []):
        if len(found.get(r["class"], [])) >= r["count"]:
            reasons.append(f"{r['class']}: {len(found[r['class']])}, should be fewer than {r['count']}")
    return not reasons, "; ".join(reasons)


def geneval_credit(found, colors, row):
    """Partial credit, the mean of all that is asked: each thing's count, 1 - |asked - found| / asked (not
    below 0); its colour, likewise; its position, 0 or 1. Colour and position get 0 when the count is not
    exact. After Flow-GRPO's reward server, whose counts could go below 0 and which gave a wrong position 0
    and then 1."""
    credits, groups = [], []
    for r in row["include"]:
        group, asked = found.get(r["class"], []), r["count"]
        parts = [max(0.0, 1 - abs(asked - len(group)) / asked)]
        if "color" in r:
            right = colors(group, r["class"]).count(r["color"]) if parts[0] == 1 else 0
            parts.append(max(0.0, 1 - abs(asked - right) / asked))
        if "position" in r:
            parts.append(float(min(parts) == 1 and not misplaced(group, r["position"], groups)))
        groups.append(group if min(parts) == 1 else None)
        credits += parts
    return sum(credits) / len(credits)


def misplaced(group, position, groups):
    """Why a group does not stand where it should, or None: every object must have the relation to every
    object of the target."""
    relation, target = position
    if target >= len(groups) or groups[target] is None:
        return "no target"
    for a in group:
        for b in groups[target]:
            found = relations(a.box, b.box)
            if relation not in found:
                return f"not {relation} the target but {' and '.join(sorted(found)) or 'nowhere'}"


def relations(a, b):
    """Where box a lies of box b: a subset of left of, right of, above, below. An offset within a tenth of the
    two sizes does not count."""
    a, b = np.array(a), np.array(b)
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    sizes = a[2:] - a[:2] + b[2:] - b[:2]
    clear = np.maximum(abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if (abs(clear) < 1e-3).all():
        return set()
    dx, dy = clear / np.linalg.norm(offset)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


# -- 5. Judges: models behind an OpenAI-compatible endpoint (vLLM, SGLang ...) -------------------------------
# --reward NAME=openai+http://HOST:PORT/v1; the environment's REWARD_API_KEY is sent along, if there is one

LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
ASK_LEVEL = (
    "How good is the quality of this picture? Answer with one word: excellent, good, fair, poor or bad."
)
ASK_SCORE = (
    "The picture was made for this caption: {prompt}\nJudge two things: whether it shows everything the "
    "caption says, with the right attributes and relations, and how good it is as a picture: clear, "
    "detailed, free of artefacts, pleasant to look at. Give one score from 1 (worst) to 5 (best)."
)
SCORE = r"""["'*_\s]*[>:=]["'*_\s]*(\d)"""  # what stands between the word `score` and its number
NUMBER = re.compile(r"(\d+(?:[.,]\d+)?)(?:\s*(?:/|out of|of)\s*(\d+))?(?!\d|[.,]\d|\s*[-–]\s*\d)")
AGAIN = "\nAnswer briefly, and in exactly the form that is asked for."
SAID = {}  # {endpoint: why its last answer without a score was none}


def deqa(images, prompts=None, metadata=None, url="", model="", timeout=120.0, retries=3, prompt=ASK_LEVEL):
    """Picture quality (DeQA-Score, arXiv 2501.11561, MIT). sum_l p_l l / 5 over the probabilities of five
    words in the first answered token, l from 5 (excellent) to 1 (bad); in [0.2, 1]; papers print it times 5.
    Needs Flow-GRPO's server, deqa=pickle+http://HOST:PORT, since neither vLLM nor SGLang serves DeQA-Score's
    model, an mPLUG-Owl2; or an endpoint with log-probabilities and another deqa.model, which must give these
    words half of the probability."""
    if not url or not model:
        raise Unavailable(
            "needs Flow-GRPO's server, deqa=pickle+http://HOST:PORT; or another model, "
            "deqa.model, at an endpoint, deqa=openai+http://HOST:PORT/v1"
        )
    limits = dict(max_tokens=1, logprobs=True, top_logprobs=20)
    read = functools.partial(read_level, who=f"{url}: {model}")
    return ask_all(read, images, [prompt] * len(images), url, model, timeout, retries, **limits)


def read_level(answer, who):
    """The expected level of an answer's first token, in [0.2, 1]."""
    try:
        top = answer["logprobs"]["content"][0]["top_logprobs"]
        likely = [(t["token"].strip(" ▁Ġ").lower(), math.exp(float(t["logprob"]))) for t in top]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"{who} gave no log-probabilities of its first token") from error
    mass = {level: sum(p for word, p in likely if word and level.startswith(word)) for level in LEVELS}
    total = sum(mass.values())
    if total < 0.5:
        tokens_seen = listing([repr(word) for word, _ in likely])
        share = f"{', '.join(LEVELS)} together have {total:.0%} of the probability"
        raise NoAnswer(f"{share}; the likeliest tokens are {tokens_seen}")
    return sum(p * LEVELS[level] for level, p in mass.items()) / total / 5


def qwenvl(
    images,
    prompts,
    metadata,
    url="",
    model="Qwen/Qwen3-VL-30B-A3B-Instruct",
    prompt=ASK_SCORE + " Be strict. Think it over, then end with <Score>N</Score>.",
    pattern=r"(?i)score\s*(?:\([^)]*\))?" + SCORE,
    max_tokens=1024,
    max_completion_tokens=0,
    timeout=120.0,
    retries=3,
):
    """A vision-language model as the judge of caption and quality; the model's own licence (Qwen3-VL:
    Apache-2.0). The number where the group of `pattern` begins, the last one, / 5, or as it says (7/10); in
    [0, 1]. Needs an endpoint; max_completion_tokens is for those that do not know max_tokens."""
    limit = {"max_tokens": max_tokens}
    if max_completion_tokens:
        limit = {"max_completion_tokens": max_completion_tokens}
    read = functools.partial(read_score, pattern=pattern)
    texts = [prompt.replace("{prompt}", p) for p in prompts]
    return ask_all(read, images, texts, url, model, timeout, retries, **limit)


def unifiedreward(
    images,
    prompts,
    metadata,
    url="",
    model="CodeGoat24/UnifiedReward-qwen-7b",
    prompt=ASK_SCORE + " Write it after 'Final Score:'.",
    pattern=r"(?i)final score" + SCORE,
    max_tokens=1024,
    max_completion_tokens=0,
    timeout=120.0,
    retries=3,
):
    """UnifiedReward (arXiv 2503.05236, MIT): caption and quality; in [0, 1], read as `qwenvl`. Needs an
    endpoint. The wording the model was trained on stands on its page: unifiedreward.prompt=@FILE, {prompt}
    for the caption."""
    limits = max_tokens, max_completion_tokens
    return qwenvl(images, prompts, metadata, url, model, prompt, pattern, *limits, timeout, retries)


def read_score(answer, pattern):
    """The score of an answer, in [0, 1]; NoAnswer if there is none, or the model was cut off, or thinking."""
    message = answer.get("message")
    said = message.get("content") if isinstance(message, dict) else None
    said = said if isinstance(said, str) else ""
    conclusion = said.rpartition("</think>")[2]
    if answer.get("finish_reason") == "length" or "<think>" in conclusion:
        raise NoAnswer(f"an answer cut off before its end (a larger max_tokens may help): {said[-200:]!r}")
    found = [NUMBER.match(conclusion, m.start(1)) for m in re.finditer(pattern, conclusion)]
    found = [number for number in found if number]
    if not found:
        raise NoAnswer(f"no score where {pattern!r} looks for one, in the answer {said[-200:]!r}")
    score, best = float(found[-1][1].replace(",", ".")), float(found[-1][2] or 5)
    if not 0 <= score <= best:
        raise NoAnswer(f"a score of {score:g}, not within 0 to {best:g}, in the answer {said[-200:]!r}")
    return score / best


def ask_all(read, images, texts, url, model, timeout, retries, **options):
    """read(answer) of one question a picture, sixteen at a time. Where no answer can be read, the question is
    put twice more, with a reminder of the form and a temperature; then the picture has no score. -> (B,), NaN
    for none"""
    if not url:
        raise Unavailable("needs an endpoint: NAME=openai+http://HOST:PORT/v1 (or NAME=WEIGHT,openai+...)")

    def ask(picture, text):
        for temperature in (0, 0.5, 1):
            question = text + AGAIN if temperature else text
            request = options | {"temperature": temperature}
            try:
                return read(chat(url, model, question, picture, timeout, retries, **request))
            except NoAnswer as error:
                SAID[url] = str(error)
        tqdm.write(f"{url}: asked three times, no score: {SAID[url]}", file=sys.stderr)
        return math.nan

    with ThreadPoolExecutor(16) as pool:
        return torch.tensor(list(pool.map(ask, pil(images), texts)), dtype=torch.float32)


def chat(url, model, text, picture, timeout, retries, **options):
    """The first choice of a chat completion about a picture."""
    image = {"url": "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
    request = {"model": model, "messages": [{"role": "user", "content": content}]} | options
    key = os.environ.get("REWARD_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = post_json(url + "/chat/completions", request, timeout, retries, headers)
    try:
        return answer["choices"][0] | {}
    except (KeyError, IndexError, TypeError) as error:
        raise Unavailable(f"{url}: answered {str(answer)[:200]!r}, not a chat completion") from error


# -- 6. Reward servers ---------------------------------------------------------------------------------------


def served(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """A server of your own, --reward NAME=http://HOST:PORT/PATH. It gets {"reward": NAME, "images": [PNG in
    base64, ...], "prompts": [...], "metadata": [...]} as JSON by POST, and answers {"scores": [one number a
    picture]}."""
    pictures = [base64.b64encode(encoded(p)).decode() for p in pil(images)]
    question = {"reward": name, "images": pictures, "prompts": prompts, "metadata": metadata}
    return numbers(post_json(url, question, timeout, retries), "scores", len(images), url)


def served_pickle(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """Flow-GRPO's servers (yifan123/reward-server), --reward NAME=pickle+http://HOST:PORT: pickled JPEGs go,
    a pickle comes, of which plain values alone are read: a reply that names any class or function is refused.
    `geneval` takes its "scores", `geneval_strict` its "rewards" (the official verdicts), any other name
    "outputs"."""
    question = {"images": [encoded(p, "JPEG") for p in pil(images)], "prompts": list(prompts)}
    question |= {"meta_datas": list(metadata), "only_strict": False}
    reply = post(url, pickle.dumps(question), {"Content-Type": "application/octet-stream"}, timeout, retries)
    try:
        answer = PlainUnpickler(io.BytesIO(reply)).load()
    except RewardError as error:
        raise RewardError(f"{url}: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise RewardError(f"{url}: a reply that is no pickle of plain values") from error
    key = {"geneval": "scores", "geneval_strict": "rewards"}.get(name, "outputs")
    return numbers(answer, key, len(images), url)


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. What would import something is refused, so no code can run."""

    def find_class(self, module, name):
        raise RewardError(f"refused a pickle that names {module}.{name}")


def numbers(answer, key, count, url):
    """A server's scores, one finite number a picture. -> (B,)"""
    values = answer.get(key) if isinstance(answer, dict) else None
    fits = isinstance(values, (list, tuple)) and len(values) == count
    if not fits or not all(isinstance(v, (int, float)) and abs(v) < 1e30 for v in values):
        raise RewardError(f"{url}: answered {str(values)[:200]}, not {count} finite numbers")
    return torch.tensor(values, dtype=torch.float32)


LARGEST = 2**26  # bytes of an answer


def post_json(url, data, timeout, retries, headers=None):
    """POST of JSON; the reply's JSON."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    reply = post(url, json.dumps(data).encode(), headers, timeout, retries)
    try:
        return json.loads(reply)
    except ValueError as error:
        raise RewardError(f"{url}: answered {reply[:200]!r}, which is not JSON") from error


def post(url, body, headers, timeout, retries):
    """POST; the reply's bytes. `timeout` seconds bound a whole attempt, however slowly the server drips.
    After a failure that may pass (no connection, no answer in time, 408, 429, 5xx) it waits as long as the
    server asks, or 1, 2, 4, ... seconds, and tries again, `retries` times; then Unavailable."""
    need("httpx2")
    import httpx2

    for attempt in range(retries + 1):
        pause = 2**attempt
        try:
            response, reply = asyncio.run(asyncio.wait_for(post_once(url, body, headers), timeout))
        except asyncio.TimeoutError:
            problem = f"no whole answer in {timeout:g} seconds"
        except (httpx2.HTTPError, OSError) as error:
            problem = str(error) or type(error).__name__
        else:
            if response.is_success:
                return reply
            problem = f"HTTP {response.status_code} {response.reason_phrase}: {message_of(reply)}"
            if response.status_code not in (408, 429) and response.status_code < 500:
                break
            pause = retry_after(response.headers.get("Retry-After"), pause)
        if attempt < retries:
            time.sleep(pause)
    raise Unavailable(f"{url}: {problem} ({attempt + 1} attempt{'s' if attempt else ''})")


async def post_once(url, body, headers):
    """POST; (response, its bytes). Pictures and keys go where the user sent them: no redirect is followed,
    and what is sent to this machine itself passes no proxy."""
    import httpx2

    host = urllib.parse.urlsplit(url).hostname or ""
    here = host in ("localhost", "::1") or host.startswith("127.")
    client = httpx2.AsyncClient(timeout=None, trust_env=not here, verify=certificates())
    reply = b""
    async with client, client.stream("POST", url, content=body, headers=headers) as response:
        try:
            async for part in response.aiter_bytes():
                reply += part
                if len(reply) > LARGEST:
                    raise RewardError(f"{url}: an answer of more than {LARGEST / 2**20:g} MB")
        except httpx2.HTTPError:
            if response.is_success:  # the page of an error may be cut
                raise
    return response, reply


@functools.cache
def certificates():
    """Whom HTTPS trusts; to read it takes longer than many an answer."""
    import httpx2

    return httpx2.create_ssl_context()


def message_of(reply):
    """What a server says of its error, on one line: JSON's message, or else the end of its text."""
    text = re.sub(r"<[^>]*>", " ", reply.decode(errors="replace"))[-300:]
    with contextlib.suppress(ValueError):
        found = json.loads(reply)
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        text = str(found)[:300]
    return " ".join(text.split())


def retry_after(header, otherwise):
    """The seconds that a Retry-After header asks for, by a number or a date; ten minutes at most."""
    try:
        if not re.fullmatch(r"\d+", header or ""):
            header = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        return min(max(float(header), 0), 600)
    except (TypeError, ValueError, AttributeError):
        return otherwise


# -- 7. What the flags --reward and --reward-option mean -----------------------------------------------------


class Reward(typing.NamedTuple):
    function: typing.Callable
    weight: float = 1.0
    task: str = None  # the only task it scores, if it was tied to one
    identity: str = ""  # what its scores depend on


SPEC = re.compile(
    r"(?P<name>[\w.-]+)(?:@(?P<task>[\w-]+))?(?:=(?P<weight>\d+\.?\d*|\.\d+))?"
    r"(?:[=,](?P<kind>pickle\+|openai\+|)(?P<url>https?://[^\s/]\S*))?"
)
SERVERS = {"": served, "pickle+": served_pickle}
JUDGES = "deqa", "qwenvl", "unifiedreward"
CHECKS = {"ocr": check_ocr, "blipvqa": noun_phrases}
CHECKS |= {"geneval": check_geneval, "geneval_strict": check_geneval}
PACKAGES = {"ocr": "rapidocr", "blipvqa": "en_core_web_sm"}  # that bring weights


def parse_rewards(specs, options=()):
    """["toy.ocr", "jpeg@scene=0.1"], ["ocr.KEY=VALUE"] -> {"ocr": Reward(function, 1.0), "jpeg":
    Reward(function, 0.1, "scene")}."""
    texts, rewards = {}, {}
    for option in options or ():
        m = re.fullmatch(r"([\w.-]+)\.(\w+)=(.*)", option, re.DOTALL)
        check(m, f"--reward-option {option}: expected NAME.KEY=VALUE")
        texts.setdefault(m[1], {})[m[2]] = m[3]
    for spec in specs or ():
        m = SPEC.fullmatch(spec)
        forms = "NAME, NAME@TASK, NAME=WEIGHT (a positive number), NAME=URL or NAME=WEIGHT,URL"
        check(m and float(m["weight"] or 1), f"--reward {spec}: expected {forms}")
        full_name, kind, url = m["name"], m["kind"], m["url"]
        name = full_name.rpartition(".")[2]
        check(name not in rewards, f"--reward {spec}: {name} is given twice")
        if kind == "openai+":
            check(full_name in JUDGES, f"--reward {spec}: openai+ is for {', '.join(JUDGES)}")
        function, fixed = SERVERS.get(kind) or load_reward(full_name), {}
        if url:
            check_url(spec, url)
            fixed["url"] = url.rstrip("/")
        if kind in SERVERS:
            fixed["name"] = name
        fixed |= read_options(full_name, function, texts.pop(full_name, {}))
        function = functools.partial(function, **fixed)
        try:
            inspect.signature(function).bind(None, None, None)
        except TypeError:
            die(f"--reward {spec}: {name} must take (images, prompts, metadata)")
        rewards[name] = Reward(function, float(m["weight"] or 1), m["task"], identity(full_name, function))
    check(not texts, f"--reward-option {', '.join(texts)}: not among --reward {' '.join(specs or ())}")
    return rewards


def check_url(spec, url):
    """Refuse an address that cannot be one."""
    try:
        return urllib.parse.urlsplit(url).port
    except ValueError as error:
        die(f"--reward {spec}: {error}")


def load_reward(name):
    """The reward function of that name."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    if module and module_file(module):
        reward = getattr(importlib.import_module(module), function, None)
        if callable(reward):
            return reward
    die(f"--reward {name}: no such reward here, nor in a file beside it; python rewards.py lists them")


def module_file(module):
    """The file of a module beside this one, mine.py or mine/__init__.py; None if there is none."""
    for file in (module + ".py", os.path.join(module, "__init__.py")):
        if os.path.exists(os.path.join(HERE, file)):
            return os.path.join(HERE, file)


def settings_of(function):
    """{option: default} of a reward."""
    given_elsewhere = ("prompts", "metadata", "url", "name")
    parameters = inspect.signature(function).parameters.items()
    return {k: p.default for k, p in parameters if p.default is not p.empty and k not in given_elsewhere}


def read_options(name, function, texts):
    """The options of a reward from {key: text}, each of its default's type, a text where that is None; @FILE
    is a file's text."""
    defaults, values = settings_of(function), {}
    for key, text in texts.items():
        flag = f"--reward-option {name}.{key}"
        check(key in defaults, f"{flag}: {name} has {', '.join(defaults) or 'no options'}")
        try:
            if text.startswith("@"):
                with open(text[1:], encoding="utf-8") as f:
                    text = f.read()
            kind = type(defaults[key])
            if kind is bool:
                values[key] = {"True": True, "False": False}[text]
            else:
                values[key] = text if defaults[key] is None else kind(text)
            if key == "pattern" and re.compile(text).groups != 1:
                raise ValueError("must have one group, where the number begins")
            if key == "timeout" and not values[key] > 0:
                raise ValueError("must be more than 0")
            if key in ("retries", "max_tokens", "max_completion_tokens", "size") and values[key] < 0:
                raise ValueError("must be at least 0")
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            die(f"{flag}={text}: {error}")
    return values


def identity(name, function):
    """What a reward's scores depend on: files and folders by their content, servers by their address."""
    parts = settings_of(function.func) | function.keywords
    for key in ("timeout", "retries", "name"):
        parts.pop(key, None)
    for key, value in parts.items():
        if isinstance(value, str) and os.path.exists(value):
            parts[key] = fingerprint(value)
    if "url" in parts:
        parts["protocol"] = function.func.__name__
    if "." in name and function.func not in SERVERS.values():
        parts["module"] = fingerprint(module_file(name.rpartition(".")[0]))
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]):
        parts["version"] = importlib.metadata.version(PACKAGES[name])
    return f"{name} {json.dumps(parts, sort_keys=True, default=str)}"


def rewards_of(task, rewards, tasks):
    """The names of the rewards that score a task's prompts: its own and the task-agnostic ones."""
    names = []
    for name, reward in rewards.items():
        related = [t for t in tasks if name == t or name.startswith(t + "_")]
        its_task = reward.task or max(related, key=len, default=task)
        if its_task == task:
            names.append(name)
    return names


def check_rewards(rewards, prompts, resolution, device="cpu", tasks=None, needed=None):
    """Before any long work: every prompt must be of the kind its rewards can score, and every reward must
    score two grey pictures, so that a missing package, model or server shows now (`needed`: only these are
    tried)."""
    tasks = tasks or prompts
    for name, reward in rewards.items():
        if reward.task and reward.task not in tasks:
            die(f"--reward {name}@{reward.task}: no such task; there are {', '.join(tasks)}")
        scored = [task for task in prompts if name in rewards_of(task, rewards, tasks)]
        rows = [(task, row) for task in scored for row in prompts[task]]
        if reward.function.func is REWARDS.get(name) and name in CHECKS:
            check_rows(name, reward, rows)
        if rows and (needed is None or name in needed):
            grey = torch.full((2, 3, resolution, resolution), 0.5, device=device)
            try:
                score, _ = score_batch(grey, rows[:1] * 2, {name: reward}, tasks)[name].tolist()
            except RewardError as error:
                die(f"--reward {error}")
            said = last_words(reward)
            check(not math.isnan(score), f"--reward {name}: no score of a grey picture. {said}")


def check_rows(name, reward, rows):
    """Refuse a prompt that one of our own rewards could not score."""
    for task, row in rows:
        try:
            CHECKS[name](row, **reward.function.keywords)
        except ValueError as error:
            die(f"--prompts {task}: {error}")
        except RewardError as error:
            die(f"--reward {name}: {error}")


def last_words(reward):
    """What a judge said when it last gave no score."""
    return SAID.get(reward.function.keywords.get("url"), "")


# -- 8. Scoring batches, beside the sampling -----------------------------------------------------------------

TOLERATED = 0.2  # the share of a rollout's pictures that may be left without a score; one always may


@torch.no_grad()
def score_batch(images, batch, rewards, tasks):
    """{reward: (B,) float32, NaN where the reward does not apply or has no score}, for a batch of (task, row)
    pairs. Raises RewardError."""
    scores = {}
    for name, reward in rewards.items():
        indices = [i for i, (task, _) in enumerate(batch) if name in rewards_of(task, rewards, tasks)]
        scores[name] = torch.full((len(batch),), math.nan)
        if not indices:
            continue
        metadata = [batch[i][1] for i in indices]
        where = f"for {metadata[0]['prompt']!r} or one beside it"
        if not images[indices].isfinite().all():
            raise RewardError(f"{name}: a picture is not finite, {where}")
        try:
            values = reward.function(images[indices], [row["prompt"] for row in metadata], metadata)
        except Unavailable as error:
            raise Unavailable(f"{name}: {error}") from error
        except (RewardError, ValueError) as error:  # ValueError: a prompt that this reward cannot score
            raise RewardError(f"{name}: {error}") from error
        try:
            values = torch.as_tensor(values, dtype=torch.float32).detach().cpu().reshape(len(indices))
        except (TypeError, ValueError, RuntimeError) as error:
            said = f"{' '.join(str(values).split())[:80]} for {len(indices)} pictures"
            raise Unavailable(f"{name}: the reward returned {said}, not a number each") from error
        if values.isinf().any():
            raise RewardError(f"{name}: an infinite score, {where}")
        scores[name][indices] = values
    return scores


class Scorer:
    """Scores batches while the next one is sampled: the rewards beside one another, each one batch at a
    time."""

    def __init__(self, rewards, tasks, stop=None):
        self.rewards, self.tasks, self.stop = rewards, tasks, stop
        self.batch, self.futures, self.threads, self.error = [], [], [], None
        self.locks = {name: threading.Lock() for name in rewards}

    def submit(self, images, batch):
        """images: (B, 3, H, W), batch: B pairs (task, row). Waits where the rewards lag four batches behind,
        so that pictures do not pile up."""
        self.batch += batch
        self.futures.append({name: Future() for name in self.rewards})
        for name, future in self.futures[-1].items():
            details = name, future, images, batch
            thread = threading.Thread(target=self.score, args=details, name=f"reward {name}", daemon=True)
            self.threads.append(thread)
            thread.start()
        if len(self.futures) > 4:
            for future in self.futures[-5].values():
                self.wait(future)

    def score(self, name, future, images, batch):
        """One reward's thread for one batch."""
        with self.locks[name]:
            try:
                if self.error:
                    raise self.error
                scores = score_batch(images, batch, {name: self.rewards[name]}, self.tasks)
                future.set_result(scores[name])
            except BaseException as error:
                self.error = error  # what waits for its turn need not be tried
                future.set_exception(error)

    def wait(self, future):
        """A future's result; None if the process is told to stop (stop: its StopSignal) before there is
        one."""
        while not (self.stop and self.stop.name):
            if wait([future], timeout=0.2).done:
                return future.result()

    def collect(self):
        """{reward: (all submitted,) float32, NaN where it does not apply or has no score}, when all are
        scored; None if told to stop before. This and `submit` raise RewardError; too many pictures without a
        score is one."""
        batch, futures, self.batch, self.futures = self.batch, self.futures, [], []
        try:
            scores = {name: [self.wait(by_name[name]) for by_name in futures] for name in self.rewards}
        finally:
            for thread in self.threads:
                thread.join(0.1)  # it is done, or still waits for a server
            self.threads = []
        if self.stop and self.stop.name:
            return None
        scores = {name: torch.cat(values) for name, values in scores.items()}
        for name, applies in applying(self.rewards, batch, self.tasks).items():
            lost, total = int((scores[name].isnan() & applies).sum()), int(applies.sum())
            if lost > max(1, TOLERATED * total) or 0 < lost == total:
                why = last_words(self.rewards[name])
                raise RewardError(f"{name}: {lost} of {total} pictures have no score. {why}")
        return scores


def applying(rewards, batch, tasks):
    """{reward: (B,) bool: whether it scores the sample's task}, for a batch of (task, row) pairs."""
    names = {task: rewards_of(task, rewards, tasks) for task in {task for task, _ in batch}}
    return {name: torch.tensor([name in names[task] for task, _ in batch]) for name in rewards}


def weighted_sum(scores, rewards, batch, tasks):
    """The rewards of a batch mixed: sum_i w_i r_i / sum_i w_i over the rewards that score a sample's task;
    NaN where one of these has no score. -> (B,)"""
    total = weights = torch.zeros(len(batch))
    for name, applies in applying(rewards, batch, tasks).items():
        total = total + torch.where(applies, rewards[name].weight * scores[name], 0)
        weights = weights + rewards[name].weight * applies
    return total / weights


# -- 9. A model's scores on held-out prompts -----------------------------------------------------------------


def evaluate(
    model,
    adapter,
    prompts,
    rewards,
    args,
    rank=0,
    world=1,
    guidance=None,
    tasks=None,
    progress=None,
    stop=None,
):
    """Mean score and standard error of each reward over the prompts it applies to, one picture a prompt,
    deterministic sampling. Prompt i of a task always starts from the same noise, so the result depends on
    neither the batch size nor the number of ranks. args: eval_num_steps, resolution, eval_batch_size, seed,
    guidance; tasks: all tasks of the run, if the prompts are of only some. -> {"n", "scores", "stderr",
    "missing": {reward: pictures without a score, which are left out}}, or None if a process was told to stop
    (stop: its StopSignal)."""
    items = [(task, row) for task, rows in prompts.items() for row in rows]
    numbers = [number for rows in prompts.values() for number in range(len(rows))]  # as in evaluate.py
    mine = list(range(rank, len(items), world))
    guidance = args.guidance if guidance is None else guidance
    sampling = args.eval_num_steps, args.resolution, adapter, guidance
    scorer, table = Scorer(rewards, tasks or prompts, stop), torch.zeros(len(rewards), len(items))
    try:
        for start in range(0, len(mine), args.eval_batch_size):
            if stop and stop.name:
                break
            indices = mine[start : start + args.eval_batch_size]
            batch = [items[i] for i in indices]
            texts = [row["prompt"] for _, row in batch]
            gens = generators(args.seed, 0, [numbers[i] for i in indices])
            scorer.submit(model.generate(texts, gens, *sampling), batch)
            if progress:
                progress(len(batch))
        scores = scorer.collect() if mine else None
        if scores:
            table[:, mine] = torch.stack(list(scores.values()))
    except RewardError as error:
        if not stop:
            die(f"--reward {error}")
        stop.fail(f"--reward {error}")
    if stop and stop.arrived(model.device):
        return None
    table = reduce_sum(table.to(model.device)).cpu().double()
    result = {"n": len(items), "scores": {}, "stderr": {}, "missing": {}}
    for values, (name, applies) in zip(table, applying(rewards, items, tasks or prompts).items()):
        scored = values[applies & ~values.isnan()]
        if len(scored):  # a reward whose task has no prompts here has no column
            result["scores"][name], result["stderr"][name] = mean_error(scored)
        if len(scored) < applies.sum():
            result["missing"][name] = int(applies.sum()) - len(scored)
    return result


def mean_error(values):
    """Mean and standard error of the mean (None for one value)."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def markdown(rows):
    """The results as a Markdown table, one line a model: mean ± standard error, and how many scores are
    missing."""
    names = list(dict.fromkeys(name for r in rows for name in [*r["scores"], *r.get("missing", ())]))
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [row["model"]]
        for name in names:
            parts = []
            if name in row["scores"]:
                error = row["stderr"].get(name)
                parts.append(f"{row['scores'][name]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
            if name in row.get("missing", ()):
                parts.append(f"{row['missing'][name]} missing")
            cells.append(", ".join(parts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- 10. The command line ------------------------------------------------------------------------------------


def rewards_in(file):
    """{name: docstring} of the rewards in a Python file, found without running it: functions of (images,
    prompts, metadata), with a default for everything after these."""
    found = {}
    with open(file, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args]
            if names[:3] == ["images", "prompts", "metadata"] and len(node.args.defaults) >= len(names) - 3:
                found[node.name] = ast.get_docstring(node) or ""
    return found


def list_rewards():
    """Print every reward's name and docstring: this file's, and those of the files beside it."""
    modules = sorted(file.removesuffix(".py") for file in os.listdir(HERE))
    for module in ["rewards", *(m for m in modules if m != "rewards" and module_file(m))]:
        with contextlib.suppress(SyntaxError, ValueError, OSError):
            for name, text in rewards_in(module_file(module)).items():
                name = name if module == "rewards" else f"{module}.{name}"
                print("\n    ".join([name, *text.splitlines()]))


def score_one(spec, picture, prompt, *options):
    """Print one picture's score."""
    full_name = re.match(r"[\w.-]*", spec)[0]
    [(name, reward)] = parse_rewards([spec], [f"{full_name}.{option}" for option in options]).items()
    try:
        image = read_picture(picture)[None]
        row = json.loads(prompt) if prompt.startswith("{") else {"prompt": prompt}
        if not isinstance(row.get("prompt"), str):
            raise ValueError('PROMPT: a JSON row needs a "prompt"')
        task = reward.task or "PROMPT"
        check_rewards({name: reward}, {task: [row]}, 64, needed=())
        [score] = score_batch(image, [(task, row)], {name: reward}, [task])[name].tolist()
    except (RewardError, ValueError) as error:
        die(str(error))
    check(not math.isnan(score), f"{name}: no score. {last_words(reward)}")
    print(f"{score:.4f}")


REWARDS = {name: globals()[name] for name in rewards_in(__file__)}  # all of the above

if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    elif len(sys.argv) == 1:
        list_rewards()
    elif len(sys.argv) >= 4:
        score_one(*sys.argv[1:])
    else:
        die("usage: rewards.py NAME PICTURE PROMPT [KEY=VALUE ...]; --help; or no argument for the list")
