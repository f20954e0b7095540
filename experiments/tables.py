"""What reproduce.sh measured, as tables and figures. Reads out/reproduce; writes tables.md, tables.json,
curves.png and samples.png into this folder, and the tables also into its README.md, between two comments.

    python experiments/tables.py

An arm that was trained with several seeds has their mean ± its standard error over the seeds; an arm with one
run has the standard error over its prompts. "average" is of the three routed tasks; quality, which no prompt
is routed by, stands beside it.
"""

import functools
import json
import math
import pathlib
import re
import statistics
import sys

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the scripts lie one folder above
from flow_sde import die, load_prompts, save_grid, write, write_json
from rewards import markdown, read_picture

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE.parent / "out/reproduce"
TASKS = ("compose", "ocr", "scene")
TEACHERS = {f"{task} (GRPO teacher)": f"{task}-0" for task in TASKS}

# Of each table: the arms' labels and names, those of reproduce.sh
STACKING = {
    "base": "base",
    "GRPO on ocr": "ocr",
    "GRPO on ocr, scene": "stack2",
    "GRPO on ocr, scene, compose (GRPO-Mix)": "mix",
}
MAIN = {
    "base": "base",
    **TEACHERS,
    "these three, each on its own task": "teachers",
    "quality (GRPO teacher, the anchor)": "quality-0",
    "GRPO-Mix": "mix",
    "SFT alone": "sft",
    "merge alone": "merge",
    "Flow-OPD from SFT": "opd-sft",
    "**Flow-OPD from merge**": "opd-merge",
    "Flow-OPD from merge, every seed with teachers of its own": "opd-own",
    "Flow-OPD from merge, `--weighting kl` (the paper's)": "opd-kl",
    "Flow-OPD from merge, compose and ocr taught with guidance 1.5": "opd-guided",
    "GRPO-Mix, sampled with guidance 1.5 (twice the cost)": "mix-guided",
}
COLD_STARTS = {
    "no cold start": "base",
    "no cold start, GRPO-Mix": "mix-none",
    "no cold start, Flow-OPD": "opd-none",
    "SFT": "sft",
    "SFT, then GRPO-Mix": "mix-sft",
    "SFT, then Flow-OPD": "opd-sft",
    "merge": "merge",
    "merge, then GRPO-Mix": "mix-merge",
    "merge, then Flow-OPD": "opd-merge",
    "`--weighting kl` (the paper's): no cold start, Flow-OPD": "opd-kl-none",
    "`--weighting kl`: SFT": "sft-kl",
    "`--weighting kl`: SFT, then Flow-OPD": "opd-kl-sft",
    "`--weighting kl`: merge, then Flow-OPD": "opd-kl",
}
MAR = {
    "base": "base",
    "the anchor": "quality-0",
    "GRPO-Mix": "mix",
    "merge": "merge",
    "Flow-OPD, no MAR": "opd-noanchor",
    "MAR, the base as anchor": "opd-baseanchor",
    "MAR, the quality teacher as anchor": "opd-anchor",
    "MAR, the quality teacher as anchor, λ = 0.2": "opd-strong",
}
NEW_PROMPTS = {
    "base": "base",
    **TEACHERS,
    "GRPO-Mix": "mix",
    "merge": "merge",
    "Flow-OPD from merge": "opd-merge",
}
ONE_CHANGE = {
    "merge, the start": "merge",
    "**the default**": "try-default",
    "`--objective ppo --lr 5e-4 --clip-range 0.1` (two updates a rollout)": "try-ppo",
    "`--objective ppo-paper --lr 5e-4 --clip-range 0.1` (two)": "try-ppo-paper",
    "`--weighting kl`": "try-kl",
    "`--sde ode`": "try-ode",
    "`--sde cps`": "try-cps",
    "`--label-steps 4`": "try-half",
    "`--label-steps 1`": "try-one",
    "`--label-steps 1 --label-density 5 2`, 20 rollouts": "try-danceopd",
    "`--schedule alternate`": "try-alternate",
    "two teachers: compose, ocr": "try-two-teachers",
    "one teacher: compose": "try-one-teacher",
    "teachers guided by 1.5, the student by 1": "try-guided",
    "merge `--method svd`, the start": "merge-svd",
    "from the svd merge": "try-svd",
    "merge `--method factors`, the start": "merge-factors",
    "from the factors merge": "try-factors",
}
SECONDS = {
    "GRPO-Mix (256 pictures, 4 updates)": "mix",
    "SFT (32 pictures, one update, as the others)": "sft",
    "Flow-OPD": "opd-merge",
    "with two guided teachers": "opd-guided",
    "without an anchor": "try-default",
    "and half of the steps labelled": "try-half",
    "or one": "try-one",
    "or ODE rollouts": "try-ode",
    "or ppo (two updates)": "try-ppo",
    "or from a start of rank 16": "try-svd",
}


