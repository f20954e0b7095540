"""The other scripts, by command line: every stage runs, every choice of every flag, and a user's mistake gets one clear line."""

import argparse
import gzip
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TASKS, few, lora_of, read_log, refused, run
from safetensors.torch import load_file

import flow_sde
from flow_sde import save_lora

QUICK = ["--batch-size", 3, "--num-steps", 4, "--steps", 2, "--eval-num-steps", 2]


def teacher(tmp_path, name, *extra):
    task = "compose=toy/prompts/compose_train.txt"
    return run(
        "train_teacher.py",
        "--reward",
        "toy.compose",
        "--prompts",
        task,
        "--eval-prompts",
        few("val", 4, tmp_path)[0],
        "--group-size",
        4,
        "--sde-window",
        0,
        *QUICK,
        "--out",
        tmp_path / name,
        *extra,
    )


@pytest.mark.parametrize(
    "script", ["train_teacher.py", "cold_start.py", "distill.py", "sample.py", "evaluate.py", "-m toy"]
)
def test_help(script):
    text = subprocess.run(
        [sys.executable, *script.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--out" in text and max(map(len, text.splitlines())) <= 128


def test_train_teacher_leaves_a_usable_teacher(tmp_path):
    ns = teacher(tmp_path, "run", "--eval-every", 1)
    assert [r["model"] for r in ns["results"]] == ["base", "teacher"]
    assert {"lora", "checkpoints", "log.jsonl", "curves.png", "samples.png", "results.json"} <= set(
        os.listdir(tmp_path / "run")
    )
    assert {
        "reward/compose",
        "kl_to_base",
        "clip_fraction",
        "tied_groups",
        "validation/compose",
    } <= set().union(*read_log(tmp_path / "run"))
    run(
        "sample.py",
        "--lora",
        tmp_path / "run/lora",
        "--num-images",
        1,
        "--num-steps",
        2,
        "--out",
        tmp_path / "pictures",
    )
    assert len(json.load(open(tmp_path / "pictures/samples.json"))["pictures"]) == 3


def test_grpo_raises_the_reward_of_what_it_can_reach(tmp_path):
    """JPEG size is a reward that any picture can improve: it must rise on the training prompts, and the clip and KL must be at work."""
    run(
        "train_teacher.py",
        "--reward",
        "jpeg",
        "--prompts",
        "x=toy/prompts/compose_train.txt",
        "--eval-prompts",
        "x=toy/prompts/compose_val.txt",
        "--out",
        tmp_path,
        "--batch-size",
        6,
        "--group-size",
        8,
        "--num-steps",
        6,
        "--sde-window",
        3,
        "--steps",
        20,
        "--lr",
        2e-3,
        "--eval-num-steps",
        6,
        "--eval-every",
        20,
        "--save-every",
        100,
    )
    base, trained = json.load(open(tmp_path / "results.json"))
    assert trained["scores"]["jpeg"] > base["scores"]["jpeg"] + 2 * base["stderr"]["jpeg"]
    log = read_log(tmp_path)
    assert log[0]["kl_to_base"] < log[-2]["kl_to_base"] and any(
        row.get("clip_fraction", 0) > 0 for row in log
    )


def test_train_teacher_choices(tmp_path):
    for i, extra in enumerate(
        (
            ["--sde", "cps"],
            ["--sde-window", 2],
            ["--guidance", 2.0],
            ["--updates-per-rollout", 1],
            ["--beta", 0, "--rank", 4],
            ["--no-ratio-norm", "--no-same-noise"],
        )
    ):
        teacher(tmp_path, str(i), *extra)
    # GRPO-Mix: three tasks, each scored by its own reward, and a task-agnostic one on all
    run(
        "train_teacher.py",
        "--reward",
        *[f"toy.{t}" for t in TASKS],
        "toy.quality=0.5",
        "--prompts",
        *[f"{t}=toy/prompts/{t}_train.txt,weight={w}" for t, w in zip(TASKS, (3, 1, 1))],
        "--eval-prompts",
        *few("val", 2, tmp_path),
        "--group-size",
        4,
        "--sde-window",
        0,
        *QUICK[2:],
        "--batch-size",
        5,
        "--out",
        tmp_path / "mix",
    )
    assert {f"reward/{n}" for n in (*TASKS, "quality")} <= read_log(tmp_path / "mix")[0].keys()
    # the same in whole rollouts of one task in turn
    run(
        "train_teacher.py",
        "--reward",
        *[f"toy.{t}=0.8" for t in TASKS],
        "toy.quality=0.2",
        "--prompts",
        *[f"{t}=toy/prompts/{t}_train.txt,weight={w}" for t, w in zip(TASKS, (2, 1, 1))],
        "--eval-prompts",
        few("val", 2, tmp_path)[0],
        "--group-size",
        4,
        "--sde-window",
        0,
        *QUICK[2:],
        "--batch-size",
        2,
        "--schedule",
        "alternate",
        "--steps",
        5,
        "--out",
        tmp_path / "turns",
    )
    seen = [
        sorted(k[7:] for k in row if k.startswith("reward/"))
        for row in read_log(tmp_path / "turns")
        if "seconds" in row
    ]
    assert seen == [
        ["compose", "quality"],
        ["compose", "quality"],
        ["ocr", "quality"],
        ["quality", "scene"],
        ["compose", "quality"],
    ]


def test_tied_groups_are_left_out_and_every_task_has_its_own_spread(loras, tmp_path, monkeypatch):
    """Of three tasks with a prompt each, one ties, and one is scored on a scale a hundred times smaller. The gradient of the first update
    (learning rate 0) is the mean over the pictures of the other two."""
    import rewards
    from flow_sde import kl, log_prob, transition

    def brightness(images, prompts, metadata):
        scale = torch.tensor([{"ties": 0.0, "small": 1.0, "large": 100.0}[p] for p in prompts])
        return scale * images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "jpeg", brightness)
    gradients, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda p, most: gradients.append(torch.cat([q.grad.flatten() for q in p])) or clip(p, most),
    )
    for name in ("ties", "small", "large"):
        (tmp_path / f"{name}.txt").write_text(name + "\n")
    argv = [
        "--reward",
        "jpeg",
        "--prompts",
        *[f"{n}={tmp_path}/{n}.txt" for n in ("ties", "small", "large")],
        "--init",
        loras["student"],
        "--batch-size",
        3,
        "--group-size",
        6,
        "--num-steps",
        4,
        "--sde-window",
        2,
        "--steps",
        1,
        "--lr",
        0,
        "--beta",
        0.5,
        "--micro-batch-size",
        4,
        "--updates-per-rollout",
        1,
        "--eval-prompts",
        f"large={tmp_path}/large.txt",
        "--eval-num-steps",
        1,
        "--no-ratio-norm",
    ]
    ns = run("train_teacher.py", *argv, "--out", tmp_path / "run")
    model, advantage, tasks = ns["model"], ns["advantage"], [task for task, _ in ns["batch"]]
    rms = {task: advantage[[t == task for t in tasks]].square().mean().sqrt().item() for task in set(tasks)}
    assert (
        rms["ties"] == 0
        and rms["small"] == pytest.approx(rms["large"], rel=0.05)
        and rms["large"] == pytest.approx((5 / 6) ** 0.5, rel=0.05)
    )
    assert read_log(tmp_path / "run")[0]["tied_groups"] == pytest.approx(1 / 3)
    rows, total = [i for i, t in enumerate(tasks) if t != "ties"], 0.0
    for s in ns["trajectory"]:
        cond = [c[torch.tensor(rows) // 6] for c in ns["conds"]]
        with torch.no_grad():
            base, _ = transition(s.x[rows], model.velocity(s.x[rows], s.t, cond), s.t, s.t_next, 0.7)
        mean, std = transition(s.x[rows], model.velocity(s.x[rows], s.t, cond, "teacher"), s.t, s.t_next, 0.7)
        total = (
            total
            - (advantage[rows] * log_prob(s.x_next[rows], mean, std)).mean()
            + 0.5 * kl(mean, base, std).mean()
        )
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(total / len(ns["trajectory"]), ns["params"])]
    )
    assert (gradients[0] - expected).norm() < 1e-3 * expected.norm()
    # nothing at all to learn from: no update, and no end
    monkeypatch.setitem(rewards.REWARDS, "jpeg", lambda images, prompts, metadata: torch.ones(len(images)))
    ns = run("train_teacher.py", *argv, "--lr", 1, "--out", tmp_path / "flat")
    assert len(gradients) == 1 and read_log(tmp_path / "flat")[0]["tied_groups"] == 1


