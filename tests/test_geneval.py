"""GenEval: the rules on hand-made detections, the detector's arithmetic, and the whole path on small random models in the real classes."""

import json
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_clip
from PIL import Image

import rewards
from rewards import Object


def thing(x, y, size=10, score=0.95):
    """A detection with its middle at (x, y)."""
    return Object(score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), None)


def verdict(row, objects, shown=None, tag="single_object"):
    """(correct, reason, credit) of detections {class: [Object]}; shown: {class: the colours CLIP would see, most certain first}."""
    found = rewards.confident(objects, row.get("tag", tag))
    colors = lambda group, name: shown[name][: len(group)]
    return *rewards.geneval_correct(found, colors, row), rewards.geneval_credit(found, colors, row)


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
RED, BLUE = {"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}
LEFT = {"class": "cat", "count": 1, "position": ["left of", 0]}
ONE = [thing(50, 50)]


@pytest.mark.parametrize(
    "row, objects, shown, correct, credit, why",
    [
        # single_object: at least one is right, but exactly one earns full credit
        ({"include": [DOG]}, {"dog": ONE}, None, True, 1, ""),
        ({"include": [DOG]}, {"cat": ONE}, None, False, 0, "dog: 0 of 1"),
        ({"include": [DOG]}, {"dog": ONE * 2}, None, True, 0, ""),
        ({"include": [DOG]}, {"dog": ONE * 5}, None, True, 0, ""),  # not below 0
        ({"include": [DOG]}, {}, None, False, 0, "dog: 0 of 1"),
        # two_object
        ({"include": [DOG, CAT]}, {"dog": ONE, "cat": ONE}, None, True, 1, ""),
        ({"include": [DOG, CAT]}, {"dog": ONE}, None, False, 0.5, "cat: 0 of 1"),
        # counting: `exclude` forbids one more
        (
            {
                "include": [{"class": "dog", "count": 3}],
                "exclude": [{"class": "dog", "count": 4}],
                "tag": "counting",
            },
            {"dog": ONE * 3},
            None,
            True,
            1,
            "",
        ),
        (
            {
                "include": [{"class": "dog", "count": 3}],
                "exclude": [{"class": "dog", "count": 4}],
                "tag": "counting",
            },
            {"dog": ONE * 4},
            None,
            False,
            2 / 3,
            "dog: 4, should be fewer than 4",
        ),
        (
            {
                "include": [{"class": "dog", "count": 3}],
                "exclude": [{"class": "dog", "count": 4}],
                "tag": "counting",
            },
            {"dog": ONE * 2},
            None,
            False,
            2 / 3,
            "dog: 2 of 3",
        ),
        # colors
        ({"include": [RED]}, {"dog": ONE}, {"dog": ["red"]}, True, 1, ""),
        ({"include": [RED]}, {"dog": ONE}, {"dog": ["pink"]}, False, 0.5, "dog: pink, not red"),
        (
            {"include": [RED]},
            {"dog": ONE * 2},
            {"dog": ["red", "blue"]},
            True,
            0,
            "",
        ),  # the most certain one is red; two are one too many
        ({"include": [RED]}, {"dog": ONE * 2}, {"dog": ["blue", "red"]}, False, 0, "dog: blue, not red"),
        (
            {"include": [{"class": "dog", "count": 2, "color": "red"}]},
            {"dog": ONE * 2},
            {"dog": ["red", "blue"]},
            False,
            0.75,
            "dog: red, blue, not red",
        ),
        ({"include": [RED]}, {}, None, False, 0, "dog: 0 of 1"),
        # color_attr
        ({"include": [RED, BLUE]}, {"dog": ONE, "cat": ONE}, {"dog": ["red"], "cat": ["blue"]}, True, 1, ""),
        (
            {"include": [RED, BLUE]},
            {"dog": ONE, "cat": ONE},
            {"dog": ["blue"], "cat": ["red"]},
            False,
            0.5,
            "dog: blue, not red; cat: red, not blue",
        ),
        (
            {"include": [RED, BLUE]},
            {"dog": ONE, "cat": ONE},
            {"dog": ["red"], "cat": ["red"]},
            False,
            0.75,
            "cat: red, not blue",
        ),
        # position
        ({"include": [DOG, LEFT]}, {"dog": [thing(90, 50)], "cat": [thing(10, 50)]}, None, True, 1, ""),
        (
            {"include": [DOG, LEFT]},
            {"dog": [thing(10, 50)], "cat": [thing(90, 50)]},
            None,
            False,
            2 / 3,
            "cat: not left of the target but right of",
        ),
        (
            {"include": [DOG, LEFT]},
            {"dog": [thing(50, 50)], "cat": [thing(50, 50)]},
            None,
            False,
            2 / 3,
            "cat: not left of the target but nowhere",
        ),
        (
            {"include": [DOG, LEFT]},
            {"cat": [thing(10, 50)]},
            None,
            False,
            1 / 3,
            "dog: 0 of 1; cat: no target",
        ),
        ({"include": [DOG, LEFT]}, {"dog": [thing(90, 50)]}, None, False, 1 / 3, "cat: 0 of 1"),
        # two cats, the more certain one in the right place: right by the official rule, without credit for number and place
        (
            {"include": [DOG, LEFT]},
            {"dog": [thing(90, 50)], "cat": [thing(10, 50), thing(95, 50, score=0.5)]},
            None,
            True,
            1 / 3,
            "",
        ),
        (
            {"include": [DOG, {"class": "cat", "count": 2, "position": ["left of", 0]}]},
            {"dog": [thing(90, 50)], "cat": [thing(10, 50), thing(99, 99)]},
            None,
            False,
            2 / 3,
            "cat: not left of the target but below",
        ),  # every one must be in its place
    ],
)
def test_verdicts(row, objects, shown, correct, credit, why):
    was, reason, part = verdict(row, objects, shown)
    assert (was, reason) == (correct, why) and part == pytest.approx(credit)


@pytest.mark.parametrize(
    "tag, score, count",
    [
        ("single_object", 0.3, 0),
        ("single_object", 0.3001, 1),
        ("colors", 0.31, 1),
        ("counting", 0.9, 0),
        ("counting", 0.9001, 1),
        ("position", 0.9, 1),
    ],
)
def test_thresholds(tag, score, count):
    assert len(rewards.confident({"dog": [thing(5, 5, score=score)]}, tag).get("dog", [])) == count


def test_most_certain_sixteen():
    scores = np.random.default_rng(0).permutation(np.linspace(0.4, 0.9, 20))
    kept = rewards.confident({"dog": [thing(5, 5, score=s) for s in scores]}, "two_object")["dog"]
    assert [o.score for o in kept] == sorted(scores, reverse=True)[:16]


@pytest.mark.parametrize(
    "dx, dy, names",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),
        (-30, 25, {"left of", "below"}),
        (2, 0, set()),
        (0, -2, set()),
        (2.1, 0, set()),
        (
            30,
            4,
            {"right of"},
        ),  # two boxes of 10: an offset up to 2 is none; then dx / |offset| must exceed 0.5
        (4.1, 0, {"right of"}),
        (3.9, 0, set()),
        (0, 0, set()),
    ],
)  # (4.1 - 2) / 4.1 = 0.512, (3.9 - 2) / 3.9 = 0.487
def test_relations(dx, dy, names):
    assert rewards.relations(thing(50 + dx, 50 + dy).box, thing(50, 50).box) == names


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a dog"},
        {"prompt": "x", "tag": "colors", "include": [{"class": "dragon", "count": 1}]},
        {"prompt": "x", "tag": "colors", "include": [{"class": "dog"}]},
        {"prompt": "x", "tag": "colors", "include": [{"class": "dog", "count": 1, "color": "mauve"}]},
        {"prompt": "x", "tag": "colors", "include": []},
        {"prompt": "x", "tag": "colors", "include": ["dog"]},
        {"prompt": "x", "tag": "colors", "include": [DOG], "exclude": None},
        {"prompt": "x", "tag": "c", "include": [{"class": "dog", "count": "2"}]},
        {"prompt": "x", "tag": "position", "include": [DOG, {**CAT, "position": ["on top of", 0]}]},
        {"prompt": "x", "tag": "position", "include": [DOG, {**CAT, "position": ["above", 1]}]},
        {"prompt": "x", "tag": "position", "include": [DOG, {**CAT, "position": "above"}]},
    ],
)
def test_prompts_without_metadata_are_refused(row):
    with pytest.raises(
        SystemExit, match="--prompts things: (a geneval prompt needs|not something geneval can look for)"
    ):
        rewards.check_rewards(rewards.parse_rewards(["geneval"]), {"things": [row]}, 64)


