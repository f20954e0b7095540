"""evaluate.py: the same table whatever the processes and the interruptions, pictures of other programs, missing scores, the paper's columns."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse

import pytest
import torch
from conftest import ROOT, few, refused, run
from PIL import Image
from test_rewards import bad_pictures

import rewards


def table(out):
    return json.load(open(os.path.join(out, "results.json")))


def pictures(out):
    return {f.relative_to(out): f.read_bytes() for f in out.rglob("samples/*.png")}


def argv(loras, tmp_path, out, n=24):
    return [
        "--models",
        "base",
        f"sign={loras['ocr']}",
        "--tasks",
        *few("test", n, str(tmp_path)),
        "--reward",
        "toy.compose",
        "toy.ocr",
        "toy.scene",
        "toy.quality",
        "jpeg@ocr",
        "--eval-num-steps",
        2,
        "--eval-batch-size",
        5,
        "--out",
        tmp_path / out,
    ]


def test_same_table_after_a_kill_and_with_two_processes(loras, tmp_path):
    """One process; one killed with kill -9 in the middle and started again; two processes that finish what one began. All with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = lambda out, *launcher: subprocess.Popen(
        list(map(str, [sys.executable, *launcher, "evaluate.py", *argv(loras, tmp_path, out)])),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
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
    assert kept >= len(made) - 5  # all but those of the batch that was cut
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("samples/*.png")}
    run("evaluate.py", *argv(loras, tmp_path, "b"))
    assert table(tmp_path / "b") == a and all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert "is of another evaluation: guidance was 1.0, now 2.0" in refused(
        "evaluate.py", *argv(loras, tmp_path, "b"), "--guidance", 2
    )


def test_means_errors_and_tasks(loras, tmp_path):
    """Every number of the table from the picture files and the reward functions themselves."""
    import toy

    run("evaluate.py", *argv(loras, tmp_path, "out", 6), "--samples-per-prompt", 2)
    for row in table(tmp_path / "out"):
        everything, apart = [], []
        for task in ("compose", "ocr", "scene"):
            files = sorted(
                (tmp_path / "out" / row["model"] / task / "samples").iterdir(), key=lambda f: f.stem[-6:]
            )
            prompts = [p for line in open(tmp_path / f"{task}_test.txt") for p in [line.strip()] * 2]
            assert len(files) == 12 and [f.name for f in files] == [
                f"{p}_{i:06d}.png" for i, p in enumerate(prompts)
            ]  # T2I-CompBench++'s names
            images = torch.stack([rewards.read_picture(f) for f in files])
            own = getattr(toy, task)(images, prompts)
            assert row["scores"][task] == pytest.approx(own.mean().item(), abs=1e-6) and row["n"] == 36
            assert row["stderr"][task] == pytest.approx((own.std() / 12**0.5).item(), abs=1e-6)
            everything.append(toy.quality(images))
            apart += [
                (images[i] - images[i + 1]).norm().item() / images[0].numel() ** 0.5 for i in range(0, 12, 2)
            ]
            assert row["tasks"]["quality"][task][0] == pytest.approx(everything[-1].mean().item(), abs=1e-6)
            if task == "ocr":
                assert row["scores"]["jpeg"] == pytest.approx(rewards.jpeg(images).mean().item(), abs=1e-6)
        assert row["scores"]["quality"] == pytest.approx(torch.cat(everything).mean().item(), abs=1e-6)
        assert row["scores"]["diversity"] == pytest.approx(sum(apart) / 18, abs=1e-6) and set(
            row["tasks"]["diversity"]
        ) == {"compose", "ocr", "scene"}
    assert (
        "quality by task:" in (tmp_path / "out/results.md").read_text()
        and Image.open(tmp_path / "out/samples.png").width > 1000
    )


FAKE = """
import torch
def value(name):
    return lambda images, prompts, metadata: torch.tensor([m["wanted"][name] for m in metadata], dtype=torch.float32)
geneval, geneval_strict, ocr, deqa, pickscore = map(value, ("geneval", "geneval_strict", "ocr", "deqa", "pickscore"))
def grey(images, prompts, metadata):
    wanted = torch.tensor([m["grey"] for m in metadata])
    return ((images[:, 0, 0, 0] * 255 - wanted).abs() < 3).float()
def fickle(images, prompts, metadata):
    from rewards import RewardError
    from rewards import Unavailable
    if any(m["wanted"].get("dead") for m in metadata):
        raise Unavailable("the server is gone")
    if any(m["wanted"].get("fails") for m in metadata):
        raise RewardError("no number in this answer")
    return torch.ones(len(images))
"""


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
        Image.new("RGB", (40 + 8 * (i % 2), 40), (i * 20, 0, 0)).save(
            tmp_path / f"theirs/picture-{i}.jpg"
        )  # of two sizes
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [
        "--folders",
        f"theirs={tmp_path}/theirs",
        "--tasks",
        f"{task}={tmp_path}/rows.jsonl",
        "--out",
        tmp_path / "out",
    ]


