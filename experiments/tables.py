"""What reproduce.sh measured, as tables and figures: reads out/reproduce, writes experiments/tables.md, tables.json, curves.png, samples.png, and
the tables of README.md.

    python experiments/tables.py

An arm that was trained with several seeds has their mean ± its standard error over the seeds; an arm with one run has the standard error
over its prompts. "average" is of the three routed tasks; quality, which no prompt is routed by, stands beside it.
"""

import glob
import json
import math
import os
import re
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from flow_sde import die, load_prompts, save_grid, write, write_json  # noqa: E402
from rewards import markdown, read_picture  # noqa: E402

RUNS = os.path.join(os.path.dirname(HERE), "out", "reproduce")
TASKS = ("compose", "ocr", "scene")


def read(evaluation):
    """An evaluation's rows, each with its average, by arm and by run: {"mix": [row of seed 0, of seed 1, ...], "mix-0": [row], "base": [row]}."""
    path = os.path.join(RUNS, evaluation, "results.json")
    arms = {}
    for row in (
        json.load(open(path))
        if os.path.exists(path)
        else die(f"{path} is missing: bash experiments/reproduce.sh makes it")
    ):
        if all(t in row["scores"] for t in TASKS):
            row["scores"] = {
                **{t: row["scores"][t] for t in TASKS},
                "average": sum(row["scores"][t] for t in TASKS) / 3,
                **row["scores"],
            }
            row["stderr"]["average"] = math.sqrt(sum(row["stderr"][t] ** 2 for t in TASKS)) / 3
        for arm in {row["model"], re.sub(r"-\d+$", "", row["model"])}:
            arms.setdefault(arm, []).append(row)
    own = {t: arms[f"{t}-0"][0] for t in TASKS if f"{t}-0" in arms and t in arms[f"{t}-0"][0]["scores"]}
    if (
        len(own) == 3
    ):  # the three teachers, each on its own task, as one model: about what a student of theirs can reach
        scores, stderr = ({t: own[t][kind][t] for t in TASKS} for kind in ("scores", "stderr"))
        scores["average"], stderr["average"] = (
            sum(scores.values()) / 3,
            math.sqrt(sum(e**2 for e in stderr.values())) / 3,
        )
        arms["teachers"] = [{"model": "{task}-0", "scores": scores, "stderr": stderr}]
    return arms


def summary(rows, label):
    """The rows of an arm as one: over seeds if there are several, else over prompts."""
    k, out = len(rows), {"model": label, "runs": len(rows), "scores": {}, "stderr": {}}
    for name in rows[0]["scores"]:
        values = [r["scores"][name] for r in rows]
        mean = out["scores"][name] = sum(values) / k
        out["stderr"][name] = (
            math.sqrt(sum((v - mean) ** 2 for v in values) / (k - 1) / k)
            if k > 1
            else rows[0]["stderr"].get(name)
        )
    return out


def table(title, evaluation, arms, default=None):
    """Adds a table of {label: arm} to the page; with `default`, also what each arm gains over that arm."""
    found = read(evaluation)
    rows = [summary(found[arm], label) for label, arm in arms.items() if arm in found]
    for row in rows if default else ():
        if arms[row["model"]] != default:
            row["scores"]["over the default"], row["stderr"]["over the default"] = paired(
                evaluation, found[arms[row["model"]]], found[default]
            )
    tables[title] = rows
    several, one = ([r for r in rows if (r["runs"] > 1) == many] for many in (True, False))
    note = (
        "/".join(sorted({str(r["runs"]) for r in several}))
        + " seeds each"
        + (f"; one run: {'; '.join(r['model'] for r in one)}" if one else "")
    )
    page.append(f"### {title}\n\n{markdown(rows)}\n\n{note[0].upper()}{note[1:]}.")
    return {arm: summary(found[arm], label) for label, arm in arms.items() if arm in found}


def paired(evaluation, runs, others, tasks=TASKS):
    """How far an arm is above another on the average of `tasks`, (mean, standard error): seed by seed, prompt by prompt on the same noise, which
    is far more exact than two tables' errors. The error has two parts, of the prompts (gaps averaged over seeds) and of the seeds; an arm with
    one run is set against every seed of the other, and adds no seed error of its own."""

    def scores(run, task):
        files = glob.glob(
            os.path.join(RUNS, evaluation, run["model"].format(task=task), task, "scores*.jsonl")
        )
        rows = [json.loads(line) for file in files for line in open(file) if line.strip()]
        return {r["picture"]: r["score"] for r in rows if r["reward"].split()[0] == f"toy.{task}"}

    gaps = []  # of each task: (seeds, prompts)
    for t in tasks:
        a, b = ([scores(run, t) for run in rows] for rows in (runs, others))
        seeds = range(max(len(a), len(b)))
        gaps.append(
            torch.tensor(
                [[a[k % len(a)][i] - b[k % len(b)][i] for i in sorted(b[0])] for k in seeds],
                dtype=torch.float64,
            )
        )
    of_seeds = sum(gap.mean(1) for gap in gaps) / len(tasks)
    variance = sum(gap.mean(0).var() / gap.shape[1] for gap in gaps) / len(tasks) ** 2
    return of_seeds.mean().item(), math.sqrt(
        variance + (of_seeds.var() / len(of_seeds) if len(of_seeds) > 1 else 0.0)
    )


