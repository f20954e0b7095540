"""What reproduce.sh measured, as tables and figures. Reads out/reproduce; writes tables.md, tables.json,
front.png, curves.png and samples.png into this folder, and the tables also into its README.md, between two
comments.

    python experiments/tables.py             # --merges: print which ones are best on validation prompts

Every arm has a run for each seed, with teachers of that seed: its mean ± its standard error over the seeds,
which contains the teachers' luck. The base has one, and the standard error over its prompts. "average" is of
the three routed tasks; quality and calm, which no prompt is routed by, stand beside it.
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
from flow_sde import die, load_prompts, read_log, save_grid, write, write_json
from rewards import markdown, read_picture

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE.parent / "out/reproduce"
TASKS = ("compose", "ocr", "scene")
PICTURES = {"opd": 32, "ocr": 128, "scene": 128, "quality": 128}  # of a rollout; else 256

# Of each table: the arms' labels and names, those of reproduce.sh
TEACHERS = {f"{task} (teacher)": task for task in TASKS}
STACKING = {
    "base": "base",
    "GRPO on ocr": "ocr",
    "GRPO on ocr, scene": "stack2",
    "GRPO on ocr, scene, compose": "mix",
    "and on quality": "mixq1",
    "GRPO on ocr, scene, compose and calm": "mixcalm1",
}
MIXES = {
    "GRPO-Mix, no quality": "mix",
    "GRPO-Mix, quality 1 : 1 (the paper's text)": "mixq1",
    "GRPO-Mix, 0.8 + 0.2 of quality (its code)": "mixq",
    "GRPO-Mix, 0.8 + 0.2, whole rollouts in turn (its code)": "mixturns",
}
MAIN = {
    "base": "base",
    **TEACHERS,
    "the three teachers, each on its own task": "teachers",
    "teachers trained with 0.2 of quality, each on its own task": "teachersq",
    "quality (teacher, the anchor)": "quality",
    **MIXES,
    "SFT alone": "sft",
    "merge alone": "merge",
    "Flow-OPD from SFT": "opdsft",
    "**Flow-OPD from merge**": "opd",
    "Flow-OPD, `--weighting kl` (the paper's), no anchor": "paper",
    "Flow-OPD, teachers trained with 0.2 of quality, no anchor": "opdq",
    "Flow-OPD, compose and ocr taught with guidance 1.5": "opdguided",
    "Flow-OPD, no anchor, then 10 rollouts of GRPO-Mix, quality 1 : 1": "upquality",
}
COLD_STARTS = {
    "no cold start": "base",
    "no cold start, GRPO-Mix": "mixnone",
    "no cold start, Flow-OPD": "opdnone",
    "SFT": "sft",
    "SFT, then GRPO-Mix": "mixsft",
    "SFT, then Flow-OPD": "opdsft",
    "merge": "merge",
    "merge, then GRPO-Mix": "mixmerge",
    "merge, then Flow-OPD": "opd",
}
MAR = {
    "base": "base",
    "the anchor": "quality",
    "GRPO-Mix, quality 1 : 1": "mixq1",
    "Flow-OPD, no MAR": "opdcalm0",
    "MAR, the quality teacher as anchor": "opd",
    "MAR, the quality teacher as anchor, λ = 0.2": "opdstrong",
}
MERGES = {  # without training: {label: {setting: arm}}
    "sum of the three × {}": {"0.5": "sum15", "0.7": "sum21", "1": "sum3"},
    "sum at rank 16 by SVD × {}": {"0.5": "svd15", "0.7": "svd21", "1": "svd3"},
    "TIES, density {}": {"0.2": "ties2", "0.3": "ties3", "0.5": "ties5"},
    "DARE-TIES, density {}": {"0.2": "dare2", "0.3": "dare3", "0.5": "dare5"},
}
STRONGER = {
    "the three teachers, each on its own task": "teachers",
    "the three teachers at strength 1.25": "teachersx125",
    "the three teachers at strength 1.5": "teachersx15",
    "Flow-OPD, no anchor": "opdcalm0",
    "Flow-OPD, teachers at 1.25": "opdx125",
    "Flow-OPD, teachers at 1.5": "opdx15",
    "Flow-OPD, compose and ocr taught with guidance 1.5": "opdguided",
    "Flow-OPD, teachers at 1.25 and these guided": "opdbest",
    "Flow-OPD, no anchor, then 10 rollouts of GRPO-Mix, quality 1 : 1": "upquality",
    "**all three**: 1.25, guided, then the 10 rollouts": "upbest",
}
NEW_PROMPTS = {"base": "base", **TEACHERS, "GRPO-Mix, quality 1 : 1": "mixq1", "Flow-OPD from merge": "opd"}
FRONTS = {  # lines of {label: arm}
    "GRPO-Mix, weight of calm": {
        "0": "mix",
        "0.25": "mixcalm025",
        "0.5": "mixcalm05",
        "1": "mixcalm1",
        "2": "mixcalm2",
    },
    "Flow-OPD, λ of the calm anchor": {
        "0": "opdcalm0",
        "0.02": "opdcalm002",
        "0.1": "opdcalm01",
        "0.3": "opdcalm03",
        "1": "opdcalm1",
    },
    "Flow-OPD, teachers trained with 0.2 of calm": {"": "opdc"},
    "Flow-OPD, calm as one more task": {"": "opdrouted"},
    "Flow-OPD, then 10 rollouts of GRPO-Mix": {"": "upcalm"},
    "the same, KL to the teachers": {"": "upklcalm"},
}
WAY_UP = {
    "Flow-OPD, no anchor (1,280 pictures)": "opdcalm0",
    "then 10 rollouts of GRPO-Mix, quality 1 : 1 (2,560 more)": "upquality",
    "the same, KL to the teachers": "upklquality",
    "GRPO-Mix, quality 1 : 1 (11,776)": "mixq1",
    "then 10 rollouts of GRPO-Mix, calm 1 : 1 (2,560 more)": "upcalm",
    "the same, with the KL to the teachers": "upklcalm",
    "GRPO-Mix, calm 1 : 1 (11,776)": "mixcalm1",
}
OTHERS = {
    "**ours**: equal weights, flow-SDE, all steps": "opdcalm0",
    "Flow-OPD's paper: the KL's own weights": "paper",
    "Flow-OPD as released: KL x dt, tasks in turn, the base as anchor": "released",
    "DiffusionOPD: ODE, dt²/2, tasks in turn": "diffusionopd",
    "DanceOPD: ODE, one step a rollout from Beta(5, 2)": "danceopd",
}
ONE_CHANGE = {
    "merge, the start": "merge",
    "**the default**": "try",
    "`--objective ppo --lr 5e-4 --clip-range 0.1` (two updates a rollout)": "tryppo",
    "`--objective ppo-paper --lr 5e-4 --clip-range 0.1` (two)": "trypaper",
    "`--weighting kl`": "trykl",
    "`--sde ode`": "tryode",
    "`--sde cps`": "trycps",
    "`--label-steps 4`": "tryhalf",
    "`--label-steps 1`": "tryone",
    "`--schedule alternate`": "tryturns",
}
SURPASSING = {
    "Flow-OPD from merge": "opd",
    "Flow-OPD from SFT": "opdsft",
    "Flow-OPD, no anchor": "opdcalm0",
    "three seeds' compose teachers in one student": "ensemble",
    "their plain merge": "mergeall",
}
SECONDS = {
    "GRPO-Mix (256 pictures, 4 updates)": "mix",
    "SFT (32 pictures, one update, as the others)": "sft",
    "Flow-OPD": "opd",
    "with two guided teachers": "opdguided",
    "without an anchor": "try",
    "and half of the steps labelled": "tryhalf",
    "or one": "tryone",
    "or ODE rollouts": "tryode",
    "or ppo (two updates)": "tryppo",
}


# ------------------------------------------------------------------------------------------------------------
# what was measured


def mean_of_tasks(row):
    """The average of a row's three tasks, and its standard error."""
    score = sum(row["scores"][task] for task in TASKS) / 3
    return score, math.sqrt(sum(row["stderr"][task] ** 2 for task in TASKS)) / 3