def test_train_teacher_resumes_bit_equal(tmp_path):
    teacher(tmp_path, "whole", "--steps", 4)
    teacher(tmp_path, "cut", "--steps", 2)
    teacher(tmp_path, "cut", "--steps", 4, "--resume", "auto")
    a, b = (
        torch.load(tmp_path / d / "checkpoints/000004/state.pt", weights_only=True)["weights"]["teacher"]
        for d in ("whole", "cut")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit, match="validation prompts compose was '[0-9a-f]+', now '[0-9a-f]+'"):
        teacher(
            tmp_path,
            "cut",
            "--steps",
            6,
            "--resume",
            "auto",
            "--eval-prompts",
            "compose=toy/prompts/compose_val.txt",
        )
    with pytest.raises(SystemExit, match="beta was 0.04, now 0.1"):
        teacher(tmp_path, "cut", "--steps", 6, "--resume", "auto", "--beta", 0.1)


def test_sft_comes_closer_to_the_teachers_and_resumes(loras, tmp_path):
    argv = [
        "--teachers",
        *[f"{t}={loras[t]}" for t in TASKS],
        "--batch-size",
        6,
        "--micro-batch-size",
        3,
        "--num-steps",
        3,
        "--lr",
        3e-3,
        "--save-every",
        5,
    ]
    run("cold_start.py", "sft", *argv, "--steps", 15, "--out", tmp_path / "whole")
    log = read_log(tmp_path / "whole")
    assert log[-1]["kl"] < 0.8 * log[0]["kl"]
    run("cold_start.py", "sft", *argv, "--steps", 5, "--out", tmp_path / "cut")
    run("cold_start.py", "sft", *argv, "--steps", 15, "--out", tmp_path / "cut", "--resume", "auto")
    a, b = (load_file(tmp_path / d / "lora/adapter_model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for sde in ("cps", "ode"):
        run("cold_start.py", "sft", *argv, "--steps", 1, "--sde", sde, "--out", tmp_path / sde)


def test_evaluate_does_not_depend_on_the_batch(loras, tmp_path):
    argv = [
        "--models",
        "base",
        f"ocr={loras['ocr']},guidance=2",
        "--prompts",
        *few("test", 4, tmp_path),
        "--eval-num-steps",
        4,
    ]
    run("evaluate.py", *argv, "--out", tmp_path / "a")
    run("evaluate.py", *argv, "--eval-batch-size", 5, "--out", tmp_path / "b")
    a, b = (json.load(open(tmp_path / d / "results.json")) for d in "ab")
    assert [r["model"] for r in a] == ["base", "ocr"] and a[0]["n"] == 12
    for x, y in zip(a, b):
        assert x["scores"] == pytest.approx(y["scores"], abs=1e-3)
    assert open(tmp_path / "a/results.md").read().startswith("| model |") and os.path.exists(
        tmp_path / "a/samples.png"
    )


def test_ctrl_c_saves_and_resumes(tmp_path):
    import time

    argv = [
        sys.executable,
        "cold_start.py",
        "sft",
        "--batch-size",
        "3",
        "--num-steps",
        "3",
        "--steps",
        "5000",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert int(os.listdir(tmp_path / "checkpoints")[0]) == len(read_log(tmp_path)) >= 3


def test_mistakes_get_one_clear_line(loras, tmp_path):
    empty, broken, untitled = tmp_path / "empty.txt", tmp_path / "broken.jsonl", tmp_path / "untitled.jsonl"
    empty.write_text("\n\n")
    broken.write_text('{"prompt": "fine"}\n{"prompt": oops}\n')
    untitled.write_text('{"text": "fine"}\n')
    ocr = f"ocr={loras['ocr']}"
    one = ["--teachers", ocr, "--prompts"]
    cases = [
        (["distill.py", *one, f"ocr={tmp_path}/none.txt"], "none.txt: no such file"),
        (["distill.py", *one, f"ocr={empty}"], "no prompts in it"),
        (["distill.py", *one, f"ocr={broken}"], "line 2 is not JSON"),
        (["distill.py", *one, f"ocr={untitled}"], 'line 1 has no "prompt"'),
        (
            ["distill.py", *one, "ocr=toy/prompts/ocr_val.txt", "compose=toy/prompts/compose_val.txt"],
            "--prompts compose: no teacher of that task",
        ),
        (
            ["distill.py", "--teachers", ocr, "x=y", "--prompts", "ocr=toy/prompts/ocr_val.txt"],
            "--teachers x: no prompts of that task",
        ),
        (
            ["distill.py", "--teachers", "ocr", "--prompts", "ocr=toy/prompts/ocr_val.txt"],
            "--teachers ocr: expected NAME=VALUE",
        ),
        (
            ["distill.py", "--teachers", "student=x", "--prompts", "student=toy/prompts/ocr_val.txt"],
            "that name is taken",
        ),
        (["evaluate.py", "--models", f"type={loras['ocr']}"], "type: PyTorch uses that name itself"),
        (
            ["distill.py", "--teachers", ocr, ocr, "--prompts", "ocr=toy/prompts/ocr_val.txt"],
            "ocr is given twice",
        ),
        (["distill.py", "--resolution", 30], "--resolution 30: this model draws multiples of 4 up to 32"),
        (["distill.py", "--resolution", 64], "--resolution 64"),
        (
            [
                "distill.py",
                "--model",
                tmp_path,
                "--teachers",
                ocr,
                "--prompts",
                "ocr=toy/prompts/ocr_val.txt",
            ],
            "not a diffusers pipeline folder",
        ),
        (
            [
                "distill.py",
                "--model",
                tmp_path / "nothing",
                "--teachers",
                ocr,
                "--prompts",
                "ocr=toy/prompts/ocr_val.txt",
            ],
            "no such folder",
        ),
        (["distill.py", "--objective", "ppo", "--sde", "ode"], "needs a stochastic sampler"),
        (["distill.py", "--noise-level", 0], "must be positive"),
        (["distill.py", "--label-steps", 10], "--label-steps 10: must lie in 0..9"),
        (["distill.py", "--label-density", 5, 0], "--label-density 5.0 0.0: both must be positive"),
        (["distill.py", "--ema", 1], "--ema 1.0: must be below 1"),
        (["sample.py", "--max-sequence-length", 600], "at most 512"),
        (
            [
                "train_teacher.py",
                "--schedule",
                "alternate",
                "--prompts",
                "compose=toy/prompts/compose_val.txt,weight=1.5",
            ],
            "they must be whole",
        ),
        (
            [
                "cold_start.py",
                "merge",
                "--method",
                "factors",
                "--teachers",
                ocr,
                "compose=toy/teachers/compose",
            ],
            "have no average",
        ),
        (["distill.py", "--resume", tmp_path], "no checkpoint there"),
        (["train_teacher.py", "--reward", "toy.smile"], "no such reward"),
        (["train_teacher.py", "--reward", "toy.ocr=much"], "NAME=WEIGHT (a positive number)"),
        (["train_teacher.py", "--group-size", 1], "--group-size 1"),
        (["train_teacher.py", "--sde-window", 9], "--sde-window 9"),
        (["sample.py", "--num-images", 0], "--num-images 0: must be at least 1"),
        (
            [
                "evaluate.py",
                "--reward",
                "toy.ocr",
                "--prompts",
                "ocr=toy/prompts/ocr_val.txt",
                "compose=toy/prompts/compose_val.txt",
            ],
            "compose: no reward",
        ),
        (["cold_start.py", "sft", "--teachers", ocr], "every task needs both"),
    ]
    for (script, *argv), message in cases:
        assert message in refused(script, *argv, "--out", tmp_path / "out"), argv


PROMPTS = ["a red fox, in snow", 'a sign saying "ÄÖ"', "the third"]


def table_of(delimiter, header, rows):
    import csv
    import io

    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([header, *rows])
    return out.getvalue()


FILES = (
    "lines.txt",
    "lines.txt.gz",
    "rows.JSONL",
    "rows.jsonl",
    "array.json",
    "DrawBench.csv",
    "PartiPrompts.tsv",
    "tasks.csv.gz",
)
ROWS = [{"prompt": p} for p in PROMPTS]
PARTI = ["Prompt", "Category", "Challenge", "Note"]
TASKED = table_of(",", ["task", "prompt"], [["ocr", p] for p in PROMPTS] + [["other", "no"]])


@pytest.mark.parametrize(
    "name, data",
    [
        ("lines.txt", "\ufeff" + "\r\n".join(PROMPTS) + "\r\n"),
        ("lines.txt.gz", gzip.compress("\n".join(PROMPTS).encode())),
        ("rows.JSONL", "\n".join(map(json.dumps, ROWS))),
        ("rows.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("array.json", json.dumps([PROMPTS[0], ROWS[1], ROWS[2] | {"task": "ocr"}], indent=2)),
        ("DrawBench.csv", table_of(",", ["Prompts", "Category"], [[p, "Colors"] for p in PROMPTS])),
        ("PartiPrompts.tsv", table_of("\t", PARTI, [[p, "Animals", "Basic", ""] for p in PROMPTS])),
        ("tasks.csv.gz", gzip.compress(TASKED.encode())),
    ],
    ids=lambda value: value if value in FILES else "",
)
def test_one_reader_of_prompts(name, data, tmp_path):
    from flow_sde import load_prompts

    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert [row["prompt"] for row in load_prompts("ocr", str(tmp_path / name))] == PROMPTS
    row = load_prompts("ocr", str(tmp_path / name))[0]
    assert row.get("Category") == {"DrawBench.csv": "Colors", "PartiPrompts.tsv": "Animals"}.get(name)
    everything = [row["prompt"] for row in load_prompts(None, str(tmp_path / name))]
    assert everything == PROMPTS + (["no"] if "tasks" in name else [])


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.txt", "a fox\n".encode("utf-16"), "looks like UTF-16"),
        ("x.txt", "a fox\n".encode("utf-16-le"), "looks like UTF-16"),
        ("x.txt", "a fox\na caf\u00e9\n".encode("cp1252"), "line 2 is not UTF-8, it looks like cp1252"),
        ("x.txt.gz", gzip.compress(b"a fox\n" * 99)[:-9], "cannot be read"),
        (
            "x.jsonl",
            b'{"prompt": "a fox"}\n{"prompt": "half \\ud83d a face"}\n',
            "line 2 holds half a character",
        ),
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
    from flow_sde import load_prompts

    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as caught:
        load_prompts("ocr", str(tmp_path / name))
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_longer_than_the_encoders_read_are_counted(capsys):
    from flow_sde import SD3

    model = SD3(os.path.join(ROOT, "toy/base"))
    fits, long = "two red circles and one blue square", "two red circles and one blue square " * 3
    model.note_long([fits, long, long, long + "too"])
    said = ", ".join(f"2 are longer than text_encoder{i} reads (12 tokens)" for i in ("", "_2", "_3"))
    assert capsys.readouterr().out == f"note: of 3 prompts {said}; the rest of them is not seen there\n"
    model.note_long([fits])
    assert not capsys.readouterr().out


def sampled(out):
    return [p["prompt"] for p in json.load(open(os.path.join(out, "samples.json")))["pictures"]]


def test_sample_takes_the_prompts_that_distill_takes(tmp_path):
    rows = [json.dumps({"task": task, "prompt": f"{task} sign"}) for task in ("ocr", "scene")]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    (tmp_path / "more.txt").write_text("one tree\n")
    (tmp_path / "o=dd.txt").write_text("odd\n")
    quick = ["--num-images", 1, "--num-steps", 1]
    run("sample.py", "--prompts", tmp_path / "all.jsonl", *quick, "--out", tmp_path / "a")
    assert sampled(tmp_path / "a") == ["ocr sign", "scene sign"]
    run(
        "sample.py",
        "--prompt",
        "first",
        "--prompts",
        f"scene={tmp_path}/all.jsonl",
        tmp_path / "more.txt",
        tmp_path / "o=dd.txt",
        *quick,
        "--out",
        tmp_path / "b",
    )
    assert sampled(tmp_path / "b") == ["first", "scene sign", "one tree", "odd"]
    assert "nothing to draw" in refused("sample.py", "--model", "toy/base", "--out", tmp_path / "c")


def test_sample_goes_on_where_it_was(tmp_path, monkeypatch):
    from flow_sde import SD3

    argv = ["sample.py", "--num-images", 4, "--num-steps", 2, "--batch-size", 3, "--out"]
    run(*argv, tmp_path / "whole")
    generate, calls = SD3.generate, []

    def spy(model, prompts, *rest, **options):
        calls.append(prompts)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(SD3, "generate", spy)
    assert "stopped; the same command goes on" in refused(*argv, tmp_path / "cut")
    kept = {f: os.stat(tmp_path / "cut" / f).st_mtime_ns for f in os.listdir(tmp_path / "cut") if f[0] == "0"}
    assert len(kept) == 6  # two batches of three: each was written when it was made
    calls[:] = []
    monkeypatch.setattr(SD3, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    run(*argv, tmp_path / "cut")
    assert len(calls) == 2 and all(os.stat(tmp_path / "cut" / f).st_mtime_ns == t for f, t in kept.items())
    for file in [f"{i:05d}.png" for i in range(12)] + ["grid.png"]:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    other = [tmp_path / "cut", "--seed", 1, "--prompt", "x"]
    assert "other pictures are there (not the same prompts, seed)" in refused(*argv, *other)
    run(*argv, *other, "--overwrite")
    assert sorted(os.listdir(tmp_path / "cut"))[1:5] == [f"{i:05d}.png" for i in range(4)]
    assert not os.path.exists(tmp_path / "cut/00004.png")


def test_pictures_that_are_not_finite_are_not_made(loras, tmp_path):
    """A LoRA of finite numbers under which the network overflows."""
    lora = lora_of(loras["ocr"])
    save_lora({n: (A * 1e20, B * 1e20, alpha) for n, (A, B, alpha) in lora.items()}, tmp_path / "huge")
    said = refused("sample.py", "--lora", tmp_path / "huge", "--num-steps", 2, "--out", tmp_path / "samples")
    assert f"lora ({tmp_path}/huge) draws a picture that is not finite" in said
    assert not [f for f in os.listdir(tmp_path / "samples") if f.endswith(".png")]
    argv = [
        "--models",
        f"huge={tmp_path}/huge",
        "base",
        "--prompts",
        *few("test", 2, tmp_path)[:1],
        "--reward",
        "toy.compose",
        "jpeg",
        "--samples-per-prompt",
        2,
        "--eval-num-steps",
        2,
        "--out",
        tmp_path / "table",
    ]
    said = refused("evaluate.py", *argv)
    assert "scores are missing (huge: 2 of diversity, huge: 4 of compose, huge: 4 of jpeg)" in said
    base, huge = json.load(open(tmp_path / "table/results.json"))
    assert base["missing"] == {} and huge["scores"] == {}
    assert not os.listdir(tmp_path / "table/huge/compose/samples")


def test_flags_that_would_do_nothing_are_refused(loras, tmp_path):
    ocr = ["--teachers", f"ocr={loras['ocr']}", "--prompts", "ocr=toy/prompts/ocr_val.txt"]
    for argv, message in (
        (["distill.py", "--init", "merge", "--rank", 8], "--rank: --init merge has"),
        (["distill.py", "--init", loras["ocr"], "--alpha", 8], "--alpha: --init"),
        (["train_teacher.py", "--init", loras["ocr"], "--rank", 32], "--rank: --init"),
        (["cold_start.py", "sft", *ocr, "--init", loras["ocr"], "--rank", 4], "--rank: "),
        (["cold_start.py", "merge", "--rank", 4], "--rank: --method cat has its own"),
        (["distill.py", "--sde", "cps", "--noise-level", 1.2], "--noise-level 1.2: with"),
        (["train_teacher.py", "--sde", "cps", "--noise-level", 3], "at most 1"),
        (["sample.py", "--sde", "cps", "--noise-level", 2], "at most 1"),
    ):
        assert message in refused(*argv, "--out", tmp_path / "out")


def test_odd_places(tmp_path, monkeypatch):
    """Commas and equals signs in a path, a checkout with a backslash, a terminal without UTF-8."""
    odd = ["a=x,y=2,guidance=1.5,weight=3", "b=/p,q/weight=1/z"]
    specs = flow_sde.parse_specs("--teachers", odd, guidance=4.0, weight=1.0)
    assert specs == {
        "a": {"value": "x,y=2", "guidance": 1.5, "weight": 3.0},
        "b": {"value": "/p,q/weight=1/z", "guidance": 4.0, "weight": 1.0},
    }
    with pytest.raises(SystemExit, match="guidance must be a number"):
        flow_sde.parse_specs("--teachers", ["a=x,guidance=high"], guidance=1.0)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model"), parser.add_argument("--files", nargs="+")
    with monkeypatch.context() as patch:
        patch.setattr(flow_sde, "HERE", "C:\\1\\g<0>")
        patch.setattr(sys, "argv", ["x.py"])
        args = flow_sde.parse_args(parser, {"model": "toy/base", "files": ["a=toy/x"]})
    assert (args.model, args.files) == ("C:\\1\\g<0>/toy/base", ["a=C:\\1\\g<0>/toy/x"])
    (tmp_path / "prompts.txt").write_text('a yellow sign saying "HAT"\n')
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(
        "evaluate.py",
        "--models",
        "base",
        "--prompts",
        f"ocr={tmp_path}/prompts.txt",
        "--reward",
        "toy.ocr",
        "--eval-num-steps",
        1,
        "--samples-per-prompt",
        2,
        "--out",
        tmp_path / "table",
    )
    terminal.flush()
    assert b" ? " in terminal.buffer.getvalue()  # the plus-minus sign of the table


def test_a_custom_reward_may_return_what_it_likes():
    from rewards import Reward, RewardError, score_batch

    batch, pictures = [("x", {"prompt": "a fox"})] * 3, torch.zeros(3, 3, 4, 4)
    score = lambda values: score_batch(pictures, batch, {"r": Reward(lambda *_: values, 1.0)}, ["x"])["r"]
    for values in ([1, 2.0, 3], np.array([1, 2, 3]), torch.tensor([[1], [2], [3]]), [torch.tensor(1), 2, 3]):
        assert score(values).tolist() == [1, 2, 3] and score(values).dtype == torch.float32
    for values in (None, 1.0, [1, 2], torch.ones(3, 3), "abc", [None] * 3):
        with pytest.raises(RewardError, match="r: .*3 pictures, not a number each"):
            score(values)
    pictures[1] = math.nan
    with pytest.raises(RewardError, match="r: a picture is not finite"):
        score([1, 2, 3])


def test_advice_fits_the_script(tmp_path, capsys):
    """On a full disk: sample.py has no --resume."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hook = sys.excepthook
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError) as full:
            run("sample.py", "--num-steps", 1, "--num-images", 1, "--out", tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.excepthook(full.type, full.value, full.tb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.excepthook = hook
    said = capsys.readouterr().err
    assert "Make room, then the same command goes on" in said
    assert "--resume" not in said and "Traceback" not in said


def test_accelerate_launch_or_what_to_use(tmp_path, monkeypatch):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    argv = ["sample.py", "--num-steps", "1", "--num-images", "2", "--batch-size", "2", "--out", str(tmp_path)]
    answer = subprocess.run([*launch, *argv], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.count("6 pictures") == 1, answer.stderr[-3000:]
    assert len([f for f in os.listdir(tmp_path) if f[0] == "0"]) == 6
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "accelerate launch asks for FSDP" in refused("sample.py", "--out", tmp_path)
