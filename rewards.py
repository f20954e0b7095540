"""Every reward and metric by name. Each is a function (images, prompts, metadata) -> (B,) float32, higher is better:
images (B, 3, H, W) float in [0, 1], prompts a list of B strings, metadata a list of B dicts (the rows of the prompt files).

    python rewards.py                        # list the rewards
    python rewards.py NAME PICTURE PROMPT    # one score

A dotted name is a function of a module beside this file: `toy.ocr` is `ocr` of toy.py, and `mine.smile` would be yours.
In the scripts, `--reward NAME=WEIGHT ...` and `--prompts TASK=FILE ...` meet by name: a reward called like a task (`toy.ocr`
counts as `ocr`) scores that task's prompts only; any other reward is task-agnostic and scores all prompts.
"""

import functools
import importlib
import io
import os
import re
import sys

import numpy as np
import torch

from flow_sde import HERE, die, generators, reduce_sum


# ----------------------------------------------------------------------------------------------------------------------
# rewards

def jpeg(images, prompts=None, metadata=None):
    """JPEG compressibility: minus the size in kB of the picture at quality 95, divided by 500 (DDPO, arXiv 2305.13301)."""
    from PIL import Image
    sizes = []
    for pixels in (images.float().cpu() * 255).round().byte().movedim(1, -1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return -torch.tensor(sizes, dtype=torch.float32) / 500


def ocr(images, prompts, metadata=None):
    """Text rendering, in [0, 1]: text_score of what RapidOCR reads (PP-OCR's models, Apache-2.0, which come with its wheel)."""
    pixels = (images.float().cpu() * 255).round().byte().movedim(1, -1).numpy()
    return torch.tensor([text_score("".join(read_text()(p).txts or ()), prompt) for p, prompt in zip(pixels, prompts)], dtype=torch.float32)


@functools.cache
def read_text():
    """The OCR engine, loaded once: detection and recognition, for upright text, one thread (the other cores sample)."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        die("--reward ocr: pip install rapidocr onnxruntime")
    return RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})


def text_score(read, prompt):
    """How well the text read off a picture matches the first quoted text of its prompt: 1 - min(edit distance, n) / n with n the
    target's length; case and spaces do not count, and a target that stands anywhere in the text read is perfect."""
    quoted = re.search(r'["“](.*?)["”]', prompt)
    if not quoted or not quoted[1].strip():
        raise ValueError(f"an ocr prompt needs its text in double quotes: {prompt!r}")
    target, read = (re.sub(r"\s", "", s).lower() for s in (quoted[1], read))
    return 1.0 if target in read else 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a, b):
    """Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


REWARDS = {"jpeg": jpeg, "ocr": ocr}
TOY = ["toy.compose", "toy.ocr", "toy.scene", "toy.quality"]


# ----------------------------------------------------------------------------------------------------------------------
# using them

def load_reward(name):
    """The reward function of that name."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    if module and os.path.exists(os.path.join(HERE, module + ".py")):
        reward = getattr(importlib.import_module(module), function, None)
        if callable(reward):
            return reward
    die(f"--reward {name}: no such reward; there are {', '.join([*REWARDS, *TOY])}, or module.function")


def parse_rewards(specs):
    """["toy.ocr", "jpeg=0.1"] -> {"ocr": (function, 1.0), "jpeg": (function, 0.1)}."""
    rewards = {}
    for spec in specs or []:
        name, eq, weight = spec.partition("=")
        if eq and not (re.fullmatch(r"\d+\.?\d*|\.\d+", weight) and float(weight)):
            die(f"--reward {spec}: the weight must be a positive number")
        rewards[name.rpartition(".")[2]] = load_reward(name), float(weight or 1)
    return rewards


def rewards_of(task, rewards, tasks):
    """The names of the rewards that score a task's prompts: its own and the task-agnostic ones."""
    return [name for name in rewards if name == task or name not in tasks]