def log(run, key):
    """[(step, value)] of a run's log."""
    rows = [json.loads(line) for line in open(os.path.join(RUNS, run, "log.jsonl"))]
    return [(r["step"], r[key]) for r in rows if key in r]


def read_runs(arm):
    """The names of an arm's runs, seed by seed."""
    return [os.path.basename(path) for path in sorted(glob.glob(os.path.join(RUNS, f"{arm}-[0-9]")))]


page, tables = [], {}
teachers = {f"{t} (GRPO teacher)": f"{t}-0" for t in TASKS}
table(
    "(a) Reward stacking",
    "test",
    {
        "base": "base",
        "GRPO on ocr": "ocr",
        "GRPO on ocr, scene": "stack2",
        "GRPO on ocr, scene, compose (GRPO-Mix)": "mix",
    },
)
main = table(
    "(b) The main table",
    "test",
    {
        "base": "base",
        **teachers,
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
    },
)
test, rows = read("test"), []
page.append(
    "These teachers are of seed 0. Over the seeds, on their own tasks: "
    + "; ".join(
        f"{t} {own['scores'][t]:.3f} ± {own['stderr'][t]:.3f}, "
        + ", ".join(f"{run['scores'][t]:.3f}" for run in test[t])
        for t in TASKS
        for own in [summary(test[t], t)]
    )
    + "."
)
for arm in ("opd-merge", "opd-own", "opd-kl", "opd-guided"):
    own = {
        t: t if arm == "opd-own" else f"{t}-guided-0" if arm == "opd-guided" and t != "scene" else f"{t}-0"
        for t in TASKS
    }
    gaps = [
        *(paired("test", test[arm], test[mix]) for mix in ("mix", "mix-guided")),
        *(paired("test", test[arm], test[own[t]], [t]) for t in TASKS),
    ]
    rows.append(
        f"| {main[arm]['model']} | "
        + " | ".join(f"{gap:+.3f} ± {error:.3f} ({gap / error:+.1f})" for gap, error in gaps)
        + " |"
    )
page.append(
    "What Flow-OPD has over GRPO-Mix, and over the teacher of each task, guided if it taught guided; paired by prompt and noise, in brackets "
    "the number of standard errors:\n\n| model | average, over GRPO-Mix | over it with guidance 1.5 | compose, over its teacher | ocr | scene |\n"
    "|---|---|---|---|---|---|\n" + "\n".join(rows)
)
(gap, error), (guided_gap, guided_error) = (
    paired("test", test["teachers"], test[mix]) for mix in ("mix", "mix-guided")
)
page.append(
    f"The three teachers, each on its own task, are {gap:+.3f} ± {error:.3f} over GRPO-Mix and {guided_gap:+.3f} ± {guided_error:.3f} over it with "
    "guidance: about all that a student of theirs can win."
)
by_step = {arm: log(f"{arm}-0", "kl_by_sigma")[-1][1] for arm in ("opd-merge", "opd-kl")}
page.append(
    "The KL to the teachers at each step of the last rollout, seed 0, over its like under `--weighting kl`: "
    + ", ".join(
        f"{by_step['opd-merge'][t] / by_step['opd-kl'][t]:.2f} at t = {float(t):.2f}"
        for t in by_step["opd-kl"]
    )
    + f". Under `--weighting kl` {list(by_step['opd-kl'].values())[-1] / sum(by_step['opd-kl'].values()):.0%} of it is the last step's."
)
table(
    "(c) Cold starts alone, then GRPO-Mix or Flow-OPD with the same number of pictures, 1280",
    "test",
    {
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
    },
)
page.append(
    "The pictures are those of the last stage: 5 rollouts and 20 updates of GRPO-Mix, 40 updates of Flow-OPD. What came before is not counted: the "
    "teachers' 11,776 pictures, the anchor's 1,024, SFT's 768. The merge has rank 48, the others 16. Teachers and GRPO-Mix are the best of "
    "their validated checkpoints (here of rollouts 4 and 5), SFT and Flow-OPD the last update."
)
table(
    "(d) MAR, 24 updates: quality on all prompts and diversity within a prompt (validation prompts, two pictures each)",
    "pairs",
    {
        "base": "base",
        "the anchor": "quality-0",
        "GRPO-Mix": "mix",
        "merge": "merge",
        "Flow-OPD, no MAR": "opd-noanchor",
        "MAR, the base as anchor": "opd-baseanchor",
        "MAR, the quality teacher as anchor": "opd-anchor",
        "MAR, the quality teacher as anchor, λ = 0.2": "opd-strong",
    },
)
everyone = {
    "base": "base",
    **teachers,
    "GRPO-Mix": "mix",
    "merge": "merge",
    "Flow-OPD from merge": "opd-merge",
}
table(
    "(e) Prompts of kinds that nobody was trained on: three sorts of shapes (compose), one letter (ocr)",
    "new",
    everyone,
)
table("(e) Two skills at once: a sign in a scene", "both", everyone)
table(
    "(f) One change at a time, 8 rollouts from the merge without an anchor (validation prompts; the last column is paired by prompt and noise)",
    "val",
    {
        "merge, the start": "merge",
        "**the default**": "try-default",
        "`--objective ppo --lr 5e-4 --clip-range 0.1` (two updates a rollout)": "try-ppo",
        "`--objective ppo-paper --lr 5e-4 --clip-range 0.1` (two)": "try-ppo-paper",
        "`--weighting kl`": "try-kl",
        "`--sde ode`": "try-ode",
        "`--sde cps`": "try-cps",
        "`--label-steps 4`": "try-half",
        "`--label-steps 1`": "try-one",
        "`--label-steps 1`, 20 rollouts": "try-danceopd",
        "`--schedule alternate`": "try-alternate",
        "two teachers: compose, ocr": "try-two-teachers",
        "one teacher: compose": "try-one-teacher",
        "teachers guided by 1.5, the student by 1": "try-guided",
        "merge `--method svd`, the start": "merge-svd",
        "from the svd merge": "try-svd",
        "merge `--method factors`, the start": "merge-factors",
        "from the factors merge": "try-factors",
    },
    default="try-default",
)
val = read("val")
page.append(
    "The teachers on their own tasks, without guidance and guided by 1.5: "
    + "; ".join(
        f"{t} {val[f'{t}-0'][0]['scores'][t]:.3f}, {val[f'{t}-guided-0'][0]['scores'][t]:.3f}" for t in TASKS
    )
    + "."
)
seconds = {
    label: sorted(v for run in read_runs(arm) for _, v in log(run, "seconds"))
    for label, arm in {
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
    }.items()
}
page.append(
    "Median seconds of a rollout and its updates, one thread, two runs at a time: "
    + ", ".join(f"{label} {s[len(s) // 2]:.1f}" for label, s in seconds.items())
    + "."
)
write(os.path.join(HERE, "tables.md"), "\n\n".join(page) + "\n")
write_json(os.path.join(HERE, "tables.json"), tables)
readme = os.path.join(os.path.dirname(HERE), "README.md")
before, mark, rest = open(readme).read().partition("<!-- experiments/tables.py writes from here -->\n")
write(readme, before + mark + "\n" + "\n\n".join(page) + "\n\n" + rest[rest.index("<!-- to here -->") :])
print("\n\n".join(page))