def test_boxes_and_scores_are_mmdetections(monkeypatch):
    """A network that sees a dog in a known rectangle of a 120 x 200 picture, twice; and a cat that is too uncertain."""

    class Network(torch.nn.Module):
        def forward(self, pixel_values):
            height, width = pixel_values.shape[-2:]
            assert (height, width) == (800, 1344) and pixel_values[
                0, :, :, 1333:
            ].abs().max() == 0  # 800 x 1333, padded to multiples of 32
            masks = torch.full((1, 3, height // 4, width // 4), -8.0)
            masks[:, :2, 50:150, 100:200] = 3.0
            masks[:, 2, :20, :20] = 5.0
            classes = torch.full((1, 3, 81), -10.0)
            classes[0, 0, 16], classes[0, 1, 16], classes[0, 1, 80], classes[0, 2, 15], classes[0, 2, 80] = (
                5,
                1,
                1.5,
                0,
                1,
            )
            return types.SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)

    monkeypatch.setattr(rewards, "load_detector", lambda name, device: Network())
    [found] = rewards.detect(torch.rand(1, 3, 120, 200, generator=torch.Generator().manual_seed(0)))
    assert list(found) == ["dog"] and len(found["dog"]) == 2
    first, second = found["dog"]
    x1, y1, x2, y2 = (
        first.box
    )  # input pixels / 4, then 800 / 120 and 1333 / 200 input pixels to one of the picture's
    assert (
        abs(x1 - 400 / 6.665) <= 1
        and abs(x2 - 800 / 6.665) <= 1
        and abs(y1 - 200 / 6.667) <= 1
        and abs(y2 - 600 / 6.667) <= 1
    )
    assert (
        first.mask.shape == (120, 200)
        and first.mask[y1:y2, x1:x2].all()
        and first.mask.sum() == (x2 - x1) * (y2 - y1)
    )
    assert (
        first.score == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item(), abs=0.03)
        and 0.3 < second.score < 0.4
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random Mask2Former and a random CLIP, small, in the folders their classes save."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=SwinConfig(
                embed_dim=12,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 2],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=12,
            num_labels=80,
        )
    )
    network.class_predictor.weight.data *= 60  # some are sure of what they see
    network.save_pretrained(folder / "detector")
    return {"detector": str(folder / "detector"), "clip": small_clip(folder / "clip")}


