"""Reward servers and judges on loopback: good ones, and slow, wrong, garbled, hostile and absent ones, each met with the right error in time."""

import base64
import email.utils
import http.server
import inspect
import io
import json
import math
import os
import pickle
import threading
import time
import types

import numpy as np
import pytest
import torch
from conftest import few, refused, run
from PIL import Image

import rewards

PROMPTS = ["a dog", "a cat", "a fox"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def serve():
    """serve(answer) -> a URL on loopback; answer(path, body, headers, handler) returns (status, bytes), or None if it wrote by itself."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                said = answer(
                    self.path, self.rfile.read(int(self.headers["Content-Length"])), self.headers, self
                )
                if said:
                    self.send_response(said[0])
                    self.send_header("Content-Length", str(len(said[1])))
                    self.end_headers()
                    self.wfile.write(said[1])

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown(), server.server_close()


def score(spec, *options, rows=None):
    rewards_of = rewards.parse_rewards([spec], options)
    [values] = rewards.score_batch(
        IMAGES, [("t", row) for row in rows or [{"prompt": p} for p in PROMPTS]], rewards_of, []
    ).values()
    return values


def brief(monkeypatch):
    """Back-offs noted instead of waited for."""
    waits = []
    monkeypatch.setattr(rewards.time, "sleep", waits.append)
    return waits


def test_json_server(serve):
    def answer(path, body, headers, _):
        asked = json.loads(body)
        assert (
            path == "/taste"
            and headers["Content-Type"] == "application/json"
            and asked["reward"] == "taste"
            and asked["prompts"] == PROMPTS
        )
        assert asked["metadata"] == [{"prompt": p} for p in PROMPTS] and "Authorization" not in headers
        pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(i)))) for i in asked["images"]]
        assert all(
            (p == np.moveaxis((i * 255).round().byte().numpy(), 0, -1)).all()
            for p, i in zip(pictures, IMAGES)
        )
        return 200, json.dumps({"scores": [float(p.mean()) for p in pictures]}).encode()

    got = score(f"taste={serve(answer)}/taste")
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx(
        (IMAGES.mul(255).round().mean((1, 2, 3))).tolist(), abs=1e-3
    )


@pytest.mark.parametrize(
    "name, key", [("geneval", "scores"), ("geneval_strict", "rewards"), ("deqa", "outputs")]
)
def test_pickle_server(serve, name, key):
    def answer(path, body, *_):
        asked = pickle.loads(body)
        assert (
            all(Image.open(io.BytesIO(i)).format == "JPEG" for i in asked["images"])
            and asked["meta_datas"] == rows
            and asked["only_strict"] is False
        )
        reply = {
            "scores": [0.1, 0.2, 0.3],
            "rewards": [1.0, 0.0, 1.0],
            "strict_rewards": [0.0] * 3,
            "group_rewards": {"colors": [-10.0] * 3},
        }
        return 200, pickle.dumps(reply if key != "outputs" else {"outputs": [0.7, 0.8, 0.9]})

    rows = [{"prompt": p, "tag": "colors", "include": [{"class": "dog", "count": 1}]} for p in PROMPTS]
    expected = {"scores": [0.1, 0.2, 0.3], "rewards": [1, 0, 1], "outputs": [0.7, 0.8, 0.9]}[key]
    assert score(f"{name}=pickle+{serve(answer)}", rows=rows).tolist() == pytest.approx(expected)


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
    ):
        with pytest.raises(rewards.RewardError, match=message):
            score(f"deqa=pickle+{serve(lambda *_: (200, reply))}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "reply, message",
    [
        (b"<html>busy</html>", "which is not JSON"),
        (b"\xff\xfe\x00", "which is not JSON"),
        (b"{}", "not 3 finite numbers"),
        (b'{"scores": [1, 2]}', "not 3 finite numbers"),
        (b'{"scores": [1, 2, "3"]}', "not 3"),
        (b'{"scores": [1, 2, NaN]}', "not 3"),
        (b'{"scores": [1, 2, null]}', "not 3"),
        (b'{"scores": 3}', "not 3"),
        (b"[0.1, 0.2, 0.3]", "not 3"),
        (b'{"scores": [1, 2, Infinity]}', "not 3"),
    ],
)
def test_wrong_answers(serve, monkeypatch, reply, message):
    waits = brief(monkeypatch)
    with pytest.raises(rewards.RewardError, match=f"taste: .*{message}"):
        score(f"taste={serve(lambda *_: (200, reply))}")
    assert waits == []  # a wrong answer would be as wrong again


def test_failures_that_may_pass_are_tried_again(serve, monkeypatch):
    waits, calls = brief(monkeypatch), []

    def answer(*_):
        calls.append(1)
        return (
            [(500, b"Traceback\nout of memory"), (429, b""), (503, b"")][len(calls) - 1]
            if len(calls) < 4
            else (200, b'{"scores": [1, 2, 3]}')
        )

    assert score(f"taste={serve(answer)}").tolist() == [1, 2, 3] and waits == [1, 2, 4]
    calls.clear()
    with pytest.raises(rewards.RewardError, match="HTTP 500 .*out of memory .2 attempts"):
        score(
            f"taste={serve(lambda *_: (500, b'Traceback' + bytes([10]) + b'out of memory'))}",
            "taste.retries=1",
        )
    waits.clear()
    with pytest.raises(rewards.RewardError, match="HTTP 404 .*1 attempt"):
        score(f"taste={serve(lambda *_: (404, b'no such model'))}")
    assert waits == []


def test_absent_and_slow_servers_end_in_time(serve, monkeypatch):
    waits = brief(monkeypatch)
    with pytest.raises(rewards.RewardError, match="127.0.0.1:9: All connection attempts failed .4 attempts"):
        score("taste=http://127.0.0.1:9")
    assert waits == [1, 2, 4]
    stop = threading.Event()

    def drip(*args):  # a byte at a time: no single read ever times out
        handler = args[3]
        handler.send_response(200), handler.send_header("Content-Length", "1000"), handler.end_headers()
        try:
            while not stop.wait(0.05):
                handler.wfile.write(b" "), handler.wfile.flush()
        except OSError:
            pass

    for answer in (drip, lambda *_: stop.wait(20) and (200, b"")):
        began = time.monotonic()
        with pytest.raises(rewards.RewardError, match="2 attempts"):
            score(f"taste={serve(answer)}", "taste.timeout=0.4", "taste.retries=1")
        assert time.monotonic() - began < 3
    stop.set()


def test_broken_error_pages_and_redirects(serve, monkeypatch):
    waits, asked = brief(monkeypatch), []

    def cut(*args):  # a 503 whose body ends too early
        handler = args[3]
        handler.send_response(503), handler.send_header("Content-Length", "1000"), handler.end_headers()
        handler.wfile.write(b"busy")

    with pytest.raises(rewards.Unavailable, match="HTTP 503.*4 attempts"):
        score(f"taste={serve(cut)}")
    assert waits == [1, 2, 4]
    elsewhere = serve(lambda *a: asked.append(a) or (200, b"{}"))

    def away(*args):
        (
            args[3].send_response(302),
            args[3].send_header("Location", elsewhere),
            args[3].send_header("Content-Length", "0"),
            args[3].end_headers(),
        )

    monkeypatch.setenv("REWARD_API_KEY", "secret\n")
    with pytest.raises(rewards.RewardError, match="HTTP 302") as caught:
        score(f"qwenvl=openai+{serve(away)}/v1")
    assert not asked and "secret" not in str(caught.value)


def test_waiting_for_a_reward_ends_with_the_signal(serve):
    """SIGTERM while a server thinks: the wait ends at once, whatever the server does."""
    done, stop = threading.Event(), type("Stop", (), {"name": None})()
    scorer = rewards.Scorer(
        rewards.parse_rewards([f"slow={serve(lambda *_: done.wait(20) and (200, b'{}'))}"]), [], stop
    )
    scorer.submit(IMAGES, [("t", {"prompt": p}) for p in PROMPTS])
    threading.Timer(0.3, lambda: setattr(stop, "name", "SIGTERM")).start()
    began = time.monotonic()
    assert scorer.collect() is None and time.monotonic() - began < 2
    done.set()


def test_a_huge_answer_is_not_swallowed(serve, monkeypatch):
    monkeypatch.setattr(rewards, "LARGEST", 1000)
    with pytest.raises(rewards.RewardError, match="more than"):
        score(f"taste={serve(lambda *_: (200, b'1' * 5000))}")


def test_retry_after_is_honoured(serve, monkeypatch):
    """Seconds or a date, for 429 and 503; ten minutes at most; nonsense is ignored."""
    waits, headers = brief(monkeypatch), []

    def answer(*args):
        handler = args[3]
        if not headers:
            return 200, b'{"scores": [1, 2, 3]}'
        (
            handler.send_response(429),
            handler.send_header("Retry-After", headers.pop(0)),
            handler.send_header("Content-Length", "0"),
        )
        handler.end_headers()

    url = serve(answer)
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    for asked, expected in (
        (["7"], [7]),
        (["0", "11"], [0, 11]),
        (["soon"], [1]),
        (["-5", "1.5"], [1, 2]),
        (["86400"], [600]),
        ([soon], [pytest.approx(30, abs=3)]),
        (["Thu, 01 Jan 1970 00:00:00 GMT"], [0]),
    ):
        headers[:] = asked
        assert score(f"taste={url}").tolist() == [1, 2, 3] and waits == expected
        waits.clear()


@pytest.mark.parametrize(
    "reply, said",
    [
        (
            json.dumps({"error": {"message": "the model `x` does not exist", "type": "NotFound"}}, indent=2),
            "the model `x` does not exist (",
        ),  # OpenAI, vLLM
        (
            json.dumps({"object": "error", "message": "prompt too long", "code": 400}, indent=4),
            "prompt too long (",
        ),  # SGLang
        (json.dumps({"detail": "Not Found"}), "Not Found ("),
        (json.dumps({"error": "no"}), "no ("),  # FastAPI; others
        ("<html>\n<body><h1>404</h1>\n nginx</body></html>", "404 nginx ("),
        ("Traceback:\n  x\nKeyError: 'image'", "Traceback: x KeyError: 'image' ("),
    ],
)
def test_a_servers_own_message_is_shown(serve, reply, said):
    with pytest.raises(rewards.Unavailable) as caught:
        score(f"taste={serve(lambda *_: (400, reply.encode()))}")
    assert f"HTTP 400 Bad Request: {said}1 attempt)" in str(caught.value)


def test_no_proxy_stands_before_this_machine(serve, monkeypatch):
    """A proxy of the environment gets what goes elsewhere, and nothing that goes to loopback."""
    seen = []

    def proxy(path, *_):
        seen.append(path)
        return 200, b'{"scores": [0, 0, 0]}'

    monkeypatch.setenv("HTTP_PROXY", serve(proxy)), monkeypatch.setenv("http_proxy", serve(proxy))
    monkeypatch.delenv("NO_PROXY", raising=False), monkeypatch.delenv("no_proxy", raising=False)
    url = serve(lambda *_: (200, b'{"scores": [1, 2, 3]}'))
    for host in ("127.0.0.1", "localhost"):
        assert score("taste=" + url.replace("127.0.0.1", host)).tolist() == [1, 2, 3]
    assert (
        seen == []
        and score("taste=http://rewards.invalid/x").tolist() == [0, 0, 0]
        and seen == ["http://rewards.invalid/x"]
    )


# -- judges ------------------------------------------------------------------------------------------------------------------


def chat(content, **more):
    return 200, json.dumps({"choices": [{"message": {"content": content}} | more]}).encode()


def test_judges(serve, monkeypatch, tmp_path):
    """What is asked, and how the number is found in what is answered."""
    seen = []

    def answer(path, body, headers, _):
        asked = json.loads(body)
        seen.append((path, asked, headers.get("Authorization")))
        picture, text = asked["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,") and asked["temperature"] == 0
        n = [p in text["text"] for p in PROMPTS].index(True) + 1
        return chat(f"Criterion 5 of 5. Final Score: {n}.5\n<Score>4</Score> no: <Score>{n}</Score>")

    url = serve(answer)
    assert score(f"unifiedreward=openai+{url}/v1").tolist() == pytest.approx([1.5 / 5, 2.5 / 5, 3.5 / 5])
    assert {(path, asked["model"], key) for path, asked, key in seen} == {
        ("/v1/chat/completions", "CodeGoat24/UnifiedReward-qwen-7b", None)
    }
    assert seen[-1][1]["max_tokens"] == 1024 and "max_completion_tokens" not in seen[-1][1]
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    (tmp_path / "ask.txt").write_text("How is {prompt}?")
    assert score(
        f"qwenvl=openai+{url}/v1", "qwenvl.model=mine", f"qwenvl.prompt=@{tmp_path}/ask.txt"
    ).tolist() == pytest.approx([0.2, 0.4, 0.6])  # the last one said
    assert (
        seen[-1][1]["model"] == "mine"
        and seen[-1][2] == "Bearer secret"
        and {a["messages"][0]["content"][1]["text"] for _, a, _ in seen[-3:]}
        == {f"How is {p}?" for p in PROMPTS}
    )
    assert score(
        f"qwenvl=openai+{url}/v1", r"qwenvl.pattern=Score: ([\d.]+)\n", "qwenvl.max_completion_tokens=77"
    ).tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert seen[-1][1]["max_completion_tokens"] == 77 and "max_tokens" not in seen[-1][1]
    score(f"qwenvl=openai+{url}/v1", "qwenvl.max_tokens=50")
    assert seen[-1][1]["max_tokens"] == 50
    for reply in (b'{"error": "no"}', b'{"choices": []}', b"[]", b'{"choices": [3]}'):
        with pytest.raises(rewards.Unavailable, match="not a chat completion"):
            score(f"qwenvl=openai+{serve(lambda *_: (200, reply))}")
    with pytest.raises(rewards.RewardError, match="needs an endpoint: NAME=openai"):
        score("qwenvl")


@pytest.mark.parametrize(
    "said, expected",
    [
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
    ],
)
def test_a_score_in_any_usual_form(said, expected):
    assert rewards.read_score(
        {"message": {"content": said}, "finish_reason": "stop"}, SCORE
    ) == pytest.approx(expected)
    if "Final" in said:
        assert rewards.read_score({"message": {"content": said}}, FINAL) == pytest.approx(expected)


SCORE, FINAL = (
    inspect.signature(f).parameters["pattern"].default for f in (rewards.qwenvl, rewards.unifiedreward)
)


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"message": {"content": "I cannot say"}}, "no score where"),
        ({"message": {"content": ""}}, "no score"),
        ({"message": {"content": None}}, "no score"),
        ({"message": None}, "no score"),
        ({}, "no score"),
        ({"message": {"content": "Score: 7"}}, "a score of 7, not within 0 to 5"),
        ({"message": {"content": "Score: 11/10"}}, "a score of 11, not within 0 to 10"),
        ({"message": {"content": "Score: -3"}}, "no score where"),
        ({"message": {"content": "Score: 1-5"}}, "no score where"),
        ({"message": {"content": "Score: 45"}}, "a score of 45"),
        ({"message": {"content": "Score: 4"}, "finish_reason": "length"}, "cut off before its end"),
        ({"message": {"content": "<think>first, Score: 4"}}, "cut off before its end"),
        ({"message": {"content": "Score: 3/0"}}, "not within 0 to 0"),
    ],
)
def test_what_is_no_score(answer, message):
    with pytest.raises(rewards.NoAnswer, match=message):
        rewards.read_score(answer, SCORE)


def test_who_gives_no_score_is_asked_again_and_then_left_out(serve, capsys):
    """Three times, with a temperature and a reminder from the second on; then the picture has no score, and it is said why."""
    asked = {p: [] for p in PROMPTS}

    def answer(path, body, *_):
        request = json.loads(body)
        text = request["messages"][0]["content"][1]["text"]
        [prompt] = [p for p in PROMPTS if p in text]
        asked[prompt].append((request["temperature"], "exactly the form" in text))
        if prompt == "a cat" and len(asked[prompt]) < 2 or prompt == "a fox":
            return chat("I would rather not")
        return chat("<Score>4</Score>")

    url = serve(answer)
    scores = score(f"qwenvl=openai+{url}")
    assert scores[:2].tolist() == pytest.approx([0.8, 0.8]) and scores[2].isnan()
    assert asked == {
        "a dog": [(0, False)],
        "a cat": [(0, False), (0.5, True)],
        "a fox": [(0, False), (0.5, True), (1, True)],
    }
    assert f"{url}: asked three times, no score: no score where" in capsys.readouterr().err
    with pytest.raises(
        SystemExit,
        match="--reward qwenvl: no score of a grey picture. no score where .* in the answer 'I would rather not'",
    ):
        rewards.check_rewards(
            rewards.parse_rewards([f"qwenvl=openai+{url}"]), {"t": [{"prompt": "a fox"}]}, 8
        )


@pytest.mark.parametrize(
    "silent, total, fine",
    [
        (1, 10, True),
        (2, 10, True),
        (3, 10, False),
        (10, 10, False),
        (1, 2, True),
        (2, 2, False),
        (1, 1, False),
    ],
)
def test_a_rollout_goes_on_without_a_few_scores(serve, silent, total, fine):
    """One picture of a rollout, or a fifth, may have no score; with more the rollout fails, saying what the judge said."""

    def answer(path, body, *_):
        text = json.loads(body)["messages"][0]["content"][1]["text"]
        number = int(text.split("number ")[1].split("\n")[0])
        return chat("no idea" if number < silent else "Score: 3")

    scorer = rewards.Scorer(
        rewards.parse_rewards([f"qwenvl@judged=openai+{serve(answer)}", "jpeg"]), ["judged", "other"]
    )
    for i in range(0, total, 5):
        part = [("judged", {"prompt": f"number {k}"}) for k in range(i, min(i + 5, total))]
        scorer.submit(torch.rand(len(part), 3, 8, 8), part)
    scorer.submit(torch.rand(1, 3, 8, 8), [("other", {"prompt": "not judged"})])
    if fine:
        scores = scorer.collect()
        assert (
            scores["qwenvl"].isnan().tolist() == [k < silent or k == total for k in range(total + 1)]
            and not scores["jpeg"].isnan().any()
        )
    else:
        with pytest.raises(
            rewards.RewardError,
            match=f"qwenvl: {silent} of {total} pictures have no score. no score where .*'no idea'",
        ):
            scorer.collect()


def test_a_validation_says_how_many_scores_are_missing(serve):
    class Model:
        device = "cpu"

        def generate(self, prompts, *_):
            return torch.rand(len(prompts), 3, 8, 8)

    def answer(path, body, *_):
        return chat("no idea" if "number 3" in str(body) else "Score: 3")

    chosen = rewards.parse_rewards([f"qwenvl=openai+{serve(answer)}"])
    args = types.SimpleNamespace(eval_num_steps=1, resolution=8, eval_batch_size=4, seed=0, guidance=1)
    row = rewards.evaluate(Model(), "x", {"t": [{"prompt": f"number {k}"} for k in range(6)]}, chosen, args)
    assert row == {
        "n": 6,
        "scores": {"qwenvl": pytest.approx(0.6)},
        "stderr": {"qwenvl": pytest.approx(0)},
        "missing": {"qwenvl": 1},
    }
    assert "| x | 0.600 ± 0.000, 1 missing |" in rewards.markdown([{"model": "x"} | row])


def test_deqa_from_the_five_levels(serve, monkeypatch):
    """Probabilities of whole words and of words' beginnings, in any spelling of a token; they must hold half of the mass."""

    def answer(top):
        return lambda *_: chat(
            "good",
            finish_reason="length",
            logprobs={"content": [{"top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top]}]},
        )

    def ask(answer, *options):
        return score(f"deqa=openai+{serve(answer)}", "deqa.model=some/vlm", *options)

    top = [
        (" Excellent", 0.1),
        ("good", 0.4),
        ("▁fair", 0.2),
        ("Ġpoor", 0.05),
        ("Bad", 0.05),
        ("The", 0.15),
        ("", 0.05),
    ]
    expected = (0.1 * 5 + 0.4 * 4 + 0.2 * 3 + 0.05 * 2 + 0.05) / 0.8 / 5
    assert ask(answer(top)).tolist() == pytest.approx([expected] * 3)
    assert ask(answer([("Ex", 0.5), ("p", 0.5)])).tolist() == pytest.approx([0.7] * 3)
    assert ask(answer([("good", 0.51), ("The", 0.49)])).tolist() == pytest.approx([0.8] * 3)
    for top in ([("The", 1.0)], [("good", 0.03), ("The", 0.97)], [("good", 0.49), ("The", 0.51)]):
        assert ask(answer(top)).isnan().all()
    assert (
        "excellent, good, fair, poor, bad together have 49% of the probability; the likeliest tokens are 'good', 'the'"
        in list(rewards.SAID.values())[-1]
    )
    with pytest.raises(rewards.Unavailable, match="gave no log-probabilities"):
        ask(lambda *_: chat("good"))
    for spec in (
        "deqa=openai+http://127.0.0.1:9",
        "deqa",
    ):  # its own model is an mPLUG-Owl2, which vLLM and SGLang do not serve
        with pytest.raises(rewards.Unavailable, match="needs Flow-GRPO's server, deqa=pickle.*deqa.model"):
            score(spec)


def train(url, out, *more):
    prompts, validation = (few(split, 2, os.path.dirname(out))[0] for split in ("train", "val"))
    return [
        "train_teacher.py",
        "--reward",
        f"taste={url}",
        "--reward-option",
        "taste.retries=0",
        "--prompts",
        prompts,
        "--eval-prompts",
        validation,
        "--batch-size",
        2,
        "--group-size",
        2,
        "--micro-batch-size",
        2,
        "--num-steps",
        3,
        "--sde-window",
        0,
        "--steps",
        4,
        "--save-every",
        100,
        "--eval-every",
        100,
        "--eval-num-steps",
        2,
        "--out",
        out,
        *more,
    ]


def test_a_reward_that_fails_stops_training_and_loses_nothing(serve, tmp_path):
    """After two rollouts the server dies: the run ends with what failed and exit status 1, and its checkpoint goes on when the server is back."""
    calls, last = [], [7]  # two to try the server, one to validate the base, two a rollout

    def answer(path, body, *_):
        calls.append(1)
        scores = {"scores": [k / 2 for k in range(len(json.loads(body)["images"]))]}
        return (200, json.dumps(scores).encode()) if len(calls) <= last[0] else (500, b"out of memory")

    argv = train(serve(answer), str(tmp_path / "out"))
    message = refused(*argv)
    assert "--reward taste: " in message and "HTTP 500" in message and "out of memory" in message
    assert os.listdir(tmp_path / "out/checkpoints") == ["000002"]
    last[0] = 1000
    run(*argv, "--resume", "auto")
    assert sorted(os.listdir(tmp_path / "out/checkpoints"))[-1] == "000004"


def test_a_server_that_is_not_there_is_noticed_first(tmp_path):
    message = refused(*train("http://127.0.0.1:9", str(tmp_path / "out")))
    assert "--reward taste: http://127.0.0.1:9" in message and os.listdir(tmp_path / "out") == [".lock"]


def test_scoring_runs_beside_sampling(serve):
    """Four batches, each 0.3 s to sample and 0.3 s to score on a server: the sum is hidden but for one."""

    def answer(path, body, *_):
        time.sleep(0.3)
        return 200, json.dumps({"scores": [1.0] * len(json.loads(body)["images"])}).encode()

    scorer = rewards.Scorer(rewards.parse_rewards([f"slow={serve(answer)}", f"slower={serve(answer)}"]), [])
    began = time.monotonic()
    for _ in range(4):
        time.sleep(0.3)
        scorer.submit(IMAGES, [("t", {"prompt": p}) for p in PROMPTS])
    scores = scorer.collect()
    took = time.monotonic() - began
    print(f"{took:.2f} s for 4 x (0.3 s sampling, 0.3 s + 0.3 s scoring)")
    assert took < 2.1 and scores["slow"].shape == (12,) and scores["slower"].tolist() == [1.0] * 12


def test_training_goes_on_without_a_picture_that_got_no_score(serve, tmp_path, monkeypatch):
    """A judge says nothing of one picture of a group of six: it is in no mean and no spread, and nothing is learnt from it; another
    group, of which one picture alone has a score, ties."""

    def answer(path, body, *_):
        text = json.loads(body)["messages"][0]["content"]
        picture = np.array(
            Image.open(io.BytesIO(base64.b64decode(text[0]["image_url"]["url"].partition(",")[2])))
        )
        return chat(f"Score: {picture.mean() / 51:.3f}"[:12])

    url, prompts = serve(answer), few("train", 1, str(tmp_path))
    chosen = [p for p in prompts if not p.startswith("scene")]
    silent = {1, 7, 8, 9, 10, 11}  # of the 12 pictures of a rollout, in whatever order they are asked about
    plain = rewards.score_batch

    def score_batch(images, batch, chosen, tasks):
        scores = plain(images, batch, chosen, tasks)
        if len(images) == 12:
            scores["qwenvl"][list(silent)] = math.nan
        return scores

    monkeypatch.setattr(rewards, "score_batch", score_batch)
    argv = [
        "train_teacher.py",
        "--reward",
        f"qwenvl=openai+{url}",
        "--prompts",
        *chosen,
        "--eval-prompts",
        chosen[0],
        "--batch-size",
        2,
        "--group-size",
        6,
        "--num-steps",
        3,
        "--sde-window",
        0,
        "--steps",
        1,
        "--eval-num-steps",
        1,
        "--micro-batch-size",
        12,
        "--updates-per-rollout",
        1,
    ]
    assert "qwenvl: 6 of 12 pictures have no score" in refused(*argv, "--out", tmp_path / "strict")
    monkeypatch.setattr(rewards, "TOLERATED", 0.6)
    ns = run(*argv, "--out", tmp_path / "out")
    groups = ns["everyone"].view(2, 6)
    assert ns["everyone"].isnan().nonzero().flatten().tolist() == sorted(silent)
    rest = groups[0][[0, 2, 3, 4, 5]]
    expected = (rest - rest.mean()) / (rest.std() + 1e-4)
    assert (
        ns["advantage"][[0, 2, 3, 4, 5]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        and ns["advantage"][1].isnan()
    )
    assert ns["telling"].nonzero().flatten().tolist() == [0, 2, 3, 4, 5] and ns["tied"].tolist() == [
        False,
        True,
    ]
    assert ns["terms"] == 5 * len(ns["trajectory"]) and all(p.isfinite().all() for p in ns["params"])
