"""evaluate.py: the same table whatever the processes and the interruptions, pictures of other programs,
missing scores, the paper's columns."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import threading
import time
import urllib.parse
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, TASKS, distill, few, refused, run, stock_pictures, together
from PIL import Image
from test_rewards import bad_pictures

import rewards
from flow_sde import generators, randn


def table(out):
    return json.loads((out / "results.json").read_text())


def times(out):
    """{picture: when it was written}."""
    return {file: file.stat().st_mtime_ns for file in out.rglob("samples/*.png")}


def toy_argv(loras, folder, out, prompts=24):
    """Base and one random LoRA on the first prompts of every task of the toy."""
    tasks = " ".join(few("test", prompts, str(folder)))
    models = f"--models base sign={loras['ocr']} --tasks {tasks}"
    columns = "--reward toy.compose toy.ocr toy.scene toy.quality jpeg@ocr"
    return f"{models} {columns} --eval-num-steps 2 --eval-batch-size 5 --out {folder / out}".split()


def test_same_table_after_a_kill_and_with_two_processes(loras, tmp_path):
    """One process; one killed with kill -9 in the middle and finished by two, with one thread each."""
    run("evaluate.py", *toy_argv(loras, tmp_path, "a", 12))
    argv = toy_argv(loras, tmp_path, "b", 12)
    killed = multiprocessing.get_context("fork").Process(target=run, args=("evaluate.py", *argv))
    killed.start()
    while killed.is_alive() and len(times(tmp_path / "b")) < 20:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    made = times(tmp_path / "b")
    assert 20 <= len(made) < 72 and not (tmp_path / "b/results.json").exists()
    together(partial(run, "evaluate.py", *argv))
    a, b = table(tmp_path / "a"), table(tmp_path / "b")
    assert a == b and [set(row["scores"]) for row in a] == [{*TASKS, "quality", "jpeg"}] * 2
    files = sorted(file.relative_to(tmp_path / "a") for file in times(tmp_path / "a"))
    assert len(files) == len(times(tmp_path / "b")) == 72
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    before = times(tmp_path / "b")
    kept = sum(before[file] == written for file, written in made.items())
    assert kept >= len(made) - 5  # all but those of the batch that was cut
    run("evaluate.py", *argv)
    assert table(tmp_path / "b") == a and times(tmp_path / "b") == before
    message = refused("evaluate.py", *argv, "--guidance", 2)
    assert "is of another evaluation: guidance was 1.0, now 2.0" in message


def test_means_errors_and_tasks(loras, tmp_path):
    """Every number of the table from the picture files and the reward functions themselves."""
    import toy

    run("evaluate.py", *toy_argv(loras, tmp_path, "out", 6), "--samples-per-prompt", 2)
    for row in table(tmp_path / "out"):
        qualities, differences = [], []
        for task in TASKS:
            files = sorted(
                (tmp_path / "out" / row["model"] / task / "samples").iterdir(), key=lambda f: f.stem[-6:]
            )
            lines = (tmp_path / f"{task}_test.txt").read_text().splitlines()
            prompts = [prompt for prompt in lines for _ in range(2)]
            names = [f"{prompt}_{i:06d}.png" for i, prompt in enumerate(prompts)]  # as in T2I-CompBench++
            assert len(files) == 12 and [file.name for file in files] == names
            images = torch.stack([rewards.read_picture(file) for file in files])
            scores = getattr(toy, task)(images, prompts)
            assert row["scores"][task] == pytest.approx(scores.mean().item(), abs=1e-6) and row["n"] == 36
            assert row["stderr"][task] == pytest.approx((scores.std() / 12**0.5).item(), abs=1e-6)
            qualities.append(toy.quality(images))
            assert row["tasks"]["quality"][task][0] == pytest.approx(qualities[-1].mean().item(), abs=1e-6)
            for first, second in zip(images[::2], images[1::2]):
                differences.append((first - second).norm().item() / first.numel() ** 0.5)
            if task == "ocr":
                assert row["scores"]["jpeg"] == pytest.approx(rewards.jpeg(images).mean().item(), abs=1e-6)
        assert row["scores"]["quality"] == pytest.approx(torch.cat(qualities).mean().item(), abs=1e-6)
        assert row["scores"]["diversity"] == pytest.approx(sum(differences) / 18, abs=1e-6)
        assert set(row["tasks"]["diversity"]) == set(TASKS)
    assert "quality by task:" in (tmp_path / "out/results.md").read_text()
    assert Image.open(tmp_path / "out/samples.png").width > 1000


# -- pictures of other programs, with scores that the prompts' rows dictate ----------------------------------

FAKE = """
import torch
from rewards import RewardError, Unavailable
def value(name):
    return lambda images, prompts, metadata: torch.tensor([float(row["wanted"][name]) for row in metadata])
