"""torchrun with two processes on the CPU equals one process with twice the batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, few

COMMANDS = {  # script and flags, without the batch size per process
    "distill.py": ["--steps", "2", "--num-steps", "4", "--eval-num-steps", "2"],
    "train_teacher.py": [
        "--steps",
        "2",
        "--num-steps",
        "4",
        "--eval-num-steps",
        "2",
        "--group-size",
        "4",
        "--sde-window",
        "2",
    ],
    "cold_start.py": ["sft", "--steps", "2", "--num-steps", "4"],
}


def launch(processes, script, *argv):
    run = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else [sys.executable]
    )
    answer = subprocess.run(
        [*run, script, *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]


@pytest.mark.parametrize("script", COMMANDS)
def test_two_processes_make_the_update_of_one(script, tmp_path):
    weights, norms, validation = [], [], few("test", 2, str(tmp_path))
    few_prompts = {"distill.py": validation, "train_teacher.py": validation[:1]}.get(script)
    for processes in (1, 2):
        launch(
            processes,
            script,
            *COMMANDS[script],
            "--batch-size",
            8 // processes,
            "--out",
            tmp_path / str(processes),
            *(["--eval-prompts", *few_prompts] if few_prompts else []),
        )
        state = torch.load(tmp_path / str(processes) / "checkpoints/000002/state.pt", weights_only=True)[
            "weights"
        ]
        weights.append(torch.cat([p.flatten() for name in sorted(state) for p in state[name].values()]))
        norms.append(
            [
                row["grad_norm"]
                for row in map(json.loads, open(tmp_path / str(processes) / "log.jsonl"))
                if "grad_norm" in row
            ]
        )
    # Adam divides by the gradient's size, so where it is all but zero rounding can turn an update around: a few weights of 190,000, here
    # 6e-5 of the norm and elsewhere 1e-7. Other noise moves the weights by 0.08 of it.
    assert (weights[0] - weights[1]).norm() < 1e-3 * weights[0].norm()
    assert len(norms[0]) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-3)  # which Adam does not see


def test_evaluation_counts_every_prompt_once(tmp_path):
    with open(tmp_path / "prompts.txt", "w") as f:
        f.writelines(open(os.path.join(ROOT, "toy/prompts/ocr_test.txt")).readlines()[:7])
    rows = []
    for processes in (1, 2):
        launch(
            processes,
            "evaluate.py",
            "--models",
            "base",
            "--prompts",
            f"ocr={tmp_path}/prompts.txt",
            "--reward",
            "toy.ocr",
            "toy.quality",
            "--eval-num-steps",
            4,
            "--out",
            tmp_path / str(processes),
        )
        rows.append(json.load(open(tmp_path / str(processes) / "results.json"))[0])
    assert rows[0]["n"] == rows[1]["n"] == 7 and rows[0]["scores"] == pytest.approx(
        rows[1]["scores"], abs=1e-4
    )
