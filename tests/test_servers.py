"""Reward servers and judges on loopback: good ones, and slow, wrong, garbled, hostile and absent ones, each met with the right error in time."""

import base64
import http.server
import io
import json
import math
import os
import pickle
import threading
import time

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
                said = answer(self.path, self.rfile.read(int(self.headers["Content-Length"])), self.headers, self)
                if said:
                    self.send_response(said[0])
                    self.send_header("Content-Length", str(len(said[1])))
                    self.end_headers()
                    self.wfile.write(said[1])
            def log_message(self, *_):
                pass
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"
    yield start
    for server in servers:
        server.shutdown(), server.server_close()


def score(spec, *options, rows=None):
    rewards_of = rewards.parse_rewards([spec], options)
    [values] = rewards.score_batch(IMAGES, [("t", row) for row in rows or [{"prompt": p} for p in PROMPTS]], rewards_of, []).values()
    return values


def brief(monkeypatch):
    """Back-offs noted instead of waited for."""
    waits = []
    monkeypatch.setattr(rewards.time, "sleep", waits.append)
    return waits


def test_json_server(serve):
    def answer(path, body, headers, _):
        asked = json.loads(body)
        assert path == "/taste" and headers["Content-Type"] == "application/json" and asked["reward"] == "taste" and asked["prompts"] == PROMPTS
        assert asked["metadata"] == [{"prompt": p} for p in PROMPTS] and "Authorization" not in headers
        pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(i)))) for i in asked["images"]]
        assert all((p == np.moveaxis((i * 255).round().byte().numpy(), 0, -1)).all() for p, i in zip(pictures, IMAGES))
        return 200, json.dumps({"scores": [float(p.mean()) for p in pictures]}).encode()
    got = score(f"taste={serve(answer)}/taste")
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx((IMAGES.mul(255).round().mean((1, 2, 3))).tolist(), abs=1e-3)


@pytest.mark.parametrize("name, key", [("geneval", "scores"), ("geneval_strict", "rewards"), ("deqa", "outputs")])
def test_pickle_server(serve, name, key):
    def answer(path, body, *_):
        asked = pickle.loads(body)
        assert all(Image.open(io.BytesIO(i)).format == "JPEG" for i in asked["images"]) and asked["meta_datas"] == rows and asked["only_strict"] is False
        reply = {"scores": [0.1, 0.2, 0.3], "rewards": [1.0, 0.0, 1.0], "strict_rewards": [0.0] * 3, "group_rewards": {"colors": [-10.0] * 3}}
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
    for reply, message in ((pickle.dumps({"outputs": Bomb(tmp_path / "pwned")}), "refused a pickle that names posix.system"),
                           (pickle.dumps({"outputs": np.ones(3)}), "refused a pickle that names numpy"),
                           (b"\x80\x04garbage", "no pickle of plain values"), (b"", "no pickle"), (pickle.dumps([1, 2, 3]), "not 3 finite numbers")):
        with pytest.raises(rewards.RewardError, match=message):
            score(f"deqa=pickle+{serve(lambda *_: (200, reply))}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("reply, message", [
    (b"<html>busy</html>", "which is not JSON"), (b"\xff\xfe\x00", "which is not JSON"), (b"{}", "not 3 finite numbers"), (b'{"scores": [1, 2]}', "not 3 finite numbers"),
    (b'{"scores": [1, 2, "3"]}', "not 3"), (b'{"scores": [1, 2, NaN]}', "not 3"), (b'{"scores": [1, 2, null]}', "not 3"), (b'{"scores": 3}', "not 3"),
    (b"[0.1, 0.2, 0.3]", "not 3"), (b'{"scores": [1, 2, Infinity]}', "not 3")])
def test_wrong_answers(serve, monkeypatch, reply, message):
    waits = brief(monkeypatch)
    with pytest.raises(rewards.RewardError, match=f"taste: .*{message}"):
        score(f"taste={serve(lambda *_: (200, reply))}")
    assert waits == []                              # a wrong answer would be as wrong again


def test_failures_that_may_pass_are_tried_again(serve, monkeypatch):
    waits, calls = brief(monkeypatch), []
    def answer(*_):
        calls.append(1)
        return [(500, b"Traceback\nout of memory"), (429, b""), (503, b"")][len(calls) - 1] if len(calls) < 4 else (200, b'{"scores": [1, 2, 3]}')
    assert score(f"taste={serve(answer)}").tolist() == [1, 2, 3] and waits == [1, 2, 4]
    calls.clear()
    with pytest.raises(rewards.RewardError, match="HTTP 500 .*out of memory .2 attempts"):
        score(f"taste={serve(lambda *_: (500, b'Traceback' + bytes([10]) + b'out of memory'))}", "taste.retries=1")
    waits.clear()
    with pytest.raises(rewards.RewardError, match="HTTP 404 .*1 attempt"):
        score(f"taste={serve(lambda *_: (404, b'no such model'))}")
    assert waits == []


