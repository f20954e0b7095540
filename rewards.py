"""Every reward and metric by name. Each is a function (images, prompts, metadata) -> (B,) float32, higher is
better: images (B, 3, H, W) float in [0, 1], prompts B strings, metadata B dicts (rows of the prompt files).
`jpeg` and `ocr` are here, the models in scorers/, the toy's in toy/.

To add one, write such a function in a mine.py beside this file, and ask for --reward mine.smile:

    def smile(images, prompts, metadata, model="someone/smiles"):
        \"\"\"The share of people who smile; in [0, 1]. Needs 1 GB.\"\"\"
        return torch.tensor([...])

What follows `metadata` are its options, each with a default. A picture it cannot score gets NaN; when a
package, a model or a server is missing, it raises Unavailable. Two attributes are optional: smile.check(row,
**options) raises ValueError for a prompt it could never score, smile.package names a package of weights.

    python rewards.py                     # list the rewards, yours too: formula, range, model, licence, needs
    python rewards.py NAME PICTURE PROMPT [KEY=VALUE ...] # one score; PROMPT may be a JSON row, as GenEval's

In the scripts, `--reward` takes NAME[@TASK][=WEIGHT][,URL] ..., and --reward-option a reward's options:

    geneval=0.8 qwenvl=0.2,openai+http://localhost:8000/v1 # weights; a judge at an OpenAI-compatible endpoint
    taste=http://localhost:9000             # your own server; scorers/servers.py has its protocol
    deqa=pickle+http://localhost:18086      # Flow-GRPO's reward servers
    toy.ocr mine.smile                      # the function `ocr` of toy/, `smile` of mine.py
    --reward-option mine.smile.model=DIR qwenvl.timeout=30 qwenvl.prompt=@prompt.txt

Rewards and tasks meet by name: a reward called like a task (`ocr`, `toy.ocr`, `ocr_strict` for the task
`ocr`) or tied to one (`pickscore@drawbench`) scores that task's prompts only; any other scores all prompts.
"""

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import re
import symtable
import sys
import threading
import typing
import unicodedata
import urllib.parse
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from PIL import Image, ImageOps

from flow_sde import HERE, check, die, fingerprint, first_line, generators, masked, reduce_sum


class RewardError(Exception):
    """A score could not be had, and why. It never counts as 0: training stops, a table calls it missing."""


class Unavailable(RewardError):
    """A server, a model or a package is not there: the next picture would fare no better."""


# -- pictures, and the simplest reward -----------------------------------------------------------------------


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


LOADED = []  # the caches of what `remembered` functions loaded


def remembered(load):
    """A decorator: what `load` returns is kept for the next call with the same arguments."""
    LOADED.append(functools.cache(load))
    return LOADED[-1]


def release_models():
    """Forget every reward model that was loaded, so that its memory is free."""
    for cache in LOADED:
        cache.cache_clear()
    torch.cuda.empty_cache()


# -- can the text be read? -----------------------------------------------------------------------------------


def ocr(images, prompts, metadata=None, language=""):
    """Text rendering. 1 - min(edit distance, n) / n between the text read and the prompt's quoted text of n
    letters, case, spaces and the typography of quotes, dashes and accents ignored, a substring is perfect; in
    [0, 1]. The first text in straight double quotes counts, without one the first in other quotes. Needs
    rapidocr and onnxruntime (PP-OCR's models, Apache-2.0, come with it, for Latin, Chinese, Japanese, and
    Greek without accents); `language` names another of its recognisers, which it downloads: arabic, cyrillic,
    devanagari, el (Greek), korean, ta, te or th."""
    engine = load_ocr(language)

    def read(picture):
        found = engine(widened(np.array(picture)))
        if found.boxes is None:
            return ""
        return "".join(found.txts[i] for i in reading_order(np.array(found.boxes)))

    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(cores) as pool:
        texts = list(pool.map(read, pil(images)))
    return torch.tensor(list(map(text_score, texts, prompts)), dtype=torch.float32)


