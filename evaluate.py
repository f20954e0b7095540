"""What came of it: rows are checkpoints, columns are rewards, every model on the same held-out prompts from
the same noise. Pictures are made once, and every reward looks at the same files; a run that was killed goes
on where it was; more rewards, tasks and models can be added to the same --out later.

    python evaluate.py                                       # the toy's base and teachers on its test prompts
    python evaluate.py --models base opd=out/distill/lora --report  # and OUT/report.html, to look at them all
    torchrun --nproc_per_node=8 evaluate.py --model stabilityai/stable-diffusion-3.5-medium \\
        --models base flow-opd=out/distill/lora --tasks geneval=evaluation_metadata.jsonl ocr=ocr_test.txt \\
        drawbench=drawbench.txt --reward geneval geneval_strict ocr pickscore@drawbench aesthetic@drawbench \\
        deqa@drawbench,pickle+http://localhost:18086                   # the paper's tables
    python evaluate.py --folders theirs=pictures --tasks ocr=ocr_test.txt --reward ocr # that any program made

Pictures lie in OUT/MODEL/TASK/samples/PROMPT_000000.png, the layout of T2I-CompBench++: its own scorers take
--out_dir OUT/MODEL/TASK. Beside results.json there are results.md and samples.png. The table does not depend
on the number of processes."""

import argparse
import contextlib
import hashlib
import html
import json
import math
import os
import pathlib
import queue
import re
import string
import threading
import typing
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flow_sde
from flow_sde import check, fingerprint, parse_specs, write, write_json
from rewards import (
    RewardError,
    Unavailable,
    check_rewards,
    encoded,
    markdown,
    mean_error,
    parse_rewards,
    pil,
    read_picture,
    rewards_of,
    score_batch,
)

TASKS = ("compose", "ocr", "scene")
TOY = dict(
    model="toy/base",
    models=["base"] + [f"{t}=toy/teachers/{t}" for t in (*TASKS, "quality")],
    tasks=[f"{t}=toy/prompts/{t}_test.txt" for t in TASKS],
    reward=[f"toy.{t}" for t in (*TASKS, "quality")],
    resolution=32,
    dtype="float32",
    guidance=1.0,
    eval_num_steps=10,
    eval_batch_size=128,
)
# The paper's Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4; our scores are divided already
PAPER = ("geneval", "ocr", "deqa", "pickscore")
FOLDERS = """instead of models: pictures in DIR/TASK (or DIR, or samples in it), in the prompts' order. Names
end in a number from 0 or 1 on (PROMPT_000000.png, as here and in T2I-CompBench; 0.jpg or image_0.png, as for
diffusers; ComfyUI_00001_.png), or begin with it (A1111: 00000-SEED.png), or folders bear it (GenEval:
00000/samples/0000.png). png, jpg, webp, bmp, avif, tiff"""

