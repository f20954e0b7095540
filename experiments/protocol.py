"""How far an evaluation is from published numbers, and why.

    python experiments/protocol.py out/evaluate           # a folder of evaluate.py, against published.json
    python experiments/protocol.py out/evaluate --published experiments/published_toy.json
    python experiments/protocol.py out/evaluate --try --model ... --models ... --tasks ... --reward ...

A row agrees if the two scores are within three combined standard errors. A published score without an error
gets ours, for the prompts are as many, and the rounding of its last digit. Beside a row stand the settings
that are not the published ones, the likeliest cause first. A row whose prompts are not said is not judged.

`--try`, followed by the flags that evaluate.py had, draws the first 40 prompts of every task again, with one
setting at a time as published (as others have it, where that is not said or none differs), in OUT/protocol.
It says which of them brings the score to the published, paired with the pictures in OUT by prompt and noise.

Exits with 0 if all rows judged agree, with 1 if not.
"""

import argparse
import hashlib
import json
import math
import pathlib
import re
import subprocess
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the scripts lie one folder above
from experiments.tables import picture_scores
from flow_sde import HERE, check, load_prompts, parse_specs, read_json, write
from rewards import mean_error

HEAD = 40  # prompts of a task that --try draws again
SIGMAS = 3  # combined standard errors up to which two scores agree; many rows are judged at once
OTHERS = {"guidance": (1.0, 4.5), "eval_num_steps": (10, 28, 40)}  # what others have: if a paper does not
OTHERS |= {"dtype": ("float16", "bfloat16"), "no_t5": (False, True)}  # say, or may not be as it says
NO_FLAG = ("prompts", "samples_per_prompt")  # what --try cannot change


# -- what was measured, what was published -------------------------------------------------------------------


def measured(result, reward, task):
    """(mean, standard error) of a row of results.json; None if that was not scored."""
    by_task = result["tasks"].get(reward, {})
    if task not in by_task:
        return None
    alone = len(by_task) == 1  # then GenEval's mean of its tags' means
    mean, error = (result["scores"][reward], result["stderr"][reward]) if alone else by_task[task]
    return mean, error or 0.0


def published(row, book, our_error):
    """(score, standard error) of a published row, in our unit."""
    unit = book["divided"].get(row["reward"], 1)
    last_digit = 10.0 ** -len(str(row["score"]).partition(".")[2]) / unit
    error = our_error if row["error"] is None else row["error"] / unit
    return float(row["score"]) / unit, math.hypot(error, last_digit / math.sqrt(12))


def sigmas(ours, theirs):
    """How many combined standard errors the first (mean, error) is above the second."""
    return (ours[0] - theirs[0]) / math.hypot(ours[1], theirs[1])


def differences(settings, protocol, book):
    """[(setting, ours, published)] where both are known and differ, the largest known effect first."""
    names = dict.fromkeys([*book["effects"], *protocol])
    both = [name for name in names if name in settings and protocol.get(name) is not None]
    return [(name, settings[name], protocol[name]) for name in both if settings[name] != protocol[name]]


def compare(out, book):
    """What was both measured and published, a dict a row. Of several published rows of the same model, task
    and reward the first is the one to reach; the others may explain."""
    results = {result["model"]: result for result in json.loads((out / "results.json").read_text())}
    rows = {}
    for row in book["rows"]:
        rows.setdefault((row["model"], row["task"], row["reward"]), []).append(row)
    found = []
    for (model, task, reward), (first, *others) in rows.items():
        ours = measured(results[model], reward, task) if model in results else None
        if ours is None:
            continue
        theirs = published(first, book, ours[1])
        settings = read_json(str(out / model / task / "settings.json"))
        protocol = book["protocols"][first["protocol"]]
        hints = []
        for other in others:
            if abs(sigmas(ours, published(other, book, ours[1]))) <= SIGMAS:
                hints.append(f"it agrees with {other['score']} of {other['source']}")
        for column in results[model]["tasks"]:  # a strict GenEval for a continuous one
            score = measured(results[model], column, task)
            alike = column != reward and column.split("_")[0] == reward.split("_")[0]
            if alike and score and abs(sigmas(score, theirs)) <= SIGMAS:
                hints.append(f"our {column}, {score[0]:.3f}, would agree")
        entry = dict(model=model, task=task, reward=reward, source=first["source"], hints=hints)
        entry |= dict(ours=ours, theirs=theirs, settings=settings, protocol=protocol)
        entry |= dict(name=f"{model}, {reward} on {task}", sigmas=sigmas(ours, theirs))
        found.append(entry | dict(differ=differences(settings, protocol, book)))
    return found


def verdict(entry, book):
    """One line on a row."""
    (score, error), (goal, _), names = entry["ours"], entry["theirs"], book["prompts"]
    line = f"{entry['name']}: {score:.3f} ± {error:.3f}, published {goal:.3f} ({entry['source']})"
    differ = [f"{name} {names.get(a, a)}, published {names.get(b, b)}" for name, a, b in entry["differ"]]
    if entry["protocol"].get("prompts") is None:
        return f"{line}: not judged, its prompts are not said"
    if abs(entry["sigmas"]) <= SIGMAS:
        return f"{line}: agrees" + (f", though {'; '.join(differ)}" if differ else "")
    unsaid = [name for name in book["effects"] if entry["protocol"].get(name) is None]
    causes = differ + entry["hints"] + [f"not said: {', '.join(unsaid)}"] * bool(unsaid)
    causes = "; ".join(causes) or "no setting differs: are these its weights and its reward's model?"
    return f"{line}: DIFFERS by {entry['sigmas']:+.1f} standard errors. {causes}"


# -- --try: one setting at a time ----------------------------------------------------------------------------


