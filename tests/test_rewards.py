"""Pictures, and the rewards on pictures and numbers whose score is known."""

import gc
import importlib
import itertools
import os
import random
import re
import struct
import sys
import types
import weakref
import zlib

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, finish, refused, run
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import rewards

FONTS = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data/fonts/ttf")
NAMES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"]
NAMES += ["DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"]
TEXTS = """Grand Opening, Fresh Bread Daily, EXIT 24, Room 101, Wet Paint, Happy Birthday, Platform 9,
Sale 50 Off, Do Not Disturb, Coffee to Go, Library Hours, Route 66, Lost and Found, Science Fair 2024,
Speed Limit 35, Keep Off the Grass, Best in Show, Follow Your Dreams, Tickets Here, Open Late"""
TEXTS = TEXTS.replace("\n", " ").split(", ")
COLORS = ("black", "white"), ("navy", "lightyellow"), ("white", "darkgreen")


def typeface(name, size):
    return ImageFont.truetype(os.path.join(FONTS, name + ".ttf"), size)


def tensor(picture):
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255


def written(text, name, size, ink, paper):
    """A picture (3, 512, 512) with a text in the middle, in as many lines as it needs."""
    canvas = Image.new("RGB", (512, 512), paper)
    pen, face = ImageDraw.Draw(canvas), typeface(name, size)
    lines = [""]
    for word in text.split():
        longer = (lines[-1] + " " + word).strip()
        lines = lines[:-1] + [longer] if pen.textlength(longer, face) < 460 else lines + [word]
    pen.multiline_text((256, 256), "\n".join(lines), fill=ink, font=face, anchor="mm", align="center")
    return tensor(canvas)


def turned(layer, angle, ink, paper):
    """What stands in the middle of a layer of 1024 pixels, turned, in ink on paper: (3, 512, 512)."""
    layer = layer.rotate(angle, Image.Resampling.BICUBIC).crop((256, 256, 768, 768))
    ink, paper = Image.new("RGB", layer.size, ink), Image.new("RGB", layer.size, paper)
    return tensor(Image.composite(ink, paper, layer))


def realistic(count):
    """Texts in one to three lines, turned by up to 15 degrees, of low contrast: [(picture, text)]."""
    draw, made = random.Random(1), []
    while len(made) < count:
        text = draw.choice(TEXTS)
        words = text.split()
        cuts = sorted(draw.sample(range(1, len(words)), draw.randint(1, min(3, len(words))) - 1))
        lines = [" ".join(words[a:b]) for a, b in zip([0, *cuts], [*cuts, len(words)])]
        face = typeface(draw.choice(NAMES), draw.choice((28, 36, 44, 56)))
        if max(map(face.getlength, lines)) > 430:
            continue
        layer = Image.new("L", (1024, 1024))
        style = dict(fill=255, font=face, anchor="mm", align="center")
        ImageDraw.Draw(layer).multiline_text((512, 512), "\n".join(lines), **style)
        paper = [draw.randint(60, 190) + draw.randint(-15, 15) for _ in "rgb"]
        contrast = draw.choice((50, 60, 80, 100)) * draw.choice((-1, 1))
        ink = [min(max(p + contrast, 0), 255) for p in paper]
        made.append((turned(layer, draw.uniform(-15, 15), tuple(ink), tuple(paper)), text))
    return made


def laid_out(count):
    """Words far apart or of several sizes, on lines that rise or fall by up to 12 degrees: [(picture,
    text)]."""
    draw, made = random.Random(2), []
    while len(made) < count:
        words = draw.choice([*TEXTS, "only $9", "Now 50 Percent", "Big Summer Sale", "just 3 days"]).split()
        name, apart = draw.choice(NAMES), draw.random() < 0.5
        sizes = [draw.choice((28, 36, 48))] * len(words)
        if not apart:
            sizes = [draw.choice((24, 32, 40, 56, 72)) for _ in words]
        gap = draw.choice((50, 80, 110) if apart else (14, 20, 30))
        lines, x = [[]], 0
        for word, size in zip(words, sizes):
            face = typeface(name, size)
            if x and x + face.getlength(word) > 400:
                lines, x = lines + [[]], 0
            lines[-1].append((word, face, x))
            x += face.getlength(word) + gap
        heights = [1.25 * max(face.size for _, face, _ in line) for line in lines]
        if sum(heights) > 330:
            continue
        layer, y = Image.new("L", (1024, 1024)), 512 - sum(heights) / 2
        for line, height in zip(lines, heights):
            last_word, last_face, last_x = line[-1]
            left = 512 - (last_x + last_face.getlength(last_word)) / 2
            anchor, share = draw.choice(
                (("ls", 0.8), ("lm", 0.5))
            )  # on one base line, or middles on one line
            for word, face, x in line:
                corner = left + x, y + height * share
                ImageDraw.Draw(layer).text(corner, word, fill=255, font=face, anchor=anchor)
            y += height
        ink, paper = draw.choice((*COLORS, ("navy", "lightblue")))
        made.append((turned(layer, draw.choice((0, 4, -4, 8, -8, 12, -12)), ink, paper), " ".join(words)))
    return made