# -- flags ---------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__)
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the embedded toy")
add("--models", nargs="+", metavar="NAME=LORA[,guidance=G]", default=["base"], help="rows; `base`: no LoRA")
add("--folders", nargs="+", metavar="NAME=DIR", help=FOLDERS)
add("--tasks", "--prompts", nargs="+", metavar="TASK=FILE", help="prompts (.txt .jsonl .json .csv .tsv)")
add("--samples-per-prompt", type=int, default=1, help="GenEval: 4; from 2 on, a column with their diversity")
add("--reward", nargs="+", metavar="NAME[@TASK]", help="the columns; one called like a task scores that only")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--out", default="out/evaluate", help="folder of the pictures, scores and tables")
add("--report", action="store_true", help="write OUT/report.html: all pictures and scores side by side")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add("--eval-num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="in the CPU's memory but while they encode")
add("--compile", action="store_true", help="torch.compile: slow at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of the noise")
args = flow_sde.parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
check(args.tasks and args.reward, "--model needs --tasks TASK=FILE and --reward NAME with it")
for spec in args.models:
    check(not spec.startswith("base="), f"--models {spec}: `base` is the bare model; name the LoRA otherwise")
each = args.samples_per_prompt
rewards = parse_rewards(args.reward, args.reward_option)
prompt_files = {task: spec["value"] for task, spec in parse_specs("--tasks", args.tasks).items()}
prompts = {}  # {task: [row of the prompt's file, once for every picture of it]}
for task, file in prompt_files.items():
    prompts[task] = [row for row in flow_sde.load_prompts(task, file) for _ in range(each)]
for task in prompts:
    scored = rewards_of(task, rewards, prompts)
    check(scored, f"--tasks {task}: no reward scores this task; --reward has {', '.join(rewards)}")
folders = {name: spec["value"] for name, spec in parse_specs("--folders", args.folders).items()}
specs = parse_specs("--models", [spec for spec in args.models if spec != "base"], guidance=args.guidance)
if "base" in args.models:
    specs = {"base": {"value": None, "guidance": args.guidance}} | specs
names = list(folders or specs)


def title(row):
    """A prompt, as far as a file name can hold it."""
    unfit = r"[/\\\x00-\x1f_]" if os.name != "nt" else r'[/\\\x00-\x1f_"<>:|?*]'
    return re.sub(unfit, " ", row["prompt"]).encode(errors="ignore")[:200].decode(errors="ignore")


def to_be_made(name, task):
    """Where this program's pictures go: the prompt and the number."""
    folder = os.path.join(args.out, name, task, "samples")
    return [os.path.join(folder, f"{title(row)}_{i:06d}.png") for i, row in enumerate(prompts[task])]


def made_elsewhere(name, task):
    """The files of --folders that belong to a task's prompts, in their order. A number is looked for in each
    place where programs put it; where none of these gives every number once, or two differ, nobody can say
    which picture is whose."""
    folder, needed = pathlib.Path(folders[name], task), len(prompts[task])
    if not folder.is_dir() and len(prompts) == 1:
        folder = pathlib.Path(folders[name])
    flag = f"--folders {name}: {folder}"
    check(folder.is_dir(), f"--folders {name}: there is no folder {folder}")
    genevals = sorted(folder.glob("[0-9]*/samples/*"))
    found = genevals or sorted(folder.glob("samples/*")) or sorted(folder.glob("*"))
    pictures = [f for f in found if re.search(r"\.(png|jpe?g|webp|bmp|avif|tiff?)$", f.name, re.I)]
    check(pictures, f"{flag} has no pictures")
    per_prompt, rest = divmod(len(pictures), needed // each)
    counts = f"{len(pictures)} pictures for {needed // each} prompts"
    check(rest or per_prompt in (0, each), f"{flag} has {counts}; give --samples-per-prompt {per_prompt}")
    orders, faults = {}, []
    for way, numbers in numberings(pictures, bool(genevals)).items():
        try:
            orders[way] = ordered(pictures, numbers, needed)
        except ValueError as error:
            faults.append(f"by {way}, {error}")
    check(orders, f"{flag}: {'; '.join(faults)}. {needed} pictures need numbers from 0 or 1 on")
    way, order = next(iter(orders.items()))
    different = f"{' and '.join(orders)} give different orders"
    same = all(other == order for other in orders.values())
    check(same, f"{flag}: {different}; let names end in the number that counts")
    titles = {title(row) for row in prompts[task]}
    for row, file in zip(prompts[task], order):
        named = re.sub(r"_\d+$", "", file.stem)
        doubt = f"{row['prompt']!r}: are the prompts of --tasks others, or in another order?"
        fits = named == title(row) or named not in titles
        check(fits, f"--folders {name}: {file} would be taken for {doubt}")
    example = f"{order[-1].name} is taken for {prompts[task][-1]['prompt']!r}"
    flow_sde.say(f"{name}, {task}: {needed} pictures by {way}; e.g. {example}")
    return [str(file) for file in order]


def numberings(pictures, genevals):
    """{where the number stands: the pictures' numbers, None for one without}."""
    last = [re.search(r"(\d+)\D*$", file.stem) for file in pictures]
    if genevals:
        numbers = [int(file.parts[-3]) * each + int(m[1]) if m else None for file, m in zip(pictures, last)]
        return {"the folders' numbers": numbers}
    first = [re.match(r"(\d+)-", file.stem) for file in pictures]
    ways = {"the last number of a name": last, "the number that a name begins with": first}
    return {way: [int(m[1]) if m else None for m in matches] for way, matches in ways.items()}


def ordered(pictures, numbers, needed):
    """Files in the order of their numbers, which must be 0 to needed - 1, or 1 to needed, each once; else
    ValueError."""
    numbered = {}
    for file, number in zip(pictures, numbers):
        if number is None:
            raise ValueError(f"{file.name} has no number")
        if number in numbered:
            raise ValueError(f"{numbered[number].name} and {file.name} have the same number")
        numbered[number] = file
    wanted = range(1, needed + 1) if min(numbered) == 1 else range(needed)
    for number in wanted:
        if number not in numbered:
            raise ValueError(f"no picture has the number {number}")
    for number, file in numbered.items():
        if number not in wanted:
            raise ValueError(f"{file.name} is one too many for {needed} pictures")
    return [numbered[number] for number in wanted]


find = made_elsewhere if folders else to_be_made
files = {(name, task): find(name, task) for name in names for task in prompts}

# -- devices, what is there already, and the model if pictures are to be made --------------------------------
accelerator = flow_sde.start_processes()
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
flow_sde.claim_folder(args.out, accelerator)
base = fingerprint(args.model) if rank == 0 and not folders else None


def folder_of(name, task):
    return os.path.join(args.out, name, task)


def settings_of(name, task):
    """What the pictures of a model and a task depend on."""
    if folders:
        hashes = [flow_sde.file_hash(file) for file in files[name, task]]
        settings = {"pictures": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:12]}
    else:
        lora = specs[name]["value"]
        settings = {"model": base, "guidance": specs[name]["guidance"], "LoRA": lora and fingerprint(lora)}
        for key in ("resolution", "eval_num_steps", "seed", "dtype", "no_t5", "max_sequence_length"):
            settings[key] = getattr(args, key)
    return settings | {"prompts": fingerprint(prompt_files[task]), "samples_per_prompt": each}


def read_scores(name, task):
    """{(reward's identity, picture's number): score} written so far, by all processes, without a line that a
    kill or a full disk cut."""
    scores = {}
    for file in sorted(pathlib.Path(folder_of(name, task)).glob("scores*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                scores[row["reward"], row["picture"]] = row["score"]
    return scores


def score_lines(scores):
    """read_scores' opposite."""
    rows = [{"picture": i, "reward": reward, "score": score} for (reward, i), score in scores.items()]
    return "".join(json.dumps(row) + "\n" for row in rows)


all_settings = {}
if rank == 0:
    for name, task in files:
        folder = folder_of(name, task)
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        settings, file = settings_of(name, task), os.path.join(folder, "settings.json")
        before = json.loads(pathlib.Path(file).read_text()) if os.path.exists(file) else settings
        changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
        problem = f"{folder} is of another evaluation: {'; '.join(changed)}"
        check(not changed, f"--out {args.out}: {problem}. Give another --out, or delete that folder")
        all_settings[file] = settings
        write(os.path.join(folder, "scores.jsonl"), score_lines(read_scores(name, task)))
        for part in pathlib.Path(folder).glob("scores.*.jsonl"):  # what each process wrote is in one file now
            part.unlink()
accelerator.wait_for_everyone()


class Job(typing.NamedTuple):
    """A batch of one model's pictures of one task, by their numbers."""

    name: str
    task: str
    numbers: list
    unscored: dict  # {reward: numbers to score}
    missing: bool  # whether the pictures are to be made


jobs = []  # this process's
for name, task in files:
    scores, total, size = read_scores(name, task), len(prompts[task]), args.eval_batch_size
    for start in range(rank * size, total, world * size):  # the same batches for any number of processes
        numbers, unscored = list(range(start, min(start + size, total))), {}
        for reward in rewards_of(task, rewards, prompts):
            lacking = [i for i in numbers if (rewards[reward].identity, i) not in scores]
            if lacking:
                unscored[reward] = lacking
        missing = not all(os.path.exists(files[name, task][i]) for i in numbers)
        if missing or unscored:
            jobs.append(Job(name, task, numbers, unscored, missing))
if any(job.missing for job in jobs):
    model = flow_sde.load_model(args, device)
    for name, spec in specs.items():
        if name != "base":
            model.load_teacher(name, spec["value"])
    if args.compile:
        model.compile()
    model.note_long(row["prompt"] for rows in prompts.values() for row in rows)
needed = {reward for job in jobs for reward in job.unscored}
check_rewards(rewards, prompts, args.resolution, device, needed=needed)
accelerator.wait_for_everyone()  # all have read, and nothing was refused, before anyone writes
for file, settings in all_settings.items():
    write_json(file, settings)

# -- make the pictures; beside that, a thread writes them and one per reward scores them ---------------------
AT_ONCE = 2**23  # pixels that a reward looks at together; a larger picture comes alone
stop, broken, writing, unreadable = flow_sde.StopSignal(), [], threading.Lock(), set()
waiting, failures = {reward: queue.Queue() for reward in rewards}, dict.fromkeys(rewards, 0)
total = sum(len(job.numbers) * job.missing + sum(map(len, job.unscored.values())) for job in jobs)
progress = tqdm(total=total, disable=rank != 0, unit="picture or score", mininterval=1)


def complain(name, task, i, problem):
    tqdm.write(f"{name}, {task}, picture {i}: {problem}")


def draw_all():
    """The pictures that are not there yet, handed to the thread that writes them."""
    writer, written = ThreadPoolExecutor(1), []
    for job in jobs:
        if stop.name:
            break
        pictures = None
        if job.missing:
            texts = [prompts[job.task][i]["prompt"] for i in job.numbers]
            noise = flow_sde.generators(args.seed, 0, job.numbers)
            sampling = args.eval_num_steps, args.resolution, job.name, specs[job.name]["guidance"]
            pictures = model.generate(texts, noise, *sampling, strict=False)
        written.append(writer.submit(hand_on, job, pictures))
        if len(written) > 2:  # so that pictures do not pile up
            written.pop(0).result()
    for future in written:
        future.result()


def hand_on(job, pictures):
    """Write a batch that was drawn; when its files lie on the disk, give it to the rewards' threads."""
    if job.missing:
        pictures = pictures.cpu()
        for i, tensor, picture in zip(job.numbers, pictures, pil(pictures)):
            if tensor.isfinite().all():
                write(files[job.name, job.task][i], encoded(picture))
            else:
                complain(job.name, job.task, i, f"not finite, so not kept; is {job.name} broken?")
                unreadable.add((job.name, job.task, i))
        with writing:
            progress.update(len(job.numbers))
    for reward, numbers in job.unscored.items():
        waiting[reward].put((job.name, job.task, numbers))


def score_all(reward):
    """One reward's thread."""
    for name, task, numbers in iter(waiting[reward].get, None):
        if failures[reward] == 3 or stop.name:
            return
        for pictures in read_files(name, task, numbers):
            score(reward, name, task, pictures)


def read_files(name, task, numbers):
    """The pictures of these numbers, {number: (3, H, W)} of one size and at most AT_ONCE pixels a time. One
    that cannot be read is said once, and has no scores."""
    together = {}
    for i in numbers:
        try:
            picture = read_picture(files[name, task][i])
        except RewardError as error:
            with writing:
                progress.update()
                if (name, task, i) not in unreadable:
                    complain(name, task, i, error)
                unreadable.add((name, task, i))
            continue
        shapes = {p.shape for p in together.values()}
        if together and (picture.shape not in shapes or (len(together) + 1) * picture[0].numel() > AT_ONCE):
            yield together
            together = {}
        together[i] = picture
    if together:
        yield together


def score(reward, name, task, pictures):
    """Score pictures and write that down. A batch that fails is tried picture by picture; what cannot be
    scored stays without a score, which the table calls missing; a reward that is unavailable three times in a
    row is left alone."""
    if failures[reward] == 3 or stop.name:
        return
    batch, scores, said = [(task, prompts[task][i]) for i in pictures], [math.nan], "no score"
    try:
        images = torch.stack(list(pictures.values())).to(device)
        scores = score_batch(images, batch, {reward: rewards[reward]}, prompts)[reward].tolist()
        failures[reward] = 0
    except RewardError as error:
        if len(pictures) > 1:
            for i, picture in pictures.items():
                score(reward, name, task, {i: picture})
            return
        failures[reward] = failures[reward] + 1 if isinstance(error, Unavailable) else 0
        said = f"{error}; {reward} is given up" if failures[reward] == 3 else error
    scores = dict(zip(pictures, scores))
    for i, value in scores.items():
        if math.isnan(value):
            complain(name, task, i, said)
    lines = score_lines({(rewards[reward].identity, i): v for i, v in scores.items() if not math.isnan(v)})
    with writing:
        with open(os.path.join(folder_of(name, task), f"scores.{rank}.jsonl"), "a") as f:
            f.write("\n" * bool(lines) + lines)  # after a line that a full disk cut
        progress.update(len(pictures))


def guarded(work, *details):
    """A bug or a full disk ends the program, not only a thread, and not while others are in the middle of
    something."""
    try:
        work(*details)
    except BaseException as error:
        broken.append(error)
        stop.name = "failure"


threads = []
for reward in rewards:
    thread = threading.Thread(target=guarded, args=(score_all, reward), name=f"reward {reward}", daemon=True)
    threads.append(thread)
    thread.start()
guarded(draw_all)
for reward, thread in zip(rewards, threads):
    waiting[reward].put(None)  # nothing more comes
    while thread.is_alive() and not stop.name:
        thread.join(0.2)
progress.close()
if broken:
    for thread in threads:
        thread.join(5)  # an interpreter that shuts down under a thread at work may abort
    raise broken[0]
if stop.arrived(device):
    flow_sde.end_processes(accelerator, f"stopped; the same command goes on from what lies in {args.out}")
accelerator.wait_for_everyone()


# -- the tables ----------------------------------------------------------------------------------------------
def thumbnail(file, side):
    """A picture file, reduced to at most `side` pixels: (3, h, w); grey if it cannot be read."""
    try:
        picture = read_picture(file)
    except RewardError:
        return torch.full((3, side, side), 0.5)
    scale = min(1, side / max(picture.shape[1:]))
    sides = [max(1, round(n * scale)) for n in picture.shape[1:]]
    return F.interpolate(picture[None], sides, mode="area")[0]


def diversity(name, task):
    """How much the pictures of one prompt differ: the mean over its pairs of the root mean square difference
    of pixels (in [0, 1], of pictures reduced to 64 x 64). -> (number of prompts,) float64, NaN where a
    picture cannot be read"""
    small = torch.full((len(files[name, task]), 3 * 64 * 64), math.nan, dtype=torch.float64)
    for i, file in enumerate(files[name, task]):
        with contextlib.suppress(RewardError):
            small[i] = F.interpolate(read_picture(file)[None], (64, 64), mode="area").flatten()
    groups = small.view(-1, each, 3 * 64 * 64)
    i, j = torch.triu_indices(each, each, 1)
    return (groups[:, i] - groups[:, j]).square().mean(-1).sqrt().mean(1)


def means(keys, scores):
    """{key: (mean, standard error) of its scores}."""
    groups = {}
    for key, score in zip(keys, scores):
        groups.setdefault(key, []).append(score)
    return {key: mean_error(torch.tensor(group, dtype=torch.float64)) for key, group in groups.items()}


def summary(name):
    """A model's row of results.json. Means are over the scores that are there; `missing` counts those that
    are not. GenEval's is the mean of its tags' means, as its authors have it."""
    row = {"model": name, "n": sum(map(len, prompts.values()))}
    row |= {"scores": {}, "stderr": {}, "tasks": {}, "tags": {}, "missing": {}}
    columns = {reward: [] for reward in rewards} | ({"diversity": []} if each > 1 else {})
    for task in prompts:  # a column has a (task, tag, score) for each of its pictures
        scores = read_scores(name, task)
        for reward in rewards_of(task, rewards, prompts):
            for i, prompt in enumerate(prompts[task]):
                value = scores.get((rewards[reward].identity, i), math.nan)
                columns[reward].append((task, prompt.get("tag"), value))
        if each > 1:
            columns["diversity"] += [(task, None, value) for value in diversity(name, task).tolist()]
    for column, entries in columns.items():
        scored = [entry for entry in entries if not math.isnan(entry[2])]
        if len(scored) < len(entries):
            row["missing"][column] = len(entries) - len(scored)
        if not scored:
            continue
        tasks, tags, scores = zip(*scored)
        row["scores"][column], row["stderr"][column] = means(["all"] * len(scores), scores)["all"]
        row["tasks"][column] = means(tasks, scores)
        if None in tags:
            continue
        row["tags"][column] = means(tags, scores)
        if column.startswith("geneval"):
            tag_means, errors = zip(*row["tags"][column].values())
            row["scores"][column] = sum(tag_means) / len(tag_means)
            known = None not in errors
            row["stderr"][column] = sum(e**2 for e in errors) ** 0.5 / len(errors) if known else None
    if all(reward in row["scores"] and reward not in row["missing"] for reward in PAPER):
        row["scores"]["average"] = sum(row["scores"][reward] for reward in PAPER) / len(PAPER)
    return row


def breakdown(results, kind, reward):
    """One reward by "tasks" or "tags", a Markdown table with its title; "" if no model has more than one."""
    rows = []
    for result in results:
        groups = result[kind].get(reward, {})
        if len(groups) > 1:
            scores, errors = ({key: pair[i] for key, pair in groups.items()} for i in (0, 1))
            rows.append({"model": result["model"], "scores": scores, "stderr": errors})
    return f"{reward} by {kind[:-1]}:\n\n{markdown(rows)}" if rows else ""


# -- the report: one page to look at everything --------------------------------------------------------------
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; --side: 180px }
#tables { display: flex; flex-wrap: wrap; gap: 0 3em; align-items: end }
table { border-collapse: collapse; margin: .5em 0 1em }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: right }
td:first-child, th:first-child { text-align: left }
nav { position: sticky; top: 0; background: #fffe; padding: .6em 0; z-index: 1 }
nav label { margin-right: 1em; white-space: nowrap }
article { border-top: 1px solid #ddd; padding: .5em 0; content-visibility: auto }
article { contain-intrinsic-size: 1px 240px }
h2 { font-size: 1em; font-weight: 600; margin: .3em 0 }
h2 small { font-weight: normal; color: #777 }
.models { display: flex; gap: .8em; overflow-x: auto }
.model { font-size: .85em; font-weight: 600 }
.samples { display: grid; grid-template-columns: repeat($across, var(--side)); gap: .3em; align-items: start }
figure { margin: 0 }
figcaption { font-size: .8em; color: #555 }
img { width: 100%; min-height: 1.4em; display: block; background: #eee; image-rendering: $images }
</style></head><body><h1>Evaluation</h1>
<div id="tables">$tables</div>
<nav>
<label>task <select id="task"><option value="">all</option>$tasks</select></label>
<label>sort by <select id="reward"><option value="">the order of the prompts</option>$rewards</select></label>
<label>of <select id="model">$models</select></label>
<label>less that of <select id="other"><option value="">none</option>$models</select></label>
<label><select id="first"><option value="1">worst first</option><option value="-1">best first</option>
</select></label>
<label>size <input id="side" type="range" min="60" max="600" value="180"></label>
<label id="count"></label>
</nav>
<main>
$prompts
</main>
<script>
const get = id => document.getElementById(id), articles = [...document.querySelectorAll("article")];
const scores = new Map(articles.map(article => [article, JSON.parse(article.dataset.scores)]));
function value(article) {
  const of = model => (scores.get(article)[model] || {})[get("reward").value];
  const one = of(get("model").value), other = get("other").value ? of(get("other").value) : 0;
  return one == null || other == null ? null : one - other;
}
function show() {
  const reward = get("reward").value, task = get("task").value, sign = +get("first").value;
  const has = article => !reward || reward in scores.get(article)[get("model").value];
  const shown = articles.filter(article => (!task || article.dataset.task == task) && has(article));
  if (reward) shown.sort((a, b) => {  // a missing score comes first
    const x = value(a), y = value(b);
    return x == null || y == null ? (x != null) - (y != null) : sign * (x - y);
  });
  document.querySelector("main").replaceChildren(...shown);
  get("count").textContent = shown.length + " prompts";
}
document.querySelectorAll("select").forEach(select => select.addEventListener("change", show));
get("side").addEventListener("input", e => document.body.style.setProperty("--side", e.target.value + "px"));
show();
</script></body></html>
"""


def table_html(text):
    """A Markdown table, with its title if it has one, as HTML."""
    heading, _, lines = text.rpartition("\n\n")
    rows = []
    for line in lines.split("\n"):
        if not line.startswith("|---"):
            tag = "td" if rows else "th"
            cells = [f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in line.strip("|").split("|")]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([f"<div><h2>{html.escape(heading)}</h2><table>", *rows, "</table></div>"])


def article_html(task, first, scores):
    """One prompt's pictures of all models, from number `first` on; scores: {model: read_scores}."""
    scored, means_of, models = rewards_of(task, rewards, prompts), {}, []
    for name in names:
        figures, values = [], {reward: [] for reward in scored}
        for i in range(first, first + each):
            caption = []
            for reward in scored:
                value = scores[name].get((rewards[reward].identity, i))
                values[reward].append(value)
                caption.append(f"{reward} {'missing' if value is None else format(value, '.3f')}")
            path = pathlib.Path(os.path.relpath(files[name, task][i], args.out)).as_posix()
            link = html.escape(urllib.parse.quote(path))
            image = f'<a href="{link}"><img loading="lazy" src="{link}" alt="no picture"></a>'
            caption = f"<figcaption>{html.escape(', '.join(caption))}</figcaption>"
            figures.append(f"<figure>{image}{caption}</figure>")
        means_of[name] = {reward: None if None in v else sum(v) / each for reward, v in values.items()}
        label = f'<div class="model">{html.escape(name)}</div>'
        models.append(f'<div>{label}<div class="samples">{"".join(figures)}</div></div>')
    data = f'data-task="{html.escape(task)}" data-scores="{html.escape(json.dumps(means_of))}"'
    number = f"<small>{html.escape(task)} {first // each}</small>"
    heading = f"<h2>{html.escape(prompts[task][first]['prompt'])} {number}</h2>"
    return f'<article {data}>\n{heading}\n<div class="models">{"".join(models)}</div>\n</article>'


def options_html(values):
    return "".join(f"<option>{html.escape(value)}</option>" for value in values)


def page_html(tables):
    """The page: the tables, and every prompt's pictures, which it shows from where they lie."""
    articles = []
    for task, rows in prompts.items():
        scores = {name: read_scores(name, task) for name in names}
        articles += [article_html(task, first, scores) for first in range(0, len(rows), each)]
    widest = max(thumbnail(files[name, task][0], 128).shape[-1] for name in names for task in prompts)
    return string.Template(PAGE).substitute(
        images="pixelated" if widest < 128 else "auto",
        across=min(2, each),
        tables="\n".join(map(table_html, tables)),
        prompts="\n".join(articles),
        tasks=options_html(prompts),
        rewards=options_html(rewards),
        models=options_html(names),
    )


if rank == 0:
    results = [summary(name) for name in names]
    tables = [markdown(results)]
    for kind in ("tasks", "tags"):
        for reward in dict.fromkeys(reward for result in results for reward in result[kind]):
            tables.append(breakdown(results, kind, reward))
    tables = [table for table in tables if table]
    per_task = max(2, 12 // len(prompts))  # pictures of the grid, one a prompt
    chosen = [(task, i) for task in prompts for i in range(0, len(prompts[task]), each)[:per_task]]
    captions = [prompts[task][i]["prompt"] for task, i in chosen]
    grid = {name: [thumbnail(files[name, task][i], 512) for task, i in chosen] for name in names}
    flow_sde.save_grid(os.path.join(args.out, "samples.png"), grid, captions)
    write_json(os.path.join(args.out, "results.json"), results)
    write(os.path.join(args.out, "results.md"), "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    also = "results.md, samples.png"
    if args.report:
        write(os.path.join(args.out, "report.html"), page_html(tables))
        also += ", report.html"
    print(f"done: {args.out}/results.json (also {also})")
    lost = {f"{r['model']}: {n} of {reward}" for r in results for reward, n in r["missing"].items()}
    if lost:
        reason = f"scores are missing ({', '.join(sorted(lost))}); the same command tries again"
        flow_sde.end_processes(accelerator, reason)
flow_sde.end_processes(accelerator)