# ------------------------------------------------------------------------------------------------------------
# what was measured


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def mean_of_tasks(row):
    """The average of a row's three tasks, and its standard error."""
    score = sum(row["scores"][task] for task in TASKS) / 3
    return score, math.sqrt(sum(row["stderr"][task] ** 2 for task in TASKS)) / 3


@functools.cache
def read(evaluation):
    """An evaluation's rows, each with its average, by arm and by run: {"mix": [row of seed 0, of seed 1,
    ...], "mix-0": [row], "base": [row]}. "teachers" is all three, each on its own task, as one model: about
    what a student of theirs can reach."""
    path = RUNS / evaluation / "results.json"
    if not path.exists():
        die(f"{path} is missing: bash experiments/reproduce.sh makes it")
    arms = {}
    for row in json.loads(path.read_text()):
        if set(TASKS) <= row["scores"].keys():
            average, row["stderr"]["average"] = mean_of_tasks(row)
            first = {task: row["scores"][task] for task in TASKS} | {"average": average}
            row["scores"] = first | row["scores"]
        arm = re.sub(r"-\d+$", "", row["model"])
        for name in {row["model"], arm}:
            arms.setdefault(name, []).append(row)
    teachers = {task: arms[f"{task}-0"][0] for task in TASKS if f"{task}-0" in arms}
    if len(teachers) == 3 and all("average" in row["scores"] for row in teachers.values()):
        together = {"model": "{task}-0", "scores": {}, "stderr": {}}
        for task, row in teachers.items():
            together["scores"][task], together["stderr"][task] = row["scores"][task], row["stderr"][task]
        together["scores"]["average"], together["stderr"]["average"] = mean_of_tasks(together)
        arms["teachers"] = [together]
    return arms


def summary(rows, label):
    """The rows of an arm as one: over seeds if there are several, else over prompts."""
    out = {"model": label, "runs": len(rows), "scores": {}, "stderr": {}}
    for name in rows[0]["scores"]:
        values = [row["scores"][name] for row in rows]
        out["scores"][name] = statistics.fmean(values)
        out["stderr"][name] = rows[0]["stderr"].get(name)
        if len(rows) > 1:
            out["stderr"][name] = statistics.stdev(values) / math.sqrt(len(rows))
    return out


def scores_by_picture(evaluation, run, task):
    folder = RUNS / evaluation / run["model"].format(task=task) / task
    scores = {}
    for file in folder.glob("scores*.jsonl"):
        for row in read_lines(file):
            if row["reward"].split()[0] == f"toy.{task}":
                scores[row["picture"]] = row["score"]
    return scores


def paired(evaluation, runs, others, tasks=TASKS):
    """How far an arm is above another on the average of `tasks`, (mean, standard error): seed by seed, prompt
    by prompt on the same noise, which is far more exact than two tables' errors. The error has two parts, of
    the prompts (gaps averaged over seeds) and of the seeds; an arm with one run is set against every seed of
    the other, and adds no seed error of its own."""
    gaps = []  # of each task: (seeds, prompts)
    for task in tasks:
        ours = [scores_by_picture(evaluation, run, task) for run in runs]
        theirs = [scores_by_picture(evaluation, run, task) for run in others]
        pictures, by_seed = sorted(theirs[0]), []
        for k in range(max(len(ours), len(theirs))):
            one, other = ours[k % len(ours)], theirs[k % len(theirs)]
            by_seed.append([one[picture] - other[picture] for picture in pictures])
        gaps.append(torch.tensor(by_seed, dtype=torch.float64))
    of_seeds = sum(gap.mean(1) for gap in gaps) / len(tasks)
    variance = sum(gap.mean(0).var() / gap.shape[1] for gap in gaps) / len(tasks) ** 2
    if len(of_seeds) > 1:
        variance += of_seeds.var() / len(of_seeds)
    return of_seeds.mean().item(), math.sqrt(variance)


def log(run, key):
    """[(step, value)] of a run's log."""
    return [(row["step"], row[key]) for row in read_lines(RUNS / run / "log.jsonl") if key in row]