def test_ocr_reads_drawn_text():
    """Texts in fonts and sizes from 28 to 64, dark on light and light on dark: a twentieth of all pairs."""
    draw = random.Random(0)
    pairs = list(itertools.product(TEXTS, NAMES))[::22]
    images = [written(*pair, draw.choice((28, 36, 48, 64)), *draw.choice(COLORS)) for pair in pairs]
    scores = rewards.ocr(torch.stack(images), [f'A sign that says "{text}"' for text, _ in pairs])
    print(len(images), "mean", scores.mean().item(), "exact", (scores == 1).float().mean().item())
    assert scores.mean() >= 0.97 and scores.dtype == torch.float32 and scores.shape == (10,)
    assert rewards.ocr(torch.ones(2, 3, 512, 512), ['a "word"', "a “Word”"]).tolist() == [0, 0]
    assert rewards.ocr(images[0][None], ['A sign that says "Zulu Quiz"']).item() < 0.5


@pytest.mark.parametrize("kind, count, least", [(realistic, 6, 0.98), (laid_out, 6, 0.98)])
def test_ocr_reads_in_the_order_of_people(kind, count, least):
    images, texts = zip(*kind(count))
    scores = rewards.ocr(torch.stack(images), [f'a sign that says "{text}"' for text in texts])
    print(kind.__name__, "mean", scores.mean().item(), [t for t, s in zip(texts, scores) if s < 1])
    assert scores.mean() >= least


def box(x, y, width, height, degrees=0):
    """The four corners of a piece of text whose middle is (x, y), on a line through the origin turned by
    degrees."""
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2) + (x, y)
    a = np.deg2rad(degrees)
    return corners @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


PIECES = {
    "far apart": [(100, 50, 80, 30), (300, 50, 80, 30)],
    "only $9: small, then large": [(100, 70, 60, 20), (180, 50, 80, 70)],
    "SALE, 50% over off": [(100, 50, 100, 60), (200, 35, 60, 20), (200, 66, 60, 20)],
    "three lines": [(150, 50, 200, 30), (90, 82, 80, 30), (220, 84, 60, 28), (150, 120, 90, 30)],
    "the second begins further left": [(300, 50, 40, 30), (100, 90, 300, 30)],
    "a staircase that rises": [(60, 200, 80, 40), (160, 175, 90, 40), (250, 100, 60, 40), (340, 40, 80, 40)],
    "a staircase that falls": [(60, 40, 80, 40), (160, 65, 90, 40), (250, 140, 60, 40), (340, 200, 80, 40)],
}


@pytest.mark.parametrize("degrees", [0, 4, -4, 15, -15, 40])
@pytest.mark.parametrize("name", PIECES)
def test_reading_order(name, degrees):
    boxes = np.array([box(*piece, degrees) for piece in PIECES[name]])
    numbers = list(range(len(boxes)))
    assert rewards.reading_order(boxes) == numbers
    shuffled = np.random.default_rng(0).permutation(len(boxes))
    assert [shuffled[i] for i in rewards.reading_order(boxes[shuffled])] == numbers


def test_reading_order_of_a_books_spine():
    """Two lines turned clockwise: the right column first, each from the top."""
    boxes = np.array([box(140, 100, 40, 120), box(145, 240, 40, 80), box(80, 120, 40, 150)])
    for order in itertools.permutations(range(3)):
        assert [order[i] for i in rewards.reading_order(boxes[list(order)])] == [0, 1, 2]


