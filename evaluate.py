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
import threading
import urllib.parse

import torch
import torch.nn.functional as F
from tqdm import tqdm

from flow_sde import (
    StopSignal,
    die,
    end_processes,
    file_hash,
    fingerprint,
    generators,
    load_model,
    load_prompts,
    claim_folder,
    parse_args,
    parse_specs,
    save_grid,
    start_processes,
    write,
    write_json,
)
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

# -- flags ---------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add(
    "--model",
    help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it",
)
add(
    "--models",
    nargs="+",
    metavar="NAME=LORA[,guidance=G]",
    default=["base"],
    help="the rows, LoRAs or full fine-tunes; `base` is the bare model",
)
add(
    "--folders",
    nargs="+",
    metavar="NAME=DIR",
    help="instead of models: pictures in DIR/TASK (or DIR, or samples in it), in the prompts' order. Names end "
    "in a number from 0 or 1 on (PROMPT_000000.png, as here and in T2I-CompBench; 0.jpg or image_0.png, as "
    "for diffusers; ComfyUI_00001_.png), or begin with it (A1111: 00000-SEED.png), or folders bear it (GenEval: "
    "00000/samples/0000.png). png, jpg, webp, bmp, avif, tiff",
)
add(
    "--tasks",
    "--prompts",
    nargs="+",
    metavar="TASK=FILE",
    help="held-out prompts (.txt, .jsonl, .json, .csv, .tsv)",
)
add(
    "--samples-per-prompt",
    type=int,
    default=1,
    help="pictures of each prompt (GenEval: 4); from 2 on, the table has their diversity",
)
add(
    "--reward",
    nargs="+",
    metavar="NAME[@TASK]",
    help="the columns; one called like a task, or tied to one, scores that task only",
)
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--out", default="out/evaluate", help="folder of the pictures, scores and tables")
add(
    "--report",
    action="store_true",
    help="write OUT/report.html: the pictures of all models side by side, scores under them, to be sorted",
)
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add("--eval-num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward")
add(
    "--dtype",
    choices=["float32", "bfloat16", "float16"],
    help="of the frozen networks; what is trained is float32",
)
add(
    "--no-t5",
    action="store_true",
    help="leave out SD3's T5 text encoder, the largest network of 3.5-Medium (long prompts suffer)",
)
add(
    "--max-sequence-length",
    type=int,
    help="tokens that T5, or what a model has in its place, reads of a prompt (Flow-GRPO and Flow-OPD: 128)",
)
add(
    "--offload-text-encoders", action="store_true", help="keep them in the CPU's memory but while they encode"
)
add("--compile", action="store_true", help="torch.compile the blocks: minutes at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

# -- what is asked, checked before anything slow -------------------------------------------------------------
if not args.tasks or not args.reward:
    die("--model needs --tasks TASK=FILE and --reward NAME with it")
rewards = parse_rewards(args.reward, args.reward_option)
task_files = {task: s["value"] for task, s in parse_specs("--tasks", args.tasks).items()}
prompts = {}
for task, file in task_files.items():
    prompts[task] = [row for row in load_prompts(task, file) for _ in range(args.samples_per_prompt)]
if idle := [t for t in prompts if not rewards_of(t, rewards, prompts)]:
    die(f"--tasks {', '.join(idle)}: no reward scores this task; --reward has {', '.join(rewards)}")
if any(m.startswith("base=") for m in args.models):
    die("--models base=...: `base` is the bare model; call the LoRA something else")
folders = {name: s["value"] for name, s in parse_specs("--folders", args.folders).items()}
specs = parse_specs(
    "--models", [m for m in args.models if m != "base" and not folders], guidance=args.guidance
)
names = list(folders) or (["base"] if "base" in args.models else []) + list(specs)
guidance = {name: specs[name]["guidance"] if name in specs else args.guidance for name in names}


def title(row):
    """A prompt, as far as a file name can hold it."""
    unfit = r"[/\\\x00-\x1f_]" if os.name != "nt" else r'[/\\\x00-\x1f_"<>:|?*]'
    return re.sub(unfit, " ", row["prompt"]).encode(errors="ignore")[:200].decode(errors="ignore")


def to_be_made(name, task):
    """Where this program's pictures go: the prompt and the number."""
    place = os.path.join(args.out, name, task, "samples")
    return [os.path.join(place, f"{title(row)}_{i:06d}.png") for i, row in enumerate(prompts[task])]


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
    absent, surplus = [n for n in wanted if n not in numbered], [n for n in numbered if n not in wanted]
    if absent:
        raise ValueError(f"no picture has the number {absent[0]}")
    if surplus:
        raise ValueError(f"{numbered[surplus[0]].name} is one too many for {needed} pictures")
    return [numbered[n] for n in wanted]


def made_elsewhere(name, task):
    """The files of --folders that belong to a task's prompts, in their order. A number is looked for in each
    place where programs put it; where none of these gives every number once, or two differ, nobody can say
    which picture is whose."""
    place, each, needed = pathlib.Path(folders[name], task), args.samples_per_prompt, len(prompts[task])
    if not place.is_dir() and len(prompts) == 1:
        place = pathlib.Path(folders[name])
    if not place.is_dir():
        die(f"--folders {name}: there is no folder {place}")
    geneval = sorted(place.glob("[0-9]*/samples/*"))
    found = geneval or sorted(place.glob("samples/*")) or sorted(place.glob("*"))
    pictures = [f for f in found if re.search(r"\.(png|jpe?g|webp|bmp|avif|tiff?)$", f.name, re.I)]
    if not pictures:
        die(f"--folders {name}: {place} has no pictures")
    per_prompt, rest = divmod(len(pictures), needed // each)
    if per_prompt not in (0, each) and not rest:
        die(
            f"--folders {name}: {place} has {len(pictures)} pictures for {needed // each} prompts; give "
            f"--samples-per-prompt {per_prompt}"
        )
    last = [re.search(r"(\d+)\D*$", file.stem) for file in pictures]
    first = [re.match(r"(\d+)-", file.stem) for file in pictures]
    ways = {
        "the last number of a name": [m and int(m[1]) for m in last],
        "the number that a name begins with": [m and int(m[1]) for m in first],
    }
    if geneval:
        numbers = [int(file.parts[-3]) * each + int(m[1]) if m else None for file, m in zip(pictures, last)]
        ways = {"the folders' numbers": numbers}
    orders, faults = {}, []
    for way, numbers in ways.items():
        try:
            orders[way] = ordered(pictures, numbers, needed)
        except ValueError as error:
            faults.append(f"by {way}, {error}")
    if not orders:
        die(f"--folders {name}: {place}: {'; '.join(faults)}. {needed} pictures need numbers from 0 or 1 on")
    [(way, order), *others] = orders.items()
    if any(other != order for _, other in others):
        die(
            f"--folders {name}: {place}: {' and '.join(orders)} give different orders; let names end in the "
            "number that counts"
        )
    titles = {title(row) for row in prompts[task]}
    for row, file in zip(prompts[task], order):
        named = re.sub(r"_\d+$", "", file.stem)
        if named in titles and named != title(row):
            die(
                f"--folders {name}: {file} would be taken for {row['prompt']!r}: are the prompts of --tasks "
                "others, or in another order?"
            )
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{name}, {task}: {needed} pictures by {way}; e.g. {order[-1].name} is taken for "
            f"{prompts[task][-1]['prompt']!r}"
        )
    return [str(file) for file in order]


find = made_elsewhere if folders else to_be_made
files = {(name, task): find(name, task) for name in names for task in prompts}
accelerator = start_processes()
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
claim_folder(args.out, accelerator)


# -- what is there already -----------------------------------------------------------------------------------
def score_rows(place):
    """The scores written so far, [{"picture", "reward", "score"}], without a line that a kill or a full disk
    cut."""
    rows = []
    for part in sorted(os.listdir(place)):
        for line in open(os.path.join(place, part)) if re.fullmatch(r"scores(\.\d+)?\.jsonl", part) else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


settings_files = {}
base = fingerprint(args.model) if rank == 0 and not folders else None
for name, task in files if rank == 0 else ():
    place = os.path.join(args.out, name, task)
    os.makedirs(os.path.join(place, "samples"), exist_ok=True)
    if folders:
        listing = [file_hash(f) for f in files[name, task]]
        settings = {"pictures": hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:12]}
    else:
        settings = {
            "model": base,
            "guidance": guidance[name],
            "LoRA": fingerprint(specs[name]["value"]) if name in specs else None,
        }
        for key in ("resolution", "eval_num_steps", "seed", "dtype", "no_t5", "max_sequence_length"):
            settings[key] = getattr(args, key)
    settings |= {"prompts": fingerprint(task_files[task]), "samples_per_prompt": args.samples_per_prompt}
    if os.path.exists(path := os.path.join(place, "settings.json")):
        before = json.load(open(path))
        changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            die(
                f"--out {args.out}: {place} is of another evaluation: {'; '.join(changed)}. Give another "
                "--out, or delete that folder"
            )
    settings_files[path] = settings
    lines = [json.dumps(row) + "\n" for row in score_rows(place)]  # what each process wrote, in one file
    write(os.path.join(place, "scores.jsonl"), "".join(lines))
    for part in os.listdir(place):
        if re.fullmatch(r"scores\.\d+\.jsonl", part):
            os.remove(os.path.join(place, part))
