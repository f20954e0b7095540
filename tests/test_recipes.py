"""README's recipes: the real parsers take them, and the settings that result are those of their sources."""

import os
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from flow_sde import SD3, parse_specs
from rewards import parse_rewards

SOURCES = {  # what must come out, by number; where a source says nothing, nothing stands here
    "1": (
        "distill.py",
        dict(
            weighting="kl",
            init="merge",
            anchor="CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix",
            anchor_weight=0.02,
            num_steps=10,
            noise_level=0.7,
            guidance=4.5,
            sde="flow",
            objective="kl",
            rank=32,
            alpha=64,
            ema=0.9,
            label_steps=0,
        ),
    ),
    "2": (
        "distill.py",
        dict(
            weighting="kl-dt",
            schedule="alternate",
            anchor="base",
            anchor_weight=0.04,
            init="none",
            lr=1e-4,
            num_steps=10,
            noise_level=0.7,
            guidance=4.5,
            batch_size=1,
            group_size=16,
            max_sequence_length=128,
            rank=32,
            alpha=64,
            ema=0.9,
        ),
    ),
    "3": (
        "distill.py",
        dict(weighting="dt2", sde="ode", schedule="alternate", anchor="none", group_size=1, guidance=4.5),
    ),
    "4": (
        "distill.py",
        dict(
            weighting="uniform",
            sde="ode",
            num_steps=16,
            label_steps=1,
            label_density=[5, 2],
            guidance=1,
            rank=128,
            alpha=128,
            lr=2e-4,
            resolution=1024,
            steps=3000,
            dtype="bfloat16",
            max_sequence_length=256,
            anchor="none",
        ),
    ),
    "5": (
        "train_teacher.py",
        dict(
            beta=0.009,
            clip_range=1e-4,
            lr=3e-4,
            num_steps=10,
            guidance=4.5,
            noise_level=0.7,
            sde="flow",
            batch_size=6,
            group_size=24,
            updates_per_rollout=2,
            rank=32,
            alpha=64,
            ema=0.9,
            same_noise=None,
            ratio_norm=None,
            sde_window=0,
        ),
    ),
    "6": (
        "train_teacher.py",
        dict(sde="cps", sde_window=3, noise_level=0.8, clip_range=1e-5, beta=0, guidance=1, group_size=24),
    ),
    "7": ("train_teacher.py", dict(ratio_norm=True, beta=0, clip_range=2e-5)),
    "8": ("train_teacher.py", dict(schedule="alternate", lr=1e-4, group_size=24, batch_size=6, beta=0.009)),
}


def recipes():
    """{number: the words of its command}, as bash reads them."""
    block = re.search(r"## Recipes.*?```sh\n(.*?)```", open(os.path.join(ROOT, "README.md")).read(), re.S)[1]
    lines = re.sub(r"^# (\d) .*$", r"number=\1", block, flags=re.M)
    shell = 'torchrun() { printf "%s " $number; printf "%q " "$@"; echo; }\n' + lines
    printed = subprocess.run(["bash", "-eu"], input=shell, capture_output=True, text=True, check=True).stdout
    return {words[0]: words[1:] for words in map(shlex.split, printed.splitlines())}


@pytest.mark.parametrize("number", SOURCES)
def test_recipe(number):
    script, expected = SOURCES[number]
    words = recipes()[number]
    assert words[:2] == ["--nproc_per_node=8", script]
    names = {"__doc__": "", "__name__": script}
    exec(
        open(os.path.join(ROOT, script)).read().split("\nargs = parse_args(")[0], names
    )  # up to the reading of the flags
    parser = names["parser"]
    parser.set_defaults(**SD3.defaults)
    args = parser.parse_args(words[2:])
    assert args.model == "stabilityai/stable-diffusion-3.5-medium"
    assert {k: getattr(args, k) for k in expected} == expected
    if script == "distill.py":
        teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
        assert teachers.keys() == parse_specs("--prompts", args.prompts).keys()
        of = lambda key: [spec[key] for spec in teachers.values()]
        assert of("weight") == ([1, 3] if number == "2" else [1, 1, 1])
        assert of("guidance") == {"2": [4.5, 4.5], "3": [1, 4.5, 4.5], "4": [1, 1, 1]}.get(
            number, [4.5, 4.5, 4.5]
        )
    if number == "8":
        assert [s["weight"] for s in parse_specs("--prompts", args.prompts, weight=1.0).values()] == [3, 1, 1]
        assert {name: r.weight for name, r in parse_rewards(args.reward).items()} == {
            "geneval": 0.8,
            "ocr": 0.8,
            "pickscore": 0.8,
            "deqa": 0.2,
        }
