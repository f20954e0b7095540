"""evaluate.py: the same table whatever the processes and the interruptions, pictures of other programs, missing scores, the paper's columns."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, few, refused, run
from PIL import Image

import rewards


def table(out):
    return json.load(open(os.path.join(out, "results.json")))


def pictures(out):
    return {f.relative_to(out): f.read_bytes() for f in out.rglob("samples/*.png")}


def argv(loras, tmp_path, out, n=24):
    return ["--models", "base", f"sign={loras['ocr']}", "--tasks", *few("test", n, str(tmp_path)), "--reward", "toy.compose", "toy.ocr", "toy.scene", "toy.quality",
            "jpeg@ocr", "--eval-num-steps", 2, "--eval-batch-size", 5, "--out", tmp_path / out]


def test_same_table_after_a_kill_and_with_two_processes(loras, tmp_path):
    """One process; one killed with kill -9 in the middle and started again; two processes that finish what one began. All with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = lambda out, *launcher: subprocess.Popen(list(map(str, [sys.executable, *launcher, "evaluate.py", *argv(loras, tmp_path, out)])), cwd=ROOT, env=environment,
                                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = start("a")
    assert whole.wait(120) == 0, whole.stderr.read()
    killed = start("b")
    while killed.poll() is None and len(list((tmp_path / "b").rglob("*.png"))) < 40:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL and not (tmp_path / "b/results.json").exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("samples/*.png")}
    assert 40 <= len(made) < 144
    two = start("b", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert two.wait(120) == 0, two.stderr.read()
    a, b = table(tmp_path / "a"), table(tmp_path / "b")
    assert a == b and [set(r["scores"]) for r in a] == [{"compose", "ocr", "scene", "quality", "jpeg"}] * 2
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") and len(pictures(tmp_path / "a")) == 144
    kept = sum(p.stat().st_mtime_ns == t for p, t in made.items())
    assert kept >= len(made) - 5                    # all but those of the batch that was cut
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("samples/*.png")}
    run("evaluate.py", *argv(loras, tmp_path, "b"))
    assert table(tmp_path / "b") == a and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert "is of another evaluation: guidance was 1.0, now 2.0" in refused("evaluate.py", *argv(loras, tmp_path, "b"), "--guidance", 2)


def test_means_errors_and_tasks(loras, tmp_path):
    """Every number of the table from the picture files and the reward functions themselves."""
    import toy
    run("evaluate.py", *argv(loras, tmp_path, "out", 6), "--samples-per-prompt", 2)
    for row in table(tmp_path / "out"):
        everything, apart = [], []
        for task in ("compose", "ocr", "scene"):
            files = sorted((tmp_path / "out" / row["model"] / task / "samples").iterdir(), key=lambda f: f.stem[-6:])
            prompts = [p for line in open(tmp_path / f"{task}_test.txt") for p in [line.strip()] * 2]
            assert len(files) == 12 and [f.name for f in files] == [f"{p}_{i:06d}.png" for i, p in enumerate(prompts)]      # T2I-CompBench++'s names
            images = torch.stack([rewards.read_picture(f) for f in files])
            own = getattr(toy, task)(images, prompts)
            assert row["scores"][task] == pytest.approx(own.mean().item(), abs=1e-6) and row["n"] == 36
            assert row["stderr"][task] == pytest.approx((own.std() / 12 ** 0.5).item(), abs=1e-6)
            everything.append(toy.quality(images))
            apart += [(images[i] - images[i + 1]).norm().item() / images[0].numel() ** 0.5 for i in range(0, 12, 2)]
            assert row["tasks"]["quality"][task][0] == pytest.approx(everything[-1].mean().item(), abs=1e-6)
            if task == "ocr":
                assert row["scores"]["jpeg"] == pytest.approx(rewards.jpeg(images).mean().item(), abs=1e-6)
        assert row["scores"]["quality"] == pytest.approx(torch.cat(everything).mean().item(), abs=1e-6)
        assert row["scores"]["diversity"] == pytest.approx(sum(apart) / 18, abs=1e-6) and set(row["tasks"]["diversity"]) == {"compose", "ocr", "scene"}
    assert "quality by task:" in (tmp_path / "out/results.md").read_text() and Image.open(tmp_path / "out/samples.png").width > 1000


FAKE = '''
import torch
def value(name):
    return lambda images, prompts, metadata: torch.tensor([m["wanted"][name] for m in metadata], dtype=torch.float32)
geneval, geneval_strict, ocr, deqa, pickscore = map(value, ("geneval", "geneval_strict", "ocr", "deqa", "pickscore"))
def fickle(images, prompts, metadata):
    from rewards import RewardError
    from rewards import Unavailable
    if any(m["wanted"].get("dead") for m in metadata):
        raise Unavailable("the server is gone")
    if any(m["wanted"].get("fails") for m in metadata):
        raise RewardError("no number in this answer")
    return torch.ones(len(images))
'''


@pytest.fixture
def fake():
    """A module of rewards beside the scripts, as a user would add one: scores that the prompts' rows dictate."""
    path = os.path.join(ROOT, "fake_rewards_of_the_tests.py")
    with open(path, "w") as f:
        f.write(FAKE)
    yield "fake_rewards_of_the_tests"
    os.remove(path)


