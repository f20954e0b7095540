"""reproduce.sh: its queue, with programs that only write down how they were called; that the scripts take the flags it gives them; and the
errors that experiments/tables.py prints."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

from flow_sde import parse_specs

FAKE = """#!/usr/bin/env bash
printf '%s\n' "$(printf '%q ' "$(basename "$0")" "$@")" >> calls
case "$*" in *"$FAIL"*) exit 3;; esac
while [ $# -gt 0 ]; do if [ "$1" = --out ]; then mkdir -p "$2/lora"; fi; shift; done
"""


@pytest.fixture
def reproduce(tmp_path):
    """Run a copy of reproduce.sh on fake programs: f(fail="") -> (exit status, what it printed, the calls it made)."""
    shutil.copy(os.path.join(ROOT, "reproduce.sh"), tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(fail="nothing fails", seeds="0 1"):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", "reproduce.sh"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAIL": fail, "SEEDS": seeds},
        )
        return (
            done.returncode,
            done.stdout + done.stderr,
            [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()],
        )

    return start


def test_every_run_once_with_flags_that_exist_and_not_again(reproduce):
    status, printed, calls = reproduce()
    assert status == 0, printed
    outs = [c[c.index("--out") + 1] for c in calls if "--out" in c]
    assert len(outs) == len(set(outs)) and len(outs) > 40 and calls[-1] == ["python", "experiments/tables.py"]
    parsers = {}
    for script in ("train_teacher.py", "cold_start.py", "distill.py", "evaluate.py"):
        source = (
            open(os.path.join(ROOT, script)).read().split("\nargs = parse_args(")[0]
        )  # up to the reading of the flags
        exec(source, parsers.setdefault(script, {"__doc__": "", "__name__": script}))
    for program, *argv in calls[:-1]:
        script = next(a for a in argv if a.endswith(".py"))
        args = parsers[script]["parser"].parse_args(argv[argv.index(script) + 1 :])
        given = lambda flag, **options: parse_specs(f"--{flag}", getattr(args, flag, None), **options)
        weight = {"weight": 1.0} if script == "train_teacher.py" else {}
        for spec in [
            *given("prompts", **weight).values(),
            *given("eval_prompts").values(),
            *given("tasks").values(),
        ]:
            assert os.path.exists(os.path.join(ROOT, spec["value"])), spec
        loras = [s["value"] for s in given("teachers", guidance=1.0, weight=1.0).values()] + [
            getattr(args, f, None) for f in ("init", "anchor")
        ]
        loras += [m.partition("=")[2].partition(",")[0] for m in getattr(args, "models", ()) if m != "base"]
        for lora in [
            lora for lora in loras if lora not in (None, "none", "base", "merge")
        ]:  # somebody made it before
            assert (
                lora.split("/lora")[0].split("/checkpoints")[0]
                in outs[: outs.index(argv[argv.index("--out") + 1])]
            ), lora
        if "opd-guided" in args.out:
            assert [s["guidance"] for s in given("teachers", guidance=1.0, weight=1.0).values()] == [
                1.5,
                1.5,
                1.0,
            ]
    status, printed, calls = reproduce()
    assert status == 0 and all("evaluate.py" in c or "experiments/tables.py" in c for c in calls), (
        calls
    )  # which skip what they have themselves


def test_a_failure_ends_it_and_the_next_start_goes_on(reproduce):
    status, printed, calls = reproduce(fail="reproduce/sft-1")
    assert status == 1 and "sft-1 failed, see out/reproduce/sft-1.log" in printed
    before = sum("--out" in c for c in calls)
    status, printed, calls = reproduce()
    assert status == 0, printed
    trained = [c for c in calls if "--out" in c and "evaluate.py" not in c]
    assert (
        any("out/reproduce/sft-1" in c for c in trained)
        and not any("out/reproduce/compose-0" in c for c in trained)
        and before > 10
    )


def test_arms_are_compared_prompt_by_prompt(tmp_path):
    """The order of a file's lines does not matter; an arm with one run is set against every seed of the other."""
    path = os.path.join(ROOT, "experiments/tables.py")
    tables = {"__file__": path}
    exec(open(path).read().split("\npage, tables = ")[0], tables)
    tables["RUNS"] = str(tmp_path)
    gaps = {
        "arm-0": [0.1, 0.3],
        "arm-1": [0.2, 0.4],
        "other-0": [0.0, 0.0],
        "other-1": [0.0, 0.0],
    }  # over 0.5 and 0.2, by prompt
    for run, (first, second) in gaps.items():
        rows = [
            {"picture": "a.png", "reward": "toy.ocr", "score": 0.5 + first},
            {"picture": "b.png", "reward": "toy.ocr", "score": 0.2 + second},
            {"picture": "a.png", "reward": "toy.quality", "score": 9.0},
        ]
        os.makedirs(tmp_path / "test" / run / "ocr")
        (tmp_path / "test" / run / "ocr/scores.jsonl").write_text(
            "\n".join(json.dumps(r) for r in (rows if run.endswith("0") else rows[::-1]))
        )
    arm, other = ([{"model": f"{name}-{k}"} for k in (0, 1)] for name in ("arm", "other"))
    prompts, seeds = (
        0.02 / 2,
        0.005 / 2,
    )  # variances of the two prompts' mean gaps .15 and .35, and of the two seeds' .2 and .3
    for runs, others in ((arm, other), (arm, other[:1])):
        assert tables["paired"]("test", runs, others, ["ocr"]) == pytest.approx(
            (0.25, (prompts + seeds) ** 0.5)
        )
    assert tables["paired"]("test", arm[:1], other, ["ocr"]) == pytest.approx((0.2, prompts**0.5))