def score_batch(images, batch, rewards, tasks):
    """{reward: (B,) float32, NaN where the reward does not apply}, for a batch of (task, row) pairs."""
    scores = {}
    for name, (function, _) in rewards.items():
        rows = [i for i, (task, _) in enumerate(batch) if name in rewards_of(task, rewards, tasks)]
        scores[name] = torch.full((len(batch),), float("nan"))
        if rows:
            try:
                values = function(images[rows], [batch[i][1]["prompt"] for i in rows], [batch[i][1] for i in rows])
            except ValueError as error:  # a prompt that this reward cannot score
                die(f"--reward {name}: {error}")
            assert values.shape == (len(rows),), f"reward {name} returned {tuple(values.shape)} for {len(rows)} pictures"
            scores[name][rows] = values.float().cpu()
    return scores


def weighted_sum(scores, rewards):
    """The rewards of a batch mixed: sum_i w_i r_i / sum_i w_i over the rewards that apply to a sample. -> (B,)"""
    values = torch.stack(list(scores.values()))
    weights = torch.tensor([rewards[name][1] for name in scores])[:, None] * ~values.isnan()
    return (values.nan_to_num() * weights).sum(0) / weights.sum(0)


def evaluate(model, adapter, prompts, rewards, args, rank=0, world=1, guidance=None, tasks=None, progress=None, stop=None):
    """Mean score and standard error of each reward over the prompts it applies to, one picture a prompt, deterministic sampling.
    Prompt i of a task always starts from the same noise, so the result depends on neither the batch size nor the number of ranks.
    args: eval_num_steps, resolution, eval_batch_size, seed, guidance; tasks: all tasks of the run, if the prompts are of only some.
    -> {"n", "scores", "stderr"}, or None if a process was told to stop (stop: its StopSignal)."""
    items = [(task, row) for task, rows in prompts.items() for row in rows]
    table = {name: torch.zeros(len(items)) for name in rewards}
    mine = list(range(rank, len(items), world))
    for start in range(0, len(mine), args.eval_batch_size):
        if stop and stop.name:
            break
        indices = mine[start:start + args.eval_batch_size]
        batch = [items[i] for i in indices]
        images = model.generate([row["prompt"] for _, row in batch], generators(args.seed, 0, indices), args.eval_num_steps,
                                args.resolution, adapter, args.guidance if guidance is None else guidance)
        for name, values in score_batch(images, batch, rewards, tasks or prompts).items():
            table[name][indices] = values
        if progress:
            progress(len(batch))
    if stop and stop.arrived(model.device):
        return None
    result = {"n": len(items), "scores": {}, "stderr": {}}
    for name, values in table.items():
        values = reduce_sum(values.to(model.device)).cpu()
        values = values[~values.isnan()].double()
        if len(values):  # a reward whose task has no prompts here has no column
            result["scores"][name] = values.mean().item()
            result["stderr"][name] = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return result


def markdown(rows):
    """The results as a Markdown table, one line a model: mean ± standard error."""
    names = list(rows[0]["scores"])
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    cell = lambda r, n: f"{r['scores'][n]:.3f}" + (f" ± {r['stderr'][n]:.3f}" if r["stderr"][n] is not None else "")
    return "\n".join(lines + [f"| {r['model']} | " + " | ".join(cell(r, n) for n in names) + " |" for r in rows])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        for name in [*REWARDS, *TOY]:
            print(f"{name:12} {(load_reward(name).__doc__ or '').strip().splitlines()[0]}")
    elif len(sys.argv) == 4:
        from PIL import Image
        name, picture, prompt = sys.argv[1:]
        reward = load_reward(name)
        try:
            pixels = np.array(Image.open(picture).convert("RGB"))
        except OSError as error:
            die(f"{picture}: {error}")
        image = torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255
        try:
            print(f"{reward(image, [prompt], [{'prompt': prompt}]).item():.4f}")
        except ValueError as error:
            die(str(error))
    else:
        die("usage: rewards.py NAME PICTURE PROMPT, or no argument for the list")