accelerator.wait_for_everyone()


def read_scores(name, task):
    """{(reward's identity, picture's number): score}, of all processes."""
    rows = score_rows(os.path.join(args.out, name, task))
    return {(row["reward"], row["picture"]): row["score"] for row in rows}


jobs = []  # this process's (name, task, numbers, {reward: numbers to score}, whether pictures are to be made)
for name, task in files:
    have = read_scores(name, task)
    numbers, step = list(range(len(prompts[task]))), args.eval_batch_size
    for start in range(rank * step, len(numbers), world * step):  # the same batches for any number of them
        batch, unscored = numbers[start : start + step], {}
        for reward in rewards_of(task, rewards, prompts):
            some = [i for i in batch if (rewards[reward].identity, i) not in have]
            if some:
                unscored[reward] = some
        missing = not all(os.path.exists(files[name, task][i]) for i in batch)
        if missing or unscored:
            jobs.append((name, task, batch, unscored, missing))
if any(missing for *_, missing in jobs):
    model = load_model(args, device)
    model.latent_shape(args.resolution)
    for name, spec in specs.items():
        model.load_teacher(name, spec["value"])
    if args.compile:
        model.compile()
    model.note_long(row["prompt"] for rows in prompts.values() for row in rows)
needed = {reward for *_, unscored, _ in jobs for reward in unscored}
check_rewards(rewards, prompts, args.resolution, device, needed=needed)
accelerator.wait_for_everyone()  # all have read, and nothing was refused, before anyone writes
for path, settings in settings_files.items():
    write_json(path, settings)