def stairs(words, rise):
    """A picture (3, 512, 512) of words, each higher than the one before by so many pixels."""
    canvas, face, x, y = Image.new("RGB", (512, 512), "white"), typeface("DejaVuSans", 36), 20, 400
    for word in words:
        ImageDraw.Draw(canvas).text((x, y), word, fill="black", font=face, anchor="ls")
        x, y = x + face.getlength(word) + 14, y - rise
    return tensor(canvas)


def test_ocr_reads_staircases_and_spines():
    pictures = [stairs(["One", "two", "three", "four"], rise) for rise in (25, 50, 90)]
    layer = Image.new("L", (1024, 1024))
    style = dict(fill=255, font=typeface("DejaVuSans", 40), anchor="mm", align="center")
    ImageDraw.Draw(layer).multiline_text((512, 512), "The Great\nGatsby", **style)
    pictures.append(turned(layer, -90, "black", "white"))
    prompts = ['a "One two three four"'] * 3 + ['a spine: "The Great Gatsby"']
    assert rewards.ocr(torch.stack(pictures), prompts).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("height, width", [(1, 600), (2000, 2), (16, 1024)])
def test_ocr_of_a_strip_asks_the_engine_for_no_gigabytes(height, width):
    """The engine makes the shorter side 736 pixels, the other in proportion: at most 4 times as many."""
    strip = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    wider = rewards.widened(strip)
    assert max(wider.shape) <= 4 * min(wider.shape[:2]) + 4
    assert (wider[:height, :width] == strip).all()
    assert rewards.widened(wider).shape == wider.shape


def test_reading_order_where_short_boxes_do_not_show_the_slope():
    """Three words on a line that rises by 8 degrees, as a detector finds them: their boxes hardly rise."""
    boxes = np.array([box(107, 276, 74, 42), box(265, 255, 48, 40), box(414, 234, 62, 48)])
    assert rewards.reading_order(boxes) == [0, 1, 2]


@pytest.mark.parametrize(
    "read, prompt, score",
    [
        ("Hello", 'a "Hello"', 1),
        ("hEL lo", 'a "H e l l o"', 1),
        ("xxhelloyy", 'a "hello"', 1),  # case, spaces, substring
        ("", 'a "hello"', 0),
        ("hallo", 'a "hello"', 0.8),
        ("zzzzzzzzzzz", 'a "hello"', 0),  # distance, at most the length
        ("first", 'a "first" and "second"', 1),
        ("second", 'a "first" and "second"', 0),  # the first quoted text
        ("caf\u00e9", "a \u201cCaf\u00e9\u201d", 1),
        ("helo", 'a "hello"', 0.8),
        ("hellllo", 'a "hello"', 0.6),
        ("Hello", 'A \u201cvintage\u201d sign that says "Hello"', 1),
        ("vintage", 'A \u201cvintage\u201d sign: "Hello"', 0),  # straight ones first
        ("vintage", 'A "vintage" sign that says \u201cHello\u201d', 1),
        ("Hallo", "ein Schild: \u201eHallo\u201c", 1),
        ("salut", "une \u00absalut\u00bb", 1),
        ("caf\u00e9", 'a "cafe\u0301"', 1),
        ("cafe\u0301", 'a "caf\u00e9"', 1),  # accents composed or not
        ("it's", 'a "it\u2019s"', 1),
        ("it\u2019s", 'a "it\'s"', 1),
        ("9\u20135", 'a "9-5"', 1),
        ("9-5", 'a "9\u20145"', 1),
        ("wait...", 'a "wait\u2026"', 1),
        ("wait\u2026", 'a "wait..."', 1),
        ("\uff33\uff21\uff2c\uff25", 'a "Sale"', 1),
        ('say "hi"', "a \u201csay \u2018hi\u2019\u201d", 1 - 2 / 7),
        ("Hello", 'A 12" record with "Hello"', 1),  # inches are no quotes
        ("Hello", '5\'10" tall, a 3"x5" card: "Hello"', 1),
        ("Hello", 'a 12" and a 24" board: \u201cHello\u201d', 1),
        ("Room 101", 'a sign "Room 101" and "Exit"', 1),
        ("Hallo", "\u201eHallo\u201d und \u201cHi\u201d", 1),  # the first by place
        ("Hallo", "\u00bbHallo\u00ab und \u00abHi\u00bb", 1),
    ],
)
def test_text_score_at_every_edge(read, prompt, score):
    assert rewards.text_score(read, prompt) == pytest.approx(score)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    rewards.release_models()
    with pytest.raises(SystemExit, match="--reward ocr: pip install rapidocr$"):
        rewards.check_rewards(rewards.parse_rewards(["ocr"]), {"signs": [{"prompt": 'a "word"'}]}, 64)


