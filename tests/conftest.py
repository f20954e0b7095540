import json
import os
import runpy
import signal
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TASKS = ("compose", "ocr", "scene")


def run(script, *argv):
    """Run a script of the project in this process; returns its globals. A user's error arrives as SystemExit with its one line."""
    old = sys.argv, os.getcwd(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = [os.path.join(ROOT, script), *map(str, argv)]
    os.chdir(ROOT)
    try:
        return runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = old[0]
        os.chdir(old[1])
        signal.signal(signal.SIGINT, old[2][0]), signal.signal(signal.SIGTERM, old[2][1])


def refused(script, *argv):
    """The one line with which a script refuses its input."""
    with pytest.raises(SystemExit) as caught:
        run(script, *argv)
    message = str(caught.value.code)
    assert "\n" not in message and message.startswith(script), message
    return message


def random_lora(folder, seed, rank=4, alpha=8, size=0.2):
    """A LoRA for the toy with random weights, saved in `folder`."""
    from flow_sde import SD3, save_lora
    model = SD3(os.path.join(ROOT, "toy/base"))
    model.new_adapter("x", rank, alpha, seed)
    gen = torch.Generator().manual_seed(seed)
    save_lora({n: (A, torch.randn(B.shape, generator=gen) * size / rank, al) for n, (A, B, al) in model.lora("x").items()}, folder)
    return str(folder)


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """Three random teachers, an anchor and a student: {name: folder}."""
    root = tmp_path_factory.mktemp("loras")
    return {name: random_lora(root / name, seed) for seed, name in enumerate((*TASKS, "anchor", "student"), 1)}


def few(prompts, n, folder):
    """The first n prompts of each toy task's split in files of their own: ["task=file", ...]."""
    specs = []
    for task in TASKS:
        path = os.path.join(folder, f"{task}_{prompts}.txt")
        with open(path, "w") as f:
            f.writelines(open(os.path.join(ROOT, f"toy/prompts/{task}_{prompts}.txt")).readlines()[:n])
        specs.append(f"{task}={path}")
    return specs


def distill(loras, out, **changes):
    """Run distill.py for a few quick updates on the random teachers; keyword arguments change its flags."""
    flags = {"teachers": [f"{t}={loras[t]}" for t in TASKS], "init": loras["student"], "anchor": loras["anchor"], "batch_size": 6,
             "micro_batch_size": 6, "num_steps": 4, "steps": 1, "save_every": 100, "eval_every": 100, "eval_num_steps": 2,
             "eval_prompts": few("test", 3, os.path.dirname(out)), "out": out} | changes
    argv = []
    for flag, value in flags.items():
        argv += ["--" + flag.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    return run("distill.py", *argv)


def read_log(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
