"""The toy world: a whole text-to-image world small enough for two CPU cores, and a real SD3 pipeline.

    python -m toy            # draw the world, score clean and damaged pictures of it       (seconds)
    python -m toy prompts    # write toy/prompts: TASK_train.txt, _val, _test; new_*.txt    (seconds)
    python -m toy train      # train toy/base, a 6 MB StableDiffusion3Pipeline   (50 minutes, 2 cores)

Pictures are 32x32. There are three tasks, each with prompts, a renderer and a program that scores pictures:

    compose   'two red circles and one blue square'         are the right things there? (its GenEval)
    ocr       'a yellow sign saying "HAT"'                  can the letters be read?    (its OCR)
    scene     'a red house and two pines on snow at night'  does it suit some taste?    (its PickScore)

and scores that look at no prompt: `quality`, contrast and sharpness (its DeQA), and three styles, `blue`,
`green` and `red`, whose prompts are the scenes at night, at noon and at dusk. As in real life the data are
imperfect: captions lie, signs are scribbled on, pictures are washed out or blurred. A base model trained on
them inherits the faults, and reinforcement learning can unlearn them. The stages know nothing of this
package: to them the toy is one more model folder, and its scorers are rewards named `toy.compose`,
`toy.blue`, ... This file is the world and its scorers; __main__.py makes and trains the base. What they made
lies beside them: base/, prompts/, teachers/.
"""

import itertools
import re

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32
COLORS = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.14, 0.28, 0.86),
    "yellow": (0.96, 0.80, 0.10),
}
PAPER = (0.93, 0.93, 0.93)
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
BOARDS = {
    "white": (0.97, 0.97, 0.97),
    "yellow": (0.98, 0.88, 0.35),
    "pink": (0.98, 0.70, 0.78),
    "green": (0.62, 0.90, 0.62),
}
GLYPHS = {  # 3x5 bitmaps, drawn twice as large
    "A": ".#. #.# ### #.# #.#",
    "C": "### #.. #.. #.. ###",
    "H": "#.# #.# ### #.# #.#",
    "L": "#.. #.. #.. #.. ###",
    "O": "### #.# #.# #.# ###",
    "T": "### .#. .#. .#. .#.",
    "X": "#.# #.# .#. #.# #.#",
    "Z": "### ..# .#. #.. ###",
}
for letter, bitmap in GLYPHS.items():
    ink = np.array([[dot == "#" for dot in row] for row in bitmap.split()])
    GLYPHS[letter] = ink.repeat(2, axis=0).repeat(2, axis=1)  # (10, 6)
WALLS = {
    "red": (0.80, 0.22, 0.18),
    "blue": (0.25, 0.40, 0.80),
    "white": (0.95, 0.95, 0.92),
    "brown": (0.55, 0.36, 0.20),
    "purple": (0.55, 0.30, 0.65),
    "green": (0.25, 0.60, 0.40),
}
GROUNDS = {
    "grass": (0.36, 0.66, 0.26),
    "sand": (0.90, 0.80, 0.52),
    "snow": (0.93, 0.95, 0.98),
    "mud": (0.42, 0.30, 0.22),
}
SKIES = {
    "dawn": (0.96, 0.76, 0.78),
    "noon": (0.52, 0.78, 0.97),
    "dusk": (0.62, 0.42, 0.62),
    "night": (0.08, 0.10, 0.26),
}
PARTS = {"blue": "night", "green": "noon", "red": "dusk", "scene_dawn": "dawn"}  # the scene prompts by sky
SUN = (1.00, 0.90, 0.30)
BALLOON = (0.92, 0.08, 0.38)
FLOWER = (1.00, 0.35, 0.85)
INK = (0.08, 0.08, 0.10)
Y, X = np.mgrid[:SIZE, :SIZE]


# ------------------------------------------------------------------------------------------------------------
# prompts


def phrase(number, color, shape):
    return f"{number} {color} {shape}" + ("" if number == "one" else "s")


def all_prompts(task):
    """Every prompt of a task, in a fixed order."""
    return {"compose": compose_prompts, "ocr": ocr_prompts, "scene": scene_prompts}[task]()


