"""Judges: vision-language models behind an OpenAI-compatible endpoint (vLLM, SGLang ...), by --reward
NAME=openai+http://HOST:PORT/v1. The environment's REWARD_API_KEY is sent along, if there is one."""

import asyncio
import base64
import functools
import math
import os
import re
import reprlib
import sys
import urllib.parse

import torch
from tqdm import tqdm

from flow_sde import listing
from rewards import NO_SCORE, RewardError, Unavailable, encoded, masked, pil
from scorers.servers import post_json

FIRST_TOKEN = dict(max_tokens=1, logprobs=True, top_logprobs=20)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
ASK_LEVEL = (
    "How good is the quality of this picture? Answer with one word: excellent, good, fair, poor or bad."
)
ASK_SCORE = (
    "The picture was made for this caption: {prompt}\nJudge two things: whether it shows everything the "
    "caption says, with the right attributes and relations, and how good it is as a picture: clear, "
    "detailed, free of artefacts, pleasant to look at. Give one score from 1 (worst) to 5 (best)."
)
AGAIN = "\nAnswer briefly, and in exactly the form that is asked for."
COLON = r"""["'*_\s]*[>:=]["'*_\s]*(\d)"""  # what stands between the word `score` and its number
FINAL_SCORE = r"(?i)final score" + COLON
TAGGED_SCORE = r"(?i)<score>\s*(\d)"
ANY_SCORE = r"(?i)score\s*(?:\([^)]*\))?" + COLON
THOUGHT = r"(?i)[<◁]{}(?:\w+:)?think(?:ing)?[>▷]"  # <think>, ◁think▷, <seed:think>; closed with a slash
NUMBER = re.compile(r"(\d+(?:[.,]\d+)?)(?:\s*(?:/|out of|of)\s*(\d+))?(?!\d|[.,]\d|\s*[-–]\s*\d)")


class NoAnswer(RewardError):
    """A judge answered, but not with a score that can be read."""


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
    reads = [functools.partial(read_level, who=f"{url}: {model}")] * len(images)
    how = True, "PNG", timeout, retries
    return ask_all(reads, images, [prompt] * len(images), url, model, *how, **FIRST_TOKEN)


def read_level(answer, who):
    """The expected level of an answer's first token, in [0.2, 1]."""
    likely = [(token.strip().lower(), p) for token, p in first_token(answer, who).items()]
    mass = {level: sum(p for word, p in likely if word and level.startswith(word)) for level in LEVELS}
    total = sum(mass.values())
    if not total >= 0.5:
        tokens_seen = listing([repr(word) for word, _ in likely])
        share = f"{', '.join(LEVELS)} together have {total:.0%} of the probability"
        raise NoAnswer(f"{share}; the likeliest tokens are {tokens_seen}")
    return sum(p * LEVELS[level] for level, p in mass.items()) / total / 5


def first_token(answer, who):
    """{token: probability} of what an answer may begin with, the likeliest twenty."""
    try:
        top = answer["logprobs"]["content"][0]["top_logprobs"]
        return {re.sub("[▁Ġ]", " ", t["token"]): math.exp(float(t["logprob"])) for t in top}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unavailable(f"{who} gave no log-probabilities of its first token") from error


def geneval2(
    images,
    prompts,
    metadata,
    url="",
    model="Qwen/Qwen3-VL-8B-Instruct",
    arithmetic=False,
    image="PNG",
    timeout=120.0,
    retries=3,
):
    """GenEval 2 (arXiv 2512.16853, CC BY-NC 4.0) by its Soft-TIFA: each question of the row's "vqa_list" is
    asked with "Answer in one word."; its atom is the probability that the answer's first token is right. The
    atoms' geometric mean (Soft-TIFA GM, a prompt's score), with arithmetic=True their arithmetic mean (AM);
    in [0, 1]; papers print it times 100. As facebookresearch/GenEval2's evaluation.py, but a token that is
    not among the twenty likeliest counts 0. Needs an endpoint with log-probabilities (Qwen3-VL: Apache-2.0)
    and the rows of geneval2_data.jsonl."""
    owners = [i for i, row in enumerate(metadata) for _ in row["vqa_list"]]
    pairs = [pair for row in metadata for pair in row["vqa_list"]]
    texts = [f"{question} Answer in one word." for question, _ in pairs]
    reads = [functools.partial(read_answer, pair=pair, who=f"{url}: {model}") for pair in pairs]
    atoms = ask_all(reads, images[owners], texts, url, model, True, image, timeout, retries, **FIRST_TOKEN)
    scores = []
    for its in atoms.split([len(row["vqa_list"]) for row in metadata]):
        scores.append(its.mean() if arithmetic else its.log().mean().exp())
    return torch.stack(scores)


