"""The commands of README.md and the recipes of experiments/README.md: the real parsers take them, and what a
recipe sets is what its source sets."""

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
    "1": dict(weighting="kl", init="out/merge/lora", anchor_weight=0.02, ema=0.9),
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
SOURCES["1"] |= dict(anchor="CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix")
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


def commands(shell, folder):
    """The commands for python and torchrun in shell lines, as bash reads them: [[recipe, word, ...], ...],
    `recipe` as the lines set it. Nothing runs, and nothing is downloaded."""
    stubs = """
        python() { printf "%s " "${recipe:-none}"; printf "%q " "$@"; echo; }
        torchrun() { python "$@"; }
        curl() { :; }
        hf() { :; }
    """
    how = dict(capture_output=True, text=True, check=True, cwd=folder)
    printed = subprocess.run(["bash", "-eu"], input=stubs + shell, **how).stdout
    return [shlex.split(line) for line in printed.splitlines()]


def recipes(folder):
    """{number: its commands, each a list of words}."""
    page = pathlib.Path(ROOT, "experiments/README.md").read_text()
    block = re.search(r"## Recipes.*?```sh\n(.*?)```", page, re.S)[1]
    found = {}
    for number, *words in commands(re.sub(r"^# (\d) .*$", r"recipe=\1", block, flags=re.M), folder):
        found.setdefault(number, []).append(words)
    return found


def test_the_commands_of_the_readme(tmp_path):
    page = pathlib.Path(ROOT, "README.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, re.S))
    shell = re.sub(r"^python3 .*$", "", blocks, flags=re.M)  # the environment's
    scripts = []
    for _, *words in commands(shell, tmp_path):
        if words[0].startswith("--nproc_per_node"):
            words = words[1:]
        script, *flags = words
        parser_of(script).parse_args(flags)
        scripts.append(script)
    assert set(scripts) == {"distill.py", "sample.py", "evaluate.py", "train_teacher.py"}


@pytest.mark.parametrize("number", SOURCES)
def test_recipe(number, tmp_path):
    *_, (processes, script, *words) = recipes(tmp_path)[number]
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


def test_recipe_1_trains_the_rank_of_the_paper(tmp_path):
    """The paper's student has rank 32. Training keeps the rank of --init, so the merge must have it."""
    merge_command, training_command = recipes(tmp_path)["1"]
    assert merge_command[:2] == ["cold_start.py", "merge"]
    merge = parser_of("cold_start.py").parse_args(merge_command[1:])
    student = parser_of("distill.py").parse_args(training_command[2:])
    assert (merge.method, merge.rank) == ("svd", 32)
    assert (merge.model, merge.teachers) == (student.model, student.teachers)
    assert student.init == f"{merge.out}/lora"
