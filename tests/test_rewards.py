"""The rewards on pictures and numbers whose score is known."""

import os
import random
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards

FONTS = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data/fonts/ttf")
TEXTS = ["Grand Opening", "Fresh Bread Daily", "EXIT 24", "Room 101", "Wet Paint", "Happy Birthday", "Platform 9", "Sale 50 Off", "Do Not Disturb",
         "Coffee to Go", "Library Hours", "Route 66", "Lost and Found", "Science Fair 2024", "Speed Limit 35", "Keep Off the Grass", "Best in Show",
         "Follow Your Dreams", "Tickets Here", "Open Late"]


def written(text, font, size, ink, paper):
    """A picture (3, 512, 512) with a text in the middle, in as many lines as it needs."""
    canvas = Image.new("RGB", (512, 512), paper)
    pen, face = ImageDraw.Draw(canvas), ImageFont.truetype(font, size)
    lines = [""]
    for word in text.split():
        longer = (lines[-1] + " " + word).strip()
        lines = lines[:-1] + [longer] if pen.textlength(longer, face) < 460 else lines + [word]
    pen.multiline_text((256, 256), "\n".join(lines), fill=ink, font=face, anchor="mm", align="center")
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0).float() / 255


def test_ocr_reads_drawn_text():
    """200 pictures: 20 texts, ten fonts and sizes from 28 to 64, dark on light and light on dark."""
    draw = random.Random(0)
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
             "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol")
    jobs = [(text, os.path.join(FONTS, name + ".ttf")) for text in TEXTS for name in names]
    images = [written(text, font, draw.choice((28, 36, 48, 64)), *draw.choice((("black", "white"), ("navy", "lightyellow"), ("white", "darkgreen"))))
              for text, font in jobs]
    scores = rewards.ocr(torch.stack(images), [f'A sign that says "{text}"' for text, _ in jobs])
    print("mean", scores.mean().item(), "exact", (scores == 1).float().mean().item())
    assert scores.mean() >= 0.97 and scores.dtype == torch.float32 and scores.shape == (200,)
    assert rewards.ocr(torch.ones(2, 3, 512, 512), ['a "word"', 'a “Word”']).tolist() == [0, 0]
    wrong = rewards.ocr(images[0][None], ['A sign that says "Zulu Quiz"'])
    assert wrong.item() < 0.5


@pytest.mark.parametrize("read, prompt, score", [
    ("Hello", 'a "Hello"', 1), ("hEL lo", 'a "H e l l o"', 1), ("xxhelloyy", 'a "hello"', 1),         # case, spaces, substring
    ("", 'a "hello"', 0), ("hallo", 'a "hello"', 0.8), ("zzzzzzzzzzz", 'a "hello"', 0),               # distance, at most the length
    ("first", 'a "first" and "second"', 1), ("second", 'a "first" and "second"', 0),                 # the first quoted text
    ("caf\u00e9", "a \u201cCaf\u00e9\u201d", 1), ("helo", 'a "hello"', 0.8), ("hellllo", 'a "hello"', 0.6)])
def test_text_score_at_every_edge(read, prompt, score):
    assert rewards.text_score(read, prompt) == pytest.approx(score)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    rewards.read_text.cache_clear()
    with pytest.raises(SystemExit, match="--reward ocr: pip install rapidocr$"):
        rewards.check_rewards(rewards.parse_rewards(["ocr"]), {"signs": [{"prompt": 'a "word"'}]}, 64)


@pytest.mark.parametrize("prompt", ["no quotes", 'an empty ""', 'blank "  "'])
def test_a_prompt_without_text_is_refused(prompt):
    with pytest.raises(ValueError, match="double quotes"):
        rewards.text_score("x", prompt)
