"""Every reward and metric by name. Each is a function (images, prompts, metadata) -> (B,) float32, higher is better:
images (B, 3, H, W) float in [0, 1], prompts a list of B strings, metadata a list of B dicts (the rows of the prompt files).

    python rewards.py                                 # list the rewards: range, formula, model, licence, what each needs
    python rewards.py NAME PICTURE PROMPT [KEY=VALUE ...]      # one score; PROMPT may be a JSON row, as GenEval's

In the scripts, `--reward` takes NAME[@TASK][=WEIGHT][,URL] ...:

    geneval=0.8 deqa=0.2,openai+http://localhost:8000/v1     # weights; deqa asks a model behind an OpenAI-compatible endpoint
    taste=http://localhost:9000                              # a server of your own: `served` says what it gets and answers
    geneval=pickle+http://localhost:18085                    # Flow-GRPO's reward servers
    toy.ocr mine.smile                                       # `ocr` of toy.py, `smile` of a mine.py beside this file

Rewards and tasks meet by name: a reward called like a task (`ocr`, `toy.ocr`, `ocr_strict` for the task `ocr`) or tied to one
(`pickscore@drawbench`) scores that task's prompts only; any other reward is task-agnostic and scores all prompts. Every keyword
argument of a reward is an option: `--reward-option pickscore.model=DIR deqa.timeout=30 qwenvl.prompt=@prompt.txt`.
"""

import base64
import functools
import hashlib
import http.client
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import queue
import re
import sys
import threading
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.nn.functional as F

from flow_sde import HERE, die, fingerprint, generators, listing, reduce_sum


class RewardError(Exception):
    """A reward could not be had, and why. Never a score of 0 instead: training stops, evaluation reports the score as missing."""


class Unavailable(RewardError):
    """No fault of the picture's: a server, a model or a package is not there, and would be missing for the next picture too."""


# ----------------------------------------------------------------------------------------------------------------------
# programs

def pil(images):
    """(B, 3, H, W) in [0, 1] -> B PIL pictures."""
    from PIL import Image
    return [Image.fromarray(pixels) for pixels in (images.float().cpu() * 255).round().byte().movedim(1, -1).numpy()]


def read_picture(file):
    """A picture file -> (3, H, W) in [0, 1]."""
    from PIL import Image
    try:
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).movedim(-1, 0).float() / 255
    except OSError as error:
        die(f"{file}: {error}")


def encoded(picture, kind="PNG", **options):
    """A PIL picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def need(*packages):
    if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
        raise Unavailable(f"pip install {' '.join(missing)}")


def jpeg(images, prompts=None, metadata=None):
    """JPEG compressibility (DDPO, arXiv 2305.13301). -kB / 500 at quality 95; below 0. Needs nothing."""
    return torch.tensor([-len(encoded(p, "JPEG", quality=95)) / 1000 / 500 for p in pil(images)], dtype=torch.float32)


def ocr(images, prompts, metadata=None):
    """Text rendering. 1 - min(edit distance, n) / n between the text read and the prompt's first quoted text of n letters, case and
    spaces ignored, a substring is perfect; in [0, 1]. Needs rapidocr and onnxruntime (PP-OCR's models, Apache-2.0, come with it)."""
    engine, cores = read_text(), max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(cores) as pool:
        texts = pool.map(lambda p: "".join(engine(np.array(p)).txts or ()), pil(images))
        return torch.tensor([text_score(text, prompt) for text, prompt in zip(texts, prompts)], dtype=torch.float32)


@functools.cache
def read_text():
    """The OCR engine: detection and recognition, for upright text, one thread a picture."""
    need("rapidocr", "onnxruntime")
    from rapidocr import RapidOCR
    return RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})


def quoted_text(prompt):
    """The first quoted text of a prompt."""
    quoted = re.search(r'["“](.*?)["”]', prompt)
    if not quoted or not quoted[1].strip():
        raise ValueError(f"an ocr prompt needs its text in double quotes: {prompt!r}")
    return quoted[1]


def text_score(read, prompt):
    """How well the text read off a picture matches its prompt: ocr's formula."""
    target, read = (re.sub(r"\s", "", s).lower() for s in (quoted_text(prompt), read))
    return 1.0 if target in read else 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a, b):
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# ----------------------------------------------------------------------------------------------------------------------
# CLIP and its kin: all in float32, on the pictures' device, loaded once

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's and BLIP's pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(pixels, mean, std):
    return (pixels - torch.tensor(mean, device=pixels.device)[:, None, None]) / torch.tensor(std, device=pixels.device)[:, None, None]


def resized(pictures, size, fit="crop"):
    """PIL pictures -> (B, 3, size, size), CLIP's pixels, resized bicubically by PIL as the models' authors did. crop: the shorter side
    becomes `size`, and the middle is cut out; pad: the longer side, with black beside it; squash: both."""
    from PIL import Image, ImageOps
    out = []
    for p in pictures:
        if fit == "crop":
            scale = size / min(p.size)
            p = p.resize([max(size, int(side * scale)) for side in p.size], Image.Resampling.BICUBIC)
            left, top = (round((side - size) / 2) for side in p.size)
            p = p.crop((left, top, left + size, top + size))
        else:
            p = ImageOps.pad(p, (size, size), Image.Resampling.BICUBIC) if fit == "pad" else p.resize((size, size), Image.Resampling.BICUBIC)
        out.append(torch.from_numpy(np.array(p)).movedim(-1, 0).float() / 255)
    return normalize(torch.stack(out), MEAN, STD)


def load(kind, name, device=None, **options):
    """A transformers class from a folder or hub id."""
    try:
        thing = kind.from_pretrained(name, **options)
    except Exception as error:  # a broken file can raise anything
        raise Unavailable(f"{name} could not be loaded ({(str(error).strip() or type(error).__name__).splitlines()[0]})")
    return thing.eval().requires_grad_(False).to(device, torch.float32) if device else thing


def load_state(file):
    """The tensors of a checkpoint: a local file, or OWNER/REPOSITORY/FILE of the hub. Nothing but tensors and plain values is read."""
    if not os.path.exists(file):
        from huggingface_hub import hf_hub_download
        try:
            file = hf_hub_download("/".join(file.split("/")[:2]), "/".join(file.split("/")[2:]))
        except Exception as error:
            raise Unavailable(f"{file}: neither a local file nor to be had from the hub ({type(error).__name__})")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise Unavailable(f"{file}: not a checkpoint of tensors ({type(error).__name__})")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.get("state_dict", state).items()}