# -- make the pictures; beside that, a thread writes them and one per reward scores them ---------------------
AT_ONCE = 2**23  # pixels that a reward looks at together; a larger picture comes alone
stop, writing, broken, unreadable = StopSignal(), threading.Lock(), [], set()
waiting, drawn = {n: queue.Queue(maxsize=4) for n in rewards}, queue.Queue(maxsize=2)
total = sum(len(batch) * made + sum(map(len, unscored.values())) for _, _, batch, unscored, made in jobs)
progress = tqdm(total=total, disable=rank != 0, unit="picture or score", mininterval=1)


def read_files(name, task, numbers):
    """The pictures of these numbers, {number: (3, H, W)} of one size and at most AT_ONCE pixels a time. One
    that cannot be read is said once, and has no scores."""
    held = {}
    for i in numbers:
        try:
            picture = read_picture(files[name, task][i])
        except RewardError as error:
            with writing:
                progress.update()
                if (name, task, i) not in unreadable:
                    tqdm.write(f"{name}, {task}, picture {i}: {error}")
                unreadable.add((name, task, i))
            continue
        shapes = [p.shape for p in held.values()]
        if held and (shapes[0] != picture.shape or (len(held) + 1) * picture[0].numel() > AT_ONCE):
            yield held
            held = {}
        held[i] = picture
    if held:
        yield held


def hand_on(place, job):
    """Put a job into a queue when there is room, unless the process is told to stop."""
    while not stop.name:
        with contextlib.suppress(queue.Full):
            return place.put(job, timeout=0.2)