def test_detector_and_clip_end_to_end(models):
    """Random pictures through the real classes; the detections against the same formulas without any shortcut, the colours against CLIP's own."""
    from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

    images = F.interpolate(torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)), 96)
    found = rewards.detect(images, models["detector"])
    network = Mask2FormerForUniversalSegmentation.from_pretrained(models["detector"]).eval()
    total = 0
    for image, objects in zip(images, found):
        x = F.interpolate(image[None], (800, 800), mode="bilinear", align_corners=False)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        with torch.no_grad():
            out = network(pixel_values=x)
        scores = []
        for query in range(12):
            mask = F.interpolate(
                F.interpolate(out.masks_queries_logits[:, query : query + 1], (800, 800), mode="bilinear"),
                (96, 96),
                mode="bilinear",
            )[0, 0]
            for label in range(80):
                inside = mask[mask > 0]
                p = out.class_queries_logits[0, query].softmax(-1)[label].item() * (
                    inside.sigmoid().mean().item() if len(inside) else 0
                )
                if p > 0.3:
                    rows, columns = (
                        (mask > 0).any(1).nonzero().flatten(),
                        (mask > 0).any(0).nonzero().flatten(),
                    )
                    scores.append(
                        (
                            rewards.OBJECTS[label],
                            p,
                            (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1),
                        )
                    )
        got = [(name, o.score, o.box) for name, group in objects.items() for o in group]
        assert [(n, b) for n, _, b in sorted(got)] == [(n, b) for n, _, b in sorted(scores)]
        assert [p for _, p, _ in sorted(got)] == pytest.approx([p for _, p, _ in sorted(scores)], abs=1e-4)
        total += len(scores)
    assert total >= 2  # the comparison was of something
    name, group = next(iter(found[0].items()))
    colors = rewards.object_colors(rewards.pil(images)[0], group, name, models["clip"], torch.device("cpu"))
    picture = np.array(rewards.pil(images)[0])
    picture[~group[0].mask] = 0x99
    crop = Image.fromarray(picture).crop(group[0].box)
    clip, tokenizer = (
        CLIPModel.from_pretrained(models["clip"]),
        rewards.load_clip(models["clip"], models["clip"], torch.device("cpu"))[1],
    )
    with torch.no_grad():
        seen = clip.visual_projection(clip.vision_model(rewards.resized([crop], 28)).pooler_output)[0]
        words = []
        for color in rewards.COLORS:
            texts = [
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            ]
            each = clip.text_projection(
                clip.text_model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
            )
            words.append((each / each.norm(dim=-1, keepdim=True)).mean(0))
        best = torch.stack([seen @ w / w.norm() for w in words]).argmax()
    assert colors[0] == rewards.COLORS[best] and len(colors) == len(group)
    row = {
        "prompt": "p",
        "tag": "colors",
        "include": [{"class": name, "count": len(group), "color": colors[0]}],
    }
    chosen = rewards.parse_rewards(
        ["geneval", "geneval_strict"],
        [f"{r}.{k}={v}" for r in ("geneval", "geneval_strict") for k, v in models.items()],
    )
    scores = rewards.score_batch(
        images,
        [("geneval", row), ("geneval", {**row, "include": [{"class": "toothbrush", "count": 1}]})],
        chosen,
        ["geneval"],
    )
    assert scores["geneval_strict"][0] == float(set(colors) == {colors[0]}) and scores["geneval"][
        0
    ] == pytest.approx(0.5 + colors.count(colors[0]) / len(colors) / 2)
    assert scores["geneval_strict"][1] == float("toothbrush" in found[1])