def fill(model, state, file, device):
    """Put a converted state dict into a model; one with a key too few, too many or of another shape is refused."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Unavailable(f"{file} does not fit: {' '.join(str(error).split()[:40])} ...")
    return model.eval().requires_grad_(False).to(device)


@functools.cache
def load_clip(model, tokenizer, device):
    from transformers import AutoTokenizer, CLIPModel
    return load(CLIPModel, model, device), load(AutoTokenizer, tokenizer)


_tokenizing = threading.Lock()


def tokens(tokenizer, texts, device, length=77, **options):
    """Token ids and mask of texts, padded to the longest and cut to `length`."""
    with _tokenizing:  # rewards share tokenizers, and those refuse two threads at once
        batch = tokenizer(texts, truncation=True, max_length=length, return_tensors="pt", **{"padding": True} | options)
    return {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}


def clip_cosine(clip, tokenizer, images, prompts, fit="crop"):
    """The cosine of picture and prompt in CLIP's space. -> (B,)"""
    pixels = resized(pil(images), clip.config.vision_config.image_size, fit).to(images.device)
    out = clip(pixel_values=pixels, **tokens(tokenizer, prompts, images.device, clip.config.text_config.max_position_embeddings))
    return F.cosine_similarity(out.image_embeds, out.text_embeds)


def pickscore(images, prompts, metadata=None, model="yuvalkirstain/PickScore_v1", tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """What people pick (arXiv 2305.01569). exp(logit scale) cos / 26, about 0.7 to 0.9; papers print it times 26. No licence
    was seen on its page; its tokenizer is laion's CLIP ViT-H (MIT). Needs 4 GB."""
    clip, tokenizer = load_clip(model, tokenizer, images.device)
    return clip.logit_scale.exp() * clip_cosine(clip, tokenizer, images, prompts) / 26


def clipscore(images, prompts, metadata=None, model="openai/clip-vit-large-patch14"):
    """Agreement of picture and text (arXiv 2104.08718). exp(logit scale) cos / 30, about 100 cos / 30: 0.5 to 1.1. OpenAI's CLIP ViT-L
    (MIT), pixels resized bicubically as CLIP asks; Flow-GRPO resizes bilinearly. Needs 1.7 GB."""
    clip, tokenizer = load_clip(model, model, images.device)
    return clip.logit_scale.exp() * clip_cosine(clip, tokenizer, images, prompts) / 30


def aesthetic(images, prompts=None, metadata=None, model="openai/clip-vit-large-patch14",
              head="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"):
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE, Apache-2.0): five linear layers on the normalised CLIP ViT-L (MIT)
    embedding of the picture. About 1 to 10. Needs 1.7 GB."""
    clip, _ = load_clip(model, model, images.device)
    pixels = resized(pil(images), clip.config.vision_config.image_size).to(images.device)
    return five_layers(load_head(head, "", images.device), F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1))


@functools.cache
def load_head(file, prefix, device):
    """The weights of five linear layers (768-1024-128-64-16-1, nothing between them but dropout), from a checkpoint."""
    state = load_state(file)
    keys = [f"{prefix}layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    if missing := [k for k in keys if k not in state]:
        raise Unavailable(f"{file} does not fit: it lacks {listing(missing)}")
    return [state[k].to(device) for k in keys]


def five_layers(weights, x):
    """(B, 768) -> (B,)"""
    for weight, bias in zip(weights[::2], weights[1::2]):
        x = F.linear(x, weight, bias)
    return x[:, 0]


def hpsv2(images, prompts, metadata=None, weights="xswu/HPSv2/HPS_v2.1_compressed.pt", base="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Human Preference Score v2.1 (arXiv 2306.09341, Apache-2.0). cos, about 0.2 to 0.35, of a fine-tuned CLIP ViT-H, converted from
    open_clip's layout to transformers' class; sizes and tokenizer are `base`'s (MIT). Needs 4 GB."""
    clip, tokenizer = load_hpsv2(weights, base, images.device)
    return clip_cosine(clip, tokenizer, images, prompts, fit="pad")


@functools.cache
def load_hpsv2(weights, base, device):
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    return fill(CLIPModel(load(CLIPConfig, base)), from_open_clip(load_state(weights)), weights, device), load(AutoTokenizer, base)


def from_open_clip(state):
    """An open_clip ViT's state dict -> transformers' CLIPModel's: q, k, v apart, projections transposed, other names."""
    out = {}
    for key, value in state.items():
        side = "vision_model." if key.startswith("visual.") else "text_model."
        name = key.removeprefix("visual.")
        if layer := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            place, part = f"{side}encoder.layers.{layer[1]}.", layer[2]
            if part.startswith("attn.in_proj_"):
                for which, piece in zip("qkv", value.chunk(3)):
                    out[f"{place}self_attn.{which}_proj.{part.removeprefix('attn.in_proj_')}"] = piece
                continue
            for old, new in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.", "self_attn."), ("c_fc", "fc1"), ("c_proj", "fc2")):
                part = part.replace(old, new)
            out[place + part] = value
        elif name in ("proj", "text_projection"):
            out["visual_projection.weight" if name == "proj" else "text_projection.weight"] = value.T
        elif key != "attn_mask":
            for old, new in (("conv1.", "embeddings.patch_embedding."), ("class_embedding", "embeddings.class_embedding"),
                             ("positional_embedding", "embeddings.position_embedding.weight"), ("token_embedding.", "embeddings.token_embedding."),
                             ("ln_pre.", "pre_layrnorm."), ("ln_post.", "post_layernorm."), ("ln_final.", "final_layer_norm.")):
                name = name.replace(old, new) if name.startswith(old) else name
            out[name if name == "logit_scale" else side + name] = value
    return out