NAMES = "geneval", "geneval_strict", "ocr", "deqa", "pickscore"
geneval, geneval_strict, ocr, deqa, pickscore = map(value, NAMES)
def grey(images, prompts, metadata):
    wanted = torch.tensor([row["grey"] for row in metadata])
    return ((images[:, 0, 0, 0] * 255 - wanted).abs() < 3).float()
def fickle(images, prompts, metadata):
    if any(row["wanted"].get("dead") for row in metadata):
        raise Unavailable("the server is gone")
    if any(row["wanted"].get("fails") for row in metadata):
        raise RewardError("no number in this answer")
    return torch.ones(len(images))
def together(images, prompts, metadata):
    return torch.full((len(images),), float(len(images)))
"""


@pytest.fixture
def fake():
    """A module of rewards beside the scripts, as a user would add one."""
    path = os.path.join(ROOT, "fake_rewards_of_the_tests.py")
    with open(path, "w") as f:
        f.write(FAKE)
    yield "fake_rewards_of_the_tests"
    os.remove(path)


def write_rows(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_argv(tmp_path, rows, reward, task="things"):
    """The command for dark pictures of two sizes, one for each row; their rewards."""
    (tmp_path / "theirs").mkdir(exist_ok=True)
    for i in range(len(rows)):
        Image.new("RGB", (40 + 8 * (i % 2), 40), (i * 20, 0, 0)).save(tmp_path / f"theirs/picture_{i}.jpg")
    write_rows(tmp_path, rows)
    folders = f"--folders theirs={tmp_path}/theirs --tasks {task}={tmp_path}/rows.jsonl"
    return f"evaluate.py {folders} --out {tmp_path}/out --reward {reward}".split()


def rows_of(count, **wanted):
    """Rows whose ocr is 1; wanted: {what a fake reward does: the rows it does that to}."""
    flags = [{name: i in numbers for name, numbers in wanted.items()} for i in range(count)]
    return [{"prompt": f"p{i}", "wanted": {"ocr": 1, "deqa": 0.5, **flags[i]}} for i in range(count)]


def test_geneval_by_tag_and_the_papers_average(tmp_path, fake):
    """Overall is the mean of the tags' means, as GenEval has it; Average = (GenEval + OCR + DeQA / 5 +
    PickScore / 26) / 4."""
    rows = []
    for tag, credit, strict in (
        ("colors", 1, 1),
        ("colors", 0.5, 0),
        ("colors", 0.5, 0),
        ("counting", 0.5, 1),
    ):
        wanted = {
            "geneval": credit,
            "geneval_strict": strict,
            "ocr": 0.5,
            "deqa": 4.0 / 5,
            "pickscore": 22.1 / 26,
        }
        rows.append({"prompt": "p", "tag": tag, "wanted": wanted})
    columns = " ".join(f"{fake}.{name}" for name in wanted)
    run(*folder_argv(tmp_path, rows, columns, "geneval"))
    [row] = table(tmp_path / "out")
    assert row["scores"]["geneval_strict"] == pytest.approx((1 / 3 + 1) / 2)
    assert row["scores"]["geneval"] == pytest.approx((2 / 3 + 0.5) / 2)
    tags = {tag: mean for tag, (mean, _) in row["tags"]["geneval_strict"].items()}
    assert tags == pytest.approx({"colors": 1 / 3, "counting": 1})
    assert row["scores"]["average"] == pytest.approx(((2 / 3 + 0.5) / 2 + 0.5 + 0.8 + 0.85) / 4)
    assert "geneval_strict by tag:" in (tmp_path / "out/results.md").read_text()


def test_a_tag_does_not_shift_the_columns(tmp_path, fake):
    rows = [row | {"tag": tag} for row, tag in zip(rows_of(3), ("a|b", "two\nlines", 7))]
    run(*folder_argv(tmp_path, rows, f"{fake}.ocr"), "--report")
    assert set(table(tmp_path / "out")[0]["tags"]["ocr"]) == {"a|b", "two\nlines", "7"}
    assert r"| model | a\|b | two lines | 7 |" in (tmp_path / "out/results.md").read_text().splitlines()
    title, (header, scores) = report_data(tmp_path / "out")["tables"][-1]
    assert title == "ocr by tag:" and header == ["model", "a|b", "two lines", "7"]
    assert scores == ["theirs", "1.000", "1.000", "1.000"]


@pytest.mark.parametrize("column", ["average", "diversity"])
def test_a_reward_does_not_mix_with_our_own_columns(column, tmp_path, fake):
    argv = folder_argv(tmp_path, rows_of(2), f"{column}=http://localhost:1")
    assert f"has its own column {column}" in refused(*argv)


def test_prompts_that_can_be_read_only_once(tmp_path, fake):
    """Through a pipe, as of `<(head -8 FILE)`: other prompts are another evaluation."""
    argv = folder_argv(tmp_path, rows_of(2), f"{fake}.ocr")
    lines = (tmp_path / "rows.jsonl").read_text()
    os.remove(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "rows.jsonl")

    def piped(text):
        thread = threading.Thread(target=(tmp_path / "rows.jsonl").write_text, args=(text,), daemon=True)
        thread.start()

    piped(lines)
    run(*argv)
    piped(lines)
    run(*argv)
    piped(lines.replace("p1", "p2"))
    assert "is of another evaluation: prompts was" in refused(*argv)


def test_a_missing_score_is_missing_and_not_zero(tmp_path, fake):
    message = refused(*folder_argv(tmp_path, rows_of(5, fails=[2]), f"{fake}.fickle {fake}.ocr"))
    assert "scores are missing (theirs: 1 of fickle); the same command tries again" in message
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"fickle": 1} and row["scores"] == {"fickle": 1, "ocr": 1}
    said = (tmp_path / "out/results.md").read_text()
    assert "| model | fickle | ocr |" in said
    assert "| theirs | 1.000 ± 0.000, 1 missing | 1.000 ± 0.000 |" in said
    scored = "".join(file.read_text() for file in (tmp_path / "out").rglob("scores*.jsonl"))
    assert scored.count("fickle") == 4 and scored.count(".ocr") == 5


def test_a_dead_reward_is_given_up(tmp_path, fake, capsys):
    argv = folder_argv(tmp_path, rows_of(12, dead=range(1, 12)), f"{fake}.fickle")
    assert "11 of fickle" in refused(*argv, "--eval-batch-size", 4)
    assert capsys.readouterr().out.count("the server is gone") == 3


def test_a_pictures_own_fault_says_nothing_of_the_next(tmp_path, fake, capsys):
    argv = folder_argv(tmp_path, rows_of(12, fails=range(1, 7)), f"{fake}.fickle")
    assert "6 of fickle" in refused(*argv)
    with open(tmp_path / "out/theirs/things/scores.0.jsonl", "a") as f:
        f.write('{"picture": 3, "rew')  # cut by a full disk
    run(*argv[:-1], f"{fake}.ocr")
    capsys.readouterr()
    with open(os.path.join(ROOT, f"{fake}.py"), "a") as f:
        f.write("\n")  # another version of the module: score again
    assert "6 of fickle" in refused(*argv)
    assert "picture 1: fickle: no number" in capsys.readouterr().out


def test_lines_that_are_not_ours_are_skipped(tmp_path, fake):
    argv = folder_argv(tmp_path, rows_of(3), f"{fake}.ocr")
    run(*argv)
    before = table(tmp_path / "out")
    scores = next((tmp_path / "out").rglob("scores.0.jsonl"))
    ours = json.loads(scores.read_text().splitlines()[-1])
    junk = ["null", "{}", "7", "[1]", '{"step": 3, "loss": 0.1}', "[" * 200_000, "\0\0", "cut {"]
    for picture, score in enumerate((None, "5", math.nan)):
        junk.append(json.dumps(ours | {"picture": picture, "score": score}))
    junk.append(json.dumps(ours | {"reward": []}))
    with open(scores, "ab") as f:
        f.write("\n".join(junk).encode() + b"\n\xff\xfe\n")
    run(*argv)
    assert table(tmp_path / "out") == before
    [merged] = (tmp_path / "out").rglob("scores*.jsonl")
    assert len(merged.read_text().splitlines()) == 3


def test_a_broken_picture_is_drawn_again(tmp_path):
    compose = few("test", 4, str(tmp_path))[0]
    flags = f"--models base --tasks {compose} --reward toy.compose --eval-num-steps 1 --out {tmp_path}/out"
    run("evaluate.py", *flags.split())
    before, files = table(tmp_path / "out"), sorted(times(tmp_path / "out"))
    whole = [file.read_bytes() for file in files]
    flipped = bytearray(whole[2])
    flipped[len(flipped) // 2] ^= 1
    for file, data in zip(files, (b"", whole[1][:-20], bytes(flipped), b"<html>")):
        file.write_bytes(data)
    run("evaluate.py", *flags.split())
    assert [file.read_bytes() for file in files] == whole and table(tmp_path / "out") == before


def test_folders_are_checked(tmp_path, fake):
    argv = folder_argv(tmp_path, rows_of(3), f"{fake}.ocr", "geneval")
    assert "jpeg@ocrs: no such task; there are geneval" in refused(*argv, "jpeg@ocrs")
    assert "has 3 pictures for 3 prompts x --samples-per-prompt 2" in refused(
        *argv, "--samples-per-prompt", 2
    )
    os.rename(tmp_path / "theirs/picture_1.jpg", tmp_path / "theirs/other_000001.png")
    run(*argv)
    assert table(tmp_path / "out")[0]["scores"] == {"ocr": 1}
    Image.new("RGB", (9, 9), "red").save(tmp_path / "theirs/other_000001.png")
    assert "is of another evaluation: pictures was" in refused(*argv)
    (tmp_path / "out/theirs/geneval/settings.json").write_text("null")
    assert "settings.json: not a JSON object" in refused(*argv)
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        message = refused("evaluate.py", "--folders", f"x={tmp_path}/{folder}", *argv[3:])
        assert f"{folder} has 0 pictures for 3 prompts" in message


PROMPTS = [f"a sign {n} with 7 letters" for n in "abcdef"]
NUMBERS = range(len(PROMPTS))


def score_of(tmp_path, names, *more, each=1):
    """The mean score of pictures of these names, each grey as its prompt's number says: 1 if all are taken
    for what they are. names: a path below the folder for each picture."""
    for k, name in enumerate(names):
        file = tmp_path / "theirs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * (k // each),) * 3).save(file)
    write_rows(tmp_path, [{"prompt": prompt, "grey": 10 * k} for k, prompt in enumerate(PROMPTS)])
    folders = f"--folders theirs={tmp_path}/theirs --tasks signs={tmp_path}/rows.jsonl --out {tmp_path}/out"
    run("evaluate.py", *folders.split(), "--reward", "fake_rewards_of_the_tests.grey", *more)
    return table(tmp_path / "out")[0]["scores"]["grey"]


LAYOUTS = {
    "our own, and T2I-CompBench's": ([f"samples/{p}_{i:06d}.png" for i, p in enumerate(PROMPTS)], 1),
    "two a prompt": ([f"signs/samples/{PROMPTS[i // 2]}_{i:06d}.png" for i in range(12)], 2),
    "GenEval's": ([f"{i:05d}/samples/{k:04d}.png" for i in NUMBERS for k in range(4)], 4),
    "GenEval's, one a prompt": ([f"{i:05d}/samples/0000.png" for i in NUMBERS], 1),
    "plain, from 0": ([f"{i}.jpg" for i in NUMBERS], 1),
    "plain, from 1": ([f"{i + 1:03d}.png" for i in NUMBERS], 1),
    "plain, two a prompt": ([f"{i}.png" for i in range(12)], 2),
    "diffusers'": ([f"image_{i}.webp" for i in NUMBERS], 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_folders(tmp_path, fake, capsys, layout):
    names, each = LAYOUTS[layout]
    assert score_of(tmp_path, names, "--samples-per-prompt", each, each=each) == pytest.approx(1)
    assert f"{os.path.basename(names[-1])} is taken for '{PROMPTS[-1]}'" in capsys.readouterr().out


DOUBTS = {
    "too many": ([f"{i}.png" for i in range(24)], "has 24 pictures for 6 prompts"),
    "too few": ([f"{i}.png" for i in NUMBERS[1:]], "has 5 pictures for 6 prompts"),
    "from 2": ([f"{i + 2}.png" for i in NUMBERS], "no picture has the number 1"),
    "a gap": ([f"{i}.png" for i in (0, 1, 2, 3, 5, 6)], "no picture has the number 4"),
    "twice": ([*[f"{i}.png" for i in NUMBERS[:-1]], "04.jpg"], "have the same number"),
    "a number for each prompt": ([f"{p}_0.png" for p in PROMPTS], "have the same number"),
    "no number": ([*[f"{i}.png" for i in NUMBERS[1:]], "grid.png"], "grid.png is neither NUMBER"),
    "ComfyUI's": ([f"ComfyUI_{i + 1:05d}_.png" for i in NUMBERS], "rename to 0.png ... 5.png"),
    "A1111's": ([f"{i:05d}-{31 + i}.png" for i in NUMBERS], "rename to 0.png ... 5.png"),
    "another prompt's": ([f"{p}_{5 - i:06d}.png" for i, p in enumerate(PROMPTS)], "would be taken for 'a"),
    "GenEval's, a sample elsewhere": (
        [*["00000/samples/0000.png", "00000/samples/0001.png"], *[f"{i}/samples/0.png" for i in range(2, 6)]],
        "is none of GenEval's 1 for each prompt",
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_folders_that_leave_a_doubt_are_refused(tmp_path, fake, doubt):
    names, message = DOUBTS[doubt]
    with pytest.raises(SystemExit, match=f"evaluate.py: --folders theirs.*{re.escape(message)}"):
        score_of(tmp_path, names)


def test_bad_pictures_cost_their_own_scores_only(tmp_path, fake, capsys):
    """Cut, no picture, too large in text or in pixels: these have no scores, are said once, and the others'
    are there; so too the second time."""
    bad = list(bad_pictures(tmp_path).values())
    argv = folder_argv(tmp_path, rows_of(12), f"{fake}.ocr {fake}.deqa jpeg")
    for i, file in enumerate(bad):
        os.remove(tmp_path / f"theirs/picture_{2 * i}.jpg")
        shutil.copy(file, tmp_path / f"theirs/picture_{2 * i}{file.suffix}")
    for _ in range(2):
        message = refused(*argv, "--report")
        assert "scores are missing (theirs: 6 of deqa, theirs: 6 of jpeg, theirs: 6 of ocr)" in message
        said = capsys.readouterr()
        assert (said.out + said.err).count("not a picture that can be read") == len(bad)
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"ocr": 6, "deqa": 6, "jpeg": 6}
    assert row["scores"]["ocr"] == 1 and row["scores"]["deqa"] == 0.5
    lines = [line for f in (tmp_path / "out").rglob("scores*.jsonl") for line in f.read_text().split()]
    numbers = re.findall(r'"picture":(\d+)', "".join(lines))
    assert set(numbers) == {"1", "3", "5", "7", "9", "11"} and len(numbers) == 18
    assert "0.500 ± 0.000, 6 missing" in (tmp_path / "out/results.md").read_text()
    data = report_data(tmp_path / "out")
    assert [row["pictures"]["theirs"][0]["scores"]["ocr"] for row in data["prompts"]] == [None, 1] * 6


def test_pictures_that_are_not_finite_are_not_scored(tmp_path, monkeypatch, capsys):
    import flow_sde

    plain = flow_sde.SD3.generate

    def generate(self, prompts, *rest, **options):
        pictures = plain(self, prompts, *rest, **options)
        pictures[1, 0, 3, 4] = float("nan")
        return pictures

    monkeypatch.setattr(flow_sde.SD3, "generate", generate)
    compose = few("test", 3, str(tmp_path))[0]
    flags = f"--models base --tasks {compose} --reward toy.compose --eval-num-steps 1 --out {tmp_path}/out"
    assert "base: 1 of compose" in refused("evaluate.py", *flags.split())
    assert "base, compose, picture 1: not finite" in capsys.readouterr().out
    assert len(times(tmp_path / "out")) == 2


def test_memory_is_bounded_by_pixels(tmp_path, fake):
    """A reward looks at 8 million pixels at a time: of a batch of four, at one of 2,900 x 2,900, at two of
    2,048 x 2,048. `together` is how many it saw."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "prompts.txt").write_text("a\n" * 4)
    folders = f"--folders x={tmp_path}/theirs --tasks t={tmp_path}/prompts.txt --eval-batch-size 4"
    for side, count in ((2900, 1), (2048, 2)):
        Image.new("RGB", (side, side), "navy").save(tmp_path / "theirs/0.png", compress_level=1)
        for i in range(1, 4):
            shutil.copy(tmp_path / "theirs/0.png", tmp_path / f"theirs/{i}.png")
        out = tmp_path / str(side)
        run("evaluate.py", *folders.split(), "--reward", f"{fake}.together", "--out", out)
        assert table(out)[0]["scores"] == {"together": count}
        assert Image.open(out / "samples.png").width < 8000


