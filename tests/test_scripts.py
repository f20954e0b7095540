"""The scripts by command line: what runs leave behind, the choices of their flags, the prompts they read, and
one clear line for a user's mistake."""

import argparse
import collections
import csv
import gzip
import io
import json
import math
import os
import resource
import runpy
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import (
    BASE,
    TASKS,
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
)
from PIL import Image

import flow_sde
import rewards
from flow_sde import SD3, kl, load_prompts, log_prob, transition

SCRIPTS = ["train_teacher.py", "cold_start.py", "distill.py", "sample.py", "evaluate.py", "toy"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(script.removesuffix(".py"), run_name="__main__", alter_sys=False)
    text = capsys.readouterr().out
    assert "--out" in text and max(map(len, text.splitlines())) <= 128


# -- what runs leave behind --------------------------------------------------------------------------------


def test_distill_leaves_a_student_and_a_table(loras, tmp_path):
    names = [f"toy.{name}" for name in (*TASKS, "quality")]
    table = dict(eval_prompts=few("test", 3, tmp_path), reward=names, eval_num_steps=2, resolution=32)
    ns = distill(loras, tmp_path / "run", steps=2, save_every=1, **table)
    files = {"lora", "checkpoints", "log.jsonl", "curves.png", "samples.png", "results.json", "args.json"}
    assert files <= set(os.listdir(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["000001", "000002"]
    rows = ["base", *(f"{task} (teacher)" for task in TASKS), "anchor", "start", "student"]
    assert [row["model"] for row in ns["results"]] == rows
    ocr = {"ocr": ns["eval_prompts"]["ocr"]}  # scores of a task do not depend on the tasks beside it
    ocr_alone = rewards.evaluate(ns["model"], "base", ocr, ns["rewards"], ns["args"], tasks=TASKS)
    assert ocr_alone["scores"]["ocr"] == ns["results"][0]["scores"]["ocr"]
    assert all(row["n"] == 9 and set(row["scores"]) == {*TASKS, "quality"} for row in ns["results"])
    assert Image.open(tmp_path / "run/samples.png").width > 300
    untrained = distill(loras, tmp_path / "none", init="none", anchor="none", lr=0, **table)
    base, *_, student = untrained["results"]
    assert student["scores"] == pytest.approx(base["scores"])


def test_train_teacher_leaves_a_usable_teacher(tmp_path):
    ns = teacher(tmp_path / "run", eval_every=1)
    assert [row["model"] for row in ns["results"]] == ["base", "teacher"]
    files = {"lora", "checkpoints", "log.jsonl", "curves.png", "samples.png", "results.json"}
    assert files <= set(os.listdir(tmp_path / "run"))
    keys = {"reward/jpeg", "kl_to_base", "clip_fraction", "tied_groups", "validation/jpeg"}
    assert keys <= set().union(*read_log(tmp_path / "run"))
    run("sample.py", lora=tmp_path / "run/lora", num_images=1, num_steps=2, out=tmp_path / "pictures")
    assert len(read_json(tmp_path / "pictures/samples.json")["pictures"]) == 3


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
    size = dict(batch_size=4, group_size=8, num_steps=6, sde_window=3, steps=8, eval_every=8)
    teacher(tmp_path / "run", **size, eval_num_steps=5, eval_prompts=few("val", 16, tmp_path)[:1])
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
def test_train_teacher_choices(choices, tmp_path, numbers_only):
    teacher(tmp_path / "run", **choices, steps=1)
    assert read_log(tmp_path / "run")[0]["grad_norm"] > 0


def test_grpo_mix(tmp_path, numbers_only):
    """Three tasks, each with its own reward, and another on all; mixed, or whole rollouts in turn."""
    paths = few("train", 8, tmp_path)
    weighted = [f"{path},weight={weight}" for path, weight in zip(paths, (2, 1, 1))]
    names = [*(f"toy.{task}=0.8" for task in TASKS), "toy.quality=0.2"]
    flags = dict(reward=names, prompts=weighted, resolution=32)
    seen = {}
    for schedule, size in (("mixed", dict(steps=1, batch_size=4)), ("alternate", dict(steps=5))):
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
    others = [kl_to if tasks[i] == "large" else "base" for i in rows]
    for s in ns["trajectory"]:
        x, x_next = s.x[rows], s.x_next[rows]
        with torch.no_grad():
            other, _ = transition(x, model.velocity(x, s.t, cond, others), s.t, s.t_next, 0.7)
        mean, std = transition(x, model.velocity(x, s.t, cond, "teacher"), s.t, s.t_next, 0.7)
        total += 0.5 * kl(mean, other, std).mean() - (advantage[rows] * log_prob(x_next, mean, std)).mean()
    grads = torch.autograd.grad(total / len(ns["trajectory"]), ns["params"])
    expected = torch.cat([g.flatten() for g in grads])
    assert (gradients[0] - expected).norm() < 1e-3 * expected.norm()
    # nothing at all to learn from: no update, and no end
    bright.update(dict.fromkeys(bright, 0.0))
    teacher(tmp_path / "flat", **flags, lr=1)
    assert len(gradients) == 1 and read_log(tmp_path / "flat")[0]["tied_groups"] == 1


def test_sft_comes_closer_to_the_teachers(loras, tmp_path, numbers_only):
    sft(loras, tmp_path / "run", steps=12, batch_size=12, micro_batch_size=6, lr=3e-3)
    log = [row["kl"] for row in read_log(tmp_path / "run")]
    assert sum(log[-2:]) < 0.75 * sum(log[:2])


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
    assert len(read_log(tmp_path / "run")) == 3 and os.listdir(tmp_path / "run/checkpoints") == ["000003"]


# -- mistakes ----------------------------------------------------------------------------------------------

VAL = "ocr=toy/prompts/ocr_val.txt"
BARE = "distill.py --eval-prompts --reward"
OCR = f"{BARE} --teachers ocr={{ocr}}"
MISTAKES = [  # {ocr}: a LoRA; {tmp}: a folder with the files below
    (f"{OCR} --prompts ocr={{tmp}}/none.txt", "none.txt: no such file"),
    (f"{OCR} --prompts ocr={{tmp}}/empty.txt", "no prompts in it"),
    (f"{OCR} --prompts ocr={{tmp}}/broken.jsonl", "line 2 is not JSON"),
    (f"{OCR} --prompts ocr={{tmp}}/untitled.jsonl", 'line 1 has no "prompt"'),
    (f"{OCR} --prompts {VAL} x=y.txt", "--prompts x: no teacher of that task"),
    (f"{OCR} x=y --prompts {VAL}", "--teachers x: no prompts of that task"),
    (f"{OCR} ocr={{ocr}} --prompts {VAL}", "ocr is given twice"),
    (f"{OCR} --prompts {VAL} --model {{tmp}}", "not a diffusers pipeline folder"),
    (f"{OCR} --prompts {VAL} --model {{tmp}}/no", "no such folder"),
    (f"{OCR} --prompts {VAL} --eval-prompts x={{tmp}}/few.txt", "--eval-prompts x: no teacher of that task"),
    (f"distill.py --teachers ocr={{ocr}} --prompts {VAL}", "compose: no teacher of that task"),
    (f"{BARE} --teachers ocr --prompts {VAL}", "--teachers ocr: expected NAME=VALUE"),
    (f"{BARE} --teachers student=x --prompts student=x.txt", "that name is taken"),
    ("distill.py --resolution 30", "--resolution 30: this model draws multiples of 4 up to 32"),
    ("distill.py --resolution 64", "--resolution 64"),
    ("distill.py --objective ppo --sde ode", "--objective ppo"),
    ("distill.py --noise-level 0", "must be positive"),
    ("distill.py --label-density 5 0", "--label-density: both must be positive"),
    ("distill.py --ema 1", "--ema 1.0: must be below 1"),
    ("distill.py --resume {tmp}", "no checkpoint there"),
    ("evaluate.py --models type={ocr}", "type: PyTorch uses that name itself"),
    (f"evaluate.py --reward toy.ocr --prompts {VAL} compose={{tmp}}/few.txt", "compose: no reward scores"),
    ("sample.py --max-sequence-length 600", "at most 512"),
    ("sample.py --lora toy/teachers/orc", "toy/teachers/orc: no such LoRA"),
    ("sample.py --lora {tmp}/run", "did you mean"),
    ("train_teacher.py --reward toy.parse", "parse must take (images, prompts, metadata)"),
    ("sample.py --num-images 0", "--num-images 0: must be at least 1"),
    ("sample.py --model toy/base", "nothing to draw"),
    ("sample.py --prompt \udcff", "'\\udcff': not UTF-8"),
    (
        "train_teacher.py --schedule alternate --prompts compose={tmp}/few.txt,weight=1.5",
        "they must be whole",
    ),
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
    ("distill.py --sde cps --noise-level 1.2", "--noise-level 1.2: with"),
    ("train_teacher.py --sde cps --noise-level 3", "at most 1"),
    ("sample.py --sde cps --noise-level 2", "at most 1"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_mistakes_get_one_clear_line(line, message, loras, tmp_path):
    (tmp_path / "few.txt").write_text("a prompt\n")
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
    with pytest.raises(SystemExit, match="--teachers a=x,guidance=high: guidance must be a number"):
        flow_sde.parse_specs("--teachers", ["a=x,guidance=high"], guidance=1.0)


def test_the_toy_is_found_wherever_the_checkout_is(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--files", nargs="+")
    monkeypatch.setattr(flow_sde, "HERE", "C:\\1\\g<0>")
    monkeypatch.setattr(sys, "argv", ["x.py"])
    args = flow_sde.parse_args(parser, {"model": "toy/base", "files": ["a=toy/x"]})
    assert (args.model, args.files) == ("C:\\1\\g<0>/toy/base", ["a=C:\\1\\g<0>/toy/x"])


def test_a_terminal_without_utf8(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    what = dict(models="base", prompts=few("test", 1, tmp_path)[1:2], reward="toy.ocr")
    run("evaluate.py", **what, eval_num_steps=1, samples_per_prompt=2, out=tmp_path / "table")
    terminal.flush()
    assert b" ? " in terminal.buffer.getvalue()  # the plus-minus sign of the table


def test_advice_fits_the_script(tmp_path, capsys):
    """On a full disk: sample.py has no --resume."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hook = sys.excepthook
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError) as full:
            run("sample.py", num_steps=1, num_images=1, out=tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.excepthook(full.type, full.value, full.tb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.excepthook = hook
    said = capsys.readouterr().err
    assert "Make room, then the same command goes on" in said
    assert "--resume" not in said and "Traceback" not in said


def test_accelerate_launch(tmp_path):
    """Two processes by Hugging Face's launcher draw what one draws."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    _, *line = command("sample.py", num_steps=1, num_images=2, batch_size=2, out=tmp_path)
    answer = finish([*launcher, *line])
    assert answer.returncode == 0 and answer.stdout.count("6 pictures") == 1, answer.stderr[-3000:]
    assert len([file for file in os.listdir(tmp_path) if file[0] == "0"]) == 6


def test_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "accelerate launch asks for FSDP" in refused("sample.py", out=tmp_path)


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


# -- prompts -----------------------------------------------------------------------------------------------

PROMPTS = ["a red fox, in snow", 'a sign saying "ÄÖ"', "the third"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def csv_text(delimiter, header, rows):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([header, *rows])
    return out.getvalue()


DRAWBENCH = csv_text(",", ["Prompts", "Category"], [[prompt, "Colors"] for prompt in PROMPTS])
PARTI = csv_text("\t", ["Prompt", "Category", "Note"], [[prompt, "Animals", ""] for prompt in PROMPTS])
TASKED = csv_text(",", ["task", "prompt"], [*(["ocr", prompt] for prompt in PROMPTS), ["other", "no"]])
FILES = {
    "lines.txt": "\ufeff" + "\r\n".join(PROMPTS) + "\r\n",
    "lines.txt.gz": gzip.compress("\n".join(PROMPTS).encode()),
    "rows.JSONL": "\n".join(map(json.dumps, ROWS)),
    "rows.jsonl": "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "array.json": json.dumps([PROMPTS[0], ROWS[1], ROWS[2] | {"task": "ocr"}], indent=2),
    "DrawBench.csv": DRAWBENCH,
    "PartiPrompts.tsv": PARTI,
    "tasks.csv.gz": gzip.compress(TASKED.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_one_reader_of_prompts(name, tmp_path):
    file, data = tmp_path / name, FILES[name]
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    rows = load_prompts("ocr", str(file))
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[0].get("Category") == {"DrawBench.csv": "Colors", "PartiPrompts.tsv": "Animals"}.get(name)
    everything = [row["prompt"] for row in load_prompts(None, str(file))]
    assert everything == PROMPTS + (["no"] if "tasks" in name else [])


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.txt", "a fox\n".encode("utf-16"), "looks like UTF-16"),
        ("x.txt", "a fox\n".encode("utf-16-le"), "looks like UTF-16"),
        ("x.txt", "a fox\na caf\u00e9\n".encode("cp1252"), "line 2 is not UTF-8, it looks like cp1252"),
        ("x.txt.gz", gzip.compress(b"a fox\n" * 99)[:-9], "cannot be read"),
        ("x.txt.gz", gzip.compress(b"a fox\n")[:10] + b"\xff" * 20, "cannot be read"),
        ("x.jsonl", b'{"prompt": "x"}\n{"prompt": "a \\ud83d face"}\n', "line 2 holds half a character"),
        ("x.jsonl", b'{"prompt": "  "}\n', 'line 1 has no "prompt"'),
        ("x.json", b'["a fox", 3]', 'entry 2 has no "prompt"'),
        ("x.json", b'["a fox",', "not JSON"),
        ("x.csv", b"text,n\na fox,1\n", "must name one column prompt; it has text, n"),
        ("x.csv", b"", "must name one column prompt"),
        ("x.csv", b"prompt,n\na fox, in snow,1\n", "line 2 has more columns than the header"),
        ("x.csv", b"n,prompt\n1\n", 'line 2 has no "prompt"'),
        ("x.tsv", b'prompt\tn\n"Hi" on a sign\t1\n', "line 2: '\t' expected after '\"'"),
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


def test_prompts_longer_than_the_encoders_read_are_counted(capsys):
    model = SD3(BASE)
    fits, long = "two red circles and one blue square", "two red circles and one blue square " * 3
    model.note_long([fits, long, long, long + "too"])
    said = ", ".join(f"2 are longer than text_encoder{i} reads (12 tokens)" for i in ("", "_2", "_3"))
    assert capsys.readouterr().out == f"note: of 3 prompts {said}; the rest of them is not seen there\n"
    model.note_long([fits])
    assert not capsys.readouterr().out


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