def imagereward(images, prompts, metadata=None, weights="THUDM/ImageReward/ImageReward.pt", tokenizer="google-bert/bert-base-uncased"):
    """ImageReward (arXiv 2304.05977, Apache-2.0). (five linear layers on BLIP's joint embedding - 0.1672) / 1.0333, unbounded, about -2 to 2.
    A BLIP ViT-L converted to transformers' classes; BERT's tokenizer (Apache-2.0). Needs 1.8 GB."""
    vision, text, head, tokenizer = load_imagereward(weights, tokenizer, images.device)
    seen = vision(pixel_values=resized(pil(images), vision.config.image_size).to(images.device)).last_hidden_state
    read = tokens(tokenizer, prompts, images.device, 35, padding="max_length")
    joint = text(**read, encoder_hidden_states=seen, encoder_attention_mask=torch.ones_like(seen[..., 0]), is_decoder=False).last_hidden_state[:, 0]
    return (five_layers(head, joint) - 0.16717362830052426) / 1.0333394966054072


@functools.cache
def load_imagereward(weights, tokenizer, device):
    """ImageReward.pt holds a BLIP whose vision tower has timm's names, and `mlp`; the sizes are read off the tensors, 64 to a head."""
    from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    state = load_state(weights)
    layers = lambda pattern: len({m[1] for k in state if (m := re.match(pattern, k))})
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "position_ids" not in k}
    tower, text = {}, part("blip.text_encoder.")
    for name, value in part("blip.visual_encoder.").items():
        for old, new in (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
                         ("patch_embed.proj.", "embeddings.patch_embedding."), ("norm.", "post_layernorm."), ("blocks.", "encoder.layers."),
                         (".norm", ".layer_norm"), (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection.")):
            name = name.replace(old, new) if old[0] == "." else new + name.removeprefix(old) if name.startswith(old) else name
        tower[name] = value
    try:
        width, _, _, patch = tower["embeddings.patch_embedding.weight"].shape
        words, depth = text["embeddings.word_embeddings.weight"].shape
        vision = BlipVisionModel(BlipVisionConfig(
            hidden_size=width, intermediate_size=len(tower["encoder.layers.0.mlp.fc1.weight"]), num_attention_heads=max(1, width // 64),
            num_hidden_layers=layers(r"blip\.visual_encoder\.blocks\.(\d+)"), patch_size=patch, layer_norm_eps=1e-6, hidden_act="gelu",
            image_size=patch * math.isqrt(tower["embeddings.position_embedding"].shape[1] - 1)))
        bert = BlipTextModel(BlipTextConfig(
            vocab_size=words, hidden_size=depth, encoder_hidden_size=width, num_attention_heads=max(1, depth // 64),
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=layers(r"blip\.text_encoder\.encoder\.layer\.(\d+)"),
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"])), add_pooling_layer=False)
    except KeyError as error:
        raise Unavailable(f"{weights} does not fit: it lacks {error}")
    return fill(vision, tower, weights, device), fill(bert, text, weights, device), load_head(weights, "mlp.", device), load(AutoTokenizer, tokenizer)


def blipvqa(images, prompts, metadata=None, model="Salesforce/blip-vqa-capfilt-large", length=35):
    """T2I-CompBench's BLIP-VQA (arXiv 2307.06350), for colour, shape and texture: the product, over the prompt's noun phrases (at most 8), of
    P(yes) / (P(yes) + P(no)) when asked "PHRASE?"; in [0, 1]. BLIP (BSD-3). The phrases are the row's "phrases", or spaCy's as in
    the official scorer: needs spacy and its en_core_web_sm for that, and 1.5 GB."""
    blip, tokenizer = load_blip(model, images.device)
    config, scores = blip.config.text_config, []
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    pixels = resized(pil(images), blip.config.vision_config.image_size, "squash").to(images.device)
    for picture, prompt, row in zip(pixels, prompts, metadata or [{}] * len(prompts)):
        seen, score = blip.vision_model(pixel_values=picture[None])[0], torch.ones((), device=images.device)
        for phrase in noun_phrases(row | {"prompt": prompt})[:8]:  # one by one: transformers 5.23 ignores a padding mask in BLIP's decoder
            question = tokens(tokenizer, [re.sub(r'[.!"()*#:;~]', " ", phrase.lower()).strip() + "?"], images.device, length)["input_ids"]
            question[:, 0] = config.bos_token_id + 1  # BLIP's [ENC]
            asked = blip.text_encoder(question, encoder_hidden_states=seen, return_dict=False)[0]
            start = torch.full((1, 1), config.bos_token_id, device=images.device)
            score = score * blip.text_decoder(start, encoder_hidden_states=asked).logits[0, 0, [yes, no]].softmax(-1)[0]
        scores.append(score)
    return torch.stack(scores)


@functools.cache
def load_blip(model, device):
    from transformers import AutoTokenizer, BlipForQuestionAnswering
    return load(BlipForQuestionAnswering, model, device), load(AutoTokenizer, model)


def noun_phrases(row):
    """What a prompt's BLIP-VQA questions are about: its row's "phrases", or spaCy's noun chunks but for those that only say where."""
    phrases = row["phrases"] if "phrases" in row else [chunk.text for chunk in load_spacy()(row["prompt"]).noun_chunks
                                                       if chunk.text.lower() not in ("top", "the side", "the left", "the right")]
    if not phrases or not isinstance(phrases, list) or not all(isinstance(p, str) and p.strip() for p in phrases):
        raise ValueError(f"blipvqa finds no noun phrase in {row['prompt']!r}")
    return phrases


@functools.cache
def load_spacy():
    need("spacy")
    import spacy
    try:
        return spacy.load("en_core_web_sm")
    except OSError:
        raise Unavailable("python -m spacy download en_core_web_sm")


# ----------------------------------------------------------------------------------------------------------------------
# GenEval (arXiv 2310.11513): a detector looks for the objects, CLIP for their colours, rules for the rest

# COCO's classes in COCO's order, with GenEval's names
OBJECTS = ("person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter, "
           "bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, "
           "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, "
           "fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted "
           "plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
           "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush").split(", ")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = "left of", "right of", "above", "below"
DETECTOR, COLOR_CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"


class Object(typing.NamedTuple):
    score: float
    box: tuple         # x1, y1, x2, y2 in pixels
    mask: object       # (H, W) bool


def geneval(images, prompts, metadata, detector=DETECTOR, clip=COLOR_CLIP):
    """GenEval with partial credit, the training reward; in [0, 1]: `geneval_credit`. Mask2Former Swin-S from transformers (code MIT, weights
    "other"), not the official evaluator's mmdetection weights, so not its exact numbers; CLIP ViT-L (MIT). Needs scipy, 2 GB, and the
    metadata of GenEval's *_metadata.jsonl. The paper's GenEval column is most likely this one."""
    return torch.tensor([v[1] for v in geneval_verdicts(images, metadata, detector, clip)], dtype=torch.float32)


def geneval_strict(images, prompts, metadata, detector=DETECTOR, clip=COLOR_CLIP):
    """GenEval as its authors score it: 1 if everything asked for is there, else 0: `geneval_correct`. Models and needs as `geneval`."""
    return torch.tensor([v[0] for v in geneval_verdicts(images, metadata, detector, clip)], dtype=torch.float32)


_verdicts, _verdicts_lock = {}, threading.Lock()


def geneval_verdicts(images, metadata, detector=DETECTOR, clip=COLOR_CLIP):
    """[(correct, credit, reason)] of a batch. The last batch is remembered, so that both scores cost one detection."""
    key = hashlib.sha256(images.cpu().numpy().tobytes()).digest(), json.dumps(metadata), detector, clip
    with _verdicts_lock:
        if key not in _verdicts:
            load_clip(clip, clip, images.device)  # a missing one shows at once, not with the first coloured object
            verdicts = []
            for picture, objects, row in zip(pil(images), detect(images, detector), metadata):
                found = confident(objects, row["tag"])
                colors = lambda group, name: object_colors(picture, group, name, clip, images.device)
                correct, reason = geneval_correct(found, colors, row)
                verdicts.append((correct, geneval_credit(found, colors, row), reason))
            _verdicts.clear()
            _verdicts[key] = verdicts
        return _verdicts[key]


def check_geneval(row):
    """Refuse a prompt's row that is not GenEval's metadata: {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?}."""
    include, exclude = row.get("include"), row.get("exclude", [])
    if not isinstance(row.get("tag"), str) or not include or not isinstance(include, list) or not isinstance(exclude, list):
        raise ValueError(f'a geneval prompt needs the "tag" and "include" of GenEval\'s metadata files: {row.get("prompt")!r}')
    for i, r in enumerate(include + exclude):
        whole = lambda v: isinstance(v, int) and not isinstance(v, bool)
        fits = isinstance(r, dict) and r.get("class") in OBJECTS and r.get("color", "red") in COLORS and whole(r.get("count")) and r["count"] > 0
        if fits and (place := r.get("position")) is not None:
            fits = isinstance(place, list) and len(place) == 2 and place[0] in RELATIONS and whole(place[1]) and 0 <= place[1] < i
        if not fits:
            raise ValueError(f"not something geneval can look for (class, count, color, position): {r}")


@torch.no_grad()
def detect(images, detector=DETECTOR):
    """The objects in pictures (B, 3, H, W): for each {class: [Object, ...]}, most certain first, with scores above 0.3. Computed as
    mmdetection's Mask2Former head does: the 100 best (query, class) pairs; masks enlarged to the padded input, cropped, resized; score =
    class probability x mean mask probability inside the mask. (transformers' own post-processing makes one overlapping map of 384 x 384.)"""
    network = load_detector(detector, images.device)
    height, width = images.shape[-2:]
    scale = min(800 / min(height, width), 1333 / max(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    resize = functools.partial(F.interpolate, mode="bilinear")
    pictures = []
    for image in images.float():
        x = F.pad(normalize(resize(image[None], (h, w)), IMAGENET_MEAN, IMAGENET_STD), (0, -w % 32, 0, -h % 32))
        out = network(pixel_values=x)
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]                        # the last class is "nothing"
        scores, best = classes.flatten().topk(min(100, classes.numel()))
        best, scores = best[scores > 0.3], scores[scores > 0.3]                          # a mask can only lower the score
        objects = {}
        if len(best):
            logits = resize(resize(out.masks_queries_logits[:, best // len(OBJECTS)], x.shape[-2:])[..., :h, :w], (height, width))[0]
            masks = logits > 0                                                           # (N, H, W)
            scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
            for i in scores.argsort(descending=True).tolist():
                if scores[i] > 0.3:
                    rows, columns = masks[i].any(1).nonzero(), masks[i].any(0).nonzero()
                    box = columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1
                    objects.setdefault(OBJECTS[best[i] % len(OBJECTS)], []).append(Object(scores[i].item(), box, masks[i].cpu().numpy()))
        pictures.append(objects)
    return pictures


@functools.cache
def load_detector(detector, device):
    from transformers import Mask2FormerForUniversalSegmentation
    need("scipy")  # transformers' class refuses to be made without it
    network = load(Mask2FormerForUniversalSegmentation, detector, device)
    if network.config.num_labels != len(OBJECTS):
        raise Unavailable(f"{detector} knows {network.config.num_labels} classes, not COCO's 80")
    return network


def confident(objects, tag):
    """The detections GenEval looks at: above 0.3 (0.9 when counting), at most 16 a class, most certain first."""
    threshold = 0.9 if tag == "counting" else 0.3
    found = {name: sorted((o for o in group if o.score > threshold), key=lambda o: -o.score)[:16] for name, group in objects.items()}
    return {name: group for name, group in found.items() if group}


@torch.no_grad()
def object_colors(picture, objects, name, clip, device):
    """The colour of each object, by zero-shot CLIP on the picture's crop with everything but the object grey."""
    from PIL import Image
    grey = Image.new("RGB", picture.size, "#999")
    crops = [Image.composite(picture, grey, Image.fromarray(o.mask)).crop(o.box) for o in objects]
    model, _ = load_clip(clip, clip, device)
    seen = model.get_image_features(pixel_values=resized(crops, model.config.vision_config.image_size).to(device)).pooler_output
    return [COLORS[i] for i in (F.normalize(seen, dim=-1) @ color_words(clip, name, device).T).argmax(1).tolist()]


@functools.cache
def color_words(clip, name, device):
    """CLIP's embeddings of the ten colours of a thing, each the mean of three phrases. -> (10, D)"""
    model, tokenizer = load_clip(clip, clip, device)
    texts = [phrase for c in COLORS for phrase in (f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object")]
    words = model.get_text_features(**tokens(tokenizer, texts, device, model.config.text_config.max_position_embeddings)).pooler_output
    return F.normalize(F.normalize(words, dim=-1).view(len(COLORS), 3, -1).mean(1), dim=-1)


def relations(a, b):
    """Where box a lies of box b: a subset of left of, right of, above, below. An offset within a tenth of the two sizes does not count."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = (((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (a, b))
    offset = np.array([ax - bx, ay - by])
    clear = np.maximum(abs(offset) - 0.1 * np.array([aw + bw, ah + bh]), 0) * np.sign(offset)
    if (abs(clear) < 1e-3).all():
        return set()
    dx, dy = clear / np.linalg.norm(offset)
    return {name for name, so in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if so}


def misplaced(group, position, groups):
    """Why a group does not stand where it should, or None: every object must have the relation to every object of the target."""
    relation, target = position
    if target >= len(groups) or groups[target] is None:
        return "no target"
    wrong = [r for a in group for b in groups[target] if relation not in (r := relations(a.box, b.box))]
    return f"not {relation} the target but {' and '.join(sorted(wrong[0])) or 'nowhere'}" if wrong else None


def geneval_correct(found, colors, row):
    """The official verdict, (correct, reason). For every thing to include: enough of them, of which the most certain `count` all have the
    colour and the position asked for; too many is wrong only where `exclude` says so. found: {class: [Object]}, colors: (objects, class) ->
    [color]."""
    reasons, groups = [], []
    for r in row["include"]:
        group, reason = found.get(r["class"], [])[:r["count"]], None
        if len(group) < r["count"]:
            reason = f"{r['class']}: {len(group)} of {r['count']}"
        elif "color" in r and (shown := colors(group, r["class"])) != [r["color"]] * r["count"]:
            reason = f"{r['class']}: {', '.join(shown)}, not {r['color']}"
        elif "position" in r and (why := misplaced(group, r["position"], groups)):
            reason = f"{r['class']}: {why}"
        groups.append(None if reason else group)
        reasons += [reason] if reason else []
    for r in row.get("exclude", []):
        if len(found.get(r["class"], [])) >= r["count"]:
            reasons.append(f"{r['class']}: {len(found[r['class']])}, should be fewer than {r['count']}")
    return not reasons, "; ".join(reasons)


def geneval_credit(found, colors, row):
    """Partial credit, the mean of all that is asked: each thing's count, 1 - |asked - found| / asked (not below 0); its colour, likewise; its
    position, 0 or 1. Colour and position get 0 when the count is not exact. After Flow-GRPO's reward server, whose counts could go
    below 0 and which gave a wrong position 0 and then 1."""
    credits, groups = [], []
    for r in row["include"]:
        group, parts = found.get(r["class"], []), []
        share = lambda n: max(0.0, 1 - abs(r["count"] - n) / r["count"])
        parts.append(share(len(group)))
        if "color" in r:
            parts.append(share(colors(group, r["class"]).count(r["color"])) if parts[0] == 1 else 0.0)
        if "position" in r:
            parts.append(float(min(parts) == 1 and not misplaced(group, r["position"], groups)))
        groups.append(group if min(parts) == 1 else None)
        credits += parts
    return sum(credits) / len(credits)


# ----------------------------------------------------------------------------------------------------------------------
# models behind an OpenAI-compatible endpoint (vLLM, SGLang): --reward NAME=openai+http://HOST:PORT/v1. The environment's REWARD_API_KEY
# is sent along, if there is one

LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
BOTH = ("The picture was made for this caption: {prompt}\nJudge two things: whether it shows everything the caption says, with the right "
        "attributes and relations, and how good it is as a picture: clear, detailed, free of artefacts, pleasant to look at. Give one score "
        "from 1 (worst) to 5 (best).")


def deqa(images, prompts=None, metadata=None, url="", model="zhiyuanyou/DeQA-Score-Mix3", timeout=120.0, retries=3,
         prompt="How good is the quality of this picture? Answer with one word: excellent, good, fair, poor or bad."):
    """Picture quality (DeQA-Score, arXiv 2501.11561, MIT). sum_l p_l l / 5 over the five level words' probabilities in the first answered token, l
    from 5 (excellent) to 1 (bad); in [0.2, 1]; papers print it times 5. Needs an endpoint that gives log-probabilities, or Flow-GRPO's
    server: deqa=pickle+http://HOST:PORT."""
    def one(picture, text):
        answer = chat(url, model, prompt, picture, timeout, retries, max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            top = answer["logprobs"]["content"][0]["top_logprobs"]
            words = [(t["token"].strip(" ▁Ġ").lower(), float(t["logprob"])) for t in top]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise RewardError(f"{url}: {model} gave no log-probabilities of its first token")
        mass = {level: sum(math.exp(p) for word, p in words if word and level.startswith(word)) for level in LEVELS}  # a token may be a beginning
        if not sum(mass.values()) > 0:
            raise RewardError(f"{url}: none of {', '.join(LEVELS)} is likely; the likeliest tokens are {listing([repr(w) for w, _ in words])}")
        return sum(mass[level] * n for level, n in LEVELS.items()) / sum(mass.values()) / 5
    return ask_all(one, images, prompts or [""] * len(images))


def qwenvl(images, prompts, metadata=None, url="", model="Qwen/Qwen3-VL-30B-A3B-Instruct", timeout=120.0, retries=3,
           prompt=BOTH + " Be strict. Think it over, then end with <Score>N</Score>.", pattern=r"<Score>\s*([0-9.]+)"):
    """A vision-language model as the judge of caption and quality; the model's own licence (Qwen3-VL: Apache-2.0). The number after `pattern`, / 5;
    in [0, 1]. Needs an endpoint."""
    return judge(images, prompts, url, model, prompt, pattern, timeout, retries)


def unifiedreward(images, prompts, metadata=None, url="", model="CodeGoat24/UnifiedReward-qwen-7b", timeout=120.0, retries=3,
                  prompt=BOTH + " Write it after 'Final Score:'.", pattern=r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)"):
    """UnifiedReward (arXiv 2503.05236, MIT): caption and quality. The number after `pattern`, / 5; in [0.2, 1]. Needs an endpoint. The wording the
    model was trained on stands on its page: give it with unifiedreward.prompt=@FILE, {prompt} in the caption's place."""
    return judge(images, prompts, url, model, prompt, pattern, timeout, retries)


def judge(images, prompts, url, model, prompt, pattern, timeout, retries):
    """The number that `pattern` finds in the model's answer, over 5, a request per picture. -> (B,)"""
    def one(picture, text):
        answer = chat(url, model, prompt.replace("{prompt}", text), picture, timeout, retries, max_tokens=1024)
        said = answer["message"]["content"] if isinstance(answer.get("message"), dict) else ""
        found = re.findall(pattern, said) if isinstance(said, str) else []
        try:
            score = float(found[-1])
        except (IndexError, ValueError):
            raise RewardError(f"{url}: no score where {pattern!r} looks for one, in the answer {str(said)[-200:]!r}")
        if not 0 <= score <= 5:
            raise RewardError(f"{url}: a score of {score}, not within 0 to 5")
        return score / 5
    return ask_all(one, images, prompts)


def ask_all(one, images, prompts):
    """One question a picture, sixteen at a time. -> (B,)"""
    with ThreadPoolExecutor(16) as pool:
        return torch.tensor(list(pool.map(one, pil(images), prompts)), dtype=torch.float32)


def chat(url, model, text, picture, timeout, retries, **options):
    """The first choice of a chat completion about a picture."""
    if not url:
        raise Unavailable("needs an endpoint: NAME=openai+http://HOST:PORT/v1 (NAME=0.2,openai+... with a weight)")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()}}
    request = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": [image, {"type": "text", "text": text}]}]} | options
    key = os.environ.get("REWARD_API_KEY", "").strip()
    answer = post_json(url + "/chat/completions", request, timeout, retries, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        return answer["choices"][0] | {}
    except (KeyError, IndexError, TypeError):
        raise RewardError(f"{url}: answered {str(answer)[:200]!r}, not a chat completion")


# ----------------------------------------------------------------------------------------------------------------------
# reward servers

def served(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """A server of your own, --reward NAME=http://HOST:PORT/PATH. It gets {"reward": NAME, "images": [PNG in base64, ...], "prompts": [...],
    "metadata": [...]} as JSON by POST, and answers {"scores": [one number a picture]}."""
    pictures = [base64.b64encode(encoded(p)).decode() for p in pil(images)]
    answer = post_json(url, {"reward": name, "images": pictures, "prompts": prompts, "metadata": metadata}, timeout, retries)
    return numbers(answer.get("scores") if isinstance(answer, dict) else None, len(images), url)


def served_pickle(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """Flow-GRPO's servers (yifan123/reward-server), --reward NAME=pickle+http://HOST:PORT: pickled JPEGs go, a pickle comes, of which plain
    values alone are read: a reply that names any class or function is refused. `geneval` takes its "scores", `geneval_strict` its
    "rewards" (the official verdicts), any other name "outputs"."""
    question = {"images": [encoded(p, "JPEG") for p in pil(images)], "prompts": list(prompts), "meta_datas": list(metadata), "only_strict": False}
    reply = post(url, pickle.dumps(question), {"Content-Type": "application/octet-stream"}, timeout, retries)
    try:
        answer = PlainUnpickler(io.BytesIO(reply)).load()
    except Exception as error:  # a broken pickle can raise anything
        raise RewardError(f"{url}: {error if isinstance(error, RewardError) else 'a reply that is no pickle of plain values'}")
    key = {"geneval": "scores", "geneval_strict": "rewards"}.get(name, "outputs")
    return numbers(answer.get(key) if isinstance(answer, dict) else None, len(images), url)


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. Whatever would import something is refused, so a pickle cannot run code."""

    def find_class(self, module, name):
        raise RewardError(f"refused a pickle that names {module}.{name}")


def numbers(values, count, url):
    """A server's scores, one finite number a picture. -> (B,)"""
    if not isinstance(values, (list, tuple)) or len(values) != count or not all(isinstance(v, (int, float)) and abs(v) < 1e30 for v in values):
        raise RewardError(f"{url}: answered {str(values)[:200]}, not {count} finite numbers")
    return torch.tensor(values, dtype=torch.float32)


def post_json(url, data, timeout, retries, headers={}):
    reply = post(url, json.dumps(data).encode(), {"Content-Type": "application/json"} | headers, timeout, retries)
    try:
        return json.loads(reply)
    except ValueError:
        raise RewardError(f"{url}: answered {reply[:200]!r}, which is not JSON")


def post(url, body, headers, timeout, retries, most=2 ** 26):
    """POST; the reply's bytes. `timeout` seconds bound a whole attempt, however slowly the server drips; after a failure that may pass (no
    connection, no answer in time, 429, 5xx) it waits 1, 2, 4, ... seconds and tries again, `retries` times, then raises RewardError."""
    def attempt(answer):
        try:
            request = urllib.request.Request(url, body, headers)
            with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as response:
                answer.put(response.read(most + 1))
        except urllib.error.HTTPError as error:
            try:
                said = error.read(2000).decode(errors="replace").strip().splitlines()[-1:]
            except Exception:
                said = []
            temporary = error.code >= 500 or error.code == 429
            answer.put((OSError if temporary else RewardError)(f"HTTP {error.code} {error.reason}: {''.join(said)[:200]}"))
        except Exception as error:
            answer.put(error)

    for k in range(retries + 1):
        if k:
            time.sleep(2 ** (k - 1))
        answer = queue.Queue()
        threading.Thread(target=attempt, args=(answer,), daemon=True).start()
        try:
            reply = answer.get(timeout=timeout)
        except queue.Empty:
            reply = TimeoutError(f"no whole answer in {timeout:g} seconds")
        if isinstance(reply, bytes):
            if len(reply) > most:
                raise RewardError(f"{url}: an answer of more than {most >> 20} MB")
            return reply
        if not isinstance(reply, (OSError, http.client.HTTPException)):
            break
    raise Unavailable(f"{url}: {getattr(reply, 'reason', None) or reply} ({k + 1} attempt{'s' if k else ''})")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Pictures and keys go where the user sent them and nowhere else: a redirect is an error."""

    def redirect_request(self, *_):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# using them

REWARDS = {f.__name__: f for f in (geneval, geneval_strict, ocr, pickscore, clipscore, aesthetic, hpsv2, imagereward, blipvqa, deqa, qwenvl,
                                   unifiedreward, jpeg)}
TOY = ["toy.compose", "toy.ocr", "toy.scene", "toy.quality"]
CHECKS = {"ocr": lambda row: quoted_text(row["prompt"]), "geneval": check_geneval, "geneval_strict": check_geneval, "blipvqa": noun_phrases}
JUDGES = {"deqa", "qwenvl", "unifiedreward"}


class Reward(typing.NamedTuple):
    function: typing.Callable
    weight: float = 1.0
    task: str = None        # the only task it scores, if it was tied to one
    identity: str = ""      # what its scores depend on: full name and options


def load_reward(name):
    """The reward function of that name."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    if module and os.path.exists(os.path.join(HERE, module + ".py")):
        reward = getattr(importlib.import_module(module), function, None)
        if callable(reward):
            return reward
    die(f"--reward {name}: no such reward; there are {', '.join([*REWARDS, *TOY])}, module.function and NAME=URL")


def parse_rewards(specs, options=()):
    """["toy.ocr", "jpeg@scene=0.1"], ["ocr.KEY=VALUE"] -> {"ocr": Reward(function, 1.0), "jpeg": Reward(function, 0.1, "scene")}."""
    chosen, rewards = {}, {}
    for option in options or ():
        if not (m := re.fullmatch(r"([\w.-]+)\.(\w+)=(.*)", option, re.S)):
            die(f"--reward-option {option}: expected NAME.KEY=VALUE")
        chosen.setdefault(m[1], {})[m[2]] = m[3]
    for spec in specs or ():
        m = re.fullmatch(r"([\w.-]+)(?:@([\w-]+))?(?:=([\d.]+))?(?:[=,]((?:pickle\+|openai\+)?https?://\S+))?", spec)
        if not m or m[3] and not (re.fullmatch(r"\d+\.?\d*|\.\d+", m[3]) and float(m[3])):
            die(f"--reward {spec}: expected NAME, NAME@TASK, NAME=WEIGHT (a positive number), NAME=URL or NAME=WEIGHT,URL")
        full, name, url = m[1], m[1].rpartition(".")[2], (m[4] or "").rstrip("/")
        if name in rewards:
            die(f"--reward {spec}: {name} is given twice")
        kind = url.partition("http")[0]
        if kind == "openai+":
            function = load_reward(full) if full in JUDGES else die(f"--reward {spec}: openai+ is for {', '.join(sorted(JUDGES))}")
        else:
            function = {"": served, "pickle+": served_pickle}[kind] if url else load_reward(full)
        fixed = {"url": url.removeprefix(kind)} if url else {}
        if function in (served, served_pickle):
            fixed["name"] = name
        known = {k: p.default for k, p in inspect.signature(function).parameters.items()
                 if p.default is not p.empty and k not in ("prompts", "metadata", "url", "name")}
        given = chosen.pop(full, {})
        for key, text in given.items():
            if key not in known:
                die(f"--reward-option {full}.{key}: {full} has {', '.join(known) or 'no options'}")
            try:
                given[key] = open(text[1:]).read() if text.startswith("@") else {"True": True, "False": False}[text] if isinstance(
                    known[key], bool) else text if known[key] is None else type(known[key])(text)
                if key == "timeout" and not given[key] > 0 or key == "retries" and given[key] < 0:
                    raise ValueError("must be more than 0" if key == "timeout" else "must be at least 0")
            except (OSError, ValueError, KeyError, TypeError) as error:
                die(f"--reward-option {full}.{key}={text}: {error}")
            if key == "pattern":
                try:
                    groups = re.compile(given[key]).groups
                except re.error as error:
                    die(f"--reward-option {full}.pattern={text}: {error}")
                if groups != 1:
                    die(f"--reward-option {full}.pattern={text}: must have one group, around the number")
        lasting = {k: v for k, v in sorted(given.items()) if k not in ("timeout", "retries")}
        source = f"{kind}server {urllib.parse.urlparse(fixed['url']).path}" if url else ""  # the same server may move to another host
        if "." in full and not url:
            source = fingerprint(os.path.join(HERE, full.rpartition(".")[0] + ".py"))
        identity = " ".join(filter(None, (full, source, json.dumps(lasting) if lasting else "")))
        rewards[name] = Reward(functools.partial(function, **fixed, **given), float(m[3] or 1), m[2], identity)
    if chosen:
        die(f"--reward-option {', '.join(chosen)}: not among --reward {' '.join(specs or ())}")
    return rewards


def rewards_of(task, rewards, tasks):
    """The names of the rewards that score a task's prompts: its own and the task-agnostic ones."""
    own = lambda name: rewards[name].task or max((t for t in tasks if name == t or name.startswith(t + "_")), key=len, default=task)
    return [name for name in rewards if own(name) == task]


def check_rewards(rewards, prompts, resolution, device="cpu", tasks=None, needed=None):
    """Before any long work: every prompt must be of the kind its rewards can score, and every reward must score one grey picture, so
    that a missing package, model or server shows now (`needed`: only these are tried)."""
    for name, reward in rewards.items():
        if reward.task and reward.task not in (tasks or prompts):
            die(f"--reward {name}@{reward.task}: no such task; there are {', '.join(tasks or prompts)}")
        rows = [(task, row) for task in prompts if name in rewards_of(task, rewards, tasks or prompts) for row in prompts[task]]
        for task, row in rows if reward.function.func is REWARDS.get(name) else ():
            try:
                CHECKS.get(name, lambda row: None)(row)
            except ValueError as error:
                die(f"--prompts {task}: {error}")
            except RewardError as error:
                die(f"--reward {name}: {error}")
        if rows and (needed is None or name in needed):
            try:
                score_batch(torch.full((1, 3, resolution, resolution), 0.5, device=device), rows[:1], {name: reward}, tasks or prompts)
            except RewardError as error:
                die(f"--reward {error}")


@torch.no_grad()
def score_batch(images, batch, rewards, tasks):
    """{reward: (B,) float32, NaN where the reward does not apply}, for a batch of (task, row) pairs. Raises RewardError."""
    scores = {}
    for name, reward in rewards.items():
        rows = [i for i, (task, _) in enumerate(batch) if name in rewards_of(task, rewards, tasks)]
        scores[name] = torch.full((len(batch),), float("nan"))
        if rows:
            try:
                values = reward.function(images[rows], [batch[i][1]["prompt"] for i in rows], [batch[i][1] for i in rows])
            except (RewardError, ValueError) as error:  # ValueError: a prompt that this reward cannot score
                raise (Unavailable if isinstance(error, Unavailable) else RewardError)(f"{name}: {error}")
            assert values.shape == (len(rows),), f"reward {name} returned {tuple(values.shape)} for {len(rows)} pictures"
            scores[name][rows] = values.float().cpu()
            if not scores[name][rows].isfinite().all():
                raise RewardError(f"{name}: a score that is not finite, for {batch[rows[0]][1]['prompt']!r} or one beside it")
    return scores


class Scorer:
    """Scores batches in the background while the next one is sampled: the rewards beside one another, each one batch at a time."""

    def __init__(self, rewards, tasks, stop=None):
        self.rewards, self.tasks, self.stop, self.batches, self.locks = rewards, tasks, stop, [], {name: threading.Lock() for name in rewards}

    def submit(self, images, batch):
        """images: (B, 3, H, W), batch: B pairs (task, row). Waits where the rewards lag four batches behind, so that pictures do not pile up."""
        def job(name, future):
            with self.locks[name]:
                try:
                    future.set_result(score_batch(images, batch, {name: self.rewards[name]}, self.tasks)[name])
                except BaseException as error:
                    future.set_exception(error)
        self.batches.append({name: Future() for name in self.rewards})
        for name, future in self.batches[-1].items():
            threading.Thread(target=job, args=(name, future), name=f"reward {name}", daemon=True).start()
        for future in self.batches[-5].values() if len(self.batches) > 4 else ():
            self.wait(future)

    def wait(self, future):
        """A future's result; None if the process is told to stop (stop: its StopSignal) before there is one."""
        while not (self.stop and self.stop.name):
            if wait([future], timeout=0.2).done:
                return future.result()

    def collect(self):
        """{reward: (all submitted,) float32, NaN where it does not apply}, when all are scored; None if told to stop before. This and
        `submit` raise RewardError."""
        batches, self.batches = self.batches, []
        scores = {name: [self.wait(b[name]) for b in batches] for name in self.rewards}
        return None if self.stop and self.stop.name else {name: torch.cat(values) for name, values in scores.items()}


def evaluate(model, adapter, prompts, rewards, args, rank=0, world=1, guidance=None, tasks=None, progress=None, stop=None):
    """Mean score and standard error of each reward over the prompts it applies to, one picture a prompt, deterministic sampling.
    Prompt i of a task always starts from the same noise, so the result depends on neither the batch size nor the number of ranks.
    args: eval_num_steps, resolution, eval_batch_size, seed, guidance; tasks: all tasks of the run, if the prompts are of only some.
    -> {"n", "scores", "stderr"}, or None if a process was told to stop (stop: its StopSignal)."""
    items = [(task, row) for task, rows in prompts.items() for row in rows]
    mine = list(range(rank, len(items), world))
    scorer, table = Scorer(rewards, tasks or prompts, stop), torch.zeros(len(rewards), len(items))
    try:
        for start in range(0, len(mine), args.eval_batch_size):
            if stop and stop.name:
                break
            indices = mine[start:start + args.eval_batch_size]
            batch = [items[i] for i in indices]
            scorer.submit(model.generate([row["prompt"] for _, row in batch], generators(args.seed, 0, indices), args.eval_num_steps,
                                         args.resolution, adapter, args.guidance if guidance is None else guidance), batch)
            if progress:
                progress(len(batch))
        else:
            if mine and (scores := scorer.collect()):
                table[:, mine] = torch.stack(list(scores.values()))
    except RewardError as error:
        stop.fail(f"--reward {error}") if stop else die(f"--reward {error}")
    if stop and stop.arrived(model.device):
        return None
    table = reduce_sum(table.to(model.device)).cpu().double()
    result = {"n": len(items), "scores": {}, "stderr": {}}
    for name, values in zip(rewards, table):
        values = values[~values.isnan()]
        if len(values):  # a reward whose task has no prompts here has no column
            result["scores"][name], result["stderr"][name] = mean_error(values)
    return result


def weighted_sum(scores, rewards):
    """The rewards of a batch mixed: sum_i w_i r_i / sum_i w_i over the rewards that apply to a sample. -> (B,)"""
    values = torch.stack(list(scores.values()))
    weights = torch.tensor([rewards[name].weight for name in scores])[:, None] * ~values.isnan()
    return (values.nan_to_num() * weights).sum(0) / weights.sum(0)


def mean_error(values):
    """Mean and standard error of the mean (None for one value)."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def markdown(rows):
    """The results as a Markdown table, one line a model: mean ± standard error, or how many scores are missing."""
    names = list(dict.fromkeys(name for r in rows for name in [*r["scores"], *r.get("missing", ())]))

    def cell(r, name):
        if name not in r["scores"]:
            return f"{r['missing'][name]} missing" if name in r.get("missing", ()) else ""
        return f"{r['scores'][name]:.3f}" + (f" ± {error:.3f}" if (error := r["stderr"].get(name)) is not None else "")
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return "\n".join(lines + [f"| {r['model']} | " + " | ".join(cell(r, name) for name in names) + " |" for r in rows])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for name in [*REWARDS, *TOY]:
            print(f"{name}\n    " + "\n    ".join(inspect.cleandoc(load_reward(name).__doc__).splitlines()))
    elif len(sys.argv) >= 4:
        spec, picture, prompt, *options = sys.argv[1:]
        full = re.match(r"[\w.-]*", spec)[0]
        rewards = parse_rewards([spec], [f"{full}.{option}" for option in options])
        image = read_picture(picture)[None]
        try:
            row = json.loads(prompt) if prompt.startswith("{") else {"prompt": prompt}
            if not isinstance(row.get("prompt"), str):
                raise ValueError('PROMPT: a JSON row needs a "prompt"')
            [(name, reward)] = rewards.items()
            check_rewards(rewards, {reward.task or "": [row]}, 64, needed=())
            print(f"{score_batch(image, [(reward.task or '', row)], rewards, [])[name].item():.4f}")
        except (RewardError, ValueError) as error:
            die(str(error))
    else:
        die("usage: rewards.py NAME PICTURE PROMPT [KEY=VALUE ...], or no argument for the list")