def test_absent_and_slow_servers_end_in_time(serve, monkeypatch):
    waits = brief(monkeypatch)
    with pytest.raises(rewards.RewardError, match="refused.*4 attempts"):
        score("taste=http://127.0.0.1:9")
    assert waits == [1, 2, 4]
    stop = threading.Event()
    def drip(*args):                                # a byte at a time: no single read ever times out
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
    def cut(*args):                                 # a 503 whose body ends too early
        handler = args[3]
        handler.send_response(503), handler.send_header("Content-Length", "1000"), handler.end_headers()
        handler.wfile.write(b"busy")
    with pytest.raises(rewards.Unavailable, match="HTTP 503.*4 attempts"):
        score(f"taste={serve(cut)}")
    assert waits == [1, 2, 4]
    elsewhere = serve(lambda *a: asked.append(a) or (200, b"{}"))
    def away(*args):
        args[3].send_response(302), args[3].send_header("Location", elsewhere), args[3].send_header("Content-Length", "0"), args[3].end_headers()
    monkeypatch.setenv("REWARD_API_KEY", "secret\n")
    with pytest.raises(rewards.RewardError, match="HTTP 302") as caught:
        score(f"qwenvl=openai+{serve(away)}/v1")
    assert not asked and "secret" not in str(caught.value)


def test_waiting_for_a_reward_ends_with_the_signal(serve):
    """SIGTERM while a server thinks: the wait ends at once, whatever the server does."""
    done, stop = threading.Event(), type("Stop", (), {"name": None})()
    scorer = rewards.Scorer(rewards.parse_rewards([f"slow={serve(lambda *_: done.wait(20) and (200, b'{}'))}"]), [], stop)
    scorer.submit(IMAGES, [("t", {"prompt": p}) for p in PROMPTS])
    threading.Timer(0.3, lambda: setattr(stop, "name", "SIGTERM")).start()
    began = time.monotonic()
    assert scorer.collect() is None and time.monotonic() - began < 2
    done.set()


def test_a_huge_answer_is_not_swallowed(serve, monkeypatch):
    monkeypatch.setattr(rewards.post, "__defaults__", (1000,))
    with pytest.raises(rewards.RewardError, match="more than"):
        score(f"taste={serve(lambda *_: (200, b'1' * 5000))}")


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
    assert {(path, asked["model"], key) for path, asked, key in seen} == {("/v1/chat/completions", "CodeGoat24/UnifiedReward-qwen-7b", None)}
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    (tmp_path / "ask.txt").write_text("How is {prompt}?")
    assert score(f"qwenvl=openai+{url}/v1", "qwenvl.model=mine", f"qwenvl.prompt=@{tmp_path}/ask.txt").tolist() == pytest.approx([0.2, 0.4, 0.6])  # the last one said
    assert seen[-1][1]["model"] == "mine" and seen[-1][2] == "Bearer secret" and {a["messages"][0]["content"][1]["text"] for _, a, _ in seen[-3:]} == {f"How is {p}?" for p in PROMPTS}
    assert score(f"qwenvl=openai+{url}/v1", r"qwenvl.pattern=Score: ([\d.]+)\n").tolist() == pytest.approx([0.3, 0.5, 0.7])
    for content, message in (("I cannot say", "no score where"), ("<Score>7</Score>", "7.0, not within"), ("", "no score"), (None, "no score")):
        with pytest.raises(rewards.RewardError, match=message):
            score(f"qwenvl=openai+{serve(lambda *_: chat(content))}")
    for reply in (b'{"error": "no"}', b'{"choices": []}', b"[]", b'{"choices": [3]}'):
        with pytest.raises(rewards.RewardError, match="not a chat completion"):
            score(f"qwenvl=openai+{serve(lambda *_: (200, reply))}")
    with pytest.raises(rewards.RewardError, match="needs an endpoint: NAME=openai"):
        score("deqa")


def test_deqa_from_the_five_levels(serve):
    """Probabilities of whole words and of words' beginnings, in any spelling of a token; other tokens do not count."""
    def answer(top):
        return lambda *_: chat("good", logprobs={"content": [{"top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top]}]})
    top = [(" Excellent", 0.1), ("good", 0.4), ("▁fair", 0.2), ("Ġpoor", 0.05), ("Bad", 0.05), ("The", 0.15), ("", 0.05)]
    expected = (0.1 * 5 + 0.4 * 4 + 0.2 * 3 + 0.05 * 2 + 0.05) / 0.8 / 5
    assert score(f"deqa=openai+{serve(answer(top))}").tolist() == pytest.approx([expected] * 3)
    assert score(f"deqa=openai+{serve(answer([('Ex', 0.5), ('p', 0.5)]))}").tolist() == pytest.approx([0.7] * 3)
    with pytest.raises(rewards.RewardError, match="none of excellent, good, fair, poor, bad"):
        score(f"deqa=openai+{serve(answer([('The', 1.0)]))}")
    with pytest.raises(rewards.RewardError, match="gave no log-probabilities"):
        score(f"deqa=openai+{serve(lambda *_: chat('good'))}")


def train(url, out, *more):
    prompts, validation = (few(split, 2, os.path.dirname(out))[0] for split in ("train", "val"))
    return ["train_teacher.py", "--reward", f"taste={url}", "--reward-option", "taste.retries=0", "--prompts", prompts, "--eval-prompts", validation, "--batch-size", 2, "--group-size", 2,
            "--micro-batch-size", 2, "--num-steps", 3, "--sde-window", 0, "--steps", 4, "--save-every", 100, "--eval-every", 100, "--eval-num-steps", 2, "--out", out, *more]


def test_a_reward_that_fails_stops_training_and_loses_nothing(serve, tmp_path):
    """After two rollouts the server dies: the run ends with what failed and exit status 1, and its checkpoint goes on when the server is back."""
    calls, last = [], [7]                           # two to try the server, one to validate the base, two a rollout
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
    assert "--reward taste: http://127.0.0.1:9" in message and not (tmp_path / "out").exists()


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