def folder_of(tmp_path, rows, task="geneval"):
    (tmp_path / "theirs").mkdir(exist_ok=True)
    for i in range(len(rows)):
        Image.new("RGB", (40 + 8 * (i % 2), 40), (i * 20, 0, 0)).save(tmp_path / f"theirs/picture-{i}.jpg")    # of two sizes
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--folders", f"theirs={tmp_path}/theirs", "--tasks", f"{task}={tmp_path}/rows.jsonl", "--out", tmp_path / "out"]


def test_geneval_by_tag_and_the_papers_average(tmp_path, fake):
    """Overall is the mean of the tags' means, as GenEval has it; Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4."""
    score = lambda g, s: {"geneval": g, "geneval_strict": s, "ocr": 0.5, "deqa": 4.0 / 5, "pickscore": 22.1 / 26}
    rows = [{"prompt": "p", "tag": tag, "wanted": score(g, s)} for tag, g, s in (("colors", 1, 1), ("colors", 0.5, 0), ("colors", 0.5, 0), ("counting", 0.5, 1))]
    names = ["geneval", "geneval_strict", "ocr", "deqa", "pickscore"]
    run("evaluate.py", *folder_of(tmp_path, rows), "--reward", *(f"{fake}.{n}" for n in names))
    [row] = table(tmp_path / "out")
    assert row["scores"]["geneval_strict"] == pytest.approx((1 / 3 + 1) / 2) and row["scores"]["geneval"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert {tag: v[0] for tag, v in row["tags"]["geneval_strict"].items()} == pytest.approx({"colors": 1 / 3, "counting": 1})
    assert row["scores"]["average"] == pytest.approx(((2 / 3 + 0.5) / 2 + 0.5 + 0.8 + 0.85) / 4)
    assert "geneval_strict by tag:" in (tmp_path / "out/results.md").read_text()


def test_a_missing_score_is_missing_and_not_zero(tmp_path, fake, capsys):
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "fails": i == 2}} for i in range(5)]
    command = ["evaluate.py", *folder_of(tmp_path, rows, "things"), "--reward", f"{fake}.fickle", f"{fake}.ocr"]
    assert "scores are missing (theirs: 1 of fickle); the same command tries again" in refused(*command)
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"fickle": 1} and "fickle" not in row["scores"] and row["scores"]["ocr"] == 1
    assert "| model | ocr | fickle |" in (tmp_path / "out/results.md").read_text() and "| theirs | 1.000 ± 0.000 | 1 missing |" in (tmp_path / "out/results.md").read_text()
    scored = (tmp_path / "out/theirs/things/scores.jsonl").read_text() + (tmp_path / "out/theirs/things/scores.0.jsonl").read_text()
    assert scored.count("fickle") == 4 and scored.count(".ocr") == 5


def test_a_dead_reward_is_given_up(tmp_path, fake, capsys):
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "dead": i > 0}} for i in range(12)]
    command = ["evaluate.py", *folder_of(tmp_path, rows, "things"), "--reward", f"{fake}.fickle", "--eval-batch-size", 4]
    assert "11 of fickle" in refused(*command)
    assert capsys.readouterr().out.count("the server is gone") == 3
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "fails": 0 < i < 7}} for i in range(12)]     # a picture's own fault says nothing of the next
    command = ["evaluate.py", *folder_of(tmp_path, rows, "things")[:-1], tmp_path / "other", "--reward"]
    assert "6 of fickle" in refused(*command, f"{fake}.fickle")
    capsys.readouterr()
    with open(tmp_path / "other/theirs/things/scores.0.jsonl", "a") as f:
        f.write('{"picture": 3, "rew')                                                             # cut by a full disk
    run(*command, f"{fake}.ocr")
    with open(os.path.join(ROOT, f"{fake}.py"), "a") as f:
        f.write("\n")                                                                             # another version of the module: score again
    assert "6 of fickle" in refused(*command, f"{fake}.fickle")
    assert "picture 1: fickle: no number" in capsys.readouterr().out


def test_folders_are_checked(tmp_path, fake):
    rows = [{"prompt": "p", "wanted": {"ocr": 1}}] * 3
    command = ["evaluate.py", *folder_of(tmp_path, rows), "--reward", f"{fake}.ocr"]
    assert "jpeg@ocrs: no such task; there are geneval" in refused(*command, "jpeg@ocrs")
    os.remove(tmp_path / "theirs/picture-1.jpg")
    assert "has no picture number 1; the task's prompts need 0 to 2" in refused(*command)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs/other_000001.png")
    run(*command)
    assert table(tmp_path / "out")[0]["scores"] == {"ocr": 1}
    Image.new("RGB", (9, 9), "red").save(tmp_path / "theirs/other_000001.png")
    assert "is of another evaluation: pictures was" in refused(*command)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs/second_1.png")
    assert "two pictures with the number 1" in refused(*command)
    assert "there is no folder" in refused("evaluate.py", "--folders", f"x={tmp_path}/nowhere", *command[3:])