@pytest.mark.parametrize("prompt", ["no quotes", 'an empty ""', 'blank "  "'])
def test_a_prompt_without_text_is_refused(prompt):
    with pytest.raises(ValueError, match="double quotes"):
        rewards.text_score("x", prompt)


@pytest.mark.parametrize("prompt", ['a sign "Hello', 'a "12" record" on a shelf', 'a 12 " record "Hi"'])
def test_an_odd_quote_is_refused(prompt):
    with pytest.raises(ValueError, match="odd double quote"):
        rewards.text_score("x", prompt)


def test_edit_distance():
    assert rewards.edit_distance("kitten", "sitting") == 3
    assert rewards.edit_distance("", "ab") == 2


def test_jpeg():
    flat, noise = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    assert rewards.jpeg(flat)[0] > rewards.jpeg(noise)[0]
    assert rewards.jpeg(torch.cat([flat, noise])).shape == (2,)


SCRIPTS = [("Καλημέρα", "έ"), ("Привет", "п"), ("สวัสดี", "ส"), ("مرحبا", "م"), ("안녕", "안"), ("नमस्ते", "न")]


@pytest.mark.parametrize("text, letter", SCRIPTS)
def test_a_script_that_the_recogniser_cannot_write_is_refused(text, letter):
    rewards.check_ocr({"prompt": 'a sign: "Café Łódź ΩΣ Straße 日本 50% ♥"'})
    prompts = {"signs": [{"prompt": f'a sign: "{text}"'}]}
    message = f"--prompts signs: ocr cannot read the '{letter}' of .*ocr.language=cyrillic .* el,"
    with pytest.raises(SystemExit, match=message):
        rewards.check_rewards(rewards.parse_rewards(["ocr"]), prompts, 64)


def test_other_recognisers(monkeypatch):
    """ocr.language asks RapidOCR for the recogniser of that script, which it downloads; what it cannot have
    gets one line."""
    import rapidocr.utils.download_file as download

    asked = []

    def offline(request):
        asked.append(request.file_url)
        raise download.DownloadFileException("no network")

    monkeypatch.setattr(download.DownloadFile, "run", offline)
    prompts = {"signs": [{"prompt": 'a "Привет"'}]}
    for language, why in (("cyrillic", " .no network"), ("el", " .no network"), ("klingon", "")):
        chosen = rewards.parse_rewards(["ocr"], [f"ocr.language={language}"])
        message = f"--reward ocr: RapidOCR for {language} could not be loaded{why}"
        with pytest.raises(SystemExit, match=message):
            rewards.check_rewards(chosen, prompts, 64)
    names = [url.rpartition("/")[2] for url in asked]
    assert names == ["cyrillic_PP-OCRv5_rec_mobile.onnx", "el_PP-OCRv5_rec_mobile.onnx"]


# -- pictures ------------------------------------------------------------------------------------------------

RED = [1.0, 0.0, 0.0]