def take(place):
    """A queue's next job; None if the process is told to stop."""
    while not stop.name:
        with contextlib.suppress(queue.Empty):
            return place.get(timeout=0.2)


def write_all():
    """The thread that writes what was drawn; every batch is given to the rewards' threads when its files lie
    on the disk."""
    while (next_job := take(drawn)) is not None:
        (name, task, batch, unscored, missing), made = next_job
        if missing:
            made = made.cpu()
            for i, tensor, picture in zip(batch, made, pil(made)):
                if tensor.isfinite().all():
                    write(files[name, task][i], encoded(picture))
                else:
                    tqdm.write(f"{name}, {task}, picture {i}: not finite, so not kept; is {name} broken?")
                    unreadable.add((name, task, i))
            with writing:
                progress.update(len(batch))
        for reward, numbers in unscored.items():
            hand_on(waiting[reward], (name, task, numbers))
    for reward in rewards:
        hand_on(waiting[reward], None)


def score_all(reward):
    """One reward's thread. A batch that fails is tried picture by picture; what cannot be scored stays
    without a score, which the table calls missing; a reward that is unavailable three times in a row is left
    alone."""
    failures = 0
    while (job := take(waiting[reward])) is not None:
        name, task, numbers = job
        for held in read_files(name, task, numbers) if failures < 3 else ():
            parts = [held]
            while parts and failures < 3 and not stop.name:
                part = parts.pop(0)
                batch = [(task, prompts[task][i]) for i in part]
                scores, said = [math.nan] * len(part), "no score"
                try:
                    pictures = torch.stack(list(part.values())).to(device)
                    scores = score_batch(pictures, batch, {reward: rewards[reward]}, prompts)[reward].tolist()
                    failures = 0
                except RewardError as error:
                    if len(part) > 1:
                        parts = [{i: picture} for i, picture in part.items()]
                        continue
                    failures = failures + 1 if isinstance(error, Unavailable) else 0
                    said = f"{error}" + (f"; {reward} is given up" if failures == 3 else "")
                lines = []
                for i, value in zip(part, scores):
                    if math.isnan(value):
                        tqdm.write(f"{name}, {task}, picture {i}: {said}")
                    else:
                        row = {"picture": i, "reward": rewards[reward].identity, "score": value}
                        lines.append(json.dumps(row) + "\n")
                with writing:
                    with open(os.path.join(args.out, name, task, f"scores.{rank}.jsonl"), "a") as f:
                        f.write("\n" * bool(lines) + "".join(lines))  # after a line that a full disk cut
                    progress.update(len(part))


def guarded(work, *details):
    """A bug or a full disk ends the program, not only a thread, and not while others are in the middle of
    something."""
    try:
        work(*details)
    except BaseException as error:
        broken.append(error)
        stop.name = "failure"


def draw_all():
    """The pictures that are not there yet, handed to the thread that writes them."""
    for job in jobs:
        if stop.name:
            return
        name, task, batch, _, missing = job
        made = None
        if missing:
            texts = [prompts[task][i]["prompt"] for i in batch]
            made = model.generate(
                texts,
                generators(args.seed, 0, batch),
                args.eval_num_steps,
                args.resolution,
                name,
                guidance[name],
                strict=False,
            )
        hand_on(drawn, (job, made))
    hand_on(drawn, None)


threads = [threading.Thread(target=guarded, args=(write_all,), daemon=True)]
for reward in rewards:
    thread = threading.Thread(target=guarded, args=(score_all, reward), name=f"reward {reward}", daemon=True)
    threads.append(thread)
for thread in threads:
    thread.start()
guarded(draw_all)
for thread in threads:
    while thread.is_alive() and not stop.name:
        thread.join(0.2)
progress.close()
if broken:
    for thread in threads:
        thread.join(5)  # an interpreter that shuts down under a thread at work may abort
    raise broken[0]
if stop.arrived(device):
    end_processes(accelerator, f"stopped; the same command goes on from what lies in {args.out}")
accelerator.wait_for_everyone()


# -- the tables ----------------------------------------------------------------------------------------------
def thumbnail(file, side):
    """A picture file, reduced to at most `side` pixels: (3, h, w); grey if it cannot be read."""
    try:
        picture = read_picture(file)
    except RewardError:
        return torch.full((3, side, side), 0.5)
    scale = min(1, side / max(picture.shape[1:]))
    return F.interpolate(picture[None], [max(1, round(n * scale)) for n in picture.shape[1:]], mode="area")[0]