def median_seconds(arm):
    seconds = []
    for folder in RUNS.glob(f"{arm}-[0-9]"):
        seconds += [value for _, value in log(folder.name, "seconds")]
    return sorted(seconds)[len(seconds) // 2]


# ------------------------------------------------------------------------------------------------------------
# the page


page, tables = [], {}


def table(title, evaluation, arms, default=None):
    """Add a table of {label: arm} to the page; with `default`, also what each arm gains over that arm."""
    found, rows = read(evaluation), []
    for label, arm in arms.items():
        if arm in found:
            row = summary(found[arm], label)
            if default and arm != default:
                gap, error = paired(evaluation, found[arm], found[default])
                row["scores"]["over the default"], row["stderr"]["over the default"] = gap, error
            rows.append(row)
    seeds = sorted({str(row["runs"]) for row in rows if row["runs"] > 1})
    note = f"{'/'.join(seeds)} seeds each"
    single = [row["model"] for row in rows if row["runs"] == 1]
    if single:
        note += f"; one run: {'; '.join(single)}"
    tables[title] = rows
    page.append(f"### {title}\n\n{markdown(rows)}\n\n{note}.")


def teachers_by_seed():
    parts = []
    for task in TASKS:
        runs = read("test")[task]
        own = summary(runs, task)
        single = ", ".join(f"{run['scores'][task]:.3f}" for run in runs)
        parts.append(f"{task} {own['scores'][task]:.3f} ± {own['stderr'][task]:.3f}, {single}")
    page.append(f"These teachers are of seed 0. Over the seeds, on their own tasks: {'; '.join(parts)}.")


def flow_opd_over_others():
    test, rows = read("test"), []
    for label, arm in MAIN.items():
        if arm not in ("opd-merge", "opd-own", "opd-kl", "opd-guided"):
            continue
        gaps = [paired("test", test[arm], test[mix]) for mix in ("mix", "mix-guided")]
        for task in TASKS:
            teacher = f"{task}-0"
            if arm == "opd-own":
                teacher = task
            elif arm == "opd-guided" and task != "scene":
                teacher = f"{task}-guided-0"
            gaps.append(paired("test", test[arm], test[teacher], [task]))
        cells = [f"{gap:+.3f} ± {error:.3f} ({gap / error:+.1f})" for gap, error in gaps]
        rows.append(f"| {' | '.join([label, *cells])} |")
    page.append(
        "What Flow-OPD has over GRPO-Mix, and over the teacher of each task, guided if it taught guided; "
        "paired by prompt and noise, in brackets the number of standard errors:\n\n"
        "| model | average, over GRPO-Mix | over it with guidance 1.5 | compose, over its teacher "
        "| ocr | scene |\n|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    gaps = [paired("test", test["teachers"], test[mix]) for mix in ("mix", "mix-guided")]
    plain, guided = (f"{gap:+.3f} ± {error:.3f}" for gap, error in gaps)
    page.append(
        f"The three teachers, each on its own task, are {plain} over GRPO-Mix and {guided} over it with "
        "guidance: about all that a student of theirs can win."
    )


def kl_by_step():
    uniform, paper = (log(run, "kl_by_sigma")[-1][1] for run in ("opd-merge-0", "opd-kl-0"))
    parts = ", ".join(f"{uniform[t] / paper[t]:.2f} at t = {float(t):.2f}" for t in paper)
    share = list(paper.values())[-1] / sum(paper.values())
    page.append(
        "The KL to the teachers at each step of the last rollout, seed 0, over its like under "
        f"`--weighting kl`: {parts}. Under `--weighting kl` {share:.0%} of it is the last step's."
    )


def guided_teachers():
    val, parts = read("val"), []
    for task in TASKS:
        plain, guided = val[f"{task}-0"][0]["scores"][task], val[f"{task}-guided-0"][0]["scores"][task]
        parts.append(f"{task} {plain:.3f}, {guided:.3f}")
    parts = "; ".join(parts)
    page.append(f"The teachers on their own tasks, without guidance and guided by 1.5: {parts}.")


def write_page():
    table("(a) Reward stacking", "test", STACKING)
    table("(b) The main table", "test", MAIN)
    teachers_by_seed()
    flow_opd_over_others()
    kl_by_step()
    title = "(c) Cold starts alone, then GRPO-Mix or Flow-OPD with the same number of pictures, 1280"
    table(title, "test", COLD_STARTS)
    page.append(
        "The pictures are those of the last stage: 5 rollouts and 20 updates of GRPO-Mix, 40 updates of "
        "Flow-OPD. What came before is not counted: the teachers' 11,776 pictures, the anchor's 1,024, SFT's "
        "768. The merge has rank 48, the others 16. Teachers and GRPO-Mix are the best of their validated "
        "checkpoints (here of rollouts 4 and 5), SFT and Flow-OPD the last update."
    )
    title = "(d) MAR, 24 updates: quality on all prompts and diversity within a prompt"
    table(f"{title} (validation prompts, two pictures each)", "pairs", MAR)
    title = (
        "(e) Prompts of kinds that nobody was trained on: three sorts of shapes (compose), one letter (ocr)"
    )
    table(title, "new", NEW_PROMPTS)
    table("(e) Two skills at once: a sign in a scene", "both", NEW_PROMPTS)
    title = "(f) One change at a time, 8 rollouts from the merge without an anchor"
    note = "(validation prompts; the last column is paired by prompt and noise)"
    table(f"{title} {note}", "val", ONE_CHANGE, default="try-default")
    guided_teachers()
    times = ", ".join(f"{label} {median_seconds(arm):.1f}" for label, arm in SECONDS.items())
    page.append(f"Median seconds of a rollout and its updates, one thread, two runs at a time: {times}.")

    text = "\n\n".join(page) + "\n"
    write(HERE / "tables.md", text)
    write_json(HERE / "tables.json", tables)
    readme = (HERE / "README.md").read_text()
    begin, end = "<!-- tables.py writes from here -->\n", "<!-- to here -->"
    write(HERE / "README.md", f"{readme.split(begin)[0]}{begin}\n{text}\n{end}{readme.split(end)[1]}")
    print(text)


# ------------------------------------------------------------------------------------------------------------
# figures


def draw_curves():
    """KL against updates, and validation scores against pictures sampled, teachers dashed."""
    val = read("val")
    figure, (kl_axis, *axes) = plt.subplots(1, 4, figsize=(16, 3.4))
    for k, task in enumerate(TASKS):
        for start, style in (("none", ":"), ("sft", "--"), ("merge", "-")):
            steps, kls = zip(*log(f"opd-{start}-0", f"kl/{task}"))
            kl_axis.plot(steps, kls, style, color=f"C{k}", label=f"{task}, from {start}", linewidth=1)
    kl_axis.set(title="KL to the teacher", xlabel="update", yscale="log")
    kl_axis.legend(fontsize=6)
    kl_axis.grid(alpha=0.3)
    for task, axis in zip(TASKS, axes):
        student = [(0, val["merge"][0]["scores"][task])]
        for arm, rows in val.items():
            if arm.startswith("opd-after-"):
                updates = int(arm.removeprefix("opd-after-"))
                student.append((32 * updates, rows[0]["scores"][task]))
        mix = [(0, val["base"][0]["scores"][task])]
        mix += [(256 * step, score) for step, score in log("mix-0", f"validation/{task}")]
        axis.plot(*zip(*sorted(student)), "o-", markersize=3, label="Flow-OPD from merge")
        axis.plot(*zip(*mix), "s-", markersize=3, label="GRPO-Mix")
        axis.axhline(val[f"{task}-0"][0]["scores"][task], linestyle="--", color="grey", label="its teacher")
        axis.set(title=f"{task} (validation)", xlabel="pictures sampled, without the teachers' own")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=90)


def draw_samples():
    """The same prompts and noise for everyone."""
    models = {"base": "base"} | {f"teacher {task}": f"{task}-0" for task in TASKS}
    models |= {"GRPO-Mix": "mix-0", "merge": "merge", "Flow-OPD": "opd-merge-0"}
    grid, captions = {label: [] for label in models}, []
    for task in TASKS:
        rows = load_prompts(task, str(HERE.parent / f"toy/prompts/{task}_test.txt"))
        captions += [row["prompt"] for row in rows[:4]]
        for label, model in models.items():
            files = (RUNS / "test" / model / task / "samples").iterdir()
            files = sorted(files, key=lambda file: int(file.stem[-6:]))  # PROMPT_000000.png
            grid[label] += [read_picture(str(file)) for file in files[:4]]
    save_grid(str(HERE / "samples.png"), grid, captions)


if __name__ == "__main__":
    write_page()
    draw_curves()
    draw_samples()
    print("experiments/README.md, tables.md, tables.json, curves.png, samples.png")