def test_pictures_of_every_kind(tmp_path):
    """Transparency lies over white, EXIF turns, 16 bits become 8; palettes, grey and CMYK are themselves."""

    def reread(picture, name, **options):
        picture.save(tmp_path / name, **options)
        return rewards.read_picture(tmp_path / name)

    def corner(*details, **options):
        return reread(*details, **options)[:, 0, 0].tolist()

    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 2, 4))
    lossless = {"a.png": {}, "a.tiff": {}, "a.webp": {"lossless": True}}
    for name, options in (lossless | {"a.avif": {"quality": 100, "subsampling": "4:4:4"}}).items():
        read = reread(half, name, **options)
        assert read[:, 0, 0].tolist() == pytest.approx(RED, abs=0.02)
        assert read[:, 0, 3].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert corner(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), "faint.png") == pytest.approx([1, 0.8, 0.8])
    assert corner(Image.new("LA", (2, 2), (0, 51)), "la.png") == pytest.approx([0.8] * 3)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert corner(palette, "p.png") == RED and corner(palette, "p.gif") == RED
    assert corner(palette, "clear.png", transparency=1) == [1, 1, 1]
    assert corner(Image.new("L", (2, 2), 51), "l.bmp") == pytest.approx([0.2] * 3)
    assert corner(Image.new("1", (2, 2), 1), "one.png") == [1, 1, 1]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert corner(cmyk, "cmyk.jpg", quality=100) == pytest.approx(RED, abs=0.02)
    wide = Image.fromarray(np.array([[0, 13107], [52428, 65535]], np.uint16))
    for name in ("wide.png", "wide.tiff"):
        assert reread(wide, name)[1].flatten().tolist() == pytest.approx([0, 0.2, 0.8, 1])
    exif, lying = Image.Exif(), Image.new("RGB", (4, 2), "blue")
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.putpixel((0, 1), (255, 0, 0))  # the lower left corner becomes the upper left
    read = reread(lying, "turned.png", exif=exif)
    assert read.shape == (3, 4, 2) and read[:, 0, 0].tolist() == RED


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bad_pictures(folder):
    """Files that are no pictures, or that nobody should open: {name: path}."""
    good = folder / "good.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(good)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 2**21, zip=True)
    Image.new("RGB", (4, 4)).save(folder / "chatty.png", pnginfo=text)
    (folder / "cut.png").write_bytes(good.read_bytes()[:2000])
    (folder / "page.png").write_text("<html>404</html>")
    (folder / "empty.png").write_bytes(b"")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0))
    huge = header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + huge)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    names = "chatty.png", "cut.png", "page.png", "empty.png", "huge.png", "float.tiff"
    return {name: folder / name for name in names}


def test_bad_pictures_are_named(tmp_path):
    for name, file in bad_pictures(tmp_path).items():
        with pytest.raises(rewards.RewardError, match=f"{name}: not a picture that can be read"):
            rewards.read_picture(file)
    message = refused("rewards.py", "jpeg", tmp_path / "page.png", "a page")
    assert "page.png: not a picture that can be read" in message


# -- one's own rewards ---------------------------------------------------------------------------------------

MINE = '''import numpy as np, torch
FIRST
def smile(images, prompts, metadata, share=0.5):
    """How many people smile; in [0, 1]."""
    return RETURNED
def helper(images, prompts, metadata, needed):
    pass
def unlike(pictures, prompts, metadata):
    pass
'''
COUNT = itertools.count()


@pytest.fixture
def mine():
    """mine(what smile returns): a module beside the scripts, as a user would write one; its name."""
    made = []

    def write(returned, first=""):
        name = f"my_rewards_{os.getpid()}_{next(COUNT)}"
        made.append(os.path.join(ROOT, name + ".py"))
        with open(made[-1], "w") as f:
            f.write(MINE.replace("RETURNED", returned).replace("FIRST", first))
        importlib.invalidate_caches()
        return name

    yield write
    for file in made:
        os.remove(file)


def test_the_list_has_ones_own_rewards(mine, capsys):
    name = mine("[1.0] * len(images)", "1 / 0  # to list it is not to run it")
    run("rewards.py")
    said = capsys.readouterr().out
    assert f"\n{name}.smile\n    How many people smile; in [0, 1].\n" in said
    assert not any(word in said for word in ("helper", "unlike", "served"))
    assert "\nocr\n    Text rendering." in said and "\ntoy.quality\n    Contrast" in said
    ours = "jpeg ocr geneval geneval_strict hpsv3 deqa geneval2 qwenvl unifiedreward pickscore clipscore"
    names = re.findall(r"^[\w.]+$", said, re.M)
    assert names[:15] == f"{ours} aesthetic hpsv2 imagereward blipvqa".split()
    assert len(set(names)) == len(names) and all("." in other for other in names[15:])


