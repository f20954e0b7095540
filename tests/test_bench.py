"""bench.py counts what it says: forwards in samples, FLOPs against the floor, for every recipe and both scripts."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, refused

COMMON = [
    "--model",
    "tiny-random",
    "--resolution",
    "32",
    "--batch-size",
    "4",
    "--micro-batch-size",
    "2",
    "--num-steps",
    "4",
    "--updates",
    "1",
]


def bench(tmp_path, *argv):
    answer = subprocess.run(
        [sys.executable, "bench.py", *COMMON, *argv, "--out", str(tmp_path / "figures.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.load(open(tmp_path / "figures.json")), answer.stdout


def test_distill(tmp_path):
    """4 samples, 3 learnt steps, guidance 2, so two halves: student, teacher and anchor once each; with a stored trajectory the student twice."""
    (ours, released), said = bench(tmp_path, "--recipe", "ours", "released", "--guidance", "2")
    assert ours["samples"] == {"forwards": 4 * 3 * 3 * 2, "with a graph": 4 * 3 * 2} and released[
        "samples"
    ] == {"forwards": 4 * 3 * 4 * 2, "with a graph": 4 * 3 * 2}
    assert ours["floor"] < ours["flops"] < released["flops"] and ours["floor"] == released["floor"]
    assert released["memory_gb"] > 0 and "| ours |" in said and "released takes" in said
    assert sum(share for part, share in ours["parts"].items()) == pytest.approx(1) and {
        "student",
        "teachers",
        "anchor or base",
        "backward",
        "optimizer",
    } <= set(ours["parts"])


def test_train_teacher(tmp_path):
    """A group of 4, 4 steps sampled without a graph, 3 learnt with one beside the base."""
    [row], _ = bench(tmp_path, "--script", "train_teacher.py")
    assert (
        row["samples"] == {"forwards": 4 * (4 + 3 + 3), "with a graph": 4 * 3}
        and row["flops"] > row["floor"]
        and "reward, beside the sampling" in row["parts"]
    )


def test_a_recipe_that_fails_does_not_cost_the_others_their_rows(tmp_path, monkeypatch, capsys):
    start = subprocess.run

    def fail(command, **options):
        return start(["false"] if command[-5] == "two-pass" else command, **options)

    monkeypatch.setattr(subprocess, "run", fail)
    flags = [*COMMON, "--t5", "--dtype", "bfloat16", "--out", tmp_path / "figures.json"]
    flags += ["--recipe", "two-pass", "released"]
    assert "--recipe two-pass failed" in refused("bench.py", *flags)
    assert [row["recipe"] for row in json.load(open(tmp_path / "figures.json"))] == ["released"]
    assert "| released |" in capsys.readouterr().out


def test_gpu_report(tmp_path):
    """All rows, but those that are to be compiled where that is switched off; a step of 8 samples is twice
    one of 4, and nothing was left out."""
    [report], said = bench(tmp_path, "--gpu-report", "--guidance", "2")
    rows = {(r["what"], r["size"]): r for r in report["rows"]}
    failed = {key for key in rows if "failed" in rows[key]}
    assert len(rows) == 12 and failed == {("compiled", 8), ("compiled", 16)}
    assert rows["", 8]["flops"] == 2 * rows["", 4]["flops"] > rows["128 tokens fewer", 8]["flops"]
    for key in rows.keys() - failed:
        assert set(rows[key]["parts"]) == {"student", "backward", "teachers", "anchor or base"}
        assert rows[key]["mfu"] > 0
    assert len(report["kernels"]) == 15 and "| 8 five teachers | 337 |" in said


def test_refusals():
    assert "--compile: no flags of this" in refused("bench.py", "--recipe", "ours", "released", "--compile")
    assert "--recipe is for --script distill.py" in refused(
        "bench.py", "--script", "train_teacher.py", "--recipe", "released"
    )
    assert "no such folder" in refused("bench.py", "--model", "/nowhere/x")
    assert "must be at least 1" in refused(
        "bench.py", "--updates", 0
    ) and "there is no such folder" in refused("bench.py", "--out", "/nowhere/x.json")
