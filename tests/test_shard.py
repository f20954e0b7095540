"""--shard: two processes that hold a part of every network each make what they make with whole networks."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from conftest import BASE, checkpoint, distill, equal, few, read_json, refused, run, sft, teacher, together
from test_families import PROMPTS, guidance_of, load, noise, with_adapters

import flow_sde

FAMILIES = ("sd3", "klein", "zimage")


def answers(model, x, prompts, guidance, rank):
    """The student's velocity and the gradient of its distance to a teacher, as numbers."""
    rows = slice(rank, rank + 2)  # other rows in each process
    cond = model.encode(prompts[rows])
    v = model.velocity(x[rows], 0.6, cond, "student", guidance)
    with torch.no_grad():
        v_teacher = model.velocity(x[rows], 0.6, cond, "teacher", guidance)
        if rank == 0:  # one more teacher is asked by one process alone
            cond = model.encode([]) if rank else cond
        nobody = model.velocity(x[rows if rank else slice(0)], 0.5, cond, "teacher", guidance)
    (v - v_teacher).square().sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.adapters["student"]]
    return torch.cat([v.detach().flatten(), nobody.flatten(), *[g.flatten() for g in grads]])


def bytes_here(network):
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in network.parameters())
    return sum(part.nbytes for part in parts)


def compare(folders, out):
    """Every family's answers, sharded and whole, and the share of the network that a process holds."""
    flow_sde.LARGE_ENCODER = 30_000
    accelerator = flow_sde.start_processes()
    rank = accelerator.process_index
    for name, folder in folders.items():
        found = []
        for options in ({}, dict(shard=True), dict(shard=True, gradient_checkpointing=True)):
            model = load(folder, device=accelerator.device, **options)
            with_adapters(model)
            found.append(answers(model, noise(model, 32), PROMPTS, guidance_of(name, model), rank))
            size = (
                bytes_here(model.transformer),
                [bytes_here(e) for _, e, _ in flow_sde.text_parts(model.pipe)],
            )
            found.append(size)
        torch.save(found, Path(out, f"{name}.{rank}.pt"))
    flow_sde.end_processes(accelerator)


def test_families(tmp_path):
    """Three, for time; the others were tried once."""
    folders = {name: tiny.build(name, str(tmp_path)) for name in FAMILIES}
    together(partial(compare, folders, tmp_path))
    for name in FAMILIES:
        for rank in range(2):
            whole, size, sharded, its_size, checkpointed, _ = torch.load(tmp_path / f"{name}.{rank}.pt")
            assert torch.equal(sharded, whole) and torch.equal(checkpointed, whole), name
            assert its_size[0] < 0.6 * size[0]
            assert sum(its_size[1]) <= sum(size[1])
    assert its_size


@pytest.mark.parametrize("script", ["distill.py", "ppo", "train_teacher.py", "cold_start.py"])
def test_runs(script, loras, tmp_path):
    """Batches of three tasks in micro-batches of two. distill.py: in int8, its anchor a full fine-tune,
    checkpointed, a grid, a table of prompts that two cannot share alike, and a checkpoint to go back to."""
    table = dict(eval_prompts=few("test", 3, tmp_path), reward=["toy.ocr", "jpeg"], compare="sum")
    both = dict(batch_size=4, micro_batch_size=2, steps=2, save_every=1)
    less = dict(quantize="int8", gradient_checkpointing=True, anchor=BASE + ",guidance=2")
    teachers = [f"ocr={loras['ocr']}"]
    train = {
        "distill.py": partial(distill, loras, **both, **table, **less, eval_every=1),
        "ppo": partial(distill, loras, **both | dict(steps=1), objective="ppo"),
        "train_teacher.py": partial(
            teacher,
            prompts=few("train", 8, tmp_path),
            teachers=teachers,
            group_size=3,
            **both | dict(batch_size=2),
        ),
        "cold_start.py": partial(sft, loras, **both),
    }[script]
    for out, flags in (("whole", {}), ("sharded", {"shard": True})):
        together(partial(train, tmp_path / out, **flags))
    last = 1 if script == "ppo" else 2
    whole = checkpoint(tmp_path / "whole", last)
    assert equal(whole, checkpoint(tmp_path / "sharded", last))
    for file in ("results.json", "samples.png"):
        if (tmp_path / "whole" / file).exists():
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "sharded" / file).read_bytes()
    if script == "distill.py":
        shutil.rmtree(tmp_path / "sharded/checkpoints/000002")
        together(partial(train, tmp_path / "sharded", shard=True, resume="auto"))
        assert equal(whole, checkpoint(tmp_path / "sharded", 2))


def test_pictures_and_tables(loras, tmp_path):
    """Five prompts in batches of two: the last of two processes has one round less."""
    prompts = few("test", 5, tmp_path)[1]
    flags = dict(lora=loras["ocr"], prompts=prompts, num_images=1, num_steps=2, batch_size=2)
    table = dict(models=["base", f"ocr={loras['ocr']}"], tasks=prompts, reward=["toy.ocr", "jpeg"])
    table |= dict(eval_num_steps=2, eval_batch_size=2)
    for out, options in (("whole", {}), ("sharded", {"shard": True})):
        together(partial(run, "sample.py", **flags, **options, out=tmp_path / out))
        together(partial(run, "evaluate.py", **table, **options, out=tmp_path / out / "table"))
    pictures = [sorted((tmp_path / out).glob("**/*.png")) for out in ("whole", "sharded")]
    assert len(pictures[0]) == 5 + 1 + 10 + 1
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()
    one, other = (read_json(tmp_path, out, "table/results.json") for out in ("whole", "sharded"))
    assert one == other
    pictures[1][0].unlink()  # one process draws it again, and the other helps
    together(partial(run, "sample.py", **flags, shard=True, out=tmp_path / "sharded"))
    assert pictures[1][0].read_bytes() == pictures[0][0].read_bytes()


def test_what_cannot_be_sharded(tmp_path, monkeypatch):
    flags = dict(shard=True, out=tmp_path / "out")
    with monkeypatch.context() as as_if_installed:
        as_if_installed.setattr("importlib.util.find_spec", lambda name: True)
        assert "cannot shard nf4" in refused("distill.py", **flags, quantize="nf4")
    assert "--compile" in refused("evaluate.py", **flags, compile=True)
    assert "torchrun" in refused("sample.py", **flags)
