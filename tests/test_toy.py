"""The toy world: prompts are disjoint and parse, scorers know good from bad, the shipped models are what
README says; and the rewards that need no model."""

import pathlib

import numpy as np
import pytest
import torch
from conftest import ROOT, TASKS, refused, run
from PIL import Image

import rewards
import toy
from flow_sde import SD3, generators, load_prompts
from toy.__main__ import identity_vae, pictures


def draw(prompts, damage=False):
    return pictures(prompts, np.random.default_rng(0), damage)


@pytest.mark.parametrize("task", TASKS)
def test_prompts(task):
    split, everything = {}, []
    for name in ("train", "val", "test"):
        rows = load_prompts(task, f"{ROOT}/toy/prompts/{task}_{name}.txt")
        split[name] = [row["prompt"] for row in rows]
        everything += split[name]
    assert split == toy.split_prompts(task)
    assert len(set(everything)) == len(everything) and len(split["test"]) >= 256
    assert set(everything) <= set(toy.all_prompts(task))
    assert {toy.parse(prompt)[0] for prompt in toy.all_prompts(task)} == {task}


def test_parts_of_the_scene_prompts():
    for name, whole in toy.split_prompts("scene").items():
        parts = []
        for part, sky in toy.PARTS.items():
            rows = load_prompts(part, f"{ROOT}/toy/prompts/{part}_{name}.txt")
            prompts = [row["prompt"] for row in rows]
            assert prompts == toy.split_prompts(part)[name] and len(prompts) > 20
            assert all(prompt.endswith(f"at {sky}") for prompt in prompts)
            parts += prompts
        assert sorted(parts) == sorted(whole)


def test_styles_are_colours():
    picture = torch.tensor([0.5, 0.2, 0.4])[None, :, None, None].expand(1, 3, 32, 32)
    for style, score in {"red": 0.2, "green": -0.25, "blue": 0.05}.items():
        assert getattr(toy, style)(picture).tolist() == pytest.approx([score]), style


@pytest.mark.parametrize("task", TASKS)
def test_scorers_know_good_from_bad(task):
    prompts, score = toy.split_prompts(task)["test"], getattr(toy, task)
    clean, damaged, blank = draw(prompts), draw(prompts, damage=True), torch.full((256, 3, 32, 32), 0.5)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert score(clean, prompts).shape == (256,)
    assert score(clean, prompts).mean() > 0.98
    assert score((clean + 0.05 * noise).clamp(0, 1), prompts).mean() > 0.95
    assert score(damaged, prompts).mean() < 0.9
    assert score(blank, prompts).max() == 0
    assert toy.quality(clean).mean() > 0.9
    assert toy.quality(0.55 + 0.4 * (clean - 0.55)).mean() < 0.1
    assert toy.quality(blank).max() == 0
    assert toy.calm(blank).min() == 1 > toy.calm(clean).mean() > toy.calm(clean + 0.1 * noise).mean()
    if task != "scene":  # another prompt's picture is a wrong picture
        assert score(clean.roll(1, 0), prompts).mean() < 0.5


def test_what_is_asked_for_is_what_is_counted():
    image = draw(["two red circles and one blue square"])
    for prompt, score in {
        "two red circles and one blue square": 1,
        "two red circles": 0.5,  # one thing too many, of two asked for
        "three red circles and one blue square": 0.75,  # one missing, of four
        "two blue circles and one blue square": 0,  # two missing, two too many
    }.items():
        assert toy.compose(image, [prompt]).item() == score, prompt
    sign = draw(['a yellow sign saying "HAT"'])
    assert toy.read_letters(sign) == ["HAT"]
    assert toy.ocr(sign, ['a white sign saying "HTT"']).item() == pytest.approx(2 / 3)


def test_the_identity_vae():
    vae, x = identity_vae(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.sample()
        assert (z - x).abs().max() < 1e-4 and (vae.decode(z).sample - x).abs().max() < 1e-4


def test_rewards_by_command_line(tmp_path, capsys):
    file = tmp_path / "sign.png"
    picture = draw(['a pink sign saying "HAT"'])[0].movedim(0, -1).numpy()
    Image.fromarray((picture * 255).astype("uint8")).save(file)
    run("rewards.py", "toy.ocr", file, 'a pink sign saying "HAT"')
    assert float(capsys.readouterr().out) == 1
    run("rewards.py")
    listing = capsys.readouterr().out
    assert "jpeg" in listing and "toy.quality" in listing
    assert "no such reward" in refused("rewards.py", "smile", file, "x")
    assert "none.png" in refused("rewards.py", "toy.ocr", tmp_path / "none.png", '"x"')
    assert "double quotes" in refused("rewards.py", "toy.ocr", file, "no quotes")
    assert "usage" in refused("rewards.py", "toy.ocr")


def test_rewards_meet_tasks_by_name():
    table = rewards.parse_rewards(["toy.ocr=2", "toy.compose", "jpeg=0.5"])
    assert rewards.rewards_of("ocr", table, ["ocr", "compose"]) == ["ocr", "jpeg"]
    assert rewards.rewards_of("drawbench", table, ["drawbench"]) == ["ocr", "compose", "jpeg"]
    prompts = ['a pink sign saying "HAT"', "one red circle"]
    batch = [("ocr", {"prompt": prompts[0]}), ("compose", {"prompt": prompts[1]})]
    scores = rewards.score_batch(draw(prompts), batch, table, ["ocr", "compose"])
    jpeg = scores["jpeg"]
    assert scores["ocr"].isnan().tolist() == [False, True] and not jpeg.isnan().any()
    expected = torch.stack([(2 * 1 + 0.5 * jpeg[0]) / 2.5, (1 + 0.5 * jpeg[1]) / 1.5])
    assert torch.allclose(rewards.weighted_sum(scores, table, batch, ["ocr", "compose"]), expected)


def test_the_shipped_toy_is_small():
    assert sum(file.stat().st_size for file in pathlib.Path(ROOT, "toy").rglob("*")) < 10e6


def test_the_shipped_teachers_are_better_than_the_base():
    """On 16 test prompts each, by clearly more than chance."""
    model = SD3(f"{ROOT}/toy/base")
    leads = {"compose": 0.1, "ocr": 0.1, "scene": 0.3, "quality": 0.3, "blue": 0.1, "green": 0.05, "red": 0.2}
    for name, least in leads.items():
        model.load_adapter(name, f"{ROOT}/toy/teachers/{name}")
        task = "compose" if name == "quality" else name
        prompts, means = toy.split_prompts(task)["test"][:16], []
        for adapter in ("base", name):
            images = model.generate(prompts, generators(0, 0, range(16)), 10, 32, adapter)
            means.append(getattr(toy, name)(images, prompts).mean().item())
        assert means[1] > means[0] + least, (name, means)


def test_ci_runs_the_readmes_test_command():
    lines = pathlib.Path(ROOT, "README.md").read_text().splitlines()
    [command] = [line for line in lines if line.startswith("python3 -m venv") and "pytest" in line]
    assert command in pathlib.Path(ROOT, ".ci/run").read_text()
