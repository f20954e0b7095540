"""What few_steps.sh measured, as tables and pictures. Reads out/few; writes few_steps.md, few_steps.png and
few_steps_samples.png into this folder.

    python experiments/few_steps.py

± is the standard error over seeds; in a difference, which is paired by seed, prompt and noise, of seeds and
prompts. SD3's schedule ends with a step from
t = 0.009 that moves nothing: of n steps n - 1 count, and only these are taught."""

import json
import math
import pathlib
import statistics
import sys

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the scripts lie one folder above
from experiments.tables import mean_gap, picture_scores
from flow_sde import die, load_prompts, save_grid, write
from rewards import read_picture

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE.parent / "out/few"
STEPS = (1, 2, 3, 4, 6, 10)
TASKS = ("compose", "ocr", "scene", "blue", "green", "red")
ROWS = {  # {model: its label}
    "base": "base",
    "sum": "sum of the six LoRAs",
    "teachers": "teachers, each on its own task",
    "many": "student of 10 steps (`python distill.py`)",
    "sft": "then SFT for 4 steps, off-policy",
    "four": "**then Flow-OPD for 4 steps**",
    "two": "**then Flow-OPD for 2 steps**",
    "guided": "4 steps, compose and ocr taught with guidance 1.5",
}


def rows_of(evaluation):
    """{model without its seed: its rows of an evaluation}."""
    path, found = RUNS / evaluation / "results.json", {}
    if not path.exists():
        die(f"{path} is missing: bash experiments/few_steps.sh makes it")
    for row in json.loads(path.read_text()):
        found.setdefault(row["model"].rstrip("0123456789"), []).append(row)
    return found


def measured(steps):
    """{model: [{task: score, "quality": score}, one a seed]} on test prompts in so many steps."""
    found = {name: [row["scores"] for row in rows] for name, rows in rows_of(f"test-{steps}").items()}
    own, pictures = {}, {}
    for task in TASKS:
        [row] = rows_of(f"own-{steps}-{task}")[task]
        own[task], pictures[task] = row["scores"][task], (row["n"], row["scores"]["quality"])
    total = sum(n for n, _ in pictures.values())
    return found | {"teachers": [own | {"quality": sum(n * score for n, score in pictures.values()) / total}]}