@functools.cache
def read(evaluation):
    """An evaluation's rows, each with its average, by arm: {"mix": {seed: row}, "base": {None: row}}.
    "teachers" are all three of a seed, each on its own task, as one model: about what a student of theirs can
    reach; "teachersq" those trained with quality besides, "teachersc" with calm, "teachersx15" at strength
    1.5."""
    path = RUNS / evaluation / "results.json"
    if not path.exists():
        die(f"{path} is missing: bash experiments/reproduce.sh makes it")
    arms = {}
    for row in json.loads(path.read_text()):
        if set(TASKS) <= row["scores"].keys():
            average, row["stderr"]["average"] = mean_of_tasks(row)
            first = {task: row["scores"][task] for task in TASKS} | {"average": average}
            row["scores"] = first | row["scores"]
        arm, seed = re.fullmatch(r"(.*?)(?:-(\d+))?", row["model"]).groups()
        arms.setdefault(arm, {})[seed] = row
    for kind in ("", "q", "c", "x125", "x15"):
        for seed in arms.get(f"compose{kind}", {}):
            rows = {task: arms.get(f"{task}{kind}", {}).get(seed, {"scores": {}}) for task in TASKS}
            if all("average" in row["scores"] for row in rows.values()):
                together = {"model": f"{{task}}{kind}-{seed}"}
                for what in ("scores", "stderr"):
                    together[what] = {task: rows[task][what][task] for task in TASKS}
                together["scores"]["average"], together["stderr"]["average"] = mean_of_tasks(together)
                arms.setdefault(f"teachers{kind}", {})[seed] = together
    return arms


