"""The toy world: prompts are disjoint and parse, scorers know good from bad, and the shipped models are what README says."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TASKS

import rewards
import toy
from flow_sde import load_prompts


def draw(prompts, damage=False, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([toy.draw(p, rng, damage) for p in prompts])).float().movedim(-1, 1)


@pytest.mark.parametrize("task", TASKS)
def test_prompts(task):
    split = {
        s: [r["prompt"] for r in load_prompts(task, os.path.join(ROOT, f"toy/prompts/{task}_{s}.txt"))]
        for s in ("train", "val", "test")
    }
    assert split == toy.split_prompts(task)
    everything = sum(split.values(), [])
    assert (
        len(set(everything)) == len(everything)
        and len(split["test"]) >= 256
        and set(everything) <= set(toy.all_prompts(task))
    )
    assert {toy.parse(p)[0] for p in toy.all_prompts(task)} == {task}


@pytest.mark.parametrize("task", TASKS)
def test_scorers_know_good_from_bad(task):
    prompts = toy.split_prompts(task)["test"]
    score = getattr(toy, task)
    clean, damaged, blank = (
        draw(prompts),
        draw(prompts, damage=True),
        torch.full((len(prompts), 3, 32, 32), 0.5),
    )
    assert score(clean, prompts).mean() > 0.98 and score(clean, prompts).shape == (len(prompts),)
    assert score(damaged, prompts).mean() < 0.9 and score(blank, prompts).max() == 0
    assert (
        score(
            (clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
            prompts,
        ).mean()
        > 0.95
    )
    assert (
        toy.quality(clean).mean() > 0.9
        and toy.quality(0.55 + 0.4 * (clean - 0.55)).mean() < 0.1
        and toy.quality(blank).max() == 0
    )
    if task != "scene":  # another prompt's picture is a wrong picture
        assert score(clean.roll(1, 0), prompts).mean() < 0.5


def test_what_is_asked_for_is_what_is_counted():
    image = draw(["two red circles and one blue square"])
    assert toy.compose(image, ["two red circles and one blue square"]).item() == 1
    assert toy.compose(image, ["two red circles"]).item() == 0.5  # one thing too many, of two asked for
    assert (
        toy.compose(image, ["three red circles and one blue square"]).item() == 0.75
    )  # one missing, of four
    assert (
        toy.compose(image, ["two blue circles and one blue square"]).item() == 0
    )  # two missing, two too many
    sign = draw(['a yellow sign saying "HAT"'])
    assert toy.read_letters(sign) == ["HAT"] and toy.ocr(
        sign, ['a white sign saying "HTT"']
    ).item() == pytest.approx(2 / 3)


def test_text_score():
    cases = [
        ("HELLO", 'a sign saying "Hello"', 1.0),
        ("h e l l o", 'a "hello" there', 1.0),
        ("xxhelloyy", '"hello"', 1.0),
        ("", '"hello"', 0.0),
        ("helo", '"hello"', 0.8),
        ("something else", '"abc"', 0.0),
        ("ab", '"a b" and "cd"', 1.0),
        ("abc", "“abc”", 1.0),
    ]
    for read, prompt, score in cases:
        assert rewards.text_score(read, prompt) == pytest.approx(score), (read, prompt)
    with pytest.raises(ValueError, match="double quotes"):
        rewards.text_score("x", "no quotes")
    assert rewards.edit_distance("kitten", "sitting") == 3 and rewards.edit_distance("", "ab") == 2


def test_jpeg():
    flat, noise = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    assert rewards.jpeg(flat)[0] > rewards.jpeg(noise)[0] and rewards.jpeg(
        torch.cat([flat, noise])
    ).shape == (2,)


def test_the_identity_vae():
    from toy.__main__ import identity_vae

    vae = identity_vae()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.sample()
        assert (z - x).abs().max() < 1e-4 and (vae.decode(z).sample - x).abs().max() < 1e-4


def test_rewards_by_command_line(tmp_path):
    from PIL import Image

    file = tmp_path / "sign.png"
    Image.fromarray(
        (draw(['a pink sign saying "HAT"'])[0].movedim(0, -1).numpy() * 255).astype("uint8")
    ).save(file)
    call = lambda *a: subprocess.run(
        [sys.executable, "rewards.py", *map(str, a)], cwd=ROOT, capture_output=True, text=True
    )
    assert float(call("toy.ocr", file, 'a pink sign saying "HAT"').stdout) == 1
    listing = call().stdout
    assert "jpeg" in listing and "toy.quality" in listing
    for argv, message in (
        (("smile", file, "x"), "no such reward"),
        (("toy.ocr", tmp_path / "none.png", '"x"'), "none.png"),
        (("toy.ocr", file, "no quotes"), "double quotes"),
        (("toy.ocr",), "usage"),
    ):
        answer = call(*argv)
        assert answer.returncode != 0 and message in answer.stderr and answer.stderr.count("\n") == 1, (
            answer.stderr
        )


def test_rewards_meet_tasks_by_name():
    table = rewards.parse_rewards(["toy.ocr=2", "toy.compose", "jpeg=0.5"])
    assert rewards.rewards_of("ocr", table, ["ocr", "compose"]) == ["ocr", "jpeg"]
    assert rewards.rewards_of("drawbench", table, ["drawbench"]) == ["ocr", "compose", "jpeg"]
    prompts = ['a pink sign saying "HAT"', "one red circle"]
    batch = [("ocr", {"prompt": prompts[0]}), ("compose", {"prompt": prompts[1]})]
    scores = rewards.score_batch(draw(prompts), batch, table, ["ocr", "compose"])
    assert scores["ocr"].isnan().tolist() == [False, True] and not scores["jpeg"].isnan().any()
    jpeg = scores["jpeg"]
    assert torch.allclose(
        rewards.weighted_sum(scores, table, batch, ["ocr", "compose"]),
        torch.stack([(2 * 1 + 0.5 * jpeg[0]) / 2.5, (1 + 0.5 * jpeg[1]) / 1.5]),
    )


def test_the_shipped_toy_is_small():
    size = sum(
        os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(os.path.join(ROOT, "toy")) for f in fs
    )
    assert size < 10e6, size


def test_the_shipped_teachers_are_better_than_the_base():
    """On a quarter of the test prompts each, by clearly more than chance."""
    from flow_sde import SD3, generators

    model = SD3(os.path.join(ROOT, "toy/base"))
    for name in (*TASKS, "quality"):
        model.load_adapter(name, os.path.join(ROOT, "toy/teachers", name))
        prompts = toy.split_prompts(name if name in TASKS else "compose")["test"][:64]
        base, teacher = (
            getattr(toy, name)(
                model.generate(prompts, generators(0, 0, range(64)), 10, 32, who), prompts
            ).mean()
            for who in ("base", name)
        )
        assert teacher > base + (0.1 if name in ("compose", "ocr") else 0.3), (name, base, teacher)


def test_ci_runs_the_readmes_test_command():
    command = [
        line
        for line in open(os.path.join(ROOT, "README.md"))
        if "python -m pytest" in line and line.startswith("python3 -m venv")
    ]
    assert len(command) == 1 and command[0] in open(os.path.join(ROOT, ".ci/run")).read()