# -- curves: KL against updates, and validation scores against pictures sampled, teachers dashed ------------------------------------
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(1, 4, figsize=(16, 3.4))
for k, t in enumerate(TASKS):
    for s, style in (("none", ":"), ("sft", "--"), ("merge", "-")):
        axes[0].plot(
            *zip(*log(f"opd-{s}-0", f"kl/{t}")), style, color=f"C{k}", label=f"{t}, from {s}", linewidth=1
        )
axes[0].set(title="KL to the teacher", xlabel="update", yscale="log")
axes[0].legend(fontsize=6)
for t, axis in zip(TASKS, axes[1:]):
    points = [
        (32 * int(arm[10:]), rows[0]["scores"][t])
        for arm, rows in val.items()
        if arm.startswith("opd-after-")
    ]
    axis.plot(
        *zip(*sorted([(0, val["merge"][0]["scores"][t])] + points)),
        "o-",
        markersize=3,
        label="Flow-OPD from merge",
    )
    axis.plot(
        *zip(
            *[(0, val["base"][0]["scores"][t])]
            + [(256 * step, v) for step, v in log("mix-0", f"validation/{t}")]
        ),
        "s-",
        markersize=3,
        label="GRPO-Mix",
    )
    axis.axhline(val[f"{t}-0"][0]["scores"][t], linestyle="--", color="grey", label="its teacher")
    axis.set(title=f"{t} (validation)", xlabel="pictures sampled, without the teachers' own")
axes[1].legend(fontsize=7)
for axis in axes:
    axis.grid(alpha=0.3)
figure.tight_layout()
figure.savefig(os.path.join(HERE, "curves.png"), dpi=90)

# -- the same prompts and noise for everyone --------------------------------------------------------------------------------------
grid, captions = {}, []
for label, model in {
    "base": "base",
    **{f"teacher {t}": f"{t}-0" for t in TASKS},
    "GRPO-Mix": "mix-0",
    "merge": "merge",
    "Flow-OPD": "opd-merge-0",
}.items():
    pictures = []
    for t in TASKS:
        folder = os.path.join(RUNS, "test", model, t, "samples")
        pictures += [
            read_picture(os.path.join(folder, f))
            for f in sorted(os.listdir(folder), key=lambda f: int(f[-10:-4]))[:4]
        ]
    grid[label] = pictures
for t in TASKS:
    captions += [
        row["prompt"]
        for row in load_prompts(t, os.path.join(os.path.dirname(HERE), f"toy/prompts/{t}_test.txt"))[:4]
    ]
save_grid(os.path.join(HERE, "samples.png"), grid, captions)
print("\nexperiments/tables.md, tables.json, curves.png, samples.png")