def summary(runs, label):
    """The rows of an arm {seed: row} as one: over seeds if there are several, else over prompts."""
    rows = list(runs.values())
    out = {"model": label, "runs": len(rows), "scores": {}, "stderr": {}}
    for name in rows[0]["scores"]:
        values = [row["scores"][name] for row in rows]
        out["scores"][name] = statistics.fmean(values)
        out["stderr"][name] = rows[0]["stderr"].get(name)
        if len(rows) > 1:
            out["stderr"][name] = statistics.stdev(values) / math.sqrt(len(rows))
    return out


@functools.cache
def picture_scores(folder, reward):
    """{picture: score} of a model on a task, evaluate.py's OUT/MODEL/TASK; reward without its module."""
    scores = {}
    for file in sorted(folder.glob("scores*.jsonl")):
        for line in filter(None, file.read_text().splitlines()):  # some are empty: a run was killed there
            row = json.loads(line)
            if row["reward"].split()[0].rpartition(".")[2] == reward:
                scores[row["picture"]] = row["score"]
    return scores


def mean_gap(gaps, weights):
    """(mean, standard error) of a weighted sum over tasks of gaps, each (seeds, prompts) float64. The error
    has two parts, of the prompts (gaps averaged over seeds) and of the seeds; it is a little too large, for
    what prompts do to seeds counts in both."""
    of_seeds = sum(w * gap.mean(1) for w, gap in zip(weights, gaps))
    variance = sum(w**2 * gap.mean(0).var() / gap.shape[1] for w, gap in zip(weights, gaps))
    if len(of_seeds) > 1:
        variance += of_seeds.var() / len(of_seeds)
    return of_seeds.mean().item(), math.sqrt(variance)