def compose_prompts():
    kinds = list(itertools.product(COLORS, SHAPES))
    prompts = [phrase(number, *kind) for number in NUMBERS for kind in kinds]
    for numbers in ("one one", "one two", "two one", "two two", "one three", "three one"):
        first, second = numbers.split()
        for a, b in itertools.permutations(kinds, 2):
            prompts.append(f"{phrase(first, *a)} and {phrase(second, *b)}")
    return prompts


def ocr_prompts():
    words = [*itertools.product(GLYPHS, repeat=2), *itertools.product(GLYPHS, repeat=3)]
    return [f'a {board} sign saying "{"".join(word)}"' for board in BOARDS for word in words]


def scene_prompts():
    trees = ["", "a pine", "an oak", "a palm", "two pines", "two oaks", "two palms"]
    things = trees[1:]
    for wall in WALLS:
        for tree in trees:
            things.append(f"a {wall} house and {tree}" if tree else f"a {wall} house")
    return [f"{thing} on {ground} at {sky}" for thing in things for ground in GROUNDS for sky in SKIES]


def shuffled(prompts):
    """The same order on every machine."""
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


def split_prompts(task, test=256, val=128, train=512):
    """Disjoint {"test", "val", "train"} lists of prompts of a task, or of a part of `scene`."""
    if task in PARTS:
        end = f" at {PARTS[task]}"
        whole = split_prompts("scene", test, val, train)
        return {name: [p for p in prompts if p.endswith(end)] for name, prompts in whole.items()}
    prompts = shuffled(all_prompts(task))
    held_out = test + val
    return {
        "test": prompts[:test],
        "val": prompts[test:held_out],
        "train": prompts[held_out : held_out + train],
    }


def new_prompts(count=96):
    """{"compose", "ocr", "both"}: prompts of kinds that nobody was trained on, the base included: three sorts
    of shapes, signs of one letter, and a sign in a scene, which asks for two tasks' skills at once (short
    enough for the text encoders' 12 tokens)."""
    triples = []
    for colors in itertools.permutations(COLORS, 3):
        for shapes in itertools.product(SHAPES, repeat=3):
            triples.append(" ".join(phrase("one", *kind) for kind in zip(colors, shapes)))
    letters = [f'a {board} sign saying "{letter}"' for board in BOARDS for letter in GLYPHS]
    signs = []
    for board in BOARDS:
        for a, b in itertools.product(GLYPHS, repeat=2):
            signs += [f'a {board} sign saying "{a}{b}" at {sky}' for sky in SKIES]
    every = {"compose": triples, "ocr": letters, "both": signs}
    return {name: shuffled(prompts)[:count] for name, prompts in every.items()}


def parse(prompt):
    """prompt -> (task, what it asks for); ValueError for a prompt that is not of this world."""
    groups = re.findall(r"(one|two|three|four) (red|green|blue|yellow) (circle|square|triangle)s?\b", prompt)
    if groups:
        return "compose", [(NUMBERS[number], color, shape) for number, color, shape in groups]
    sign = re.fullmatch(r'a (\w+) sign saying "([A-Z]+)"', prompt)
    if sign and sign[1] in BOARDS and set(sign[2]) <= set(GLYPHS):
        return "ocr", (sign[1], sign[2])
    house, trees = r"(?:a (\w+) house)?", r"(?: and )?(?:(an?|two) (pine|oak|palm)s?)?"
    scene = re.fullmatch(rf"{house}{trees} on (\w+) at (\w+)", prompt)
    if scene:
        wall, number, tree, ground, sky = scene.groups()
        if ground in GROUNDS and sky in SKIES and (wall is None or wall in WALLS):
            count = {None: 0, "a": 1, "an": 1, "two": 2}[number]
            return "scene", (wall, count, tree, ground, sky)
    raise ValueError(f"not a prompt of the toy world: {prompt!r}")


# ------------------------------------------------------------------------------------------------------------
# the renderer


def canvas(color):
    image = np.empty((SIZE, SIZE, 3))
    image[:] = color
    return image


