"""What grow.sh measured, as tables and pictures. Reads out/grow; writes grow.json, grow.md, grow.png and
grow_samples.png into this folder. Seeds that grow.json has already and out/grow has not are kept.

    python experiments/grow.py

A share of the gap: 0 is the base, 1 the task's teacher, each seed's own. Kept, of several tasks: the mean of
their shares, each counted as 1 at most, for a style can be overdone without end. ± is the standard error over
seeds, which have teachers, orders of tasks and students of their own."""

import argparse
import json
import pathlib
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the scripts lie one folder above
from experiments.few_steps import spread
from flow_sde import die, load_prompts, read_log, save_grid, write, write_json
from rewards import read_picture

HERE = pathlib.Path(__file__).resolve().parent
RUNS = HERE.parent / "out/grow"
TASKS = ("compose", "ocr", "scene", "blue", "green", "red", "gold", "dark")
COUNTS = (1, 2, 4, 8)  # of tasks
MERGES = {"sum": "sum", "svd": "sum, cut to rank 16 by SVD", "ties": "TIES", "dare": "DARE-TIES"}  # by name
ARMS = {"best merge": "best merge without training", "mix": "GRPO-Mix, as many pictures as the teachers"}
ARMS |= {"opd": "**Flow-OPD, 15 updates a task**", "fixed": "Flow-OPD, 60 updates"}
ARMS |= {"up": "Flow-OPD, then 10 rollouts of the mix"}
RANKS = {f"rank{rank}": str(rank) for rank in (4, 8, 16, 32)} | {"opd": "128, the average itself"}
ROLLOUT, UPDATE = 256, 48  # pictures


def scores_of(evaluation):
    """{model: {task: score}} of an evaluation of grow.sh."""
    path = RUNS / evaluation / "results.json"
    if not path.exists():
        die(f"{path} is missing: bash experiments/grow.sh makes it")
    return {row["model"]: row["scores"] for row in json.loads(path.read_text())}


def ends(split, seed):
    """{task: (the base's score, its teacher's)}."""
    found = {}
    for task in TASKS:
        rows = scores_of(f"own-{task}-{split}-{seed}")
        found[task] = rows["base"][task], rows[task][task]
    return found


def shares(scores, bounds):
    """{task: the share of its gap that is closed}."""
    return {t: (score - bounds[t][0]) / (bounds[t][1] - bounds[t][0]) for t, score in scores.items()}


def kept(row, its=None):
    return statistics.fmean(min(share, 1) for share in row.values())


def choose(count, seed):
    """{family of merges: its best one on validation prompts}."""
    bounds, best = ends("val", seed), {}
    closed = {name: kept(shares(row, bounds)) for name, row in scores_of(f"val-{count}-{seed}").items()}
    for family in MERGES:
        best[family] = max((n for n in closed if n.startswith(family)), key=closed.get)
    return best, closed


def minutes(run, steps=None):
    """Core-minutes that a training run has taken for its first so many updates or rollouts."""
    rows = [row for row in read_log(RUNS / run) if "seconds" in row]
    return sum(row["seconds"] for row in rows[:steps]) / 60


def measured(seed):
    """Everything of a seed that the page needs: {K: ...}, as grow.json has it."""
    bounds, validation, found = ends("test", seed), ends("val", seed), {}
    for count in COUNTS:
        rows = {name: shares(row, bounds) for name, row in scores_of(f"test-{count}-{seed}").items()}
        after, tasks = scores_of(f"val-{count}-{seed}"), list(rows["opd"])
        its = {"rows": rows, "opd": [], "mix": []}  # curves: (pictures, core-minutes, share in validation)
        its["teachers"] = sum(map(pictures_of, tasks)), sum(minutes(f"{task}-{seed}") for task in tasks)
        for updates in range(15, 15 * count + 1, 15):
            closed = kept(shares(after[f"after{updates}"], validation))
            its["opd"].append((updates * UPDATE, minutes(f"opd{count}-{seed}", updates), closed))
        if count > 1:
            best, closed = choose(count, seed)
            its["chosen"] = best
            for family, name in best.items():
                rows[family] = rows.pop(name)
            rows["best merge"] = rows[max(best, key=lambda family: closed[best[family]])]
            for row in read_log(RUNS / f"mix{count}-{seed}"):
                scored = {n.partition("/")[2]: v for n, v in row.items() if n.startswith("validation/")}
                if scored:
                    spent = row["step"] * ROLLOUT, minutes(f"mix{count}-{seed}", row["step"])
                    its["mix"].append((*spent, kept(shares(scored, validation))))
        found[str(count)] = its
    return found