def paired(evaluation, arm, other, tasks=TASKS):
    """How far an arm is above another on the average of `tasks`, (mean, standard error): seed by seed, prompt
    by prompt on the same noise, which is far more exact than two tables' errors."""
    arms = read(evaluation)
    ours, theirs = list(arms[arm].values()), list(arms[other].values())
    gaps = []  # of each task: (seeds, prompts)
    for task in tasks:
        by_seed = []
        for k in range(max(len(ours), len(theirs))):
            one, another = ours[k % len(ours)]["model"], theirs[k % len(theirs)]["model"]
            folders = (RUNS / evaluation / model.format(task=task) / task for model in (one, another))
            one, another = (picture_scores(folder, task) for folder in folders)
            by_seed.append([one[picture] - another[picture] for picture in sorted(another)])
        gaps.append(torch.tensor(by_seed, dtype=torch.float64))
    return mean_gap(gaps, [1 / len(tasks)] * len(tasks))


def in_words(gap, error):
    """A difference, its error, and how many of them it is."""
    return f"{gap:+.3f} ± {error:.3f} ({gap / error:+.1f})"


def log(run, key):
    """[(step, value)] of a run's log."""
    return [(row["step"], row[key]) for row in read_log(RUNS / run) if key in row]


def median_seconds(arm):
    """Of a rollout and its updates: a median, so that a machine that was busy or asleep does not count."""
    seconds = []
    for folder in RUNS.glob(f"{arm}-[0-9]"):
        seconds += [value for _, value in log(folder.name, "seconds")]
    return statistics.median(seconds)


def spent(seed, arm):
    """All pictures that a run has sampled, and the seconds."""
    rollouts = len(log(f"{arm}-{seed}", "seconds"))
    return rollouts * PICTURES.get(arm, 256), rollouts * median_seconds(arm)


# ------------------------------------------------------------------------------------------------------------
# the page


page, tables = [], {}


def table(title, evaluation, arms, default=None):
    """Add a table of {label: arm} to the page; with `default`, also what each arm gains over that arm."""
    found, rows = read(evaluation), []
    for label, arm in arms.items():
        if arm in found:
            row = summary(found[arm], label)
            if default and arm != default and "average" in row["scores"]:
                gap, error = paired(evaluation, arm, default)
                row["scores"]["over the default"], row["stderr"]["over the default"] = gap, error
            rows.append(row)
    tables[title] = rows
    page.append(f"### {title}\n\n{markdown(rows)}")


def best_mix():
    """The mix that is best on validation prompts with the first seed, the only one that all of them have."""
    val = read("val")
    first = next(iter(val["opd"]))
    return max(MIXES.values(), key=lambda arm: val[arm][first]["scores"]["average"])


def merges():
    """{label: arm} of the best merge of every family, on validation prompts."""
    val, best = read("val"), {}
    if "sum3" not in val:  # only `reproduce.sh more` has them
        return {}
    for label, arms in MERGES.items():
        average = {setting: summary(val[arm], label)["scores"]["average"] for setting, arm in arms.items()}
        setting = max(average, key=average.get)
        best[label.format(setting)] = arms[setting]
    return best


def with_merges(arms):
    """A table's arms with these merges behind the average."""
    out = {}
    for label, arm in arms.items():
        out |= {label: arm} | (merges() if arm == "merge" else {})
    return out


def fronts():
    return FRONTS | {"merge:": {"average": "merge"} | merges()}


def bullets(arms, other):
    """Of a table's {label: arm}, how far each is above another, paired."""
    lines = [f"- {label}: {in_words(*paired('test', arm, other))}" for label, arm in arms.items()]
    page.append("\n".join(lines))


def over_the_mix():
    best = best_mix()
    label = next(label for label, arm in MIXES.items() if arm == best)
    page.append(f"The best on validation prompts is: {label}. Over it, paired by seed, prompt and noise:")
    label = {arm: label for label, arm in MAIN.items()}
    shown = ("teachers", "opd", "opdsft", "paper", "opdq", "opdguided", "upquality")
    bullets({label[arm]: arm for arm in shown}, best)
    if merges():
        page.append("Merges without training, over Flow-OPD from merge:")
        bullets({"average": "merge"} | merges(), "opd")