def test_short_names_load_their_own_module_alone():
    """What lists or asks for jpeg needs neither scorers/ nor transformers' models."""
    code = "import sys, rewards; rewards.main([]); rewards.parse_rewards(['jpeg', 'pickscore'])\n"
    code += "print([m for m in sys.modules if m.startswith('scorers.')])"
    done = finish([sys.executable, "-c", code])
    assert done.stdout.endswith("['scorers.preference']\n"), done.stderr


def test_release_models():
    """What was loaded is loaded anew after its release, and nothing refers to the old one."""
    engine = rewards.load_ocr()
    assert rewards.load_ocr() is engine and rewards.letters("")
    rewards.release_models()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and rewards.load_ocr() is not None


def test_a_script_is_not_run_because_it_was_named(mine):
    name = mine("[1.0]", "raise SystemExit('it ran')")
    with pytest.raises(SystemExit, match=f"--reward {name}.frown: no such reward"):
        rewards.parse_rewards([f"{name}.frown"])
    with pytest.raises(SystemExit, match="--reward evaluate.x: no such reward"):
        rewards.parse_rewards(["evaluate.x"])


def test_a_module_of_pythons_name_is_refused(mine, monkeypatch):
    """A reward in a file called statistics.py, say, where Python's own module was loaded before."""
    name = mine("[1.0]")
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(SystemExit, match=f"Python has its own `{name}`; give {name}.py another name"):
        rewards.parse_rewards([f"{name}.smile"])


def smiles(mine, returned):
    """The scores of two pictures where smile returns that."""
    chosen = rewards.parse_rewards([f"{mine(returned)}.smile"])
    return rewards.score_batch(torch.zeros(2, 3, 4, 4), [("t", {"prompt": "p"})] * 2, chosen, [])["smile"]


ARRAYS = ["[0.25, 0.5]", "(0.25, 0.5)", "np.array([0.25, 0.5])", "np.array([[0.25], [0.5]])"]
TENSORS = ["torch.tensor([[0.25], [0.5]], requires_grad=True)", "torch.tensor([0.25, 0.5]).half()"]


@pytest.mark.parametrize("returned", [*ARRAYS, *TENSORS])
def test_what_a_reward_may_return(mine, returned):
    scores = smiles(mine, returned)
    assert scores.tolist() == [0.25, 0.5] and scores.dtype == torch.float32


@pytest.mark.parametrize("returned", ["None", "[0.25]", "np.ones((2, 2))", "[None, 1.0]", "'high'", "0.5"])
def test_what_a_reward_may_not_return(mine, returned):
    message = "smile: the reward returned .* for 2 pictures, not a number each"
    with pytest.raises(rewards.RewardError, match=message):
        smiles(mine, returned)


GRIN = """def grin(images, prompts, metadata, often=False, file=None, n=3):
    return [often, file == 'x']"""


def test_options_of_ones_own_rewards(mine):
    """Each is of its default's type."""
    name = mine("[share] * 2", GRIN)

    def of(*options):
        [reward] = rewards.parse_rewards([f"{name}.grin"], [f"{name}.grin.{o}" for o in options]).values()
        return reward.function.keywords

    assert of("often=True", "file=x", "n=4") == {"often": True, "file": "x", "n": 4}
    assert of("often=False") == {"often": False}
    for option in ("often=yes", "n=2.5", "m=1"):
        with pytest.raises(SystemExit, match=f"--reward-option {name}.grin.{option[0]}"):
            of(option)


def test_a_mix_leaves_out_who_has_no_score():
    """sum w r / sum w over the rewards of the sample's task; a sample that one of these could not score is
    not there."""
    chosen = rewards.parse_rewards(["geneval=0.8", "ocr", "jpeg=0.2"])
    batch = [("geneval", {}), ("geneval", {}), ("ocr", {}), ("geneval", {})]
    nan = float("nan")
    scores = {
        "geneval": torch.tensor([1.0, 0.5, nan, nan]),
        "ocr": torch.tensor([nan, nan, 0.5, nan]),
        "jpeg": torch.tensor([0.0, nan, 1.0, 0.5]),
    }
    mixed = rewards.weighted_sum(scores, chosen, batch, ["geneval", "ocr"])
    assert mixed[[0, 2]].tolist() == pytest.approx([0.8, (0.5 + 0.2) / 1.2]) and mixed[[1, 3]].isnan().all()