def read_answer(answer, pair, who):
    """The probability that an answer's first token is the right one, in [0, 1]."""
    likely = first_token(answer, who)
    top = max(likely, key=likely.get, default="")
    if not top.strip().isalnum() and top not in right_tokens(*pair):
        raise NoAnswer(f"the likeliest first token is {top!r}, not a word (a judge must not think aloud)")
    return sum(likely.get(token, 0.0) for token in right_tokens(*pair))


def right_tokens(question, answer):
    """The tokens that evaluation.py takes for the answer: a word as it is and capitalised, each also after a
    space, and a number's first digit. Qwen splits " 3" into " " and "3", so " " counts."""
    tokens = []
    for word in (answer.lower(), answer.capitalize()):
        tokens += [word, " " + word]
    if question.startswith("How many"):
        tokens += [str(NUMBERS.index(answer) + 1)[0], " "]
    return tokens


def check_geneval2(row, **_):
    """Refuse a prompt's row that is not GenEval 2's: {"vqa_list": [[question, answer], ...]}, the answer a
    number's word after "How many", and Yes to all else."""
    pairs = row.get("vqa_list")
    if not isinstance(pairs, list) or not pairs:
        needs = 'a geneval2 prompt needs the "vqa_list" of geneval2_data.jsonl'
        raise ValueError(f"{needs}: {row.get('prompt')!r}")
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        if not is_pair or pair[1] not in (NUMBERS if pair[0].startswith("How many") else ["Yes"]):
            expected = '["How many ...", "one" to "ten"] or [question, "Yes"]'
            raise ValueError(f"geneval2 expects {expected}, not {pair!r}: {row.get('prompt')!r}")


geneval2.check = check_geneval2


def qwenvl(
    images,
    prompts,
    metadata,
    url="",
    model="Qwen/Qwen3-VL-30B-A3B-Instruct",
    prompt=ASK_SCORE + " Be strict. Think it over, then end with <Score>N</Score>.",
    pattern="",
    max_tokens=1024,
    max_completion_tokens=0,
    temperature=True,
    image="PNG",
    timeout=120.0,
    retries=3,
):
    """A vision-language model judges caption and quality; the model's own licence (Qwen3-VL: Apache-2.0). The
    number in the last <Score>, or else after the last "score:", or where the group of `pattern` begins; / 5,
    or as it says (7/10); in [0, 1]. Needs an endpoint; for one that does not know max_tokens there is
    max_completion_tokens, for one that refuses a temperature temperature=False, a picture as PNG image=JPEG.
    None may answer as a stream."""
    limit = {"max_tokens": max_tokens}
    if max_completion_tokens:
        limit = {"max_completion_tokens": max_completion_tokens}
    patterns = [pattern] if pattern else [TAGGED_SCORE, ANY_SCORE]
    reads = [functools.partial(read_score, patterns=patterns)] * len(images)
    texts = [prompt.replace("{prompt}", p) for p in prompts]
    how = temperature, image, timeout, retries
    return ask_all(reads, images, texts, url, model, *how, **limit)