def stronger():
    table("(l) Stronger teachers", "test", STRONGER)
    page.append("Over the teachers as trained, each on its own task, paired by seed, prompt and noise:")
    bullets({label: arm for label, arm in STRONGER.items() if arm != "teachers"}, "teachers")
    table("(l) The same students on validation prompts, two pictures each", "pairs", STRONGER)


def surpassing():
    """Students beside the teachers of their seeds."""
    rows = ["| student | compose, over its teacher | ocr | scene |\n|---|---|---|---|"]
    for label, arm in SURPASSING.items():
        if arm in read("test"):
            tasks = ["compose"] if arm in ("ensemble", "mergeall") else TASKS
            cells = [in_words(*paired("test", arm, task, [task])) if task in tasks else "" for task in TASKS]
            rows.append(f"| {' | '.join([label, *cells])} |")
    page.append(
        "### (j) Is a student better than its teachers?\n\n"
        "On each task, over the teacher of its seed (the last two over each of the three), paired by prompt "
        "and noise; in brackets the number of standard errors.\n\n" + "\n".join(rows)
    )


def cost(seed, arm):
    """Pictures and seconds until every task is within 0.02 of its teacher, on validation prompts; None if it
    never is."""
    val = read("val")
    goals = {task: val[task][seed]["scores"][task] - 0.02 for task in TASKS}
    if arm == "opd":
        reached = {0: val["merge"][seed]["scores"], 40: val["opd"][seed]["scores"]}
        for name, runs in val.items():
            if name.startswith("opdafter") and seed in runs:
                reached[int(name.removeprefix("opdafter"))] = runs[seed]["scores"]
    else:
        reached = {}
        for task in TASKS:
            for step, score in log(f"{arm}-{seed}", f"validation/{task}"):
                reached.setdefault(step, {})[task] = score
    for step in sorted(reached):
        if all(reached[step][task] >= goal for task, goal in goals.items()):
            return step * PICTURES.get(arm, 256), step * median_seconds(arm)
    return None


def costs():
    rows = ["| | pictures, by seed | seconds, by seed |\n|---|---|---|"]
    val = read("val")
    seeds = list(val["opd"])
    found = {label: [cost(seed, arm) for seed in val[arm]] for label, arm in MIXES.items()}
    found["Flow-OPD from merge, teachers at hand"] = [cost(seed, "opd") for seed in seeds]
    with_teachers = found["Flow-OPD from merge, with its teachers' cost and its anchor's"] = []
    for seed, own in zip(seeds, found["Flow-OPD from merge, teachers at hand"]):
        before = [spent(seed, teacher) for teacher in (*TASKS, "quality")]
        with_teachers.append(own and [sum(numbers) for numbers in zip(own, *before)])
    for label, pairs in found.items():
        cells = [", ".join(f"{pair[k]:,.0f}" if pair else "never" for pair in pairs) for k in (0, 1)]
        rows.append(f"| {' | '.join([label, *cells])} |")
    page.append(
        "### (k) Cost to a level: until every task is within 0.02 of its teacher (validation prompts)\n\n"
        + "\n".join(rows)
        + "\n\nSeconds are rollouts times their median, one thread, two runs at a time. Where one number "
        "stands, there was one run."
    )


def write_page():
    table("(a) The seesaw: one more reward", "test", STACKING)
    table("(b) The main table", "test", with_merges(MAIN))
    over_the_mix()
    title = "(c) Cold starts alone, then GRPO-Mix or Flow-OPD with the same number of pictures, 1,280"
    table(title, "test", with_merges(COLD_STARTS))
    title = "(d) MAR: quality on all prompts and diversity within a prompt"
    table(f"{title} (validation prompts, two pictures each)", "pairs", MAR)
    title = "(e) Prompts of kinds that nobody was trained on: three sorts of shapes, one letter"
    table(title, "new", NEW_PROMPTS)
    table("(e) Two skills at once: a sign in a scene", "both", NEW_PROMPTS)
    title = "(f) One change at a time, 8 rollouts from the merge without an anchor"
    note = "(validation prompts; the last column is paired by prompt and noise)"
    table(f"{title} {note}", "val", ONE_CHANGE, default="try")
    front = {f"{line} {label}".strip(): arm for line, arms in fronts().items() for label, arm in arms.items()}
    table("(g) The front: a reward that conflicts", "test", {"calm (teacher)": "calm"} | front)
    table("(h) The way up: Flow-OPD first, then rewards", "test", WAY_UP)
    table("(i) Other methods, 1,280 pictures each, from the merge", "test", OTHERS, default="opdcalm0")
    surpassing()
    costs()
    if "upbest" in read("test"):
        stronger()
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