def test_geneval_by_tag_and_the_papers_average(tmp_path, fake):
    """Overall is the mean of the tags' means, as GenEval has it; Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4."""
    score = lambda g, s: {
        "geneval": g,
        "geneval_strict": s,
        "ocr": 0.5,
        "deqa": 4.0 / 5,
        "pickscore": 22.1 / 26,
    }
    rows = [
        {"prompt": "p", "tag": tag, "wanted": score(g, s)}
        for tag, g, s in (("colors", 1, 1), ("colors", 0.5, 0), ("colors", 0.5, 0), ("counting", 0.5, 1))
    ]
    names = ["geneval", "geneval_strict", "ocr", "deqa", "pickscore"]
    run("evaluate.py", *folder_of(tmp_path, rows), "--reward", *(f"{fake}.{n}" for n in names))
    [row] = table(tmp_path / "out")
    assert row["scores"]["geneval_strict"] == pytest.approx((1 / 3 + 1) / 2) and row["scores"][
        "geneval"
    ] == pytest.approx((2 / 3 + 0.5) / 2)
    assert {tag: v[0] for tag, v in row["tags"]["geneval_strict"].items()} == pytest.approx(
        {"colors": 1 / 3, "counting": 1}
    )
    assert row["scores"]["average"] == pytest.approx(((2 / 3 + 0.5) / 2 + 0.5 + 0.8 + 0.85) / 4)
    assert "geneval_strict by tag:" in (tmp_path / "out/results.md").read_text()


def test_a_missing_score_is_missing_and_not_zero(tmp_path, fake, capsys):
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "fails": i == 2}} for i in range(5)]
    command = [
        "evaluate.py",
        *folder_of(tmp_path, rows, "things"),
        "--reward",
        f"{fake}.fickle",
        f"{fake}.ocr",
    ]
    assert "scores are missing (theirs: 1 of fickle); the same command tries again" in refused(*command)
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"fickle": 1} and row["scores"] == {"fickle": 1, "ocr": 1}
    said = (tmp_path / "out/results.md").read_text()
    assert (
        "| model | fickle | ocr |" in said and "| theirs | 1.000 ± 0.000, 1 missing | 1.000 ± 0.000 |" in said
    )
    scored = (tmp_path / "out/theirs/things/scores.jsonl").read_text() + (
        tmp_path / "out/theirs/things/scores.0.jsonl"
    ).read_text()
    assert scored.count("fickle") == 4 and scored.count(".ocr") == 5


def test_a_dead_reward_is_given_up(tmp_path, fake, capsys):
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "dead": i > 0}} for i in range(12)]
    command = [
        "evaluate.py",
        *folder_of(tmp_path, rows, "things"),
        "--reward",
        f"{fake}.fickle",
        "--eval-batch-size",
        4,
    ]
    assert "11 of fickle" in refused(*command)
    assert capsys.readouterr().out.count("the server is gone") == 3
    rows = [
        {"prompt": f"p{i}", "wanted": {"ocr": 1, "fails": 0 < i < 7}} for i in range(12)
    ]  # a picture's own fault says nothing of the next
    command = ["evaluate.py", *folder_of(tmp_path, rows, "things")[:-1], tmp_path / "other", "--reward"]
    assert "6 of fickle" in refused(*command, f"{fake}.fickle")
    capsys.readouterr()
    with open(tmp_path / "other/theirs/things/scores.0.jsonl", "a") as f:
        f.write('{"picture": 3, "rew')  # cut by a full disk
    run(*command, f"{fake}.ocr")
    with open(os.path.join(ROOT, f"{fake}.py"), "a") as f:
        f.write("\n")  # another version of the module: score again
    assert "6 of fickle" in refused(*command, f"{fake}.fickle")
    assert "picture 1: fickle: no number" in capsys.readouterr().out