def unifiedreward(
    images,
    prompts,
    metadata,
    url="",
    model="CodeGoat24/UnifiedReward-qwen-7b",
    prompt=ASK_SCORE + " Write it after 'Final Score:'.",
    pattern=FINAL_SCORE,
    max_tokens=1024,
    max_completion_tokens=0,
    temperature=True,
    image="PNG",
    timeout=120.0,
    retries=3,
):
    """UnifiedReward (arXiv 2503.05236, MIT): caption and quality; in [0, 1], read as `qwenvl`. Needs an
    endpoint. The wording the model was trained on stands on its page: unifiedreward.prompt=@FILE, {prompt}
    for the caption."""
    limits = max_tokens, max_completion_tokens
    how = temperature, image, timeout, retries
    return qwenvl(images, prompts, metadata, url, model, prompt, pattern, *limits, *how)


def read_score(answer, patterns):
    """The score of an answer, in [0, 1], by the first pattern that finds one; NoAnswer if none does, or the
    model was cut off, or thinking."""
    message = answer.get("message")
    message = message if isinstance(message, dict) else {}
    said = message.get("content")
    if isinstance(said, list):
        said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
    if not isinstance(said, str) or not said.strip():
        others = {key: value for key, value in message.items() if value and key not in ("role", "content")}
        reason = f"finish_reason {answer.get('finish_reason')}, {reprlib.repr(others)}"
        raise NoAnswer(f"an answer without text: {reason}")
    conclusion = re.split(THOUGHT.format("/"), said)[-1]
    if answer.get("finish_reason") == "length" or re.search(THOUGHT.format(""), conclusion):
        raise NoAnswer(f"an answer cut off before its end (a larger max_tokens may help): {said[-200:]!r}")
    for pattern in patterns:
        found = [NUMBER.match(conclusion, m.start(1)) for m in re.finditer(pattern, conclusion)]
        found = [number for number in found if number]
        if found:
            break
    else:
        raise NoAnswer(f"no score in the answer {said[-200:]!r}")
    score, best = float(found[-1][1].replace(",", ".")), float(found[-1][2] or 5)
    if not 0 <= score <= best or best == 0:
        raise NoAnswer(f"a score of {score:g}, not within 0 to {best:g}, in the answer {said[-200:]!r}")
    return score / best


def ask_all(reads, images, texts, url, model, temperature, image, timeout, retries, **options):
    """read(answer) of one question a picture, `read` being its own of `reads`, sixteen at a time. An answer
    without a score is asked for twice more, with a reminder of the form and a temperature; then the picture
    has none. -> (B,), NaN for none"""
    if not url:
        raise Unavailable("needs an endpoint: NAME=openai+http://HOST:PORT/v1 (or NAME=WEIGHT,openai+...)")
    turns = asyncio.Semaphore(16)

    async def ask(read, picture, text):
        async with turns:
            for degrees in (0, 0.5, 1):
                question = text + AGAIN if degrees else text
                request = options | ({"temperature": degrees} if temperature else {})
                try:
                    return read(await chat(url, model, question, picture, image, timeout, retries, **request))
                except NoAnswer as error:
                    NO_SCORE[url] = str(error)
        tqdm.write(f"{masked(url)}: asked three times, no score: {NO_SCORE[url]}", file=sys.stderr)
        return math.nan

    async def ask_everything():
        return await asyncio.gather(*map(ask, reads, pil(images), texts))

    return torch.tensor(asyncio.run(ask_everything()), dtype=torch.float32)


async def chat(url, model, text, picture, image, timeout, retries, **options):
    """The first choice of a chat completion about a picture, sent in the format `image`."""
    data = base64.b64encode(await asyncio.to_thread(encoded, picture, image)).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/{image.lower()};base64,{data}"}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]
    key = os.environ.get("REWARD_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise Unavailable("REWARD_API_KEY holds a space, a line break, or a letter that is not ASCII")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = urllib.parse.urlsplit(url)
    where = where._replace(path=where.path.rstrip("/") + "/chat/completions").geturl()
    request = {"model": model, "messages": messages} | options
    answer = await post_json(where, request, timeout, retries, headers)
    try:
        return answer["choices"][0] | {}
    except (KeyError, IndexError, TypeError) as error:
        raise Unavailable(f"{url}: answered {reprlib.repr(answer)}, not a chat completion") from error