def pictures_of(task):
    """That its teacher was trained on, as grow.sh has it."""
    return {"compose": 20 * 256, "ocr": 10 * 128}.get(task, 8 * 128)


def until(curve, level):
    """(pictures, core-minutes) after which a curve reaches a level; None if it never does."""
    before = None
    for pictures, spent, closed in curve:
        if closed >= level:
            if before is None:
                return pictures, spent
            part = (level - before[2]) / (closed - before[2])
            return tuple(old + part * (new - old) for old, new in zip(before, (pictures, spent)))
        before = pictures, spent, closed
    return None


def cell(values):
    mean, error = spread(values)
    return f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def table(title, seeds, of, arms):
    """Rows: arms {name: label}; columns: K; of(shares of the tasks, seed, K) -> a number."""
    lines = [f"### {title}\n", "| tasks | " + " | ".join(map(str, COUNTS)) + " |", "|---" * 5 + "|"]
    for name, label in arms.items():
        texts = []
        for count in map(str, COUNTS):
            its = [(seed[count]["rows"][name], seed[count]) for seed in seeds if name in seed[count]["rows"]]
            texts.append(cell([of(row, whole) for row, whole in its]) if its else "")
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def by_task(seeds):
    """The eight tasks of the largest student, one by one."""
    lines = ["### Eight tasks, one by one\n", "| | " + " | ".join(TASKS) + " |", "|---" * 9 + "|"]
    for name, label in ARMS.items():
        texts = [cell([seed["8"]["rows"][name][task] for seed in seeds]) for task in TASKS]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def by_rank(seeds):
    """Eight tasks in students of other ranks, from the teachers' average cut to that rank by SVD."""
    seeds = [seed["8"]["rows"] for seed in seeds if "rank4" in seed["8"]["rows"]]
    lines = ["### Eight tasks, by the student's rank\n", "| rank | " + " | ".join(RANKS.values()) + " |"]
    lines.append("|---" * 6 + "|")
    for label, of in {"kept": kept, "the worst task's share": lambda row: min(row.values())}.items():
        texts = [cell([of(rows[name]) for rows in seeds]) for name in RANKS]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def mean_of(row, its=None):
    return statistics.fmean(row.values())


def above(row, its):
    """How far a row is above Flow-OPD's, of the same seed."""
    return kept(row) - kept(its["rows"]["opd"])


def costs(seeds):
    """{way: {K: [(pictures, core-minutes) to 95% of what Flow-OPD ends with, or None, a seed]}}."""
    ways = {"Flow-OPD, teachers at hand": {}, "teachers, then Flow-OPD": {}, "GRPO-Mix": {}}
    for count in COUNTS:
        for seed in seeds:
            its = seed[str(count)]
            level = 0.95 * its["opd"][-1][2]
            alone = until(its["opd"], level)
            found = [alone, [a + b for a, b in zip(alone, its["teachers"])]]
            if count > 1:
                found.append(until(its["mix"], level))
            for way, spent in zip(ways, found):
                ways[way].setdefault(count, []).append(spent)
    return ways


