"""Two processes on the CPU make the update of one with twice the batch, judge every prompt once, and resume
from one checkpoint or not at all."""

import os
import shutil
from functools import partial

import pytest
import torch
from conftest import checkpoint, distill, few, read_json, read_log, run, sft, teacher, together, write_end

pytestmark = pytest.mark.usefixtures("numbers_only")


@pytest.mark.parametrize("script", ["distill.py", "train_teacher.py", "cold_start.py"])
def test_two_processes_make_the_update_of_one(script, loras, tmp_path):
    """In batches of three tasks, whose prompts are dealt in turn; train_teacher.py's two updates share groups
    of three."""
    train = {
        "distill.py": partial(distill, loras),
        "train_teacher.py": partial(teacher, prompts=few("train", 8, tmp_path), group_size=3, sde_window=2),
        "cold_start.py": partial(sft, loras, num_steps=4),
    }[script]
    outs = tmp_path / "one", tmp_path / "two"
    train(outs[0], batch_size=8, steps=2)
    together(partial(train, outs[1], batch_size=4, steps=2))
    one, two = (torch.cat([w.flatten() for w in checkpoint(out, 2).values()]) for out in outs)
    # Adam divides by the gradient's size, so where it is all but zero rounding can turn an update around: a
    # few weights of 190,000, here 6e-5 of the norm and elsewhere 1e-7. Other noise moves them by 0.08 of it.
    assert (one - two).norm() < 1e-3 * one.norm()
    norms = [[row["grad_norm"] for row in read_log(out) if "grad_norm" in row] for out in outs]
    assert len(norms[0]) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-3)  # which Adam does not see


def test_evaluation_counts_every_prompt_once(tmp_path):
    """Seven prompts, which two processes cannot share alike."""
    flags = dict(models="base", prompts=few("test", 7, tmp_path)[1], reward=["toy.ocr", "toy.quality"])
    judge = partial(run, "evaluate.py", **flags, eval_num_steps=4)
    judge(out=tmp_path / "one")
    together(partial(judge, out=tmp_path / "two"))
    ((one,), (two,)) = (read_json(tmp_path, name, "results.json") for name in ("one", "two"))
    assert one["n"] == two["n"] == 7 and one["scores"] == pytest.approx(two["scores"], abs=1e-4)


def resume_from_own_folder(loras, root):
    """As on machines without a common disk."""
    distill(loras, root / os.environ["RANK"], steps=3, resume="auto")


def test_processes_that_find_different_checkpoints_are_refused(loras, tmp_path):
    distill(loras, tmp_path / "0", batch_size=6, steps=2, save_every=1)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.rmtree(tmp_path / "1/checkpoints/000002")
    together(partial(write_end, partial(resume_from_own_folder, loras, tmp_path), tmp_path))
    for rank in range(2):
        assert "find different checkpoints" in (tmp_path / f"{rank}.txt").read_text()