def report_data(out):
    """What the page of --report shows. It has one script, whose text ends nowhere but at its end."""
    text = (out / "report.html").read_text()
    assert text.count("<script") == text.count("</script") == 1 and "http" not in text
    return json.loads(re.search("^const data = (.*);$", text, re.MULTILINE)[1])


def test_report(tmp_path, loras):
    """Every prompt with all models' pictures and their scores, and the tables, on a page that needs nothing
    but the pictures."""
    strange = 'a <script>alert("1")</script> & 100% of #1? "TL"'
    (tmp_path / "ocr.txt").write_text(strange + '\na pink sign saying "LZ"\n')
    tasks = f"--tasks {few('test', 3, str(tmp_path))[0]} ocr={tmp_path}/ocr.txt --samples-per-prompt 2"
    flags = f"--models base mine={loras['ocr']} --reward toy.compose jpeg --eval-num-steps 1 --report"
    run("evaluate.py", *tasks.split(), *flags.split(), "--out", tmp_path / "out")
    data = report_data(tmp_path / "out")
    assert [row["task"] for row in data["prompts"]] == ["compose"] * 3 + ["ocr"] * 2
    assert [row["number"] for row in data["prompts"]] == [0, 1, 2, 0, 1]
    assert data["prompts"][3]["prompt"] == strange
    for row in data["prompts"]:
        assert list(row["pictures"]) == data["models"] == ["base", "mine"]
        for name, pictures in row["pictures"].items():
            files = [tmp_path / "out" / urllib.parse.unquote(picture["file"]) for picture in pictures]
            numbers = [f"{2 * row['number'] + k:06d}" for k in range(2)]
            assert [file.stem[-6:] for file in files] == numbers
            assert all(f.is_file() and f.parts[-4:-1] == (name, row["task"], "samples") for f in files)
            values = rewards.jpeg(torch.stack([rewards.read_picture(f) for f in files]))
            for picture, value in zip(pictures, values.tolist()):
                assert picture["scores"]["jpeg"] == pytest.approx(value, abs=1e-6)
                assert ("compose" in picture["scores"]) == (row["task"] == "compose")
    title, (header, *rows) = data["tables"][0]
    assert title == "" and header == ["model", "compose", "jpeg", "diversity"]
    for cells, row in zip(rows, table(tmp_path / "out"), strict=True):
        assert cells[0] == row["model"]
        assert cells[2] == f"{row['scores']['jpeg']:.3f} ± {row['stderr']['jpeg']:.3f}"
    assert data["tables"][1][0] == "jpeg by task:" and data["tables"][1][1][0] == ["model", "compose", "ocr"]


