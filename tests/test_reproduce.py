"""reproduce.sh: its queue, with programs that only write down how they were called; and that the scripts take the flags it gives them."""

import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

FAKE = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> calls; echo >> calls
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
        done = subprocess.run(["bash", "reproduce.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAIL": fail, "SEEDS": seeds})
        return done.returncode, done.stdout + done.stderr, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return start


def test_every_run_once_with_flags_that_exist_and_not_again(reproduce):
    status, printed, calls = reproduce()
    assert status == 0, printed
    outs = [c[c.index("--out") + 1] for c in calls if "--out" in c]
    assert len(outs) == len(set(outs)) and len(outs) > 40 and calls[-1] == ["python", "results/tables.py"]
    parsers = {}
    for script in ("train_teacher.py", "cold_start.py", "distill.py", "evaluate.py"):
        source = open(os.path.join(ROOT, script)).read().split("\nargs = parse_args(")[0]  # up to the reading of the flags
        exec(source, parsers.setdefault(script, {"__doc__": "", "__name__": script}))
    for program, *argv in calls[:-1]:
        script = next(a for a in argv if a.endswith(".py"))
        args = parsers[script]["parser"].parse_args(argv[argv.index(script) + 1:])
        for spec in [*(getattr(args, "prompts", None) or ()), *(getattr(args, "eval_prompts", None) or ()), *(getattr(args, "tasks", None) or ())]:
            assert os.path.exists(os.path.join(ROOT, spec.partition("=")[2].partition(",")[0])), spec
        for lora in [*(getattr(args, "teachers", None) or ()), *(m for m in getattr(args, "models", ()) if m != "base")]:  # somebody made it before
            run = lora.partition("=")[2].partition(",")[0].split("/lora")[0].split("/checkpoints")[0]
            assert run in outs[:outs.index(argv[argv.index("--out") + 1])], lora
    status, printed, calls = reproduce()
    assert status == 0 and all("evaluate.py" in c or "results/tables.py" in c for c in calls), calls  # which skip what they have themselves


def test_a_failure_ends_it_and_the_next_start_goes_on(reproduce):
    status, printed, calls = reproduce(fail="reproduce/sft-1")
    assert status == 1 and "sft-1 failed, see out/reproduce/sft-1.log" in printed
    before = sum("--out" in c for c in calls)
    status, printed, calls = reproduce()
    assert status == 0, printed
    trained = [c for c in calls if "--out" in c and "evaluate.py" not in c]
    assert any("out/reproduce/sft-1" in c for c in trained) and not any("out/reproduce/compose-0" in c for c in trained) and before > 10
