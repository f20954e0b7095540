"""README's recipes: the real parsers take them, and the settings that result are those of their sources."""

import pathlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from flow_sde import SD3, parse_specs
from rewards import parse_rewards

# What must come out, by number; where a source says nothing, nothing stands here
SOURCES = {
    "1": dict(weighting="kl", init="merge", anchor="CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix", anchor_weight=0.02),
    "2": dict(
        weighting="kl-dt", init="none", anchor="base", anchor_weight=0.04, schedule="alternate", lr=1e-4
    ),
    "3": dict(weighting="dt2", sde="ode", schedule="alternate", anchor="none", group_size=1, guidance=4.5),
    "4": dict(weighting="uniform", sde="ode", num_steps=16, label_steps=1, label_density=[5, 2], guidance=1),
    "5": dict(beta=0.009, clip_range=1e-4, lr=3e-4, noise_level=0.7, sde="flow", sde_window=0),
    "6": dict(sde="cps", sde_window=3, noise_level=0.8, clip_range=1e-5, beta=0, guidance=1, group_size=24),
    "7": dict(ratio_norm=True, beta=0, clip_range=2e-5),
    "8": dict(schedule="alternate", lr=1e-4, group_size=24, batch_size=6, beta=0.009),
}
SOURCES["1"] |= dict(num_steps=10, noise_level=0.7, guidance=4.5, sde="flow", objective="kl", label_steps=0)
SOURCES["1"] |= dict(rank=32, alpha=64, ema=0.9)
SOURCES["2"] |= dict(num_steps=10, noise_level=0.7, guidance=4.5, batch_size=1, group_size=16)
SOURCES["2"] |= dict(rank=32, alpha=64, ema=0.9, max_sequence_length=128)
SOURCES["4"] |= dict(rank=128, alpha=128, lr=2e-4, resolution=1024, steps=3000, dtype="bfloat16")
SOURCES["4"] |= dict(max_sequence_length=256, anchor="none")
SOURCES["5"] |= dict(num_steps=10, guidance=4.5, batch_size=6, group_size=24, updates_per_rollout=2)
SOURCES["5"] |= dict(rank=32, alpha=64, ema=0.9, same_noise=None, ratio_norm=None)
GUIDANCE = {"1": [4.5, 4.5, 4.5], "2": [4.5, 4.5], "3": [1, 4.5, 4.5], "4": [1, 1, 1]}  # of the teachers
WEIGHTS = {"1": [1, 1, 1], "2": [1, 3], "3": [1, 1, 1], "4": [1, 1, 1]}


def parser_of(script):
    """A script's argparse parser: the script is run up to the reading of its flags."""
    source = re.split(r"\nargs = .*parse_args\(", pathlib.Path(ROOT, script).read_text())[0]
    names = {"__doc__": "", "__name__": script}
    exec(source, names)
    return names["parser"]


def recipes():
    """{number: the words of its command}, as bash reads them."""
    page = pathlib.Path(ROOT, "README.md").read_text()
    block = re.search(r"## Recipes.*?```sh\n(.*?)```", page, re.S)[1]
    lines = re.sub(r"^# (\d) .*$", r"number=\1", block, flags=re.M)
    shell = 'torchrun() { printf "%s " $number; printf "%q " "$@"; echo; }\n' + lines
    printed = subprocess.run(["bash", "-eu"], input=shell, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in printed.splitlines()]
    return {number: words for number, *words in commands}


@pytest.mark.parametrize("number", SOURCES)
def test_recipe(number):
    processes, script, *words = recipes()[number]
    assert processes == "--nproc_per_node=8"
    assert script == ("distill.py" if number in GUIDANCE else "train_teacher.py")
    parser = parser_of(script)
    parser.set_defaults(**SD3.defaults)
    args = parser.parse_args(words)
    assert args.model == "stabilityai/stable-diffusion-3.5-medium"
    assert {name: getattr(args, name) for name in SOURCES[number]} == SOURCES[number]
    if script == "distill.py":
        teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
        assert teachers.keys() == parse_specs("--prompts", args.prompts).keys()
        assert [spec["guidance"] for spec in teachers.values()] == GUIDANCE[number]
        assert [spec["weight"] for spec in teachers.values()] == WEIGHTS[number]
    if number == "8":
        prompts = parse_specs("--prompts", args.prompts, weight=1.0)
        assert [spec["weight"] for spec in prompts.values()] == [3, 1, 1]
        weights = {name: reward.weight for name, reward in parse_rewards(args.reward).items()}
        assert weights == {"geneval": 0.8, "ocr": 0.8, "pickscore": 0.8, "deqa": 0.2}