def test_a_bad_picture_costs_its_prompts_diversity(tmp_path, fake):
    argv = folder_argv(tmp_path, rows_of(3) * 2, f"{fake}.ocr")
    write_rows(tmp_path, rows_of(3))
    (tmp_path / "theirs/picture_3.jpg").write_text("<html>")
    assert "theirs: 1 of diversity, theirs: 1 of ocr" in refused(*argv, "--samples-per-prompt", 2)
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"ocr": 1, "diversity": 1}
    assert row["scores"]["diversity"] == pytest.approx(20 / 255 / 3**0.5, abs=0.01)


# -- sample.py -----------------------------------------------------------------------------------------------


def test_a_few_step_student_says_how_it_is_sampled(loras, tmp_path):
    """Its steps and guidance are the defaults of sample.py and evaluate.py, and draw what diffusers draws."""
    taught = dict(teachers=f"ocr={loras['ocr']},guidance=2", prompts=few("train", 8, str(tmp_path))[1])
    distill(loras, tmp_path, **taught, guidance=1, num_steps=3, teacher_substeps=2, eval_num_steps=None)
    student = tmp_path / "lora"
    assert json.loads((student / "sampling.json").read_text()) == {"num_steps": 3, "guidance": 1.0}
    draw = dict(lora=student, prompt="a cup", num_images=1)
    run("sample.py", **draw, out=tmp_path / "drawn")
    drawn = torch.from_numpy(np.asarray(Image.open(tmp_path / "drawn/00000.png")) / 255).movedim(-1, 0)
    noise = randn(generators(0, 0, [0]), (3, 32, 32), "cpu")
    theirs = stock_pictures(BASE, ["a cup"], noise, 3, lora=student, length=12)
    assert (drawn - theirs[0]).abs().max() < 1 / 255 + 1e-4
    rows = [f"own={student}", f"said={student},num_steps=1", "base"]
    judge = dict(tasks=few("test", 2, str(tmp_path))[1], reward="jpeg")
    run("evaluate.py", **judge, models=rows, out=tmp_path / "table")
    run("evaluate.py", **judge, models=rows[:2], eval_num_steps=4, out=tmp_path / "flag")
    how = {}
    for file in tmp_path.glob("*/*/ocr/settings.json"):
        how[file.parts[-4], file.parts[-3]] = json.loads(file.read_text())["eval_num_steps"]
    expected = {("table", "own"): 3, ("table", "said"): 1, ("table", "base"): 10}
    assert how == expected | {("flag", "own"): 4, ("flag", "said"): 1}
    (student / "sampling.json").write_text('{"num_steps": "4"}')
    assert "num_steps must be a whole number" in refused("sample.py", **draw, out=tmp_path / "no")
    half = refused("evaluate.py", **judge, models=f"x={student},num_steps=1.5", out=tmp_path / "no")
    assert "num_steps must be" in half


def test_sample_draws_broken_pictures_again(tmp_path):
    flags = dict(num_images=1, num_steps=1, out=tmp_path)
    run("sample.py", **flags)
    files = sorted(tmp_path.glob("0*.png"))
    before = [file.read_bytes() for file in files]
    for file, data in zip(files, (b"", before[1][:-20], bytes(len(before[2]))), strict=True):
        file.write_bytes(data)
    run("sample.py", **flags)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("limit", [100, 2000])
def test_merge_on_a_full_disk(limit, loras, tmp_path, monkeypatch):
    """In bytes of a file: at 100 the disk is full for Python, at 2,000 for safetensors."""
    import flow_sde

    save, (soft, hard) = flow_sde.SD3.save_pipeline, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    flags = dict(lora=loras["ocr"], num_images=1, num_steps=1, out=tmp_path / "out", merge=tmp_path / "alone")
    with monkeypatch.context() as full:
        full.setattr(flow_sde.SD3, "save_pipeline", limited)
        message = refused("sample.py", **flags)
    assert f"--merge {tmp_path}/alone: could not be written" in message and "File too large" in message
    run("sample.py", **flags)
    assert (tmp_path / "alone/model_index.json").exists()