def test_a_missing_color_model_shows_before_the_work(models):
    row = {"prompt": "p", "tag": "two_object", "include": [DOG]}
    with pytest.raises(SystemExit, match="--reward geneval: /nowhere could not be loaded"):
        rewards.check_rewards(
            rewards.parse_rewards(
                ["geneval"], [f"geneval.detector={models['detector']}", "geneval.clip=/nowhere"]
            ),
            {"t": [row]},
            32,
        )


def test_one_detection_for_both_scores(models, monkeypatch):
    calls, detect = [], rewards.detect
    monkeypatch.setattr(rewards, "detect", lambda *a: calls.append(1) or detect(*a))
    row = {"prompt": "p", "tag": "two_object", "include": [DOG, CAT]}
    images = torch.rand(1, 3, 32, 32)
    for other in (images, images, images.flip(0, 1), images):
        rewards.geneval(other, ["p"], [row], **models), rewards.geneval_strict(other, ["p"], [row], **models)
    assert len(calls) == 3


def test_one_score_from_the_command_line(models, tmp_path, capsys):
    from conftest import run

    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "p.png")
    row = json.dumps({"prompt": "p", "tag": "two_object", "include": [DOG, CAT]})
    run(
        "rewards.py",
        "geneval_strict",
        tmp_path / "p.png",
        row,
        f"detector={models['detector']}",
        f"clip={models['clip']}",
    )
    assert float(capsys.readouterr().out) in (0, 1)