def test_folders_are_checked(tmp_path, fake):
    rows = [{"prompt": "p", "wanted": {"ocr": 1}}] * 3
    command = ["evaluate.py", *folder_of(tmp_path, rows), "--reward", f"{fake}.ocr"]
    assert "jpeg@ocrs: no such task; there are geneval" in refused(*command, "jpeg@ocrs")
    os.remove(tmp_path / "theirs/picture-1.jpg")
    assert "by the last number of a name, no picture has the number 1" in refused(*command)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs/other_000001.png")
    run(*command)
    assert table(tmp_path / "out")[0]["scores"] == {"ocr": 1}
    Image.new("RGB", (9, 9), "red").save(tmp_path / "theirs/other_000001.png")
    assert "is of another evaluation: pictures was" in refused(*command)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs/second_1.png")
    assert "other_000001.png and second_1.png have the same number" in refused(*command)
    assert "there is no folder" in refused("evaluate.py", "--folders", f"x={tmp_path}/nowhere", *command[3:])
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in refused("evaluate.py", "--folders", f"x={tmp_path}/empty", *command[3:])


PROMPTS = [f"a sign {n} with 7 letters" for n in "abcdef"]


def score_of(tmp_path, names, *more, prompts=PROMPTS, each=1):
    """The mean score of pictures of these names, each grey as its prompt's number says: 1 if all are taken for what they are. names: for
    each prompt, or for each of its pictures, a path below the folder."""
    folder = tmp_path / "theirs"
    shutil.rmtree(folder, ignore_errors=True)
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * (k // each),) * 3).save(folder / name)
    rows = [{"prompt": p, "grey": 10 * k} for k, p in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    command = [
        "evaluate.py",
        "--folders",
        f"theirs={folder}",
        "--tasks",
        f"signs={tmp_path}/rows.jsonl",
        "--reward",
        "fake_rewards_of_the_tests.grey",
        *more,
    ]
    run(*command, "--out", tmp_path / "out")
    return table(tmp_path / "out")[0]["scores"]["grey"]


ROWS = range(len(PROMPTS))
SEEDS = 3141592653, 2718281828, 1414213562, 1732050807, 5772156649, 1618033988


@pytest.mark.parametrize(
    "names, each",
    [
        ([f"samples/{p}_{i:06d}.png" for i, p in enumerate(PROMPTS)], 1),  # our own, and T2I-CompBench's
        ([f"signs/samples/{PROMPTS[i // 2]}_{i:06d}.png" for i in range(12)], 2),
        ([f"{i:05d}/samples/{k:04d}.png" for i in ROWS for k in range(4)], 4),
        ([f"{i:05d}/samples/0000.png" for i in ROWS], 1),  # GenEval's
        ([f"{i}.jpg" for i in ROWS], 1),
        ([f"{i + 1:03d}.png" for i in ROWS], 1),
        ([f"{i}.png" for i in range(12)], 2),  # plain
        ([f"image_{i}.webp" for i in ROWS], 1),
        ([f"flux_dev_{i:02d}.tiff" for i in ROWS], 1),
        ([f"sd3.5-{i}.bmp" for i in ROWS], 1),  # diffusers'
        ([f"ComfyUI_{i + 1:05d}_.png" for i in ROWS], 1),
        ([f"sd3_1024_{i + 1:05d}_.avif" for i in ROWS], 1),
        ([f"{i:05d}-{seed}.png" for i, seed in enumerate(SEEDS)], 1),
        ([f"{i:05d}-42.png" for i in ROWS], 1),  # A1111's
        ([f"{i:05d}-{seed}-{p}.png" for i, (seed, p) in enumerate(zip(SEEDS, PROMPTS))], 1),
        ([f"{i:05d}-{77 + i}.png" for i in ROWS], 1),
    ],
)
def test_layouts_of_folders(tmp_path, fake, capsys, names, each):
    more = ["--samples-per-prompt", each] if each > 1 else []
    assert score_of(tmp_path, names, *more, each=each) == pytest.approx(1)
    said = capsys.readouterr().out
    assert (
        f"theirs, signs: {len(names)} pictures by the " in said
        and f"e.g. {os.path.basename(names[-1])} is taken for '{PROMPTS[-1]}'" in said
    )


@pytest.mark.parametrize(
    "names, more, message",
    [
        ([f"{i}.png" for i in range(24)], [], "has 24 pictures for 6 prompts; give --samples-per-prompt 4"),
        ([f"{i:05d}/samples/{k:04d}.png" for i in ROWS for k in range(2)], [], "give --samples-per-prompt 2"),
        (
            [f"{i}.png" for i in ROWS],
            ["--samples-per-prompt", 4],
            "has 6 pictures for 6 prompts; give --samples-per-prompt 1",
        ),
        ([f"{i}.png" for i in range(7)], [], "6.png is one too many for 6 pictures"),
        ([f"{i + 2}.png" for i in ROWS], [], "no picture has the number 0"),
        ([*[f"{i}.png" for i in ROWS], "grid.png"], [], "grid.png has no number"),
        ([f"{i}.png" for i in ROWS[1:]], [], "no picture has the number"),
        ([*[f"{i}.png" for i in ROWS[:-1]], "4.jpg"], [], "4.jpg and 4.png have the same number"),
        ([f"{seed}.png" for seed in SEEDS], [], "no picture has the number 0"),
        (
            [f"{5 - i}-{i}.png" for i in ROWS],
            [],
            "give different orders; let names end in the number that counts",
        ),
        ([f"{p}_{5 - i:06d}.png" for i, p in enumerate(PROMPTS)], [], "would be taken for 'a sign"),
        ([f"{p}_0.png" for p in PROMPTS], [], "have the same number"),
    ],
)
def test_folders_that_leave_a_doubt_are_refused(tmp_path, fake, names, more, message):
    with pytest.raises(SystemExit, match=f"evaluate.py: --folders theirs.*{re.escape(message)}"):
        score_of(tmp_path, names, *more)


def test_bad_pictures_cost_their_own_scores_only(tmp_path, fake, capsys):
    """Cut, no picture, too large in text or in pixels: these have no scores, are said once, and the others' are there; so too the second time."""
    bad = list(bad_pictures(tmp_path).values())
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1, "deqa": 0.5}} for i in range(12)]
    command = [
        "evaluate.py",
        *folder_of(tmp_path, rows, "things"),
        "--reward",
        f"{fake}.ocr",
        f"{fake}.deqa",
        "jpeg",
        "--report",
    ]
    for i, file in enumerate(bad):
        os.remove(tmp_path / f"theirs/picture-{2 * i}.jpg")
        shutil.copy(file, tmp_path / f"theirs/picture-{2 * i}{file.suffix}")
    for _ in range(2):
        assert "scores are missing (theirs: 6 of deqa, theirs: 6 of jpeg, theirs: 6 of ocr)" in refused(
            *command
        )
        said = capsys.readouterr()
        assert (said.out + said.err).count("not a picture that can be read") == len(bad)
    [row] = table(tmp_path / "out")
    assert (
        row["missing"] == {"ocr": 6, "deqa": 6, "jpeg": 6}
        and row["scores"]["ocr"] == 1
        and row["scores"]["deqa"] == 0.5
    )
    scored = [
        json.loads(line)
        for f in (tmp_path / "out/theirs/things").glob("scores*.jsonl")
        for line in f.read_text().split("\n")
        if line
    ]
    assert sorted({r["picture"] for r in scored}) == [1, 3, 5, 7, 9, 11] and len(scored) == 18
    assert (
        "0.500 ± 0.000, 6 missing" in (tmp_path / "out/results.md").read_text()
        and "ocr missing" in (tmp_path / "out/report.html").read_text()
    )


