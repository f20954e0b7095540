"""Reward servers and judges on loopback: good ones, and slow, wrong, garbled, hostile and absent ones, each
met with the right error in time."""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import math
import os
import pickle
import re
import threading
import time
import types

import numpy as np
import pytest
import torch
from conftest import few, refused, run
from PIL import Image

import rewards
from flow_sde import load_prompts
from scorers import judges, servers

PROMPTS = ["a dog", "a cat", "a fox"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def serve():
    """serve(answer) -> a URL on loopback; answer(path, body, headers, handler) returns (status, bytes), or
    None if it wrote by itself. serve(bytes) always answers these."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                said = (
                    (200, answer)
                    if isinstance(answer, bytes)
                    else answer(self.path, body, self.headers, self)
                )
                if said:
                    status, reply = said
                    send(self, status, {"Content-Length": len(reply)}, reply)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler, status, headers, reply=b""):
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key, str(value))
    handler.end_headers()
    with contextlib.suppress(OSError):  # nobody waits any more
        handler.wfile.write(reply)


def batch_of(prompts, task="t"):
    return [(task, {"prompt": prompt}) for prompt in prompts]


def score(spec, *options, rows=None):
    chosen = rewards.parse_rewards([spec], options)
    batch = [("t", row) for row in rows] if rows else batch_of(PROMPTS)
    [values] = rewards.score_batch(IMAGES, batch, chosen, []).values()
    return values


@pytest.fixture
def waits(monkeypatch):
    """Back-offs noted instead of waited for."""
    noted = []

    async def note(seconds):
        noted.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    return noted


def test_json_server(serve):
    def answer(path, body, headers, _):
        asked = json.loads(body)
        assert path == "/taste" and headers["Content-Type"] == "application/json"
        assert "Authorization" not in headers
        assert asked["reward"] == "taste" and asked["prompts"] == PROMPTS
        assert asked["metadata"] == [{"prompt": p} for p in PROMPTS]
        pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in asked["images"]]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(pictures, rewards.pil(IMAGES), strict=True))
        return 200, json.dumps({"scores": [float(np.mean(p)) for p in pictures]}).encode()

    got = score(f"taste={serve(answer)}/taste")
    means = IMAGES.mul(255).round().mean((1, 2, 3)).tolist()
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx(means, abs=1e-3)


def test_a_server_may_have_no_score_for_a_picture(serve):
    url = serve(b'{"scores": [0.5, null, NaN]}')
    got = score(f"taste={url}")
    assert got[0] == 0.5 and got[1:].isnan().all()


PICKLED = {  # as Flow-GRPO's servers answer
    "scores": [0.1, 0.2, 0.3],
    "rewards": [1.0, 0.0, 1.0],
    "strict_rewards": [0.0] * 3,
    "group_rewards": {"colors": [-10.0] * 3},
}


@pytest.mark.parametrize(
    "name, key", [("geneval", "scores"), ("geneval_strict", "rewards"), ("deqa", "outputs")]
)
def test_pickle_server(serve, name, key):
    reply = {"outputs": [0.7, 0.8, 0.9]} if key == "outputs" else PICKLED

    def answer(path, body, *_):
        asked = pickle.loads(body)
        assert all(Image.open(io.BytesIO(data)).format == "JPEG" for data in asked["images"])
        assert asked["meta_datas"] == rows and asked["only_strict"] is False
        return 200, pickle.dumps(reply)

    things = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    rows = [{"prompt": p, **things} for p in PROMPTS]
    assert score(f"{name}=pickle+{serve(answer)}", rows=rows).tolist() == pytest.approx(reply[key])


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_would_run_code_is_refused(serve, tmp_path):
    for reply, message in (
        (pickle.dumps({"outputs": Bomb(tmp_path / "pwned")}), "refused a pickle that names posix.system"),
        (pickle.dumps({"outputs": np.ones(3)}), "refused a pickle that names numpy"),
        (b"\x80\x04garbage", "no pickle of plain values"),
        (b"", "no pickle"),
        (pickle.dumps([1, 2, 3]), "not 3 finite numbers"),
        (b"\x80\x02]r\x00\x00\x00\x08.", "memo would take all memory"),  # at index 2^27: 2 GB
    ):
        with pytest.raises(rewards.RewardError, match=message):
            score(f"deqa=pickle+{serve(reply)}")
    assert not (tmp_path / "pwned").exists()


NUMBERS = [b"{}", b'{"scores": [1, 2]}', b'{"scores": [1, 2, "3"]}', b'{"scores": 3}']
NUMBERS += [b'{"scores": [1, 2, [3]]}', b"[0.1, 0.2, 0.3]", b'{"scores": [1, 2, Infinity]}']


@pytest.mark.parametrize("reply", [*NUMBERS, b"<html>busy</html>", b"\xff\xfe\x00", b"[" * 200_000])
def test_wrong_answers(serve, waits, reply):
    problem = "not 3 finite numbers" if reply in NUMBERS else "which is not JSON"
    with pytest.raises(rewards.RewardError, match=f"taste: .*{problem}"):
        score(f"taste={serve(reply)}")
    assert waits == []  # a wrong answer would be as wrong again


def test_failures_that_may_pass_are_tried_again(serve, waits):
    answers = [(500, b"Traceback\nout of memory"), (429, b""), (503, b""), (200, b'{"scores": [1, 2, 3]}')]
    assert score(f"taste={serve(lambda *_: answers.pop(0))}").tolist() == [1, 2, 3] and waits == [1, 2, 4]
    with pytest.raises(rewards.RewardError, match="HTTP 500 .*out of memory .attempts: 2"):
        score(f"taste={serve(lambda *_: (500, b'Traceback:  out of memory'))}", "taste.retries=1")
    waits.clear()
    with pytest.raises(rewards.RewardError, match="HTTP 404 .*attempts: 1"):
        score(f"taste={serve(lambda *_: (404, b'no such model'))}")
    assert waits == []


def test_absent_and_slow_servers_end_in_time(serve, waits):
    with pytest.raises(rewards.RewardError, match="127.0.0.1:9: All connection attempts failed .attempts: 4"):
        score("taste=http://127.0.0.1:9")
    assert waits == [1, 2, 4]
    stop = threading.Event()

    def drip(path, body, headers, handler):  # a byte at a time: no single read ever times out
        send(handler, 200, {"Content-Length": 1000})
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()

    for answer in (drip, lambda *_: stop.wait(20) and (200, b"")):
        began = time.monotonic()
        with pytest.raises(rewards.RewardError, match="attempts: 2"):
            score(f"taste={serve(answer)}", "taste.timeout=0.3", "taste.retries=1")
        assert time.monotonic() - began < 3
    stop.set()


def test_broken_error_pages_and_redirects(serve, waits, monkeypatch):
    asked = []

    def cut(path, body, headers, handler):  # a 503 whose body ends too early
        send(handler, 503, {"Content-Length": 1000}, b"busy")

    def away(path, body, headers, handler):
        send(handler, 302, {"Location": elsewhere, "Content-Length": 0})

    with pytest.raises(rewards.Unavailable, match="attempts: 4"):
        score(f"taste={serve(cut)}")
    assert waits == [1, 2, 4]
    elsewhere = serve(lambda *a: asked.append(a) or (200, b"{}"))
    monkeypatch.setenv("REWARD_API_KEY", "secret\n")
    with pytest.raises(rewards.RewardError, match="HTTP 302") as caught:
        score(f"qwenvl=openai+{serve(away)}/v1")
    assert not asked and "secret" not in str(caught.value)


def test_waiting_for_a_reward_ends_with_the_signal(serve):
    """SIGTERM while a server thinks: the wait ends at once, whatever the server does."""
    done, stop = threading.Event(), types.SimpleNamespace(name=None)
    slow = serve(lambda *_: done.wait(20) and (200, b"{}"))
    scorer = rewards.Scorer(rewards.parse_rewards([f"slow={slow}"]), [], stop)
    scorer.submit(IMAGES, batch_of(PROMPTS))
    threading.Timer(0.3, lambda: setattr(stop, "name", "SIGTERM")).start()
    began = time.monotonic()
    assert scorer.collect() is None and time.monotonic() - began < 2
    done.set()


def test_a_huge_answer_is_not_swallowed(serve, monkeypatch):
    monkeypatch.setattr(servers, "LARGEST", 1000)
    with pytest.raises(rewards.RewardError, match="more than"):
        score(f"taste={serve(b'1' * 5000)}")


def test_retry_after_is_honoured(serve, waits):
    """Seconds, for 429 and 503; ten minutes at most; anything else is ignored."""
    pauses = []

    def answer(path, body, headers, handler):
        if not pauses:
            return 200, b'{"scores": [1, 2, 3]}'
        send(handler, 429, {"Retry-After": pauses.pop(0), "Content-Length": 0})

    url = serve(answer)
    asked = {"7": 7, "0": 0, "soon": 1, "-5": 1, "86400": 600, "9" * 5000: 1}
    for seconds, expected in asked.items():
        pauses[:] = [seconds]
        assert score(f"taste={url}").tolist() == [1, 2, 3] and waits == [expected]
        waits.clear()


PAGES = [
    ('{\n  "error": {"message": "the model `x` does not exist"}}', "the model `x` does not exist"),
    ("Traceback:\n  x\nKeyError: 'image'", "Traceback: x KeyError: 'image'"),
    ("x" * 5000 + "\nout of memory", "xxx out of memory"),
]


@pytest.mark.parametrize("reply, said", PAGES)
def test_a_servers_own_message_is_shown(serve, reply, said):
    with pytest.raises(rewards.Unavailable) as caught:
        score(f"taste={serve(lambda *_: (400, reply.encode()))}")
    assert "HTTP 400 Bad Request: " in str(caught.value) and said in str(caught.value)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_no_proxy_stands_before_this_machine(serve, monkeypatch):
    """A proxy of the environment gets what goes elsewhere, and nothing that goes to loopback."""
    seen = []

    def proxy(path, *_):
        seen.append(path)
        return 200, b'{"scores": [0, 0, 0]}'

    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, serve(proxy))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    url = serve(b'{"scores": [1, 2, 3]}')
    for host in ("127.0.0.1", "localhost"):
        assert score("taste=" + url.replace("127.0.0.1", host)).tolist() == [1, 2, 3]
    assert seen == []
    assert score("taste=http://rewards.invalid/x").tolist() == [0, 0, 0]
    assert seen == ["http://rewards.invalid/x"]


def test_a_proxy_that_cannot_be_used_is_said(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(rewards.Unavailable, match="the environment's proxy cannot be used"):
        score("taste=http://rewards.invalid/x")


def test_secrets_are_in_no_message(serve, monkeypatch, capsys):
    address = serve(lambda *_: chat("no")).replace("http://", "http://me:secret@")
    assert score(f"qwenvl=openai+{address}").isnan().all()
    with pytest.raises(rewards.RewardError, match=r"http://\*\*\*@127") as caught:
        score(f"taste={address}")
    monkeypatch.setenv("REWARD_API_KEY", "secret\nsecret")
    with pytest.raises(rewards.Unavailable, match="REWARD_API_KEY holds") as broken:
        score(f"qwenvl=openai+{address}")
    said = capsys.readouterr().err
    assert "***@127" in said and "secret" not in said + str(caught.value) + str(broken.value)


# -- judges --------------------------------------------------------------------------------------------------


def chat(content, **more):
    return 200, json.dumps({"choices": [{"message": {"content": content}} | more]}).encode()


def question_of(body):
    """(picture, text) of a request to a judge."""
    image, text = json.loads(body)["messages"][0]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{picture.format.lower()};base64"
    return picture, text["text"]


def test_judges(serve, monkeypatch, tmp_path):
    """What is asked, and how the number is found in what is answered."""
    seen = []

    def answer(path, body, headers, _):
        asked, (_, text) = json.loads(body), question_of(body)
        seen.append((path, asked, headers.get("Authorization"), text))
        assert asked["temperature"] == 0
        n = [p in text for p in PROMPTS].index(True) + 1
        return chat(f"Criterion 5 of 5. Final Score: {n}.5\n<Score>4</Score> no: <Score>{n}</Score>")

    url = serve(answer)
    assert score(f"unifiedreward=openai+{url}/v1").tolist() == pytest.approx([1.5 / 5, 2.5 / 5, 3.5 / 5])
    for path, asked, key, _ in seen:
        assert path == "/v1/chat/completions" and asked["model"] == "CodeGoat24/UnifiedReward-qwen-7b"
        assert key is None and asked["max_tokens"] == 1024 and "max_completion_tokens" not in asked
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    (tmp_path / "ask.txt").write_text("How is {prompt}?")
    options = "qwenvl.model=mine", f"qwenvl.prompt=@{tmp_path}/ask.txt"
    values = score(f"qwenvl=openai+{url}/v1", *options)
    assert values.tolist() == pytest.approx([0.2, 0.4, 0.6])  # the last one said
    assert seen[-1][1]["model"] == "mine" and seen[-1][2] == "Bearer secret"
    assert {text for *_, text in seen[-3:]} == {f"How is {p}?" for p in PROMPTS}
    options = r"qwenvl.pattern=Score: ([\d.]+)\n", "qwenvl.max_completion_tokens=77"
    assert score(f"qwenvl=openai+{url}/v1", *options).tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert seen[-1][1]["max_completion_tokens"] == 77 and "max_tokens" not in seen[-1][1]
    score(f"qwenvl=openai+{url}/v1", "qwenvl.max_tokens=50")
    assert seen[-1][1]["max_tokens"] == 50
    score(f"qwenvl=openai+{url}/v1/?version=2")
    assert seen[-1][0] == "/v1/chat/completions?version=2"


def test_a_judge_that_takes_no_temperature_and_only_jpeg(serve):
    seen = []

    def answer(path, body, *_):
        seen.append(("temperature" in json.loads(body), question_of(body)[0].format))
        return chat("Final Score: 4")

    url = serve(answer)
    assert score(f"unifiedreward=openai+{url}").tolist() == pytest.approx([0.8] * 3)
    options = "unifiedreward.temperature=False", "unifiedreward.image=JPEG"
    assert score(f"unifiedreward=openai+{url}", *options).tolist() == pytest.approx([0.8] * 3)
    assert seen == [(True, "PNG")] * 3 + [(False, "JPEG")] * 3


def test_what_is_no_chat_completion(serve):
    for reply in (b'{"error": "no"}', b'{"choices": []}', b"[]", b'{"choices": [3]}'):
        with pytest.raises(rewards.Unavailable, match="not a chat completion"):
            score(f"qwenvl=openai+{serve(reply)}")
    with pytest.raises(rewards.RewardError, match="needs an endpoint: NAME=openai"):
        score("qwenvl")


FORMS = [
    ("<Score>4</Score>", 0.8),
    ("<score>4</score>", 0.8),
    ("<Score> 4.5 </Score>", 0.9),
    ("**Final Score:** 4", 0.8),
    ("Final Score: **4**", 0.8),
    ('{"score": 4}', 0.8),
    ('```json\n{"reason": "x", "score": "4"}\n```', 0.8),
    ("Final Score: 4/10", 0.4),
    ("Final Score: 4 / 5.", 0.8),
    ("Score: 8 out of 10", 0.8),
    ("Score: 4,5", 0.9),
    ("Final Score: 4, because", 0.8),
    ("Alignment Score (1-5): 3", 0.6),
    ("Final Score: 0", 0),
    ("Score: 2, no, wait. Score: 3", 0.6),
    ("Thinking: score: 1</think>Score: 3", 0.6),
    ("<think>Score: 1</think>\n<Score>3</Score>", 0.6),
    ("◁think▷Score: 1◁/think▷Score: 3", 0.6),
    ("<seed:think>Score: 1</seed:think>Score: 3", 0.6),
    ("<Score>4</Score> Note: a perfect score: 5 is for flawless pictures.", 0.8),
    ([{"type": "text", "text": "<Score>"}, {"type": "image"}, {"type": "text", "text": "4</Score>"}], 0.8),
]
PATTERNS = [judges.TAGGED_SCORE, judges.ANY_SCORE]


@pytest.mark.parametrize("said, expected", FORMS)
def test_a_score_in_any_usual_form(said, expected):
    answer = {"message": {"content": said}, "finish_reason": "stop"}
    assert judges.read_score(answer, PATTERNS) == pytest.approx(expected)
    if "Final" in said:
        assert judges.read_score(answer, [judges.FINAL_SCORE]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"message": {"content": "I cannot say"}}, "no score in"),
        ({"message": {"content": ""}}, "without text"),
        ({"message": {"content": None, "refusal": "not allowed"}}, "without text.*refusal.*not allowed"),
        ({"message": {"content": None}, "finish_reason": "content_filter"}, "without text.*content_filter"),
        ({"message": {"content": None, "tool_calls": [{"id": 1}]}}, "without text.*tool_calls"),
        ({"message": {"content": [], "reasoning_content": "Score: 3"}}, "without text.*reasoning_content"),
        ({"message": None}, "without text"),
        ({}, "without text"),
        ({"message": {"content": "◁think▷first, Score: 4"}}, "cut off before its end"),
        ({"message": {"content": "<seed:think>first, Score: 4"}}, "cut off before its end"),
        ({"message": {"content": "Score: 7"}}, "a score of 7, not within 0 to 5"),
        ({"message": {"content": "Score: 11/10"}}, "a score of 11, not within 0 to 10"),
        ({"message": {"content": "Score: -3"}}, "no score in"),
        ({"message": {"content": "Score: 1-5"}}, "no score in"),
        ({"message": {"content": "Score: 45"}}, "a score of 45"),
        ({"message": {"content": "Score: 4"}, "finish_reason": "length"}, "cut off before its end"),
        ({"message": {"content": "<think>first, Score: 4"}}, "cut off before its end"),
        ({"message": {"content": "Score: 3/0"}}, "not within 0 to 0"),
    ],
)
def test_what_is_no_score(answer, message):
    with pytest.raises(judges.NoAnswer, match=message):
        judges.read_score(answer, PATTERNS)


def test_who_gives_no_score_is_asked_again_and_then_left_out(serve, capsys):
    """Three times, with a temperature and a reminder from the second on; then the picture has no score, and
    it is said why."""
    asked = {p: [] for p in PROMPTS}

    def answer(path, body, *_):
        _, text = question_of(body)
        [prompt] = [p for p in PROMPTS if p in text]
        asked[prompt].append((json.loads(body)["temperature"], "exactly the form" in text))
        refuses = prompt == "a fox" or (prompt == "a cat" and len(asked[prompt]) == 1)
        return chat("I would rather not" if refuses else "<Score>4</Score>")

    url = serve(answer)
    scores = score(f"qwenvl=openai+{url}")
    assert scores[:2].tolist() == pytest.approx([0.8, 0.8]) and scores[2].isnan()
    once, again, thrice = (0, False), (0.5, True), (1, True)
    assert asked == {"a dog": [once], "a cat": [once, again], "a fox": [once, again, thrice]}
    assert f"{url}: asked three times, no score: no score in" in capsys.readouterr().err
    message = "--reward qwenvl: no score of a grey picture. no score in the answer 'I would rather not'"
    with pytest.raises(SystemExit, match=message):
        chosen = rewards.parse_rewards([f"qwenvl=openai+{url}"])
        rewards.check_rewards(chosen, {"t": [{"prompt": "a fox"}]}, 8)


ROLLOUTS = [
    (1, 10, True),
    (2, 10, True),
    (3, 10, False),
    (10, 10, False),
    (1, 2, True),
    (2, 2, False),
    (1, 1, False),
]


@pytest.mark.parametrize("silent, total, fine", ROLLOUTS)
def test_a_rollout_goes_on_without_a_few_scores(serve, silent, total, fine):
    """One picture of a rollout, or a fifth, may have no score; with more the rollout fails, saying what the
    judge said."""

    def answer(path, body, *_):
        number = int(re.search(r"number (\d+)", question_of(body)[1])[1])
        return chat("no idea" if number < silent else "Score: 3")

    chosen = rewards.parse_rewards([f"qwenvl@judged=openai+{serve(answer)}", "jpeg"])
    scorer = rewards.Scorer(chosen, ["judged", "other"])
    batch = batch_of([f"number {k}" for k in range(total)], "judged") + batch_of(["not judged"], "other")
    for i in range(0, len(batch), 5):
        part = batch[i : i + 5]
        scorer.submit(torch.rand(len(part), 3, 8, 8), part)
    if not fine:
        message = f"qwenvl: {silent} of {total} pictures have no score. no score in the answer 'no idea'"
        with pytest.raises(rewards.RewardError, match=message):
            scorer.collect()
        return
    scores = scorer.collect()
    assert scores["qwenvl"].isnan().tolist() == [k < silent or k == total for k in range(total + 1)]
    assert not scores["jpeg"].isnan().any()


def test_a_validation_says_how_many_scores_are_missing(serve):
    class Model:
        device = "cpu"

        def generate(self, prompts, *_):
            return torch.rand(len(prompts), 3, 8, 8)

    def answer(path, body, *_):
        return chat("no idea" if "number 3" in str(body) else "Score: 3")

    chosen = rewards.parse_rewards([f"qwenvl=openai+{serve(answer)}"])
    args = types.SimpleNamespace(eval_num_steps=1, resolution=8, eval_batch_size=4, seed=0, guidance=1)
    rows = [{"prompt": f"number {k}"} for k in range(6)]
    row = rewards.evaluate(Model(), "x", {"t": rows}, chosen, args)
    assert row["n"] == 6 and row["missing"] == {"qwenvl": 1}
    assert row["scores"] == pytest.approx({"qwenvl": 0.6}) and row["stderr"] == pytest.approx({"qwenvl": 0})
    assert "| x | 0.600 ± 0.000, 1 missing |" in rewards.markdown([{"model": "x"} | row])


def test_deqa_from_the_five_levels(serve):
    """Probabilities of whole words and of words' beginnings, in any spelling of a token; they must hold half
    of the mass."""

    def ask(**words):
        top = [{"token": token, "logprob": math.log(p)} for token, p in words.items()]
        reply = chat("good", finish_reason="length", logprobs={"content": [{"top_logprobs": top}]})
        return score(f"deqa=openai+{serve(lambda *_: reply)}", "deqa.model=some/vlm")

    words = {" Excellent": 0.1, "good": 0.4, "▁fair": 0.2, "Ġpoor": 0.05, "Bad": 0.05, "The": 0.15, "": 0.05}
    expected = (0.1 * 5 + 0.4 * 4 + 0.2 * 3 + 0.05 * 2 + 0.05) / 0.8 / 5
    assert ask(**words).tolist() == pytest.approx([expected] * 3)
    assert ask(Ex=0.5, p=0.5).tolist() == pytest.approx([0.7] * 3)
    assert ask(good=0.51, The=0.49).tolist() == pytest.approx([0.8] * 3)
    for words in ({"The": 1.0}, {"good": 0.03, "The": 0.97}, {"good": 0.49, "The": 0.51}):
        assert ask(**words).isnan().all()
    said = list(rewards.NO_SCORE.values())[-1]
    assert "excellent, good, fair, poor, bad together have 49% of the probability" in said
    assert "the likeliest tokens are 'good', 'the'" in said
    with pytest.raises(rewards.Unavailable, match="some/vlm gave no log-probabilities"):
        score(f"deqa=openai+{serve(lambda *_: chat('good'))}", "deqa.model=some/vlm")
    for spec in ("deqa=openai+http://127.0.0.1:9", "deqa"):  # neither vLLM nor SGLang serves its own model
        with pytest.raises(rewards.Unavailable, match="needs Flow-GRPO's server, deqa=pickle.*deqa.model"):
            score(spec)


# -- GenEval 2 -----------------------------------------------------------------------------------------------


def atom(**tokens):
    """A judge's answer of one token, with the probabilities of what it may begin with."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return chat("x", finish_reason="length", logprobs={"content": [{"top_logprobs": top}]})


GREEN = {  # the first row of geneval2_data.jsonl
    "prompt": "a green backpack and a pig",
    "atom_count": 3,
    "vqa_list": [
        ["How many backpacks are in the image?", "one"],
        ["Is the backpack green?", "Yes"],
        ["Are there any backpacks in the image?", "Yes"],
        ["How many pigs are in the image?", "one"],
        ["Are there any pigs in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object", "count", "object"],
}
SEVEN = {"prompt": "seven croissants", "vqa_list": [["How many croissants are in the image?", "seven"]]}
ANSWERS = {  # to each question, and what evaluation.py's sum over its answer list comes to
    "How many backpacks are in the image?": (
        {"one": 0.2, "One": 0.3, "1": 0.1, " one": 0.05, " One": 0.02, " ": 0.01, "two": 0.3, "2": 0.02},
        0.68,
    ),
    "Is the backpack green?": ({"Yes": 0.6, "ĠYes": 0.01, "yes": 0.02, "No": 0.3, "YES": 0.04}, 0.63),
    "Are there any backpacks in the image?": ({"Yes": 0.9, "No": 0.1}, 0.9),
    "How many pigs are in the image?": ({"Two": 0.5, "ones": 0.2, "11": 0.1, "One": 0.05}, 0.05),
    "Are there any pigs in the image?": ({"Yes": 1.0}, 1.0),
    "How many croissants are in the image?": ({"7": 0.4, "▁seven": 0.3, "sevent": 0.3}, 0.7),
}


def test_geneval2_is_soft_tifa(serve, tmp_path):
    """Every question once, about its own row's picture, one greedy token; then the geometric mean of the
    probabilities of the official answer lists, or the arithmetic one."""
    seen = []

    def answer(path, body, *_):
        asked, (picture, text) = json.loads(body), question_of(body)
        [question] = [q for q in ANSWERS if text == f"{q} Answer in one word."]
        seen.append((question, picture.tobytes()))
        assert asked["max_tokens"] == 1 and asked["logprobs"] is True and asked["top_logprobs"] == 20
        assert asked["temperature"] == 0 and asked["model"] == "Qwen/Qwen3-VL-8B-Instruct"
        return atom(**ANSWERS[question][0])

    file = tmp_path / "geneval2_data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (SEVEN, GREEN)))
    rows, spec = load_prompts("geneval2", str(file)), f"geneval2=openai+{serve(answer)}/v1"
    atoms = [[ANSWERS[question][1] for question, _ in row["vqa_list"]] for row in rows]
    got = score(spec, rows=rows)
    assert got.tolist() == pytest.approx([math.prod(p) ** (1 / len(p)) for p in atoms])
    pictures = [picture.tobytes() for picture in rewards.pil(IMAGES)]
    owners = [(q, pictures[i]) for i, row in enumerate(rows) for q, _ in row["vqa_list"]]
    assert sorted(seen) == sorted(owners)
    got = score(spec, "geneval2.arithmetic=True", rows=rows)
    assert got.tolist() == pytest.approx([sum(p) / len(p) for p in atoms])


def test_geneval2_without_an_answer(serve):
    """A right answer that is not among the tokens shown is 0; a judge that thinks aloud gives no score."""
    said = [atom(No=1.0), atom(**{"<think>": 1.0})]
    url = serve(lambda *_: said[0])
    assert score(f"geneval2=openai+{url}", rows=[GREEN]).tolist() == [0]
    said.pop(0)
    assert score(f"geneval2=openai+{url}", rows=[GREEN]).isnan().all()
    assert "first token is '<think>', not a word" in rewards.NO_SCORE[url]
    with pytest.raises(rewards.Unavailable, match="Qwen3-VL-8B-Instruct gave no log-probabilities"):
        score(f"geneval2=openai+{serve(lambda *_: chat('Yes'))}", rows=[GREEN])


@pytest.mark.parametrize(
    "pairs, message",
    [
        (None, 'needs the "vqa_list" of geneval2_data.jsonl: .a pig'),
        ([], 'needs the "vqa_list"'),
        ("Are there pigs?", 'needs the "vqa_list"'),
        ([["Are there pigs?"]], "not .'Are there pigs.'.: 'a pig"),
        ([["Are there pigs?", "No"]], '"Yes".*, not'),
        ([["How many pigs are there?", "eleven"]], '"one" to "ten"'),
        ([["How many pigs are there?", 1]], '"one" to "ten"'),
        ([{"question": "Are there pigs?", "answer": "Yes"}], "geneval2 expects"),
    ],
)
def test_what_is_no_geneval2_prompt(pairs, message):
    row = {"prompt": "a pig"} | ({} if pairs is None else {"vqa_list": pairs})
    chosen = rewards.parse_rewards(["geneval2=openai+http://127.0.0.1:9"])
    with pytest.raises(SystemExit, match=f"--prompts geneval2: .*{message}"):
        rewards.check_rewards(chosen, {"geneval2": [GREEN, row]}, 8)


# -- in a run ------------------------------------------------------------------------------------------------


def train(url, out):
    """The command for four small updates on a server's reward."""
    prompts, validation = (few(split, 2, os.path.dirname(out))[0] for split in ("train", "val"))
    flags = f"--reward taste={url} --reward-option taste.retries=0"
    flags += f" --prompts {prompts} --eval-prompts {validation}"
    sizes = "--batch-size 2 --group-size 2 --micro-batch-size 2 --num-steps 3 --sde-window 0 --steps 4"
    now_and_then = "--save-every 100 --eval-every 100 --eval-num-steps 2"
    return f"train_teacher.py {flags} {sizes} {now_and_then} --out {out}".split()


def test_a_reward_that_fails_stops_training_and_loses_nothing(serve, tmp_path):
    """After two rollouts the server dies: the run ends with what failed and exit status 1, and its checkpoint
    goes on when the server is back."""
    calls, last = [], [7]  # two to try the server, one to validate the base, two a rollout

    def answer(path, body, *_):
        calls.append(1)
        if len(calls) > last[0]:
            return 500, b"out of memory"
        return 200, json.dumps({"scores": [k / 2 for k in range(len(json.loads(body)["images"]))]}).encode()

    argv = train(serve(answer), str(tmp_path / "out"))
    message = refused(*argv)
    assert "--reward taste: " in message and "HTTP 500" in message and "out of memory" in message
    assert sorted(os.listdir(tmp_path / "out/checkpoints")) == ["000000", "000002"]
    last[0] = 1000
    run(*argv, "--resume", "auto")
    assert sorted(os.listdir(tmp_path / "out/checkpoints"))[-1] == "000004"


def test_a_server_that_is_not_there_is_noticed_first(tmp_path):
    message = refused(*train("http://127.0.0.1:9", str(tmp_path / "out")))
    assert "--reward taste: http://127.0.0.1:9" in message and os.listdir(tmp_path / "out") == [".lock"]


def test_scoring_runs_beside_sampling(serve):
    """Four batches, each 0.2 s to sample and 0.2 s to score on two servers: the sum is hidden but for one."""

    def answer(path, body, *_):
        time.sleep(0.2)
        return 200, json.dumps({"scores": [1.0] * len(json.loads(body)["images"])}).encode()

    scorer = rewards.Scorer(rewards.parse_rewards([f"slow={serve(answer)}", f"slower={serve(answer)}"]), [])
    began = time.monotonic()
    for _ in range(4):
        time.sleep(0.2)
        scorer.submit(IMAGES, batch_of(PROMPTS))
    scores = scorer.collect()
    took = time.monotonic() - began
    print(f"{took:.2f} s for 4 x (0.2 s sampling, 0.2 s + 0.2 s scoring)")
    assert took < 1.6 and scores["slow"].shape == (12,) and scores["slower"].tolist() == [1.0] * 12


def test_training_goes_on_without_a_picture_that_got_no_score(serve, tmp_path, monkeypatch):
    """A judge says nothing of one picture of a group of six: it is in no mean and no spread, and nothing is
    learnt from it; another group, of which one picture alone has a score, ties."""

    def answer(path, body, *_):
        picture, _ = question_of(body)
        return chat(f"Score: {np.mean(picture) / 51:.3f}")

    silent = [1, 7, 8, 9, 10, 11]  # of the 12 pictures of a rollout
    plain = rewards.score_batch

    def score_batch(images, batch, chosen, tasks):
        scores = plain(images, batch, chosen, tasks)
        if len(images) == 12:
            scores["qwenvl"][silent] = math.nan
        return scores

    monkeypatch.setattr(rewards, "score_batch", score_batch)
    compose, ocr, _ = few("train", 1, str(tmp_path))
    flags = f"--reward qwenvl=openai+{serve(answer)} --prompts {compose} {ocr} --eval-prompts {compose}"
    sizes = "--batch-size 2 --group-size 6 --num-steps 3 --sde-window 0 --steps 1 --eval-num-steps 1"
    argv = f"train_teacher.py {flags} {sizes} --micro-batch-size 12 --updates-per-rollout 1 --out".split()
    assert "qwenvl: 6 of 12 pictures have no score" in refused(*argv, tmp_path / "strict")
    monkeypatch.setattr(rewards, "TOLERATED", 0.6)
    ns = run(*argv, tmp_path / "out")
    scores, scored = ns["reward"][:6], [0, 2, 3, 4, 5]
    assert ns["reward"].isnan().nonzero().flatten().tolist() == silent
    expected = (scores[scored] - scores[scored].mean()) / (scores[scored].std() + 1e-4)
    assert ns["advantage"][scored].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert ns["advantage"][1].isnan() and ns["tied"].tolist() == [False, True]
    assert ns["telling"].flatten().nonzero().flatten().tolist() == scored
    assert ns["terms"] == 5 * len(ns["trajectory"]) and all(p.isfinite().all() for p in ns["params"])