def spread(values):
    """A mean and, of several seeds, its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def table(title, cells):
    """cells: {model: {steps: (mean, error)}}."""
    lines = [f"### {title}\n", "| steps | " + " | ".join(map(str, STEPS)) + " |", "|---" * 7 + "|"]
    for name, label in ROWS.items():
        texts = [label]
        for n in STEPS:
            mean, error = cells.get(name, {}).get(n, (None, None))
            texts.append("" if mean is None else f"{mean:.3f}" + (f" ± {error:.3f}" if error else ""))
        if any(texts[1:]):
            lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def difference(ours, theirs, reward=None):
    """How far (steps, model) is above another, (mean, error): of the mean of the tasks, or of a reward's mean
    over all pictures. theirs may be "teachers", which have no seed."""
    (steps, model), (other_steps, other), gaps = ours, theirs, []  # gaps: of each task (seeds, pictures)
    seeds = sorted(row["model"].removeprefix(model) for row in rows_of(f"test-{steps}")[model])
    for task in TASKS:
        of_seeds = []
        for seed in seeds:
            folder = f"own-{other_steps}-{task}/{task}"
            if other != "teachers":
                folder = f"test-{other_steps}/{other}{seed}"
            one = picture_scores(RUNS / f"test-{steps}/{model}{seed}" / task, reward or task)
            another = picture_scores(RUNS / folder / task, reward or task)
            of_seeds.append([one[picture] - another[picture] for picture in sorted(one)])
        gaps.append(torch.tensor(of_seeds, dtype=torch.float64))
    total = sum(gap.shape[1] for gap in gaps)
    weights = [gap.shape[1] / total if reward else 1 / len(TASKS) for gap in gaps]
    mean, error = mean_gap(gaps, weights)
    return f"{mean:+.3f} ± {error:.3f}"


def grid():
    """The same prompts and noise by steps."""
    rows = {"teachers, 10 steps": None, "student, 10": (10, "many0"), "student, 4": (4, "many0")}
    rows |= {"SFT, 4": (4, "sft0"), "4-step student, 4": (4, "four0"), "teachers, 2": None}
    rows |= {"student, 2": (2, "many0"), "2-step student, 2": (2, "two0")}
    pictures, texts = {name: [] for name in rows}, []
    for task in TASKS:
        file = HERE.parent / f"toy/prompts/{'scene_dawn' if task == 'scene' else task}_test.txt"
        texts += [row["prompt"] for row in load_prompts(task, str(file))[:2]]
        for name, place in rows.items():
            steps, model = place or (int(name.split()[1]), None)
            folder = RUNS / (f"test-{steps}/{model}" if model else f"own-{steps}-{task}/{task}") / task
            files = sorted((folder / "samples").glob("*.png"), key=lambda file: file.stem[-6:])
            pictures[name] += [read_picture(str(file)) for file in files[:2]]
    save_grid(str(HERE / "few_steps_samples.png"), pictures, texts)


def figure(panels):
    """panels: {title: cells as table's}."""
    drawn, axes = plt.subplots(1, len(panels), figsize=(10, 5), layout="constrained")
    for axis, (title, cells) in zip(axes, panels.items()):
        for name, label in ROWS.items():
            steps = [n for n in STEPS if n in cells.get(name, {})]
            means, errors = zip(*[cells[name][n] for n in steps])
            style = dict(fmt="--o" if name in ("base", "sum", "teachers") else "-o", ms=3)
            axis.errorbar(steps, means, [e or 0 for e in errors], label=label.strip("*"), **style)
        axis.set(title=title, xlabel="sampling steps, one forward each", xscale="log")
        axis.set_xticks(STEPS, map(str, STEPS))
        axis.minorticks_off()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    drawn.savefig(HERE / "few_steps.png", dpi=90)


def main():
    scores = {n: measured(n) for n in STEPS}
    base, best = scores[10]["base"][0], scores[10]["teachers"][0]
    closed, quality, diversity = ({name: {} for name in ROWS} for _ in range(3))
    for n in STEPS:
        for name, rows in scores[n].items():
            shares = [[(row[t] - base[t]) / (best[t] - base[t]) for t in TASKS] for row in rows]
            closed[name][n] = spread([statistics.fmean(share) for share in shares])
            quality[name][n] = spread([row["quality"] for row in rows])
    for n in (2, 4, 10):
        for name, rows in rows_of(f"pairs-{n}").items():
            diversity[name][n] = spread([row["scores"]["diversity"] for row in rows])
    page = [
        table("Gap closed: 0 the base in ten steps, 1 the teachers in ten, mean of the six tasks", closed),
        table("Quality, all pictures", quality),
        table("Diversity within a prompt (validation prompts, two pictures each)", diversity),
    ]
    lines = ["### Differences\n", "| | mean of the tasks | quality |", "|---|---|---|"]
    pairs = {
        "4-step student in 4, over the student in 10": ((4, "four"), (10, "many")),
        "4-step student in 4, over the student in 4": ((4, "four"), (4, "many")),
        "4-step student in 4, over SFT in 4": ((4, "four"), (4, "sft")),
        "2-step student in 2, over the student in 2": ((2, "two"), (2, "many")),
        "2-step student in 2, over teachers in 2": ((2, "two"), (2, "teachers")),
        "2-step student in 2, over the student in 10": ((2, "two"), (10, "many")),
        "guided 4-step student in 4, over the student in 10": ((4, "guided"), (10, "many")),
    }
    for label, pair in pairs.items():
        lines.append(f"| {label} | {difference(*pair)} | {difference(*pair, 'quality')} |")
    page.append("\n".join(lines))
    lines = ["### On a Turbo, in four steps\n", "| model | " + " | ".join([*TASKS, "quality"]) + " |"]
    lines.append("|---" * 8 + "|")
    labels = {"base": "the Turbo", "many": "the 10-step student's LoRA on it", "turbo": "**taught on it**"}
    found = rows_of("turbo-4") | {"of the base": rows_of("test-4")["four"]}
    for name, label in (labels | {"of the base": "*4-step student of the base*"}).items():
        texts = []
        for column in (*TASKS, "quality"):
            mean, error = spread([row["scores"][column] for row in found[name]])
            texts.append(f"{mean:.3f}" + (f" ± {error:.3f}" if error else ""))
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    page.append("\n".join(lines))
    write(str(HERE / "few_steps.md"), "\n\n".join(page) + "\n")
    figure({"gap closed": closed, "quality": quality})
    grid()
    print("\n\n".join(page))


if __name__ == "__main__":
    main()