def widened(pixels):
    """(H, W, 3) with its edges repeated until no side is shorter than 32 or a quarter of the other: the
    engine enlarges the shorter one to 736 pixels, which makes gigabytes of a strip."""
    least = max(32, max(pixels.shape) // 4)
    missing = [max(0, least - side) for side in pixels.shape[:2]]
    return np.pad(pixels, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="edge")


@remembered
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
    left. boxes: (N, 4, 2), corners clockwise from the top left. A piece is on a line if it overlaps the piece
    next to it by half the height of the smaller one. -> N numbers"""
    sides = np.linalg.norm(np.roll(boxes, -1, axis=1) - boxes, axis=2)  # top, right, bottom, left
    widths, heights = sides[:, ::2].mean(1), sides[:, 1::2].mean(1)
    if np.median(heights / widths) >= 1.5:  # as on a book's spine; the engine reads such pieces downwards
        boxes, widths, heights = np.roll(boxes, -1, axis=1), heights, widths
    along = boxes[:, 1] - boxes[:, 0] + boxes[:, 2] - boxes[:, 3]
    slope = np.median(np.arctan2(along[:, 1], along[:, 0]))
    middles = boxes.mean(1)  # seen in a frame that is turned by the slope
    x = middles[:, 0] * np.cos(slope) + middles[:, 1] * np.sin(slope)
    y = middles[:, 1] * np.cos(slope) - middles[:, 0] * np.sin(slope)
    if is_rising_staircase(x, y, widths, heights):
        return x.argsort().tolist()
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


def is_rising_staircase(x, y, widths, heights):
    """Whether at least three pieces stand one right of the other, each higher than the one before. Two may as
    well be two lines, of which the second begins further left."""
    order = x.argsort()
    gaps = np.diff(x[order]) - (widths[order][1:] + widths[order][:-1]) / 2
    rises = -np.diff(y[order])
    return len(x) > 2 and gaps.min() > -0.2 * heights.min() and rises.min() > 0.2 * heights.min()


QUOTES = re.compile("“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|»([^«]*)«|「([^」]*)」|『([^』]*)』")
TYPEWRITER = {"'": "‘’‚‛′`´", '"': "“”„‟″«»", "-": "‐‑‒–—―−", "/": "⁄"}
PLAIN = {ord(sign): plain for plain, signs in TYPEWRITER.items() for sign in signs}


def quoted_text(prompt):
    """The text that a prompt asks for: the first in straight quotes (Flow-GRPO's rule), or else the first in
    others. A straight quote after a digit opens nothing: it is that of 12 inches."""
    straight = re.findall(r'(?<!\d)"([^"]*)("?)', prompt)
    if straight and not straight[-1][1]:
        raise ValueError(f"an ocr prompt with an odd double quote, opened and not closed: {prompt!r}")
    texts = [text for text, _ in straight] + ["".join(groups) for groups in QUOTES.findall(prompt)]
    for text in texts:
        if text.strip():
            return text
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
                "ocr.language=cyrillic it may, or arabic, devanagari, el, korean, ta, te, th"
            )


@remembered
def letters(language):
    """What the recogniser can write."""
    known = "".join(load_ocr(language).text_rec.postprocess_op.character)
    return {letter.casefold() for letter in plain_text(known)}


ocr.check, ocr.package = check_ocr, "rapidocr"
REWARDS = {"jpeg": jpeg, "ocr": ocr}  # `load_reward` finds the others


# -- the flags --reward and --reward-option ------------------------------------------------------------------


class Reward(typing.NamedTuple):
    function: typing.Callable
    weight: float = 1.0
    task: str = None  # the only task it scores, if it was tied to one
    identity: str = ""  # what its scores depend on


SPEC = re.compile(
    r"(?P<name>[\w.-]+)(?:@(?P<task>[\w-]+))?(?:=(?P<weight>\d+\.?\d*|\.\d+))?"
    r"(?:[=,](?P<kind>pickle\+|openai\+|)(?P<url>https?://[^\s/]\S*))?"
)
SERVERS = {"": "scorers.servers.served", "pickle+": "scorers.servers.served_pickle"}
OWN_COLUMNS = "average", "diversity"  # of evaluate.py
NO_SCORE = {}  # {a judge's url: why its last answer without a score was none}


def parse_rewards(specs, options=()):
    """["toy.ocr", "jpeg@scene=0.1"], ["ocr.KEY=VALUE"] -> {"ocr": Reward(function, 1.0), "jpeg":
    Reward(function, 0.1, "scene")}."""
    texts, rewards = {}, {}
    for option in options or ():
        m = re.fullmatch(r"([\w.-]+)\.(\w+)=(.*)", option, re.DOTALL)
        check(m, f"--reward-option {option}: expected NAME.KEY=VALUE")
        texts.setdefault(m[1], {})[m[2]] = m[3]
    for spec in specs or ():
        m, spec = SPEC.fullmatch(spec), masked(spec)
        forms = "NAME, NAME@TASK, NAME=WEIGHT (a positive number), NAME=URL or NAME=WEIGHT,URL"
        check(m and float(m["weight"] or 1), f"--reward {spec}: expected {forms}")
        full_name, kind, url = m["name"], m["kind"], m["url"]
        name = full_name.rpartition(".")[2]
        check(name not in rewards, f"--reward {spec}: {name} is given twice")
        check(name not in OWN_COLUMNS, f"--reward {spec}: evaluate.py has its own column {name}")
        function, fixed = load_reward(SERVERS.get(kind, full_name)), {}
        if kind in SERVERS:
            fixed["name"] = name
        if url:
            takes_url = "url" in inspect.signature(function).parameters
            check(takes_url, f"--reward {spec}: openai+ is for judges: deqa, geneval2, qwenvl, unifiedreward")
            fixed["url"] = url.rstrip("/")
            try:
                urllib.parse.urlsplit(url).port  # noqa: B018, raises where there can be no such address
            except ValueError as error:
                die(f"--reward {spec}: {error}")
        fixed |= read_options(full_name, function, texts.pop(full_name, {}))
        function = functools.partial(function, **fixed)
        try:
            inspect.signature(function).bind(None, None, None)
        except TypeError:
            die(f"--reward {spec}: {name} must take (images, prompts, metadata)")
        rewards[name] = Reward(function, float(m["weight"] or 1), m["task"], identity(full_name, function))
    check(not texts, f"--reward-option {', '.join(texts)}: not among --reward {' '.join(rewards)}")
    return rewards


def load_reward(name):
    """The reward function of that name: jpeg, ocr, one of scorers/, or MODULE.FUNCTION of a file beside this
    one."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    for scorer in scorer_modules():
        if name in rewards_in(module_file(scorer)):
            module = scorer
    file = module and module_file(module)
    if file and function in top_level_names(file):
        loaded = importlib.import_module(module)
        if os.path.realpath(getattr(loaded, "__file__", None) or "") != os.path.realpath(file):
            die(f"--reward {name}: Python has its own `{module}`; give {os.path.basename(file)} another name")
        reward = getattr(loaded, function, None)
        if callable(reward):
            return reward
    die(f"--reward {name}: no such reward here, nor in a file beside it; python rewards.py lists them")


def scorer_modules():
    """The modules in scorers/."""
    files = sorted(os.listdir(os.path.join(HERE, "scorers")))
    return ["scorers." + file.removesuffix(".py") for file in files if file.endswith(".py")]


def module_file(module):
    """The file of a module beside this one, mine.py or mine/__init__.py; None if there is none."""
    path = os.path.join(HERE, *module.split("."))
    for file in (path + ".py", os.path.join(path, "__init__.py")):
        if os.path.exists(file):
            return file


def top_level_names(file):
    """What a Python file defines, found without running it: a script must not run because it was named."""
    with open(file, encoding="utf-8") as f:
        symbols = symtable.symtable(f.read(), file, "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


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
            if key == "image" and text not in ("PNG", "JPEG"):
                raise ValueError("must be PNG or JPEG")
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
        parts |= {"url": masked(parts["url"]), "protocol": function.func.__name__}
    if "." in name and function.func.__module__ != "scorers.servers":
        parts["module"] = fingerprint(module_file(name.rpartition(".")[0]))
    package = getattr(function.func, "package", None)
    if package and importlib.util.find_spec(package):
        parts["version"] = importlib.metadata.version(package)
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
        check_row = getattr(reward.function.func, "check", None)
        if check_row:
            for task, row in rows:
                try:
                    check_row(row, **reward.function.keywords)
                except ValueError as error:
                    die(f"--prompts {task}: {error}")
                except RewardError as error:
                    die(f"--reward {name}: {error}")
        if rows and (needed is None or name in needed):
            grey = torch.full((2, 3, resolution, resolution), 0.5, device=device)
            try:
                score, _ = score_batch(grey, rows[:1] * 2, {name: reward}, tasks)[name].tolist()
            except RewardError as error:
                die(f"--reward {error}")
            check(not math.isnan(score), f"--reward {name}: no score of a grey picture. {why_none(reward)}")


def why_none(reward):
    """What a judge said when it last gave no score."""
    return NO_SCORE.get(reward.function.keywords.get("url"), "")


# -- scoring batches while others are sampled ----------------------------------------------------------------

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
        where = f"for {metadata[0]['prompt']!r} or another of its batch"
        if not images[indices].isfinite().all():
            raise RewardError(f"{name}: a picture is not finite, {where}")
        try:
            values = reward.function(images[indices], [row["prompt"] for row in metadata], metadata)
        except Unavailable as error:
            raise Unavailable(masked(f"{name}: {error}")) from error
        except (RewardError, ValueError) as error:  # ValueError: a prompt that this reward cannot score
            raise RewardError(masked(f"{name}: {error}")) from error
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
    """Scores batches while the next one is sampled. The rewards run in parallel, each one batch at a time."""

    def __init__(self, rewards, tasks, stop=None):
        self.rewards, self.tasks, self.stop = rewards, tasks, stop
        self.batch, self.futures = [], []
        self.locks = {name: threading.Lock() for name in rewards}

    def submit(self, images, batch):
        """images: (B, 3, H, W), batch: B pairs (task, row). Waits while the rewards lag four batches behind,
        so that pictures do not pile up."""
        self.batch += batch
        self.futures.append({name: Future() for name in self.rewards})
        for name, future in self.futures[-1].items():
            job = name, future, images, batch  # a pool's threads would keep a process that is told to stop
            threading.Thread(target=self.score, args=job, daemon=True).start()
        if len(self.futures) > 4:
            for future in self.futures[-5].values():
                self.wait(future)

    def score(self, name, future, images, batch):
        """One reward's scores of one batch, in a thread."""
        with self.locks[name]:
            try:
                scores = score_batch(images, batch, {name: self.rewards[name]}, self.tasks)
                future.set_result(scores[name])
            except BaseException as error:
                future.set_exception(error)

    def wait(self, future):
        """A future's result; None if the process is told to stop (stop: its StopSignal) before."""
        while not (self.stop and self.stop.name):
            if wait([future], timeout=0.2).done:
                return future.result()

    def collect(self):
        """{reward: (all submitted,) float32, NaN where it does not apply or has no score}; None if told to
        stop. This and `submit` raise RewardError; too many pictures without a score is one."""
        batch, futures, self.batch, self.futures = self.batch, self.futures, [], []
        scores = {name: [self.wait(by_name[name]) for by_name in futures] for name in self.rewards}
        if self.stop and self.stop.name:
            return None
        scores = {name: torch.cat(values) for name, values in scores.items()}
        for name, applies in applying(self.rewards, batch, self.tasks).items():
            lost, total = int((scores[name].isnan() & applies).sum()), int(applies.sum())
            if lost > max(1, TOLERATED * total) or 0 < lost == total:
                why = why_none(self.rewards[name])
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


# -- a model's scores on held-out prompts --------------------------------------------------------------------


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
    mine, most = list(range(rank, len(items), world)), math.ceil(len(items) / world)
    guidance = args.guidance if guidance is None else guidance
    sampling = args.eval_num_steps, args.resolution, adapter, guidance
    scorer, table = Scorer(rewards, tasks or prompts, stop), torch.zeros(len(rewards), len(items))
    try:
        for start in range(0, most, args.eval_batch_size):
            if stop and stop.told(model.device, model.shard):
                break
            indices = mine[start : start + args.eval_batch_size]
            batch = [items[i] for i in indices]
            texts = [row["prompt"] for _, row in batch]
            gens = generators(args.seed, 0, [numbers[i] for i in indices])
            pictures = model.generate(texts, gens, *sampling)
            if batch:
                scorer.submit(pictures, batch)
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


# -- the command line ----------------------------------------------------------------------------------------


def list_rewards():
    """Print every reward's name and docstring: this file's, those of scorers/, and of the files beside it."""
    ours = ["rewards", *scorer_modules()]
    beside = sorted({file.removesuffix(".py") for file in os.listdir(HERE)} - {"rewards"})
    for module in ours + [module for module in beside if module_file(module)]:
        with contextlib.suppress(SyntaxError, ValueError, OSError):  # of a file that is no Python
            for name, text in rewards_in(module_file(module)).items():
                full_name = name if module in ours else f"{module}.{name}"
                print("\n    ".join([full_name, *text.splitlines()]))


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
    check(not math.isnan(score), f"{name}: no score. {why_none(reward)}")
    print(f"{score:.4f}")


def main(argv):
    if argv in (["-h"], ["--help"]):
        print(__doc__)
    elif not argv:
        list_rewards()
    elif len(argv) >= 3:
        score_one(*argv)
    else:
        die("usage: rewards.py NAME PICTURE PROMPT [KEY=VALUE ...]; --help; or no argument for the list")


if __name__ == "__main__":
    import rewards  # the module whose errors scorers/ raise, not this second copy of it

    rewards.main(sys.argv[1:])