def diversity(name, task):
    """How much the pictures of one prompt differ: the mean over its pairs of the root mean square difference
    of pixels (in [0, 1], of pictures reduced to 64 x 64). -> (number of prompts,) float64, NaN where a
    picture cannot be read"""
    small = []
    for file in files[name, task]:
        try:
            small.append(F.interpolate(read_picture(file)[None], (64, 64), mode="area").double().flatten())
        except RewardError:
            small.append(torch.full((3 * 64 * 64,), math.nan, dtype=torch.float64))
    groups = torch.stack(small).view(-1, args.samples_per_prompt, 3 * 64 * 64)
    i, j = torch.triu_indices(args.samples_per_prompt, args.samples_per_prompt, 1)
    return (groups[:, i] - groups[:, j]).square().mean(-1).sqrt().mean(1)


def summary(name):
    """A model's row of results.json. Means are over the scores that are there; `missing` counts those that
    are not. GenEval's is the mean of its tags' means, as its authors have it."""
    row = {
        "model": name,
        "n": sum(map(len, prompts.values())),
        "scores": {},
        "stderr": {},
        "tasks": {},
        "tags": {},
        "missing": {},
    }

    def means(groups):
        return {key: mean_error(torch.tensor(values, dtype=torch.float64)) for key, values in groups.items()}

    def add(column, by_task, lost):
        if lost:
            row["missing"][column] = lost
        if by_task:
            everything = [v for values in by_task.values() for v in values]
            row["scores"][column], row["stderr"][column] = means({"": everything})[""]
            row["tasks"][column] = means(by_task)

    have = {task: read_scores(name, task) for task in prompts}
    for reward, (*_, identity) in rewards.items():
        by_task, by_tag, lost = {}, {}, 0
        for task in prompts:
            for i, prompt in enumerate(prompts[task] if reward in rewards_of(task, rewards, prompts) else ()):
                value = have[task].get((identity, i))
                if value is None:
                    lost += 1
                    continue
                by_task.setdefault(task, []).append(value)
                by_tag.setdefault(prompt.get("tag"), []).append(value)
        add(reward, by_task, lost)
        if by_tag and None not in by_tag:
            row["tags"][reward] = means(by_tag)
            if reward.startswith("geneval"):
                tag_means, errors = zip(*row["tags"][reward].values())
                row["scores"][reward] = sum(tag_means) / len(tag_means)
                row["stderr"][reward] = None
                if None not in errors:
                    row["stderr"][reward] = sum(e**2 for e in errors) ** 0.5 / len(errors)
    if args.samples_per_prompt > 1:
        apart = {task: diversity(name, task) for task in prompts}
        there = {task: values[~values.isnan()].tolist() for task, values in apart.items()}
        lost = sum(len(apart[task]) - len(there[task]) for task in prompts)
        add("diversity", {task: values for task, values in there.items() if values}, lost)
    if all(reward in row["scores"] and reward not in row["missing"] for reward in PAPER):
        row["scores"]["average"] = sum(row["scores"][reward] for reward in PAPER) / len(PAPER)
    return row


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
.samples { display: grid; grid-template-columns: repeat(ACROSS, var(--side)); gap: .3em; align-items: start }
figure { margin: 0 }
figcaption { font-size: .8em; color: #555 }
img { width: 100%; min-height: 1.4em; display: block; background: #eee; image-rendering: IMAGES }
</style></head><body><h1>Evaluation</h1>
<div id="tables">TABLES</div>
<nav>
<label>task <select id="task"><option value="">all</option>TASKS</select></label>
<label>sort by <select id="reward"><option value="">the order of the prompts</option>REWARDS</select></label>
<label>of <select id="model">MODELS</select></label>
<label>less that of <select id="other"><option value="">none</option>MODELS</select></label>
<label><select id="first"><option value="1">worst first</option><option value="-1">best first</option>
</select></label>
<label>size <input id="side" type="range" min="60" max="600" value="180"></label>
<label id="count"></label>
</nav>
<main>
PROMPTS
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
  const has = article => !reward || article.dataset.rewards.split(" ").includes(reward);
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


def article_html(task, first, have):
    """One prompt's pictures of all models, with their scores; `first` is the number of its first picture."""
    numbers, means, models = range(first, first + args.samples_per_prompt), {}, []
    scored = rewards_of(task, rewards, prompts)
    for name in names:
        figures, values = [], {reward: [] for reward in scored}
        for i in numbers:
            said = []
            for reward in scored:
                value = have[name, task].get((rewards[reward].identity, i))
                values[reward].append(value)
                said.append(f"{reward} {'missing' if value is None else format(value, '.3f')}")
            place = pathlib.Path(os.path.relpath(files[name, task][i], args.out)).as_posix()
            link = html.escape(urllib.parse.quote(place))
            figures.append(
                f'<figure><a href="{link}"><img loading="lazy" src="{link}" alt="no picture"></a>'
                f"<figcaption>{html.escape(', '.join(said))}</figcaption></figure>"
            )
        means[name] = {reward: None if None in v else sum(v) / len(v) for reward, v in values.items()}
        models.append(
            f'<div><div class="model">{html.escape(name)}</div>'
            f'<div class="samples">{"".join(figures)}</div></div>'
        )
    return (
        f'<article data-task="{html.escape(task)}" data-rewards="{" ".join(scored)}" '
        f'data-scores="{html.escape(json.dumps(means))}">\n'
        f"<h2>{html.escape(prompts[task][first]['prompt'])} "
        f"<small>{html.escape(task)} {first // args.samples_per_prompt}</small></h2>\n"
        f'<div class="models">{"".join(models)}</div>\n</article>'
    )


def report(tables):
    """The page: the tables, and every prompt's pictures, which it shows from where they lie."""
    have = {(name, task): read_scores(name, task) for name in names for task in prompts}
    articles, each = [], args.samples_per_prompt
    for task, rows in prompts.items():
        articles += [article_html(task, first, have) for first in range(0, len(rows), each)]
    widths = [thumbnail(files[name, task][0], 128).shape[-1] for name in names for task in prompts]

    def options(values):
        return "".join(f"<option>{html.escape(value)}</option>" for value in values)

    parts = {
        "IMAGES": "pixelated" if max(widths) < 128 else "auto",
        "ACROSS": str(min(2, each)),
        "TABLES": "\n".join(map(table_html, tables)),
        "PROMPTS": "\n".join(articles),
        "TASKS": options(prompts),
        "REWARDS": options(rewards),
        "MODELS": options(names),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], PAGE)


if rank == 0:
    results = [summary(name) for name in names]
    tables = [markdown(results)]
    for kind in ("tasks", "tags"):
        for reward in dict.fromkeys(k for r in results for k in r[kind]):
            parts = []
            for r in results:
                if len(r[kind].get(reward, ())) > 1:
                    means, errors = ({k: v[i] for k, v in r[kind][reward].items()} for i in (0, 1))
                    parts.append({"model": r["model"], "scores": means, "stderr": errors})
            if parts:
                tables.append(f"{reward} by {kind[:-1]}:\n\n{markdown(parts)}")
    shown = max(2, 12 // len(prompts))  # of each task, one picture a prompt
    each = args.samples_per_prompt
    chosen = [(task, i) for task in prompts for i in range(0, len(prompts[task]), each)[:shown]]
    grid = {name: [thumbnail(files[name, task][i], 512) for task, i in chosen] for name in names}
    save_grid(os.path.join(args.out, "samples.png"), grid, [prompts[task][i]["prompt"] for task, i in chosen])
    write_json(os.path.join(args.out, "results.json"), results)
    write(os.path.join(args.out, "results.md"), "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    lost = {f"{r['model']}: {n} of {reward}" for r in results for reward, n in r["missing"].items()}
    if args.report:
        write(os.path.join(args.out, "report.html"), report(tables))
    also = ", report.html" if args.report else ""
    print(f"done: {args.out}/results.json (also results.md, samples.png{also})")
    if lost:
        lost = ", ".join(sorted(lost))
        end_processes(accelerator, f"scores are missing ({lost}); the same command tries again")
end_processes(accelerator)
