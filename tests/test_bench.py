"""bench.py counts what it says: forwards in samples, FLOPs against the floor, for recipes and scripts."""

import json
import multiprocessing
import os
import subprocess

import pytest
from conftest import ROOT, run
from test_recipes import parser_of

SMALL = "--model tiny-random --resolution 32 --batch-size 4 --micro-batch-size 2 --num-steps 4 --updates 1"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(flags) -> the figures; compiling is switched off, for it takes minutes."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")

    def start(flags, message=None):
        argv = [*SMALL.split(), *flags.split(), "--out", tmp_path / "figures.json"]
        if message is None:
            run("experiments/bench.py", *argv)
        else:
            with pytest.raises(SystemExit, match=message):
                run("experiments/bench.py", *argv)
        return json.loads((tmp_path / "figures.json").read_text())

    return start


@pytest.fixture
def spared(monkeypatch):
    """A recipe's process is a fork of this one, and so spared the slow imports; that of `two-pass` fails."""

    def start(command, **options):
        process = multiprocessing.get_context("fork").Process(target=run, args=command[1:])
        process.start()
        if "two-pass" in command[-5:]:
            process.kill()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode)

    monkeypatch.setattr(subprocess, "run", start)


def test_distill(bench, spared, capsys):
    """4 samples, 3 learnt steps, guidance 2, so two halves: student, teacher and anchor once each; with a
    stored trajectory the student twice. A recipe that fails does not cost the others their rows."""
    flags = "--recipe ours two-pass released --guidance 2 --t5 --dtype bfloat16"
    ours, released = bench(flags, "--recipe two-pass failed")
    assert ours["samples"] == {"forwards": 4 * 3 * 3 * 2, "with a graph": 4 * 3 * 2}
    assert released["samples"] == {"forwards": 4 * 3 * 4 * 2, "with a graph": 4 * 3 * 2}
    assert ours["floor"] == released["floor"] < ours["flops"] < released["flops"]
    assert released["memory_gb"] > 0
    parts = {"student", "teachers", "anchor or base", "backward", "optimizer"}
    assert parts <= set(ours["parts"]) and sum(ours["parts"].values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "| ours |" in printed and "| released |" in printed and "released takes" in printed


def test_train_teacher(bench, spared):
    """A group of 4, 4 steps sampled without a graph, 3 learnt with one beside the base."""
    [row] = bench("--script train_teacher.py")
    assert row["samples"] == {"forwards": 4 * (4 + 3 + 3), "with a graph": 4 * 3}
    assert row["flops"] > row["floor"] and "reward, beside the sampling" in row["parts"]


def test_gpu_report(bench, capfd):
    """All rows, but those that are to be compiled where that is switched off; a step of 8 samples is twice
    one of 4, and nothing was left out."""
    report = bench("--gpu-report")
    rows = {(row["what"], row["size"]): row for row in report["rows"]}
    failed = {key for key in rows if "failed" in rows[key]}
    assert len(rows) == 12 and failed == {("compiled", 8), ("compiled", 16)}
    assert rows["", 8]["flops"] == 2 * rows["", 4]["flops"] > rows["128 tokens fewer", 8]["flops"]
    for key in rows.keys() - failed:
        assert set(rows[key]["parts"]) == {"student", "backward", "teachers", "anchor or base"}
        assert rows[key]["mfu"] > 0
    assert len(report["kernels"]) == 15 and "| 8 five teachers | 337 |" in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    {
        "--recipe ours released --compile": "--compile: no flags of this",
        "--script train_teacher.py --recipe released": "--recipe is for --script distill.py",
        "--model /nowhere/x": "no such folder",
        "--updates 0": "--updates 0: must be at least 1",
        "--num-steps 1": "--num-steps 1: must be at least 2",
        "--out /nowhere/x.json": "there is no such folder",
    }.items(),
)
def test_refusals(flags, message):
    with pytest.raises(SystemExit, match=message):
        run("experiments/bench.py", *flags.split())


def test_gpu_script(tmp_path):
    """Its commands, with a python that only writes down how it was called, have flags that exist."""
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$(echo "$@" | tr "\\n" " ")" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", "experiments/gpu.sh"], cwd=ROOT, env=env, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    parts = ("-m pytest", "distill.py", "bench.py")
    [checks], [toy], benches = ([call for call in calls if part in call] for part in parts)
    assert len(calls) == 7 and os.path.exists(os.path.join(ROOT, checks.split()[-1]))
    parser_of("distill.py").parse_args(toy.split()[1:])
    assert len(benches) == 3
    for call in benches:
        with pytest.raises(SystemExit, match="no such folder"):
            run(*call.split(), "--model", "/nowhere/x")
