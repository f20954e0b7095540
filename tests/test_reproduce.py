"""reproduce.sh, few_steps.sh and grow.sh: their queues, with programs that only write down how they were
called, and that the scripts take the flags they give them; tables.py: the errors it prints, and that its
tables are in experiments/README.md; few_steps.py: the errors of its differences; grow.py: its numbers."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, read_json
from test_recipes import parser_of

from experiments import few_steps, grow, tables

FAKE = """#!/usr/bin/env bash
printf '%s\n' "$(printf '%q ' "$(basename "$0")" "$@")" >> calls
case "$*" in *"$FAIL"*) exit 3;; esac
while [ $# -gt 0 ]; do if [ "$1" = --out ]; then mkdir -p "$2/lora"; fi; shift; done
"""

OPTIONS = {  # of the teachers, by run
    "opdguided-1": [",guidance=1.5,weight=2", ",guidance=1.5", ""],
    "opdbest-1": [",scale=1.25,guidance=1.5,weight=2", ",scale=1.25,guidance=1.5", ",scale=1.25"],
}


@pytest.fixture
def reproduce(tmp_path, request):
    """Run a copy of a script on fake programs: f(fail) -> (exit status, what it printed, its calls)."""
    script = getattr(request, "param", "reproduce")
    (tmp_path / "experiments").mkdir()
    shutil.copy(os.path.join(ROOT, f"experiments/{script}.sh"), tmp_path / "experiments")
    shutil.copytree(os.path.join(ROOT, "toy/prompts"), tmp_path / "toy/prompts")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(fail="nothing fails"):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAIL": fail, "SEEDS": "0 1"}
        command = ["bash", str(tmp_path / f"experiments/{script}.sh"), "more"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)
        calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, calls

    return start


def out_of(call):
    return call[call.index("--out") + 1].rpartition("/")[2]


@pytest.mark.parametrize(
    "reproduce, count", [("reproduce", 40), ("few_steps", 40), ("grow", 100)], indirect=["reproduce"]
)
def test_every_run_once_with_flags_that_exist_and_not_again(reproduce, count):
    status, printed, calls = reproduce()
    assert status == 0, printed
    assert calls.pop()[1] in [f"experiments/{name}.py" for name in ("tables", "few_steps", "grow")]
    choosing = ("experiments/grow.py", "--merges")
    calls = [call for call in calls if not set(choosing) & set(call)]
    made = []
    for call in calls:
        script = next(word for word in call if word.endswith(".py"))
        args = parser_of(script).parse_args(call[call.index(script) + 1 :])
        assert all(re.match(r"[\w-]+(=|$)", model) for model in vars(args).get("models", []))  # a row's name
        assert "merge" not in call or "--resume" not in call  # cold_start.py refuses it
        for word in call:
            for file in re.findall(r"toy/prompts/\w+\.txt", word):
                assert os.path.exists(os.path.join(ROOT, file)), call
            for lora in re.findall(r"out/\w+/([\w.-]+)/(?!\w+\.txt)", word):
                assert lora in made, call
        assert out_of(call) not in made
        made.append(out_of(call))
        if out_of(call) in OPTIONS:
            teachers = [word for word in call if re.match(r"\w+=.*-1/lora", word)]
            assert [word.partition("/lora")[2] for word in teachers] == OPTIONS[out_of(call)]
    assert len(made) > count
    status, printed, calls = reproduce()  # evaluate.py and sample.py skip by themselves what they have
    trained = [call for call in calls if {"distill.py", "train_teacher.py", "cold_start.py"} & {*call}]
    assert status == 0 and not trained


def test_a_failure_ends_it_and_the_next_start_goes_on(reproduce):
    status, printed, calls = reproduce(fail="reproduce/sft-1")
    assert status == 1 and "sft-1 failed, see out/reproduce/sft-1.log" in printed
    assert len(calls) > 10
    status, printed, calls = reproduce()
    assert status == 0, printed
    trained = [out_of(call) for call in calls if "--out" in call and "evaluate.py" not in call]
    assert "sft-1" in trained and "compose-0" not in trained


@pytest.mark.parametrize("reproduce", ["grow"], indirect=True)
def test_a_failure_ends_grow_too(reproduce):
    status, printed, calls = reproduce(fail="out/grow/mix4-0")
    assert status != 0 and "mix4-0 failed: see out/grow/mix4-0.log" in printed
    assert not any("experiments/grow.py" in call for call in calls)


def test_few_steps_are_compared_prompt_by_prompt(tmp_path, monkeypatch):
    """Two seeds, two pictures of each task; a gap of .1 and .3 with one seed, of .2 and .4 with the other."""
    monkeypatch.setattr(few_steps, "RUNS", tmp_path)
    runs = {"test-4/four0": (0.1, 0.3), "test-4/four1": (0.2, 0.4), "test-9/many0": (0, 0)}
    for name, gaps in runs.items():
        for task in few_steps.TASKS:
            rows = []
            for reward in (task, "quality"):
                scores = zip("ab", (0.5 + gaps[0], 0.2 + gaps[1]))
                rows += [{"picture": i, "reward": f"toy.{reward} x", "score": score} for i, score in scores]
            for folder in (name, name.replace("many0", "many1"), f"own-9-{task}/{task}"):
                (tmp_path / folder / task).mkdir(parents=True, exist_ok=True)
                lines = "\n".join(map(json.dumps, rows[:: -1 if "many" in folder else 1]))
                (tmp_path / folder / task / "scores.jsonl").write_text(lines)
    results = [{"model": "four0"}, {"model": "four1"}]
    (tmp_path / "test-4/results.json").write_text(json.dumps(results))
    error = (0.01 / 6 + 0.005 / 2) ** 0.5  # of six tasks' prompts, gaps .15 and .35; of the seeds, .2 and .3
    expected = f"+0.250 ± {error:.3f}"
    assert few_steps.difference((4, "four"), (9, "many")) == expected
    assert few_steps.difference((4, "four"), (9, "many"), "quality") == expected
    assert few_steps.difference((4, "four"), (9, "teachers")) == expected


def test_arms_are_compared_prompt_by_prompt(tmp_path, monkeypatch):
    """Whatever the order of a file's lines; an arm with one run is set against every seed of the other."""
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    zero = (0.0, 0.0)
    gaps = {"arm-0": (0.1, 0.3), "arm-1": (0.2, 0.4), "other-0": zero, "other-1": zero, "single": zero}
    results = [{"model": run, "scores": {"ocr": 0.5}, "stderr": {"ocr": 0.1}} for run in gaps]
    for run, (first, second) in gaps.items():
        rows = [
            {"picture": "a.png", "reward": "toy.ocr", "score": 0.5 + first},
            {"picture": "b.png", "reward": "toy.ocr", "score": 0.2 + second},
            {"picture": "a.png", "reward": "toy.quality", "score": 9.0},
        ]
        if run.endswith("1"):
            rows.reverse()
        (tmp_path / "test" / run / "ocr").mkdir(parents=True)
        (tmp_path / "test" / run / "ocr/scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test/results.json").write_text(json.dumps(results))
    prompts = 0.02 / 2  # the variance of the two prompts' mean gaps, .15 and .35, over their number
    seeds = 0.005 / 2  # of the two seeds' mean gaps, .2 and .3
    both = pytest.approx((0.25, (prompts + seeds) ** 0.5))
    assert tables.paired("test", "arm", "other", ["ocr"]) == both
    assert tables.paired("test", "arm", "single", ["ocr"]) == both
    gap, error = tables.paired("test", "single", "arm", ["ocr"])
    assert (-gap, error) == both


def test_merges_are_chosen_on_validation_prompts(tmp_path, monkeypatch):
    """By their mean over seeds: the second of every family, though the first is best with one seed."""
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    tables.read.cache_clear()
    (tmp_path / "val").mkdir()
    results = []
    for arms in tables.MERGES.values():
        for arm, scores in zip(arms.values(), ((0.9, 0.1), (0.6, 0.6), (0.5, 0.5))):
            for seed, score in enumerate(scores):
                row = {"model": f"{arm}-{seed}", "scores": dict.fromkeys(tables.TASKS, score)}
                results.append(row | {"stderr": dict.fromkeys(tables.TASKS, 0.01)})
    (tmp_path / "val/results.json").write_text(json.dumps(results))
    arms = tables.with_merges({"the average": "merge", "a student": "opd"})
    assert list(arms.values()) == ["merge", "sum21", "svd21", "ties3", "dare3", "opd"]
    assert "sum of the three × 0.7" in arms and "TIES, density 0.3" in arms


def test_cost_to_a_level(tmp_path, monkeypatch):
    """The first validation at which every task is within 0.02 of its teacher."""
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    tables.read.cache_clear()
    (tmp_path / "val").mkdir()
    scores = {"compose": 0.6, "ocr": 0.7, "scene": 0.8}
    models = {"merge-0": 0.1, "opdafter16-0": 0.03, "opdafter32-0": 0.01, "opd-0": 0}
    models |= {f"{task}-0": 0 for task in scores}
    results = []
    for model, below in models.items():
        reached = {task: score - below for task, score in scores.items()}
        results.append({"model": model, "scores": reached, "stderr": dict.fromkeys(scores, 0.01)})
    (tmp_path / "val/results.json").write_text(json.dumps(results))
    (tmp_path / "opd-0").mkdir()
    log = [{"step": step, "seconds": 2} for step in range(1, 41)]
    (tmp_path / "opd-0/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert tables.cost("0", "opd") == (32 * 32, 64)
    (tmp_path / "mix-0").mkdir()
    log = [
        {"step": 4, "seconds": 9},
        {"step": 4, "validation/ocr": 0.7},
        {"step": 4, "validation/scene": 0.8},
    ]
    log = [{"step": step, "seconds": 9} for step in (1, 2, 3)] + log
    late = [{"step": 4, "validation/compose": 0.5}]
    (tmp_path / "mix-0/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log + late))
    assert tables.cost("0", "mix") is None
    late = [{"step": 4, "validation/compose": 0.59}]
    (tmp_path / "mix-0/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log + late))
    assert tables.cost("0", "mix") == (4 * 256, 36)


def test_the_page_has_the_tables_and_its_links_lead_somewhere():
    folder = pathlib.Path(ROOT, "experiments")
    page = (folder / "README.md").read_text()
    begin, end = "<!-- tables.py writes from here -->\n\n", "\n<!-- to here -->"
    assert begin + (folder / "tables.md").read_text() + end in page
    for link in re.findall(r"\]\(([^)\s]+)\)", page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = folder / (name or "README.md")
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link


def test_what_grows_is_measured_on_test_prompts_and_chosen_on_others(tmp_path, monkeypatch):
    """Every gap is .2 wide; the base has .3. TIES is best on validation prompts, the sum on test prompts."""
    monkeypatch.setattr(grow, "RUNS", tmp_path)
    monkeypatch.setattr(grow, "HERE", tmp_path)
    monkeypatch.setattr(grow, "grid", lambda seed: None)

    def put(name, tasks, **closed):
        rows = []
        for model, share in closed.items():
            rows.append({"model": model, "scores": dict.fromkeys(tasks, 0.3 + 0.2 * share)})
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(rows))

    def log(name, rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))

    for task in grow.TASKS:
        log(f"{task}-0", [{"step": 1, "seconds": 60}, {"step": 2, "seconds": 60}])
        for split in ("val", "test"):
            put(f"own-{task}-{split}-0", [task], base=0, **{task: 1})
    for count in grow.COUNTS:
        tasks = grow.TASKS[:count]
        updates = range(15, 15 * count + 1, 15)
        merges = {"sum5": 0.4, "sum1": 0.3, "svd1": 0, "ties2": 0.5, "ties3": 0.1, "dare5_1": 0.2}
        after = {f"after{u}": u / 100 for u in updates}
        put(f"val-{count}-0", tasks, **after, **(merges if count > 1 else {}))
        log(f"opd{count}-0", [{"step": i + 1, "seconds": 6} for i in range(120)])
        students = {"opd": 0.9, "fixed": 0.8}
        if count == 1:
            put("test-1-0", tasks, **students)
            continue
        chosen = {"sum5": 0.7, "svd1": 0, "ties2": 0.6, "dare5_1": 0.1}
        if count == 8:
            students |= {"rank4": 0.2, "rank8": 0.4, "rank16": 0.6, "rank32": 0.8}
        put(f"test-{count}-0", tasks, **students, mix=1, up=1.1, **chosen)  # which counts as 1
        validated = {f"validation/{task}": 0.46 if count == 8 else 0.5 for task in tasks}
        log(f"mix{count}-0", [{"step": 1, "seconds": 30}, {"step": 1, **validated}])
    assert grow.choose(4, 0)[0] == {"sum": "sum5", "svd": "svd1", "ties": "ties2", "dare": "dare5_1"}
    monkeypatch.setattr("sys.argv", ["grow.py"])
    grow.main()
    page = (tmp_path / "grow.md").read_text()
    for row in (
        "| best merge without training |  | 0.60 | 0.60 | 0.60 |",
        "| sum |  | 0.70 | 0.70 | 0.70 |",
        "| best merge without training |  | -0.30 | -0.30 | -0.30 |",
        "| **Flow-OPD, 15 updates a task** |" + " 0.90 |" * 8,
        "| Flow-OPD, then 10 rollouts of the mix |  | 0.10 | 0.10 | 0.10 |",
        "| Flow-OPD, then 10 rollouts of the mix |  | 1.10 | 1.10 | 1.10 |",
        "| kept | 0.20 | 0.40 | 0.60 | 0.80 | 0.90 |",
        "| GRPO-Mix |  | 256, 0.5 | 256, 0.5 | not by 1 of 1 seeds (at the end 0.80) |",
    ):
        assert row in page, row
    # Flow-OPD of eight ends at 1; .9 after 90 updates, 1 after 105: .95 between. 48 pictures, 6 seconds each
    teachers = sum(map(grow.pictures_of, grow.TASKS))
    assert "| 4,680, 9.8 |" in page and f"| {4680 + teachers:,}, 25.8 |" in page
    assert (tmp_path / "grow.png").exists() and read_json(tmp_path, "grow.json")["0"]["8"]["chosen"]
