"""GenEval (arXiv 2310.11513): a detector finds the objects, CLIP names their colours, and rules judge."""

import functools
import hashlib
import json
import threading
import typing

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import Unavailable, need, pil, remembered
from scorers.preference import CLIP_L, load, load_clip, normalize, resized, tokens

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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


_verdicts, _verdicts_lock = {}, threading.Lock()  # of the last batch


def geneval_verdicts(images, metadata, detector=DETECTOR, clip=CLIP_L):
    """[(correct, credit)] of a batch, remembered so that both scores cost one detection."""
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


geneval.check = geneval_strict.check = check_geneval


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
    names = [network.config.id2label.get(i, "") for i in range(network.config.num_labels)]
    same = sum(name == ours for name, ours in zip(names, OBJECTS))
    if len(names) != len(OBJECTS) or same < 60:  # publishers differ in a few: sofa, tvmonitor, mouse
        raise Unavailable(f"{detector} knows {len(names)} classes, of which {same} are COCO's 80 by name")
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


@remembered
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