def variants(entries):
    """[(setting, value)] to try: the published value where it is another; what others have where that is not
    said, or where no setting differs and still the score does."""
    found = []
    for entry in entries:
        settings, protocol = entry["settings"], entry["protocol"]
        changes = [(name, theirs) for name, _, theirs in entry["differ"] if name not in NO_FLAG]
        for name, values in OTHERS.items():
            if name in settings and (not entry["differ"] or protocol.get(name) is None):
                changes += [(name, value) for value in values if value != settings[name]]
        found += changes
    return list(dict.fromkeys(found))


def digest_of(prompts):
    """As in settings.json."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]


def heads(out, tasks, entries):
    """TASK=FILE for every task: its first prompts, in a file of their own."""
    found, digests = [], {entry["task"]: entry["settings"]["prompts"] for entry in entries}
    for task, spec in parse_specs("--tasks", tasks).items():
        prompts = load_prompts(task, spec["value"])
        same = digests.get(task) in (None, digest_of(prompts))
        check(same, f"--try --tasks {task}: {out} was not made with the prompts of {spec['value']}")
        file = out / "protocol/prompts" / f"{task}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write(str(file), "".join(json.dumps(row) + "\n" for row in prompts[:HEAD]))
        found.append(f"{task}={file}")
    return found


def draw(folder, setting, value, flags, models, tasks):
    """evaluate.py with one setting changed."""
    own = setting.removeprefix("eval_")  # a model's own would win
    models = [re.sub(rf",{own}=[^,]*", "", spec) for spec in models]
    if setting == "no_t5":
        changed = [flag for flag in flags if flag != "--no-t5"] + ["--no-t5"] * value
    else:
        changed = [*flags, "--" + setting.replace("_", "-"), str(value)]
    print(f"trying {setting} {value} on {HEAD} prompts a task", flush=True)
    command = [sys.executable, f"{HERE}/evaluate.py", *changed, "--out", str(folder)]
    done = subprocess.run([*command, "--models", *models, "--tasks", *tasks], stdout=subprocess.DEVNULL)
    check(done.returncode == 0, f"--try: evaluate.py failed with {setting} {value}, see above")


def moved(out, folder, entry, setting):
    """(mean, standard error) of what a variant changed of a row's score."""
    place = pathlib.Path(entry["model"], entry["task"])
    settings = read_json(str(folder / place / "settings.json"))
    own = (setting, "prompts")
    other = [name for name in settings if name not in own and settings[name] != entry["settings"][name]]
    check(not other, f"--try: {out} was not made with these flags; its {', '.join(other)} differs")
    before, after = (picture_scores(drawn / place, entry["reward"]) for drawn in (out, folder))
    gaps = [after[picture] - before[picture] for picture in after if picture in before]
    check(len(gaps) > 1, f"--try: {folder / place} has no scores of {entry['reward']}")
    return mean_error(torch.tensor(gaps, dtype=torch.float64))


def try_variants(out, flags, entries):
    """Draw every variant; say for each row which leads towards the published score."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["base"])
    parser.add_argument("--tasks", "--prompts", nargs="+")
    given, flags = parser.parse_known_args(flags)
    check(given.tasks, "--try: the flags that evaluate.py had must follow, --tasks among them")
    specs, wanted = {spec.partition("=")[0]: spec for spec in given.models}, {e["model"] for e in entries}
    check(wanted <= specs.keys(), f"--try --models: must have {', '.join(sorted(wanted))}")
    tasks, found = heads(out, given.tasks, entries), []
    for setting, value in variants(entries):
        folder = out / "protocol" / f"{setting}={value}"
        draw(folder, setting, value, flags, [specs[model] for model in sorted(wanted)], tasks)
        for entry in entries:
            gap, error = moved(out, folder, entry, setting)
            found.append((entry["name"], f"{setting} {value}", gap, error))
    for entry in entries:
        missing = entry["theirs"][0] - entry["ours"][0]
        groups = {"yes": [], "part of it": [], "perhaps": [], "no": []}
        own = [row[1:] for row in found if row[0] == entry["name"]]
        for change, gap, error in sorted(own, key=lambda row: abs(missing - row[1])):
            enough = abs(missing - gap) <= 2 * error
            if gap * missing > 0 and abs(gap) > 2 * error:
                answer = "yes" if enough else "part of it"
            else:
                answer = "perhaps" if enough else "no"
            groups[answer].append(f"{change} ({gap:+.3f} ± {error:.3f})")
        answers = "; ".join(f"{answer}: {', '.join(texts)}" for answer, texts in groups.items() if texts)
        print(f"{entry['name']}, {missing:+.3f} to the published score. Is it the setting? {answers or 'no'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=pathlib.Path, help="folder of evaluate.py")
    parser.add_argument("--published", default=f"{HERE}/experiments/published.json", help="numbers to reach")
    parser.add_argument("--try", dest="flags", nargs=argparse.REMAINDER, help="find the cause")
    args = parser.parse_args()
    check((args.out / "results.json").exists(), f"{args.out}: has no results.json; evaluate.py writes it")
    book = read_json(args.published)
    entries = compare(args.out, book)
    check(entries, f"{args.out}: none of its rows is in {args.published}")
    for entry in entries:
        print(verdict(entry, book))
    judged = [entry for entry in entries if entry["protocol"].get("prompts") is not None]
    apart = [entry for entry in judged if abs(entry["sigmas"]) > SIGMAS]
    for setting, effect in book["effects"].items():
        if any(setting == name for entry in apart for name, *_ in entry["differ"]):
            print(f"{setting}: {effect}")
    print(f"{len(judged) - len(apart)} of {len(judged)} rows agree")
    if args.flags is not None and apart:
        try_variants(args.out, args.flags, apart)
    sys.exit(1 if apart else 0)
