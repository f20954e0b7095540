"""Reward servers, your own and Flow-GRPO's, and the HTTP that judges use too. An answer has a size limit and
a deadline, and no code in it is run."""

import asyncio
import base64
import functools
import io
import json
import math
import pickle
import pickletools
import re
import reprlib
import urllib.parse

import torch

from flow_sde import first_line
from rewards import RewardError, Unavailable, encoded, need, pil


def served(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """Your own server, --reward NAME=http://HOST:PORT/PATH. It gets {"reward": NAME, "images": [PNG in
    base64, ...], "prompts": [...], "metadata": [...]} as JSON by POST, and answers {"scores": [a number a
    picture, or null for no score]}."""
    pictures = [base64.b64encode(encoded(p)).decode() for p in pil(images)]
    question = {"reward": name, "images": pictures, "prompts": prompts, "metadata": metadata}
    answer = asyncio.run(post_json(url, question, timeout, retries))
    return numbers(answer, "scores", len(images), url)


def served_pickle(images, prompts, metadata, url, name, timeout=120.0, retries=3):
    """Flow-GRPO's servers (yifan123/reward-server), --reward NAME=pickle+http://HOST:PORT: pickled JPEGs go,
    a pickle comes, of which plain values alone are read: a reply that names any class or function is refused.
    `geneval` takes its "scores", `geneval_strict` its "rewards" (the official verdicts), any other name
    "outputs"."""
    question = {"images": [encoded(p, "JPEG") for p in pil(images)], "prompts": list(prompts)}
    question |= {"meta_datas": list(metadata), "only_strict": False}
    headers = {"Content-Type": "application/octet-stream"}
    reply = asyncio.run(post(url, pickle.dumps(question), headers, timeout, retries))
    try:
        for opcode, argument, _ in pickletools.genops(reply):
            if "PUT" in opcode.name and argument > len(reply):
                raise RewardError("refused a pickle whose memo would take all memory")
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
    """A server's scores, one a picture: a finite number, or NaN for null. -> (B,)"""
    values = answer.get(key) if isinstance(answer, dict) else None
    fits = isinstance(values, (list, tuple)) and len(values) == count
    if fits:
        values = [math.nan if value is None else value for value in values]
        fits = all(isinstance(value, (int, float)) and not abs(value) >= 1e30 for value in values)
    if not fits:
        raise RewardError(f"{url}: answered {reprlib.repr(values)}, not {count} finite numbers")
    return torch.tensor(values, dtype=torch.float32)


LARGEST = 2**26  # bytes of an answer


async def post_json(url, data, timeout, retries, headers=None):
    """POST of JSON; the answer's JSON."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    reply = await post(url, json.dumps(data).encode(), headers, timeout, retries)
    try:
        return json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{url}: answered {reply[:200]!r}, which is not JSON") from error


async def post(url, body, headers, timeout, retries):
    """POST; the answer's bytes. `timeout` seconds bound a whole attempt, however slowly the server drips.
    After a failure that may pass (no connection, no answer in time, 408, 429, 5xx) it waits as long as the
    server asks, or 1, 2, 4, ... seconds, and tries again, `retries` times; then Unavailable."""
    need("httpx2")
    import httpx2

    for attempt in range(retries + 1):
        pause = 2**attempt
        try:
            response, reply = await asyncio.wait_for(post_once(url, body, headers), timeout)
        except asyncio.TimeoutError:
            problem = f"no whole answer in {timeout:g} seconds"
        except (httpx2.HTTPError, OSError) as error:
            problem = str(error) or type(error).__name__
        else:
            if response.is_success:
                return reply
            said = " ".join(reply.decode(errors="replace").split())
            problem = f"HTTP {response.status_code} {response.reason_phrase}: {said[-300:]}"
            if response.status_code not in (408, 429) and response.status_code < 500:
                break
            asked = re.fullmatch(r"\d{1,9}", response.headers.get("Retry-After", ""))
            pause = min(int(asked[0]), 600) if asked else pause
        if attempt < retries:
            await asyncio.sleep(pause)
    raise Unavailable(f"{url}: {problem} (attempts: {attempt + 1})")


async def post_once(url, body, headers):
    """POST; (response, its bytes). Pictures and keys go where the user sent them: no redirect is followed,
    and what is sent to this machine passes no proxy."""
    import httpx2

    host = urllib.parse.urlsplit(url).hostname or ""
    here = host in ("localhost", "::1") or host.startswith("127.")
    try:
        client = httpx2.AsyncClient(timeout=None, trust_env=not here, verify=certificates())
    except (ImportError, ValueError) as error:
        raise Unavailable(f"{url}: the environment's proxy cannot be used ({first_line(error)})") from error
    reply = b""
    async with client, client.stream("POST", url, content=body, headers=headers) as response:
        async for part in response.aiter_bytes():
            reply += part
            if len(reply) > LARGEST:
                raise RewardError(f"{url}: an answer of more than {LARGEST / 2**20:g} MB")
    return response, reply


@functools.cache
def certificates():
    """Whom HTTPS trusts; to read it takes a tenth of a second."""
    import httpx2

    return httpx2.create_ssl_context()