def draw_front():
    """The mean of the three tasks against calm, a line for every method."""
    test = read("test")
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for label, arms in fronts().items():
        rows = [summary(test[arm], arm) for arm in arms.values()]
        x, y = ([row["scores"][name] for row in rows] for name in ("calm", "average"))
        x_error, y_error = ([row["stderr"][name] for row in rows] for name in ("calm", "average"))
        style = dict(marker="o", markersize=4, capsize=2, linestyle="" if label == "merge:" else "-")
        axis.errorbar(x, y, y_error, x_error, label=label.strip(":"), **style)
        for value, text in zip(zip(x, y), arms):
            text = text.partition(" ")[0].strip(",")  # of a merge its kind
            axis.annotate(text, value, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="calm, on all prompts", ylabel="mean of the three tasks")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "front.png", dpi=100)


def draw_curves():
    """KL against updates, and validation scores against pictures sampled, teachers dashed; the first seed."""
    val = read("val")
    seed = next(iter(val["opd"]))
    figure, (kl_axis, *axes) = plt.subplots(1, 4, figsize=(16, 3.4))
    for k, task in enumerate(TASKS):
        for start, style in (("none", ":"), ("sft", "--"), ("", "-")):
            steps, kls = zip(*log(f"opd{start}-{seed}", f"kl/{task}"))
            label = f"{task}, from {start or 'merge'}"
            kl_axis.plot(steps, kls, style, color=f"C{k}", label=label, linewidth=1)
    kl_axis.set(title="KL to the teacher", xlabel="update", yscale="log")
    kl_axis.legend(fontsize=6)
    kl_axis.grid(alpha=0.3)
    best = best_mix()
    for task, axis in zip(TASKS, axes):
        student = [(0, val["merge"][seed]["scores"][task]), (1280, val["opd"][seed]["scores"][task])]
        for arm, runs in val.items():
            if arm.startswith("opdafter"):
                student.append((32 * int(arm.removeprefix("opdafter")), runs[seed]["scores"][task]))
        mix = [(0, val["base"][None]["scores"][task])]
        mix += [(256 * step, score) for step, score in log(f"{best}-{seed}", f"validation/{task}")]
        axis.plot(*zip(*sorted(student)), "o-", markersize=3, label="Flow-OPD from merge")
        axis.plot(*zip(*mix), "s-", markersize=3, label="GRPO-Mix")
        axis.axhline(val[task][seed]["scores"][task], linestyle="--", color="grey", label="its teacher")
        axis.set(title=f"{task} (validation)", xlabel="pictures sampled, without the teachers' own")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=90)


def draw_samples():
    """The same prompts and noise for everyone; the first seed."""
    seed = next(iter(read("test")["opd"]))
    models = {"base": "base"} | {f"{task} (teacher)": f"{task}-{seed}" for task in TASKS}
    models |= {"GRPO-Mix": f"{best_mix()}-{seed}", "merge": f"merge-{seed}", "Flow-OPD": f"opd-{seed}"}
    models |= {"and calm": f"upcalm-{seed}"}
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
    if sys.argv[1:] == ["--merges"]:
        print(*merges().values())
        raise SystemExit
    write_page()
    draw_front()
    draw_curves()
    draw_samples()
    print("experiments/README.md, tables.md, tables.json, and the figures")