def cost_table(ways, seeds):
    lines = [
        "### Until 95% of what Flow-OPD ends with is kept (validation prompts): pictures, core-minutes\n"
    ]
    lines += ["| tasks | " + " | ".join(map(str, COUNTS)) + " |", "|---" * 5 + "|"]
    for way, by_count in ways.items():
        texts = []
        for count in COUNTS:
            reached = [spent for spent in by_count.get(count, []) if spent]
            curves = [seed[str(count)]["mix" if way == "GRPO-Mix" else "opd"] for seed in seeds]
            ends_at = [curve[-1][2] for curve, spent in zip(curves, by_count.get(count, [])) if not spent]
            text = []
            if reached:
                pictures, spent = (statistics.fmean(column) for column in zip(*reached))
                text.append(f"{pictures:,.0f}, {spent:.1f}")
            if ends_at:
                most = statistics.fmean(ends_at)
                text.append(f"not by {len(ends_at)} of {len(seeds)} seeds (at the end {most:.2f})")
            texts.append("; ".join(text))
        lines.append(f"| {way} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def figure(seeds, ways):
    drawn, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for name, label in ARMS.items():
        counts = [count for count in COUNTS if name in seeds[0][str(count)]["rows"]]
        values = [spread([kept(seed[str(count)]["rows"][name]) for seed in seeds]) for count in counts]
        means, errors = zip(*values)
        style = dict(fmt="--o" if name in ("best merge", "mix") else "-o", ms=4, capsize=2)
        axes[0].errorbar(counts, means, [error or 0 for error in errors], label=label.strip("*"), **style)
    axes[0].axhline(1, color="grey", lw=0.8, ls=":")
    axes[0].set_title("kept of what the teachers can", fontsize=11)
    for k, what in enumerate(("pictures", "core-minutes"), 1):
        for way, by_count in ways.items():
            points = {}
            for count, found in by_count.items():
                ends = [seed[str(count)]["mix" if way == "GRPO-Mix" else "opd"][-1] for seed in seeds]
                spent = [(reached or end)[k - 1] for reached, end in zip(found, ends)]
                points[count] = statistics.fmean(spent)
                if None in found:
                    text = f"{found.count(None)} of {len(found)}\ndo not"
                    where = dict(xytext=(6, -18), textcoords="offset points", fontsize=8)
                    axes[k].annotate(text, (count, points[count]), **where)
            axes[k].plot(list(points), list(points.values()), "-o", ms=4, label=way)
        axes[k].set(yscale="log")
        axes[k].set_title(f"{what} to 95% of where Flow-OPD ends", fontsize=11)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(COUNTS, map(str, COUNTS))
        axis.set_xlim(0.9, 12)
        axis.set_xlabel("tasks, each with a teacher")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    drawn.savefig(HERE / "grow.png", dpi=90)


def grid(seed):
    """The same prompts and noise for the models of eight tasks."""
    best, closed = choose(8, seed)
    merge = max(best.values(), key=closed.get)
    rows = {"base": "base", "best merge": merge, "GRPO-Mix": "mix", "Flow-OPD": "opd", "teachers": None}
    pictures, texts = {name: [] for name in rows}, []
    for task in TASKS:
        texts.append(load_prompts(task, str(RUNS / f"prompts/{task}_test.txt"))[0]["prompt"])
        for name, model in rows.items():
            folder = RUNS / f"test-8-{seed}/{model}/{task}/samples"
            if name in ("base", "teachers"):
                folder = RUNS / f"own-{task}-test-{seed}/{model or task}/{task}/samples"
            [file] = folder.glob("*_000000.png")
            pictures[name].append(read_picture(str(file)))
    save_grid(str(HERE / "grow_samples.png"), pictures, texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", nargs=2, metavar=("K", "SEED"), help="print the best merges' names")
    args = parser.parse_args()
    if args.choose:
        print(*choose(*args.choose)[0].values())
        return
    file = HERE / "grow.json"
    whole = json.loads(file.read_text()) if file.exists() else {}
    here = sorted(path.parent.name.rpartition("-")[2] for path in RUNS.glob("test-8-*/results.json"))
    whole |= {seed: measured(seed) for seed in here}
    if not whole:
        die(f"{RUNS}: nothing here; bash experiments/grow.sh makes it")
    write_json(str(file), whole)
    seeds = [whole[seed] for seed in sorted(whole)]
    ways, merges = costs(seeds), {family: f"{label}" for family, label in MERGES.items()}
    page = [
        table("Kept of what the teachers can", seeds, kept, ARMS | merges),
        table(
            "Kept above Flow-OPD of the same seed",
            seeds,
            above,
            {n: a for n, a in ARMS.items() if n != "opd"},
        ),
        table("The worst task's share of its gap", seeds, lambda row, its: min(row.values()), ARMS),
        table("Shares, also above 1", seeds, mean_of, ARMS),
        by_task(seeds),
        by_rank(seeds),
        cost_table(ways, seeds),
    ]
    write(str(HERE / "grow.md"), "\n\n".join(page) + "\n")
    figure(seeds, ways)
    if here:
        grid(here[0])
    print("\n\n".join(page))


if __name__ == "__main__":
    main()
