"""The scripts by command line: what runs leave behind, the choices of their flags, the prompts they read, and
one clear line for a user's mistake."""

import collections
import errno
import io
import json
import math
import os
import re
import runpy
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import (
    BASE,
    ROOT,
    TASKS,
    begin,
    command,
    distill,
    few,
    finish,
    huge_lora,
    read_json,
    read_log,
    refused,
    run,
    sft,
    teacher,
    write_end,
)
from PIL import Image

import flow_sde
import rewards
from flow_sde import SD3, kl, load_prompts, log_prob, save_lora, transition

SCRIPTS = ["train_teacher.py", "cold_start.py", "distill.py", "sample.py", "evaluate.py", "toy"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(script.removesuffix(".py"), run_name="__main__", alter_sys=False)
    text = capsys.readouterr().out
    assert "--out" in text and max(map(len, text.splitlines())) <= 128


# -- what runs leave behind --------------------------------------------------------------------------------


SCORED = dict(reward=[f"toy.{task}" for task in TASKS], eval_num_steps=1, eval_every=1)
DRY = {  # {script: (its flags, pictures that it would draw: 12 prompts times models or validations)}
    "distill.py": (SCORED | dict(compare="sum", eval_batch_size=2), 5 * 12),
    "train_teacher.py": (SCORED | dict(group_size=2, sde_window=1), 121 * 12),
    "cold_start.py": ({}, 0),
}


@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_tells_and_leaves_nothing(script, loras, tmp_path, capsys):
    """Also which teacher changes nothing."""
    model = SD3(BASE)
    model.new_adapter("asleep", 4, 8)
    save_lora(model.lora("asleep"), tmp_path / "asleep")
    prompts, (flags, pictures) = few("train", 4, tmp_path), DRY[script]
    teachers = [f"compose={tmp_path}/asleep", f"ocr={loras['ocr']}", f"scene={loras['scene']}"]
    flags = flags | dict(teachers=teachers, prompts=prompts, resolution=32, num_steps=2)
    flags |= dict(batch_size=3, steps=120)
    if pictures:
        flags |= dict(eval_prompts=prompts)
    before, began = set(tmp_path.rglob("*")), time.time()
    run(script, *["sft"] * (script == "cold_start.py"), **flags, dry_run=True, out=tmp_path / "out")
    assert set(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    times = re.search(r"time: ([\d.]+) s for each of --steps 120: ([\d.]+) minutes\n", said).groups()
    seconds, minutes = map(float, times)
    assert 0 < seconds < time.time() - began and minutes == pytest.approx(2 * seconds, abs=0.07)
    assert re.search(r"memory of the process: \d\.\d+ GB at its peak; throughout: transformer ", said)
    assert re.findall(r"note: (\w+) \((.*)\) draws as the base does", said) == [
        ("teacher_of_compose" if script == "train_teacher.py" else "compose", f"{tmp_path}/asleep")
    ]
    assert re.findall(r"steps, (\d+) for validations", said) == [str(pictures)] * (pictures > 0)
    assert ("waiting for their scores" in said) == (script == "train_teacher.py")
    assert ("KL to each teacher at the start: compose " in said) == (script == "distill.py")


def test_distill_leaves_a_student_and_a_table(loras, tmp_path, monkeypatch):
    names = [f"toy.{name}" for name in (*TASKS, "quality")]
    table = dict(eval_prompts=few("test", 2, tmp_path), reward=names, eval_num_steps=2, resolution=32)
    ns = distill(loras, tmp_path / "run", steps=2, save_every=1, compare=["sum", "ties"], **table)
    files = {"lora", "checkpoints", "log.jsonl", "curves.png", "samples.png", "results.json", "args.json"}
    assert files <= set(os.listdir(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["000001", "000002"]
    rows = ["base", "sum", "ties", "start", "student", "teachers, each on its own task"]
    assert [row["model"] for row in ns["results"]] == rows
    ocr = {"ocr": ns["eval_prompts"]["ocr"]}  # scores of a task do not depend on the tasks beside it
    ocr_alone = rewards.evaluate(ns["model"], "base", ocr, ns["rewards"], ns["args"], tasks=TASKS)
    assert ocr_alone["scores"]["ocr"] == ns["results"][0]["scores"]["ocr"]
    for row in ns["results"]:
        own = row["model"].startswith("teachers")
        assert set(row["scores"]) - {"gap closed"} == ({*TASKS} if own else {*TASKS, "quality"})
    assert Image.open(tmp_path / "run/samples.png").width > 300
    card = (tmp_path / "run/lora/README.md").read_text()
    assert "base_model: base\n" in card and "| ocr | ocr | 1 | 33% | " in card and "$" not in card
    assert str(tmp_path) not in card and (tmp_path / "run/lora/samples.png").exists()
    monkeypatch.setattr(flow_sde, "plot_curves", lambda path: None)
    monkeypatch.setattr(flow_sde, "draw_rows", lambda *args: None)
    table["eval_prompts"] = table["eval_prompts"][:1]
    untrained = distill(loras, tmp_path / "none", init="none", anchor="none", lr=0, **table)
    base, _, student, _ = untrained["results"]
    assert student["scores"] == pytest.approx(base["scores"])


def test_train_teacher_leaves_a_usable_teacher(tmp_path):
    teacher(tmp_path / "run", eval_every=1)
    assert [row["model"] for row in read_json(tmp_path, "run/results.json")] == ["base", "teacher"]
    files = {"lora", "checkpoints", "log.jsonl", "curves.png", "samples.png", "results.json"}
    assert files <= set(os.listdir(tmp_path / "run"))
    keys = {"reward/jpeg", "kl_to_base", "clip_fraction", "tied_groups", "validation/jpeg"}
    assert keys <= set().union(*read_log(tmp_path / "run"))
    run("sample.py", lora=tmp_path / "run/lora", num_images=1, num_steps=2, out=tmp_path / "pictures")
    assert len(read_json(tmp_path / "pictures/samples.json")["pictures"]) == 3


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "wandb", False, None

    def __init__(self):
        super().__init__()
        self.numbers, self.pictures = [], []

    def store_init_configuration(self, values):
        self.flags = values

    def log(self, values, step):
        self.numbers.append(step)

    def log_images(self, values, step):
        self.pictures += [(name, step, pixels) for name, [pixels] in values.items()]


def test_a_tracker_gets_curves_and_samples(loras, tmp_path, monkeypatch):
    """Whenever they are drawn, as they are in the run's folder, at the step of the numbers before them."""
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    start, trackers = flow_sde.start_processes, []

    def start_processes(track, out):
        trackers.append(Recorder())
        return start(trackers[-1], out)

    monkeypatch.setattr(flow_sde, "start_processes", start_processes)
    distill(loras, tmp_path / "student", track="wandb", steps=2, eval_every=1)
    teacher(tmp_path / "teacher", track="wandb", eval_every=1)
    sft(loras, tmp_path / "sft", track="wandb", steps=2, save_every=1)
    monkeypatch.setattr(flow_sde, "plot_curves", lambda path: None)  # as before the first update
    sft(loras, tmp_path / "empty", track="wandb")
    both, curves = [("curves", 1), ("samples", 1)], [("curves", 1), ("curves", 2)]
    drawn = {"student": [*both, ("samples", 2), ("curves", 2)]}
    drawn |= {"teacher": [*both, ("curves", 2), ("samples", 2)], "sft": curves}
    assert trackers.pop().pictures == []
    for (out, expected), tracker in zip(drawn.items(), trackers, strict=True):
        assert [(name, step) for name, step, _ in tracker.pictures] == expected
        assert {*tracker.numbers} == {1, 2} and tracker.flags["track"] == "wandb"
        for name, pixels in {name: pixels for name, _, pixels in tracker.pictures}.items():  # the last ones
            file = Image.open(tmp_path / out / f"{name}.png").convert("RGB")
            assert np.array_equal(pixels, np.array(file))


def test_tensorboard_gets_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher(tmp_path, track="tensorboard", eval_every=1)
    events = EventAccumulator(str(tmp_path / "flow-opd")).Reload()
    assert events.Tags()["images"] == ["curves", "samples"] and "reward/jpeg" in events.Tags()["scalars"]
    for name in ("curves", "samples"):
        shown = events.Images(name)
        assert [image.step for image in shown] == [1, 2]
        picture = Image.open(io.BytesIO(shown[-1].encoded_image_string))
        assert picture.tobytes() == Image.open(tmp_path / f"{name}.png").convert("RGB").tobytes()


def test_wandb_gets_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    teacher(tmp_path, track="wandb", eval_every=1)
    for name in ("curves", "samples"):
        kept = sorted(tmp_path.glob(f"wandb/offline-run-*/files/media/images/{name}_*.png"))
        assert len(kept) == 2
        last = max(kept, key=lambda file: int(file.name.split("_")[1]))
        expected = Image.open(tmp_path / f"{name}.png").convert("RGB").tobytes()
        assert Image.open(last).convert("RGB").tobytes() == expected


def test_evaluate_does_not_depend_on_the_batch(loras, tmp_path):
    models = dict(models=["base", f"ocr={loras['ocr']},guidance=2"], prompts=few("test", 3, tmp_path))
    for size in (None, 5):
        run("evaluate.py", **models, eval_num_steps=3, eval_batch_size=size, out=tmp_path / str(size))
    whole, parts = (read_json(tmp_path, str(size), "results.json") for size in (None, 5))
    assert [row["model"] for row in whole] == ["base", "ocr"] and whole[0]["n"] == 9
    for a, b in zip(whole, parts, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-3)
    assert (tmp_path / "5/results.md").read_text().startswith("| model |")
    assert os.path.exists(tmp_path / "5/samples.png")


# -- training a teacher, and starting a student ------------------------------------------------------------


@pytest.fixture
def bright(monkeypatch):
    """The reward "jpeg" is how bright a picture is, times a factor of its prompt."""
    factors = collections.defaultdict(lambda: 1.0)

    def reward(images, prompts, metadata):
        return torch.tensor([factors[prompt] for prompt in prompts]) * images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "jpeg", reward)
    return factors


def test_grpo_raises_the_reward_of_what_it_can_reach(bright, tmp_path, numbers_only):
    """Brightness must rise on other prompts, and clip and KL must be at work."""
    size = dict(batch_size=3, group_size=8, num_steps=4, sde_window=2, steps=6, eval_every=6)
    teacher(tmp_path / "run", **size, eval_num_steps=4, eval_prompts=few("val", 16, tmp_path)[:1])
    base, trained = read_json(tmp_path, "run/results.json")
    assert trained["scores"]["jpeg"] > base["scores"]["jpeg"] + 2 * base["stderr"]["jpeg"]
    log = [row for row in read_log(tmp_path / "run") if "seconds" in row]
    assert log[0]["kl_to_base"] < log[-1]["kl_to_base"] and any(row["clip_fraction"] > 0 for row in log)


@pytest.mark.parametrize(
    "choices",
    [
        dict(sde="cps", updates_per_rollout=1),
        dict(sde_window=2, guidance=2.0),
        dict(beta=0, rank=4, no_ratio_norm=True, no_same_noise=True),
    ],
    ids=" ".join,
)
def test_train_teacher_choices(choices, tmp_path, monkeypatch, numbers_only):
    """With --beta 0 the base is asked for its one validation picture, and never for a KL."""
    velocity, asked = SD3.velocity, collections.Counter()

    def spy(model, x, t, cond, adapter="base", guidance=1.0):
        asked[adapter] += 1
        return velocity(model, x, t, cond, adapter, guidance)

    monkeypatch.setattr(SD3, "velocity", spy)
    teacher(tmp_path / "run", **choices, steps=1)
    assert read_log(tmp_path / "run")[0]["grad_norm"] > 0
    assert (asked["base"] == 1) == (choices.get("beta") == 0)


def test_grpo_mix(tmp_path, numbers_only):
    """Three tasks, each with its own reward, and another on all; mixed, or whole rollouts in turn."""
    paths = few("train", 8, tmp_path)
    weighted = [f"{path},weight={weight}" for path, weight in zip(paths, (2, 1, 1))]
    names = [*(f"toy.{task}=0.8" for task in TASKS), "toy.quality=0.2"]
    flags = dict(reward=names, prompts=weighted, resolution=32, group_size=2, num_steps=2)
    seen = {}
    sizes = {"mixed": dict(steps=1, batch_size=4), "alternate": dict(steps=5, batch_size=1)}
    for schedule, size in sizes.items():
        teacher(tmp_path / schedule, **flags, **size, schedule=schedule)
        rows = [row for row in read_log(tmp_path / schedule) if "seconds" in row]
        seen[schedule] = [sorted(key[7:] for key in row if key.startswith("reward/")) for row in rows]
    compose, ocr, scene = ["compose", "quality"], ["ocr", "quality"], ["quality", "scene"]
    assert seen == {
        "mixed": [sorted([*TASKS, "quality"])],
        "alternate": [compose, compose, ocr, scene, compose],
    }


@pytest.mark.parametrize("kl_to", ["base", "teacher_of_large"])
def test_grpo_gradient(kl_to, loras, bright, tmp_path, gradients, numbers_only):
    """-E[A log pi(a|s)] + beta KL(pi || base or teacher), advantages in units of their task's spread. Of
    three tasks with a prompt each, one ties and is left out, one is scored on a scale of a hundredth."""
    bright |= {"ties": 0.0, "small": 1.0, "large": 100.0}
    for name in bright:
        (tmp_path / f"{name}.txt").write_text(name + "\n")
    paths = [f"{name}={tmp_path}/{name}.txt" for name in bright]
    flags = dict(prompts=paths, eval_prompts=paths[2:], init=loras["student"], no_ratio_norm=True, beta=0.5)
    flags |= dict(
        batch_size=3, group_size=6, micro_batch_size=4, sde_window=2, steps=1, updates_per_rollout=1
    )
    if kl_to != "base":
        flags["teachers"] = f"large={loras['ocr']}"
    ns = teacher(tmp_path / "run", **flags, lr=0)
    model, advantage, tasks = ns["model"], ns["advantage"], [task for task, _ in ns["batch"]]
    rms = {}
    for task in bright:
        rms[task] = advantage[[t == task for t in tasks]].square().mean().sqrt().item()
    assert rms["ties"] == 0 and rms["small"] == pytest.approx(rms["large"], rel=0.05)
    assert rms["large"] == pytest.approx((5 / 6) ** 0.5, rel=0.05)
    assert read_log(tmp_path / "run")[0]["tied_groups"] == pytest.approx(1 / 3)
    rows, total = [i for i, task in enumerate(tasks) if task != "ties"], 0.0
    cond = [c[torch.tensor(rows) // 6] for c in ns["conds"]]
    large = torch.tensor([tasks[i] == "large" for i in rows]).view(-1, 1, 1, 1)
    for s in ns["trajectory"]:
        x, x_next = s.x[rows], s.x_next[rows]
        with torch.no_grad():
            v_base, v_large = (model.velocity(x, s.t, cond, name) for name in ("base", kl_to))
        other, _ = transition(x, torch.where(large, v_large, v_base), s.t, s.t_next, 0.7)
        mean, std = transition(x, model.velocity(x, s.t, cond, "teacher"), s.t, s.t_next, 0.7)
        total += 0.5 * kl(mean, other, std).mean() - (advantage[rows] * log_prob(x_next, mean, std)).mean()
    grads = torch.autograd.grad(total / len(ns["trajectory"]), ns["params"])
    expected = torch.cat([g.flatten() for g in grads])
    assert (gradients[0] - expected).norm() < 1e-3 * expected.norm()
    # nothing at all to learn from: no update, and no end
    bright.update(dict.fromkeys(bright, 0.0))
    teacher(tmp_path / "flat", **flags, lr=1)
    assert len(gradients) == 1 and read_log(tmp_path / "flat")[0]["tied_groups"] == 1


@pytest.mark.parametrize("sde", ["cps", "ode"])
def test_sft_choices(sde, loras, tmp_path, numbers_only):
    sft(loras, tmp_path / "run", sde=sde)
    assert read_log(tmp_path / "run")[0]["kl"] > 0


def test_ctrl_c_saves(loras, tmp_path, monkeypatch, capsys, gradients, numbers_only):
    """The update in hand is given up, the ones before it are saved."""
    clip = torch.nn.utils.clip_grad_norm_

    def interrupted(*args):
        if len(gradients) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    sft(loras, tmp_path / "run", steps=5000)
    assert "stopped" in capsys.readouterr().out
    assert len(read_log(tmp_path / "run")) == 3 and flow_sde.saved_steps(tmp_path / "run")[-1] == "000003"


# -- mistakes ----------------------------------------------------------------------------------------------

VAL = "ocr=toy/prompts/ocr_val.txt"
BARE = "distill.py --eval-prompts --reward"
OCR = f"{BARE} --teachers ocr={{ocr}}"
MISTAKES = [  # {ocr}: a LoRA; {tmp}: a folder with the files below
    (f"{OCR} --prompts ocr={{tmp}}/none.txt", "none.txt: no such file"),
    (f"{OCR} --prompts ocr={{tmp}}/empty.txt", "no prompts in it"),
    (f"{OCR} --prompts ocr={{tmp}}/broken.jsonl", "line 2: not JSON"),
    (f"{OCR} --prompts ocr={{tmp}}/untitled.jsonl", 'line 1 has no "prompt"'),
    (f"{OCR} --prompts {VAL} x=y.txt", "needs both; only one names x"),
    (f"{OCR} x=y --prompts {VAL}", "needs both; only one names x"),
    (f"{OCR} ocr={{ocr}} --prompts {VAL}", "ocr is given twice"),
    (f"{OCR} --prompts {VAL} --model {{tmp}}", "not a diffusers pipeline folder"),
    (f"{OCR} --prompts {VAL} --model {{tmp}}/no", "no such folder"),
    (f"{OCR} --prompts {VAL} --eval-prompts x={{tmp}}/few.txt", "--eval-prompts x: no teacher of that task"),
    (f"{BARE} --teachers ocr={{ocr}},weight=0 --prompts {VAL}", "weight 0"),
    (f"{OCR} --prompts ocr={{tmp}}/few.csv", "few.csv: a .csv file; prompts are .txt or .jsonl"),
    (f"{BARE} --teachers ocr --prompts {VAL}", "--teachers ocr: expected NAME=VALUE"),
    (f"{BARE} --teachers student=x --prompts student=x.txt", "that name is taken"),
    ("distill.py --resolution 30", "--resolution 30: this model draws multiples of 4 up to 32"),
    ("distill.py --resolution 64", "--resolution 64"),
    ("distill.py --objective ppo --sde ode", "--objective ppo"),
    ("distill.py --noise-level 0", "must be positive"),
    ("distill.py --label-density 5 0", "--label-density: both must be positive"),
    ("distill.py --ema 1", "--ema 1.0: must be below 1"),
    ("distill.py --resume {tmp}", "no checkpoint there"),
    (f"evaluate.py --reward toy.ocr --prompts {VAL} compose={{tmp}}/few.txt", "compose: no reward scores"),
    ("sample.py --max-sequence-length 600", "at most 512"),
    ("sample.py --lora toy/teachers/orc", "toy/teachers/orc: no such LoRA"),
    ("sample.py --lora {tmp}/run", "did you mean"),
    ("train_teacher.py --reward toy.parse", "parse must take (images, prompts, metadata)"),
    ("sample.py --num-images 0", "--num-images 0: must be a number of at least 1"),
    ("sample.py --seed 12345678901234567890123", "--seed 12345678901234567890123: must be a number"),
    ("sample.py --model toy/base", "nothing to draw"),
    ("sample.py --prompt \udcff", "'\\udcff': not UTF-8"),
    (f"{OCR},weight=1.5 --prompts {VAL} --schedule alternate", "they must be whole"),
    ("train_teacher.py --reward toy.smile", "no such reward"),
    ("train_teacher.py --reward toy.ocr=much", "NAME=WEIGHT (a positive number)"),
    ("train_teacher.py --group-size 1", "--group-size 1"),
    ("train_teacher.py --sde-window 9", "--sde-window 9"),
    ("cold_start.py sft --teachers ocr={ocr}", "every task needs both"),
    (
        "cold_start.py merge --method factors --teachers ocr={ocr} x=toy/teachers/compose",
        "--method factors: these LoRAs differ",
    ),
    # flags that would do nothing
    ("distill.py --init merge --rank 8", "--rank: --init merge has"),
    ("distill.py --init {ocr} --alpha 8", "--alpha: --init"),
    ("train_teacher.py --init {ocr} --rank 32", "--rank: --init"),
    (f"cold_start.py sft --teachers ocr={{ocr}} --prompts {VAL} --init {{ocr}} --rank 4", "--rank: "),
    ("cold_start.py merge --rank 4", "--rank: --method cat has its own"),
    ("cold_start.py merge --steps 5", "--steps: only for sft"),
    ("cold_start.py merge --resume auto", "--resume: only for sft"),
    ("cold_start.py merge --init {ocr}", "--init: only for sft"),
    ("cold_start.py sft --method svd", "--method: only for merge"),
    ("distill.py --sde cps --noise-level 1.2", "--noise-level 1.2: with"),
    ("train_teacher.py --sde cps --noise-level 3", "at most 1"),
    ("sample.py --sde cps --noise-level 2", "at most 1"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_mistakes_get_one_clear_line(line, message, loras, tmp_path):
    for name in ("few.txt", "few.csv"):
        (tmp_path / name).write_text("a prompt\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "run/lora").mkdir(parents=True)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fine"}\n{"prompt": oops}\n')
    (tmp_path / "untitled.jsonl").write_text('{"text": "fine"}\n')
    script, *argv = line.format(ocr=loras["ocr"], tmp=tmp_path).split()
    assert message in refused(script, *argv, out=tmp_path / "out")


def test_specs_may_have_commas_and_equals_signs():
    odd = ["a=x,y=2,guidance=1.5,weight=3", "b=/p,q/weight=1/z"]
    a = {"value": "x,y=2", "guidance": 1.5, "weight": 3.0}
    b = {"value": "/p,q/weight=1/z", "guidance": 4.0, "weight": 1.0}
    assert flow_sde.parse_specs("--teachers", odd, guidance=4.0, weight=1.0) == {"a": a, "b": b}
    either = [f"a=x{order}" for order in (",scale=2,text=0,guidance=3", ",guidance=3,scale=2,text=0")]
    first, second = (flow_sde.parse_specs("--teachers", [spec], guidance=1.0) for spec in either)
    assert first == second == {"a": {"value": "x,scale=2,text=0", "guidance": 3.0}}
    with pytest.raises(SystemExit, match="--teachers a=x,guidance=high: guidance must be a number"):
        flow_sde.parse_specs("--teachers", ["a=x,guidance=high"], guidance=1.0)


def test_the_toy_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = runpy.run_path(os.path.join(ROOT, "flow_sde.py"))["TOY_DIR"]
    assert os.path.samefile(toy, os.path.join(ROOT, "toy"))


def test_a_terminal_without_utf8(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    what = dict(models="base", prompts=few("test", 1, tmp_path)[1:2], reward="toy.ocr")
    run("evaluate.py", **what, eval_num_steps=1, samples_per_prompt=2, out=tmp_path / "table")
    terminal.flush()
    assert b" ? " in terminal.buffer.getvalue()  # the plus-minus sign of the table


@pytest.mark.parametrize(
    "error, advice",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--micro-batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"), "--gradient-checkpointing"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), "x.pt could not be written; .* Make room"),
        (RuntimeError("a bug"), "Traceback|RuntimeError: a bug"),
    ],
)
def test_what_is_full_is_no_bug(error, advice, capsys):
    flow_sde.explain_full(type(error), error, None)
    said = capsys.readouterr().err
    assert re.search(advice, said) and (said.count("\n") == 1)


def test_what_is_left_in_the_environment(tmp_path):
    """ACCELERATE_MIXED_PRECISION of another program counts for nothing; a world without a rank is refused."""
    draw = partial(run, "sample.py", prompt="x", num_steps=1, num_images=1)
    fp8 = begin(partial(draw, out=tmp_path / "drawn"), ACCELERATE_MIXED_PRECISION="fp8")
    alone = begin(partial(write_end, partial(draw, out=tmp_path / "none"), tmp_path), WORLD_SIZE="2")
    for process in (fp8, alone):
        process.join()
    assert fp8.exitcode == 0 and (tmp_path / "drawn/00000.png").exists()
    assert "WORLD_SIZE is set and RANK is not" in (tmp_path / "0.txt").read_text()


def test_torchrun(tmp_path):
    """Two processes draw what one draws."""
    answer = finish(command("sample.py", processes=2, num_steps=1, num_images=2, batch_size=2, out=tmp_path))
    assert answer.returncode == 0 and answer.stdout.count("6 pictures") == 1, answer.stderr[-3000:]
    assert len([file for file in os.listdir(tmp_path) if file[0] == "0"]) == 6


def test_a_custom_reward_may_return_what_it_likes():
    batch, pictures = [("x", {"prompt": "a fox"})] * 3, torch.zeros(3, 3, 4, 4)

    def score(values):
        reward = rewards.Reward(lambda *_: values, 1.0)
        return rewards.score_batch(pictures, batch, {"r": reward}, ["x"])["r"]

    for values in ([1, 2.0, 3], np.array([1, 2, 3]), torch.tensor([[1], [2], [3]]), [torch.tensor(1), 2, 3]):
        assert score(values).tolist() == [1, 2, 3] and score(values).dtype == torch.float32
    for values in (None, 1.0, [1, 2], torch.ones(3, 3), "abc", [None] * 3):
        with pytest.raises(rewards.RewardError, match="r: .*3 pictures, not a number each"):
            score(values)
    pictures[1] = math.nan
    with pytest.raises(rewards.RewardError, match="r: a picture is not finite"):
        score([1, 2, 3])


def test_reward_models_are_loaded_only_while_they_score(loras, tmp_path, monkeypatch, numbers_only):
    """They are tried before training and released, and loaded again by the main thread, since transformers
    changes global state while it loads one, before threads score."""
    events, descend = [], flow_sde.descend
    load = rewards.remembered(lambda: events.append("loaded"))

    def reward(images, prompts, metadata):
        load()
        in_main = threading.current_thread() is threading.main_thread()
        events.append("tried" if in_main else "scored")
        return images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "jpeg", reward)
    monkeypatch.setattr(flow_sde, "descend", lambda *args: events.append("update") or descend(*args))
    distill(loras, tmp_path, eval_prompts=few("test", 2, tmp_path)[:1], reward="jpeg")
    assert events[:5] == ["loaded", "tried", "update", "loaded", "tried"] and set(events[5:]) == {"scored"}


# -- prompts -----------------------------------------------------------------------------------------------

PROMPTS = ["a red fox, in snow", 'a sign saying "ÄÖ"', "the third"]
ROWS = [{"prompt": prompt, "tag": "x"} for prompt in PROMPTS]
FILES = {
    "lines.txt": "\ufeff" + "\r\n".join(PROMPTS) + "\r\n",
    "rows.JSONL": "\n".join(map(json.dumps, ROWS)),
    "rows.jsonl": "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "tasks.jsonl": "\n".join(json.dumps(row) for row in [ROWS[0] | {"task": "x"}, *ROWS]),
}


@pytest.mark.parametrize("name", FILES)
def test_one_reader_of_prompts(name, tmp_path):
    file = tmp_path / name
    file.write_text(FILES[name], encoding="utf-8", newline="")
    rows = load_prompts("ocr", str(file))
    assert rows == (ROWS if "lines" not in name else [{"prompt": prompt} for prompt in PROMPTS])
    assert len(load_prompts(None, str(file))) == len(PROMPTS) + ("tasks" in name)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.txt", "a fox\n".encode("utf-16"), "not UTF-8"),
        ("x.txt", "a fox\n".encode("utf-16-le"), "NUL bytes"),
        ("x.txt", "a fox\na caf\u00e9\n".encode("cp1252"), "line 2 is not UTF-8"),
        ("x.txt.gz", b"\x1f\x8b", "a .gz file; prompts are .txt or .jsonl"),
        ("x.json", b'["a fox"]', "a .json file"),
        ("x.tsv", b"prompt\ta fox\n", "a .tsv file"),
        ("x.jsonl", b'{"prompt": "x"}\n{"prompt": "a \\ud83d face"}\n', "line 2 holds half a character"),
        ("x.jsonl", b'{"prompt": "  "}\n', 'line 1 has no "prompt"'),
        ("x.jsonl", b'{"prompt": "a fox", "task": "other"}\n', 'no prompts in it for the task "ocr"'),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_prompt_files_that_are_not_what_they_seem(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        load_prompts("ocr", str(tmp_path / name))
    said = str(caught.value)
    assert message in said and name in said and "\n" not in said


def test_prompts_from_a_pipe(loras, tmp_path, numbers_only):
    """`<(head -8 FILE)` can be read only once; a resumed run knows others."""

    def piped(split):
        found = []
        for spec in few(split, 8, tmp_path):
            task, _, file = spec.partition("=")
            reader, writer = os.pipe()
            os.write(writer, Path(file).read_bytes())
            os.close(writer)
            found.append(f"{task}=/dev/fd/{reader}")
        return found

    train = partial(distill, loras, tmp_path / "run", num_steps=2)
    assert len(train(prompts=piped("train"))["prompts"]["ocr"]) == 8
    train(prompts=piped("train"), resume="auto", steps=2)
    with pytest.raises(SystemExit, match="another run: prompts compose was"):
        train(prompts=piped("val"), resume="auto", steps=3)


# -- sample.py ---------------------------------------------------------------------------------------------


def test_sample_takes_the_prompts_that_distill_takes(tmp_path):
    rows = [json.dumps({"task": task, "prompt": f"{task} sign"}) for task in ("ocr", "scene")]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    (tmp_path / "o=dd.txt").write_text("odd\n")

    def sampled(name, *files, **flags):
        run("sample.py", prompts=files, **flags, num_images=1, num_steps=1, out=tmp_path / name)
        return [row["prompt"] for row in read_json(tmp_path, name, "samples.json")["pictures"]]

    every = tmp_path / "all.jsonl"
    assert sampled("a", every) == ["ocr sign", "scene sign"]
    files = f"scene={every}", tmp_path / "o=dd.txt"
    assert sampled("b", *files, prompt="first") == ["first", "scene sign", "odd"]


def test_sample_goes_on_where_it_was(tmp_path, monkeypatch):
    """Every batch is written when it is made; Ctrl-C in the second of four."""
    generate, calls = SD3.generate, []

    def interrupted(model, *args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(model, *args)

    flags = dict(num_images=4, num_steps=2, batch_size=3)
    run("sample.py", **flags, out=tmp_path / "whole")
    monkeypatch.setattr(SD3, "generate", interrupted)
    cut = tmp_path / "cut"
    assert "stopped; the same command goes on" in refused("sample.py", **flags, out=cut)
    kept = {file: os.stat(cut / file).st_mtime_ns for file in os.listdir(cut) if file[0] == "0"}
    assert len(kept) == 6
    run("sample.py", **flags, out=cut)
    assert len(calls) == 4 and all(os.stat(cut / file).st_mtime_ns == time for file, time in kept.items())
    for file in [f"{i:05d}.png" for i in range(12)] + ["grid.png"]:
        assert (cut / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    flags |= dict(seed=1, prompt="x")
    assert "other pictures are there (not the same prompts, seed)" in refused("sample.py", **flags, out=cut)
    run("sample.py", **flags, overwrite=True, out=cut)
    assert sorted(file for file in os.listdir(cut) if file[0] == "0") == [f"{i:05d}.png" for i in range(4)]


def test_pictures_that_are_not_finite_are_not_made(loras, tmp_path):
    huge = huge_lora(loras["ocr"], tmp_path / "huge")
    said = refused("sample.py", lora=huge, num_steps=2, out=tmp_path / "samples")
    assert f"lora ({huge}) draws a picture that is not finite" in said
    assert not [file for file in os.listdir(tmp_path / "samples") if file.endswith(".png")]
    what = dict(models=[f"huge={huge}", "base"], prompts=few("test", 2, tmp_path)[:1])
    what |= dict(reward=["toy.compose", "jpeg"], samples_per_prompt=2)
    said = refused("evaluate.py", **what, eval_num_steps=2, out=tmp_path / "table")
    assert "scores are missing (huge: 2 of diversity, huge: 4 of compose, huge: 4 of jpeg)" in said
    base, broken = read_json(tmp_path, "table/results.json")
    assert base["missing"] == {} and broken["scores"] == {}
    assert not os.listdir(tmp_path / "table/huge/compose/samples")