def test_pictures_that_are_not_finite_are_not_scored(tmp_path, monkeypatch, loras, capsys):
    import flow_sde

    plain = flow_sde.SD3.generate

    def generate(self, prompts, *rest, **options):
        pictures = plain(self, prompts, *rest, **options)
        pictures[1, 0, 3, 4] = float("nan")
        return pictures

    monkeypatch.setattr(flow_sde.SD3, "generate", generate)
    command = [
        "evaluate.py",
        "--models",
        "base",
        "--tasks",
        few("test", 3, str(tmp_path))[0],
        "--reward",
        "toy.compose",
        "--eval-num-steps",
        1,
        "--out",
        tmp_path / "out",
    ]
    assert "base: 1 of compose" in refused(*command)
    assert (
        "base, compose, picture 1: not finite" in capsys.readouterr().out
        and len(pictures(tmp_path / "out")) == 2
    )


def test_memory_is_bounded_by_pixels(tmp_path):
    """Four pictures of 4,096 x 4,096 in a batch of four: one of them at a time, 200 MB in floating point."""
    Image.new("RGB", (4096, 4096), "navy").save(tmp_path / "0.png", compress_level=1)
    (tmp_path / "theirs").mkdir()
    for i in range(4):
        os.link(tmp_path / "0.png", tmp_path / f"theirs/{i}.png")
    (tmp_path / "p.txt").write_text("a\n" * 4)
    program = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    argv = [
        "--folders",
        f"x={tmp_path}/theirs",
        "--tasks",
        f"t={tmp_path}/p.txt",
        "--reward",
        "jpeg",
        "--eval-batch-size",
        4,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, "evaluate.py", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    peak = int(done.stdout.split("peak ")[1]) / 2**20
    print(f"{peak:.2f} GB")
    assert peak < 2.4 and Image.open(tmp_path / "out/samples.png").width < 8000


class Page(html.parser.HTMLParser):
    """What a report shows: [(task, prompt, {model: [(file, caption)]}, scores)], tables' cells, scripts and addresses."""

    def __init__(self, text):
        super().__init__()
        self.articles, self.cells, self.scripts, self.links, self.inside, self.open = [], [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside, self.links = (
            attributes.get("class") or tag,
            self.links + [v for k, v in attributes.items() if k in ("src", "href")],
        )
        if tag == "article":
            self.articles.append([attributes["data-task"], "", {}, json.loads(attributes["data-scores"])])
        if tag == "img":
            self.articles[-1][2][self.open].append([attributes["src"], ""])
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.cells[-1] += data
        elif self.inside == "script":
            self.scripts.append(data)
        elif self.articles and self.inside == "h2":
            self.articles[-1][1] += data
        elif self.articles and self.inside == "model":
            self.open = data
            self.articles[-1][2][data] = []
        elif self.articles and self.inside == "figcaption":
            self.articles[-1][2][self.open][-1][1] += data

    def handle_endtag(self, tag):
        self.inside = ""


def test_report(tmp_path, loras):
    """Every prompt with all models' pictures and their scores, and the tables, on one page that needs nothing but the pictures."""
    strange = 'a <script>alert("1")</script> & 100% of #1? "TL"'
    (tmp_path / "ocr.txt").write_text(strange + '\na pink sign saying "LZ"\n')
    run(
        "evaluate.py",
        "--models",
        "base",
        f"mine={loras['ocr']}",
        "--tasks",
        few("test", 3, str(tmp_path))[0],
        f"ocr={tmp_path}/ocr.txt",
        "--samples-per-prompt",
        2,
        "--reward",
        "toy.compose",
        "jpeg",
        "--eval-num-steps",
        1,
        "--out",
        tmp_path / "out",
        "--report",
    )
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert [task for task, *_ in page.articles] == ["compose"] * 3 + ["ocr"] * 2 and page.articles[3][
        1
    ].strip() == strange
    rows = {r["model"]: r for r in table(tmp_path / "out")}
    for task, prompt, models, scores in page.articles:
        assert list(models) == ["base", "mine"] and all(len(shown) == 2 for shown in models.values())
        for name, shown in models.items():
            files = [tmp_path / "out" / urllib.parse.unquote(src) for src, _ in shown]
            assert all(f.is_file() and f.parts[-4:-1] == (name, task, "samples") for f in files)
            images = torch.stack([rewards.read_picture(f) for f in files])
            for caption, value in zip((c for _, c in shown), rewards.jpeg(images).tolist()):
                assert f"jpeg {value:.3f}" in caption and ("compose" in caption) == (task == "compose")
            assert scores[name]["jpeg"] == pytest.approx(rewards.jpeg(images).mean().item(), abs=1e-6)
    for name, row in rows.items():
        assert (
            f"{row['scores']['jpeg']:.3f} ± {row['stderr']['jpeg']:.3f}" in page.cells and name in page.cells
        )
    assert (
        len(page.scripts) == 1
        and "alert" not in page.scripts[0]
        and all(link.startswith(("base/", "mine/")) for link in page.links)
    )
    assert "http" not in text.replace("https://", "http") and text.count("<script") == 1


def test_a_bad_picture_costs_its_prompts_diversity(tmp_path, fake):
    rows = [{"prompt": f"p{i}", "wanted": {"ocr": 1}} for i in range(3)]
    command = [
        "evaluate.py",
        *folder_of(tmp_path, rows * 2, "things"),
        "--reward",
        f"{fake}.ocr",
        "--samples-per-prompt",
        2,
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "theirs/picture-3.jpg").write_text("<html>")
    assert "theirs: 1 of diversity, theirs: 1 of ocr" in refused(*command)
    [row] = table(tmp_path / "out")
    assert row["missing"] == {"ocr": 1, "diversity": 1} and row["scores"]["diversity"] == pytest.approx(
        20 / 255 / 3**0.5, abs=0.01
    )