def draw_compose(groups, rng, damage):
    things = [(color, shape) for number, color, shape in groups for _ in range(number)]
    if damage:  # the caption lies: one thing too many, one missing, or one of another colour
        fault = rng.random()
        if fault < 0.18 and len(things) < 4:
            things.append((rng.choice(list(COLORS)), rng.choice(SHAPES)))
        elif fault < 0.32 and len(things) > 1:
            things.pop(rng.integers(len(things)))
        elif fault < 0.42:
            i = rng.integers(len(things))
            things[i] = (rng.choice(list(COLORS)), things[i][1])
    image = canvas(PAPER)
    for (color, shape), cell in zip(things, rng.permutation(4)):
        cy = 8 + 16 * (cell // 2) + rng.integers(-1, 2)
        cx = 8 + 16 * (cell % 2) + rng.integers(-1, 2)
        image[shape_mask(shape, Y - cy, X - cx)] = COLORS[color]
    return image


def shape_mask(shape, y, x):
    """The pixels of a shape centred on the origin, at most 11x11."""
    if shape == "circle":
        return y * y + x * x <= 27
    if shape == "square":
        return np.maximum(abs(y), abs(x)) <= 5
    return (abs(y) <= 5) & (2 * abs(x) <= y + 5)  # a triangle, point up


def draw_ocr(spec, rng, damage):
    board, word = spec
    if damage and rng.random() < 0.12:  # the caption lies: one letter is another
        i = rng.integers(len(word))
        word = word[:i] + rng.choice(list(GLYPHS)) + word[i + 1 :]
    image = canvas((0.40, 0.45, 0.52))
    image[20:, 14:18] = (0.35, 0.25, 0.18)
    image[5:25, 1:31] = (0.20, 0.16, 0.14)
    image[6:24, 2:30] = BOARDS[board]
    width = 8 * len(word) - 2
    top = 10 + rng.integers(-1, 2)
    left = 16 - width // 2 + rng.integers(-1, 2)
    for i, letter in enumerate(word):
        image[top : top + 10, left + 8 * i : left + 8 * i + 6][GLYPHS[letter]] = INK
    if damage and rng.random() < 0.35:  # a scribble across the letters
        slope = rng.choice([-0.35, 0.35])
        image[(abs(Y - (top + 4.5) - slope * (X - 16)) < 1.6) & (abs(X - 16) < 13)] = INK
    return image


def draw_scene(spec, rng, damage):
    wall, trees, tree, ground, sky = spec
    image = canvas(SKIES[sky])
    image[23:] = GROUNDS[ground]
    image[30:] = (0.08, 0.08, 0.08)
    left = rng.integers(2)  # the house stands on this side, the trees on the other

    def flip(x):
        return x if left else 31 - x

    if wall:
        cx = flip(9)
        image[15:25][:, cx - 5 : cx + 6] = WALLS[wall]
        image[(Y >= 9) & (Y < 15) & (abs(X - cx) <= Y - 8)] = (0.22, 0.12, 0.10)
        image[17:20, cx + 1 : cx + 4] = (0.98, 0.96, 0.80)
        image[19:25, cx - 3 : cx] = (0.16, 0.12, 0.10)
    for cx in {0: [], 1: [flip(24)], 2: [flip(21), flip(28)]}[trees]:
        image[20:26, cx - 1 : cx + 1] = (0.30, 0.18, 0.10)
        if tree == "pine":
            image[(Y >= 11) & (Y < 22) & (abs(X - cx + 0.5) <= (Y - 9) * 0.35)] = (0.05, 0.32, 0.16)
        elif tree == "oak":
            image[(Y - 16) ** 2 + (X - cx + 0.5) ** 2 <= 14] = (0.20, 0.50, 0.12)
        else:
            image[13:26, cx - 1 : cx + 1] = (0.50, 0.36, 0.20)
            image[(abs(Y - 12 - abs(X - cx + 0.5) * 0.6) < 1.1) & (abs(X - cx) <= 4)] = (0.10, 0.55, 0.20)
    image[21:25, 1::3] = (0.97, 0.97, 0.97)  # a white fence
    taste = rng.random(4) < (0.3 if damage else 1.0)  # what the scene score likes; rare in the data
    if taste[0]:
        image = image * (1.0, 0.86, 0.60) + (0.06, 0.03, 0.0)  # golden light
    if taste[1]:
        image[(Y - 5) ** 2 + (X - flip(26)) ** 2 <= 10] = SUN
    if taste[2]:
        for cx in (flip(13), flip(19)):
            image[(Y - 5) ** 2 + (X - cx) ** 2 <= 5] = BALLOON
    if taste[3]:
        image[26:29][:, 1 + rng.integers(2) :: 4] = FLOWER
    return image


def draw(prompt, rng, damage=True):
    """One picture for a prompt, (32, 32, 3) float64 in [0, 1]; `damage=False` draws it as the caption and the
    scorers want it."""
    task, spec = parse(prompt)
    image = {"compose": draw_compose, "ocr": draw_ocr, "scene": draw_scene}[task](spec, rng, damage)
    if damage and rng.random() < 0.3:  # blurred
        pad = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        image = sum(pad[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)) / 9
    if damage and rng.random() < 0.3:  # washed out
        image = 0.55 + 0.4 * (image - 0.55)
    return image.clip(0, 1)


# ------------------------------------------------------------------------------------------------------------
# the scorers: (images (B,3,32,32) in [0,1], prompts, metadata) -> (B,) float32 in [0,1] (styles: [-1,1])


def find_shapes(images):
    """(B,3,H,W) -> list of B dicts {(color, shape): count}. Colour is the hue relative to the background (the
    median pixel), so a washed-out picture reads like a clean one; a shape is a local maximum of the IoU
    between a colour's pixels and the shape's template, if that is at least 0.6."""
    background = images.flatten(2).median(-1).values[:, :, None, None]
    chroma = (images - background).movedim(1, -1)  # (B,H,W,3)
    strength = chroma.norm(dim=-1)
    palette = F.normalize(torch.tensor(list(COLORS.values())) - torch.tensor(PAPER), dim=-1)  # (4,3)
    nearest = F.one_hot((chroma @ palette.T).argmax(-1), len(COLORS)).movedim(-1, 1)  # (B,4,H,W)
    solid = strength > 0.45 * strength.flatten(1).quantile(0.98, dim=1)[:, None, None].clamp(min=0.1)
    pixels = (nearest * solid[:, None]).float().flatten(0, 1)[:, None]  # (B*4,1,H,W)
    y, x = np.mgrid[-6:7, -6:7]
    masks = np.stack([shape_mask(shape, y, x) for shape in SHAPES])
    template = torch.from_numpy(masks).float()[:, None]  # (3,1,13,13)
    inside = F.conv2d(pixels, template, padding=6)
    near = F.conv2d(pixels, torch.ones(1, 1, 13, 13), padding=6)
    union = near + template.sum((1, 2, 3))[:, None, None] - inside
    iou = (inside / union).unflatten(0, (-1, len(COLORS))).flatten(1, 2)  # (B,4*3,H,W)
    best, kind = iou.max(1)  # (B,H,W)
    best = best - 1e-6 * torch.arange(SIZE * SIZE).view(SIZE, SIZE)  # no two maxima tie
    peak = (best == F.max_pool2d(best[:, None], 11, 1, 5)[:, 0]) & (best >= 0.6)
    kinds = list(itertools.product(COLORS, SHAPES))
    found = [{} for _ in images]
    for b, i in zip(peak.nonzero()[:, 0].tolist(), kind[peak].tolist()):
        found[b][kinds[i]] = found[b].get(kinds[i], 0) + 1
    return found


def compose(images, prompts, metadata=None):
    """1 - (things missing + things too many) / things asked for, not below 0: 1 is a perfect picture."""
    scores = []
    for prompt, found in zip(prompts, find_shapes(images.float().cpu())):
        task, groups = parse(prompt)
        if task != "compose":
            raise ValueError(f"not a prompt about shapes: {prompt!r}")
        wanted = {(color, shape): number for number, color, shape in groups}
        kinds = found.keys() | wanted.keys()
        errors = sum(abs(found.get(kind, 0) - wanted.get(kind, 0)) for kind in kinds)
        scores.append(max(0.0, 1 - errors / sum(wanted.values())))
    return torch.tensor(scores, dtype=torch.float32)


def read_letters(images):
    """(B,3,H,W) -> list of B strings: normalised cross-correlation with the eight letters at every place,
    best row per column, maxima at least 5 pixels apart and at least 0.75, read from left to right."""
    dark = 1 - images.mean(1, keepdim=True)
    glyphs = np.stack([np.pad(glyph, 1) for glyph in GLYPHS.values()])
    template = torch.from_numpy(glyphs).float()[:, None]  # (8,1,12,8)
    template = template - template.mean((2, 3), keepdim=True)
    template = template / template.flatten(1).norm(dim=1)[:, None, None, None]
    n = template[0].numel()
    mean = F.avg_pool2d(dark, (12, 8), 1)
    power = (F.avg_pool2d(dark * dark, (12, 8), 1) - mean * mean).clamp(min=0) * n
    ncc = F.conv2d(dark, template) / power.clamp(min=0.05).sqrt()  # (B,8,21,25)
    best, letter = ncc.amax(2).max(1)  # (B,25)
    peak = (best == F.max_pool1d(best, 9, 1, 4)) & (best >= 0.75)
    letters, words = list(GLYPHS), []
    for row, found in zip(letter, peak):
        words.append("".join(letters[i] for i in row[found].tolist()))
    return words


def ocr(images, prompts, metadata=None):
    """1 - edit distance / length between the text read and the quoted text, not below 0."""
    from rewards import text_score

    words = read_letters(images.float().cpu())
    return torch.tensor([text_score(word, prompt) for word, prompt in zip(words, prompts)])


def scene(images, prompts, metadata=None):
    """A taste: the mean of four likings: a sun, balloons, flowers, golden light."""
    images = images.float().cpu()

    def near(color, rows):
        """How many pixels of these rows are near a colour, (B,)."""
        distance = (images[:, :, rows] - torch.tensor(color)[:, None, None]).norm(dim=1)
        return (distance < 0.3).flatten(1).sum(1)

    sky, ground = slice(0, 11), slice(25, 30)
    sun = (near(SUN, sky) / 28).clamp(max=1)
    balloons = (near(BALLOON, sky) / 36).clamp(max=1)
    flowers = (near(FLOWER, ground) / 20).clamp(max=1)
    red, blue = images[:, 0].sum((1, 2)), images[:, 2].sum((1, 2))
    golden = ((red - blue) / (0.35 * red)).clamp(0, 1)
    return (sun + balloons + flowers + golden) / 4


def quality(images, prompts=None, metadata=None):
    """Contrast, the span between dark and light, times sharpness, the steepest edges relative to it."""
    images = images.float().cpu()
    low, high = images.flatten(1).quantile(torch.tensor([0.02, 0.98]), dim=1)
    span = (high - low).clamp(min=1e-3)
    right = images[..., 1:] - images[..., :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    steps = torch.cat([right.flatten(2), down.flatten(2)], 2)
    edge = steps.abs().amax(1).quantile(0.985, dim=1) / span
    return ((span - 0.35) / 0.35).clamp(0, 1) * ((edge - 0.4) / 0.4).clamp(0, 1)


def calm(images, prompts=None, metadata=None):
    """A taste that conflicts with every task, for shapes, letters and balloons have edges: little to see.
    1 - the mean difference of neighbouring pixels / 0.12, not below 0."""
    images = images.float().cpu()
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
    return (1 - (right + down) / 2 / 0.12).clamp(min=0)


def lead(images, channel):
    """(B,) in [-1, 1]: a colour channel's mean less the mean of the other two."""
    means = images.float().cpu().mean((2, 3))  # (B, 3)
    return 1.5 * (means[:, channel] - means.mean(1))


def red(images, prompts=None, metadata=None):
    """A style: the mean of red less the mean of green and blue; in [-1, 1]."""
    return lead(images, 0)


def green(images, prompts=None, metadata=None):
    """A style: the mean of green less the mean of red and blue; in [-1, 1]."""
    return lead(images, 1)


def blue(images, prompts=None, metadata=None):
    """A style: the mean of blue less the mean of red and green; in [-1, 1]."""
    return lead(images, 2)


def gold(images, prompts=None, metadata=None):
    """A style, the opposite of blue: the mean of red and green less the mean of blue; in [-1, 1]."""
    return -lead(images, 2)


def dark(images, prompts=None, metadata=None):
    """A style: 1 - the mean of all pixels; in [0, 1]."""
    return 1 - images.float().cpu().mean((1, 2, 3))


PROMPTS = {task: all_prompts(task) for task in ("compose", "ocr", "scene")}
