"""Evaluate checkpoints: rows are models, columns are rewards. All models sample the same held-out prompts
from the same noise, and all rewards score the same picture files. The same command goes on after an
interruption; rewards, tasks and models can be added to the same --out later.

    python evaluate.py                                       # the toy's base and teachers on its test prompts
    python evaluate.py --models base opd=out/distill/lora --report    # and OUT/report.html: all pictures
    torchrun --nproc_per_node=8 evaluate.py --model stabilityai/stable-diffusion-3.5-medium \\
        --models base flow-opd=out/distill/lora --tasks geneval=evaluation_metadata.jsonl ocr=ocr_test.txt \\
        drawbench=drawbench.txt --reward geneval geneval_strict ocr pickscore@drawbench aesthetic@drawbench \\
        deqa@drawbench,pickle+http://localhost:18086                   # the paper's tables
    python evaluate.py --folders theirs=pictures --tasks ocr=ocr_test.txt --reward ocr # another program's

Pictures are in OUT/MODEL/TASK/samples/PROMPT_000000.png, the layout of T2I-CompBench++, whose scorers take
--out_dir OUT/MODEL/TASK. Results are in OUT/results.json, results.md and samples.png; they do not depend on
the number of processes."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import queue
import re
import threading
import typing
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# isort: split
from flow_sde import generators  # mathematics  # noqa: I001
from flow_sde import load_model, quantizer, sampling_of  # model
from flow_sde import HERE, TOY_DIR, StopSignal, check, claim_folder, end_processes, file_hash  # run
from flow_sde import fingerprint, load_prompts, parse_args, parse_specs, read_json, save_grid, say
from flow_sde import start_processes, write, write_json
from rewards import RewardError, Unavailable, check_rewards, encoded, markdown, mean_error, parse_rewards
from rewards import pil, read_picture, rewards_of, score_batch

TASKS = ("compose", "ocr", "scene")
TOY = dict(
    model=f"{TOY_DIR}/base",
    models=["base"] + [f"{t}={TOY_DIR}/teachers/{t}" for t in (*TASKS, "quality")],
    tasks=[f"{t}={TOY_DIR}/prompts/{t}_test.txt" for t in TASKS],
    reward=[f"toy.{t}" for t in (*TASKS, "quality")],
    resolution=32,
    dtype="float32",
    guidance=1.0,
    eval_num_steps=10,
    eval_batch_size=128,
)
# The paper's Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4; our scores are divided already
PAPER = ("geneval", "ocr", "deqa", "pickscore")
FOLDERS = """score existing pictures, not models. Layouts: DIR/TASK/NUMBER.png (DIR/NUMBER.png for a single
task), T2I-CompBench's samples/PROMPT_NUMBER.png, GenEval's NUMBER/samples/NUMBER.png. Numbers start at 0 or 1
and follow the prompts. png, jpg, webp, bmp, avif, tiff"""

# -- flags ---------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@")
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the embedded toy")
ROWS = "NAME=LORA[,guidance=G][,num_steps=N]"
add("--models", nargs="+", metavar=ROWS, default=["base"], help="rows; `base`: no LoRA")
add("--folders", nargs="+", metavar="NAME=DIR", help=FOLDERS)
add("--tasks", "--prompts", nargs="+", metavar="TASK=FILE", help="prompts, .txt or .jsonl")
add("--samples-per-prompt", type=int, default=1, help="GenEval: 4; more than 1 adds a column `diversity`")
add("--reward", nargs="+", metavar="NAME[@TASK]", help="columns; one named like a task scores only that task")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--out", default="out/evaluate", help="folder for pictures, scores and tables")
add("--report", action="store_true", help="write OUT/report.html: all pictures and scores side by side")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add("--eval-num-steps", type=int, default=40, help="steps (paper: 40); else a few-step student's own")
add("--eval-batch-size", type=int, default=8, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of frozen weights; the rest is float32")
add("--quantize", choices=["int8", "nf4"], help="of large frozen weights: 1 or 0.56 bytes each, less exact")
add("--shard", action="store_true", help="spread what is frozen over the processes (FSDP): slower")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (worse on long prompts)")
add("--max-sequence-length", type=int, help="text tokens (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="keep them in CPU memory while not encoding")
add("--compile", action="store_true", help="torch.compile: slow at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
check(args.tasks and args.reward, "--model needs --tasks TASK=FILE and --reward NAME with it")
for spec in args.models:
    check(not spec.startswith("base="), f"--models {spec}: `base` is the bare model; name the LoRA otherwise")
per_prompt = args.samples_per_prompt
rewards = parse_rewards(args.reward, args.reward_option)
prompts = {}  # {task: [row of the prompt's file, once for each of its pictures]}
for task, spec in parse_specs("--tasks", args.tasks).items():
    prompts[task] = [row for row in load_prompts(task, spec["value"]) for _ in range(per_prompt)]
for task in prompts:
    scored = rewards_of(task, rewards, prompts)
    check(scored, f"--tasks {task}: no reward scores this task; --reward has {', '.join(rewards)}")
folders = {name: spec["value"] for name, spec in parse_specs("--folders", args.folders).items()}
own = dict(guidance=None, num_steps=None)
loras = parse_specs("--models", [spec for spec in args.models if spec != "base"], **own)
if "base" in args.models:
    loras = {"base": {"value": None, **own}} | loras
names = list(folders or loras)
for name, spec in loras.items():  # how it is sampled: as its row says, or a typed flag, or its sampling.json
    saved = {} if name == "base" or folders else sampling_of(spec["value"])
    for key, flag in {"num_steps": "eval_num_steps", "guidance": "guidance"}.items():
        default = getattr(args, flag)
        if spec[key] is None:
            spec[key] = default if flag in parser.given else saved.get(key, default)
    whole = spec["num_steps"] >= 1 and spec["num_steps"] % 1 == 0
    check(whole, f"--models {name}: num_steps={spec['num_steps']:g} must be a whole number above 0")
    spec["num_steps"] = int(spec["num_steps"])
ways = [f"{spec['num_steps']} steps, guidance {spec['guidance']:g}" for spec in loras.values()]
if len(set(ways)) > 1:
    say("note: not all are sampled alike: " + "; ".join(map("{} in {}".format, loras, ways)))


def file_title(row):
    """A prompt as the start of a file name."""
    unfit = r"[/\\\x00-\x1f_]" if os.name != "nt" else r'[/\\\x00-\x1f_"<>:|?*]'
    return re.sub(unfit, " ", row["prompt"]).encode(errors="ignore")[:200].decode(errors="ignore")


def our_files(name, task):
    """The files of a model's pictures, one for each row of prompts[task]."""
    folder = os.path.join(args.out, name, task, "samples")
    return [os.path.join(folder, f"{file_title(row)}_{i:06d}.png") for i, row in enumerate(prompts[task])]


def their_files(name, task):
    """The same for --folders. Only their numbers say which picture is whose, so these must leave no doubt."""
    folder = pathlib.Path(folders[name], task)
    if not folder.is_dir() and len(prompts) == 1:
        folder = pathlib.Path(folders[name])
    flag, needed = f"--folders {name}: {folder}", len(prompts[task])
    geneval = sorted(folder.glob("[0-9]*/samples/*"))
    found = geneval or sorted(folder.glob("samples/*")) or sorted(folder.glob("*"))
    pictures = [f for f in found if re.fullmatch(r"\.(png|jpe?g|webp|bmp|avif|tiff?)", f.suffix, re.I)]
    counts = f"{needed // per_prompt} prompts x --samples-per-prompt {per_prompt}"
    check(len(pictures) == needed, f"{flag} has {len(pictures)} pictures for {counts}")
    layouts = f"rename to 0.png ... {needed - 1}.png in the prompts' order; --help has other layouts"
    numbered = {}
    for file in pictures:
        named = re.fullmatch(r"(?:.*_)?(\d+)", file.stem, re.DOTALL)
        check(named, f"{flag}: {file.name} is neither NUMBER nor PROMPT_NUMBER; {layouts}")
        number = int(named[1])
        if geneval:
            fits = file.parts[-3].isdecimal() and number < per_prompt
            check(fits, f"{flag}: {file} is none of GenEval's {per_prompt} for each prompt; {layouts}")
            number += int(file.parts[-3]) * per_prompt
        check(number not in numbered, f"{flag}: {file} and {numbered.get(number)} have the same number")
        numbered[number] = file
    first = min(1, *numbered)
    for number in range(first, first + needed):
        check(number in numbered, f"{flag}: no picture has the number {number}; {layouts}")
    ordered = [numbered[number] for number in sorted(numbered)]
    titles = {file_title(row) for row in prompts[task]}
    for row, file in zip(prompts[task], ordered):
        its_title = re.sub(r"_\d+$", "", file.stem)
        fits = its_title == file_title(row) or its_title not in titles
        doubt = f"{row['prompt']!r}: are the prompts of --tasks others, or in another order?"
        check(fits, f"{flag}: {file.name} would be taken for {doubt}")
    say(f"{name}, {task}: {ordered[-1].name} is taken for {prompts[task][-1]['prompt']!r}")
    return [str(file) for file in ordered]


find = their_files if folders else our_files
files = {(name, task): find(name, task) for name in names for task in prompts}

# -- processes, what exists already, and the model if pictures are missing -----------------------------------
accelerator = start_processes()
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
claim_folder(args.out, accelerator)
base = fingerprint(args.model) if rank == 0 and not folders else None


def folder_of(name, task):
    return os.path.join(args.out, name, task)


def digest(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def settings_of(name, task):
    """What the pictures of a model and a task depend on."""
    settings = {"prompts": digest(prompts[task][::per_prompt]), "samples_per_prompt": per_prompt}
    if folders:
        return settings | {"pictures": digest([file_hash(file) for file in files[name, task]])}
    lora = loras[name]["value"]
    settings |= {"model": base, "LoRA": lora and fingerprint(lora)}
    settings |= {"guidance": loras[name]["guidance"], "eval_num_steps": loras[name]["num_steps"]}
    for key in ("resolution", "seed", "dtype", "no_t5", "max_sequence_length"):
        settings[key] = getattr(args, key)
    return settings | {"quantize": quantizer(args.quantize)}


def read_scores(name, task):
    """{(reward's identity, picture's number): score} that all processes have written. A line that was cut off
    or is not ours counts for nothing."""
    scores = {}
    for file in sorted(pathlib.Path(folder_of(name, task)).glob("scores*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                if math.isfinite(row["score"]):
                    scores[row["reward"], row["picture"]] = row["score"]
    return scores


def score_lines(scores):
    """The lines that read_scores reads."""
    rows = [{"picture": i, "reward": reward, "score": score} for (reward, i), score in scores.items()]
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_whole(file):
    """Whether one of our PNGs exists and its checksums are right."""
    try:
        with Image.open(file) as picture:
            picture.verify()
        return True
    except Exception:  # a broken file can raise anything
        return False


all_settings = {}
if rank == 0:
    for name, task in files:
        folder = folder_of(name, task)
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        settings, file = settings_of(name, task), os.path.join(folder, "settings.json")
        before = read_json(file) if os.path.exists(file) else settings
        changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
        problem = f"{folder} is of another evaluation: {'; '.join(changed)}"
        check(not changed, f"--out {args.out}: {problem}. Give another --out, or delete that folder")
        all_settings[file] = settings
        write(os.path.join(folder, "scores.jsonl"), score_lines(read_scores(name, task)))
        for part in pathlib.Path(folder).glob("scores.*.jsonl"):  # each process's own; all in one file now
            part.unlink()
accelerator.wait_for_everyone()


class Job(typing.NamedTuple):
    """A batch of one model's pictures of one task, by their numbers."""

    name: str
    task: str
    numbers: list
    unscored: dict  # {reward: numbers to score}
    missing: bool  # whether the pictures are to be drawn


jobs = []  # this process's
for name, task in files:
    scores, total, size = read_scores(name, task), len(prompts[task]), args.eval_batch_size
    for start in range(0, total, world * size):  # the same batches for any number of processes
        everyones = range(start, min(start + world * size, total))
        numbers, unscored = list(everyones[rank * size :][:size]), {}
        for reward in rewards_of(task, rewards, prompts):
            lacking = [i for i in numbers if (rewards[reward].identity, i) not in scores]
            if lacking:
                unscored[reward] = lacking
        looked_at = everyones if args.shard else numbers  # a sharded network draws for all, or for none
        missing = not folders and not all(is_whole(files[name, task][i]) for i in looked_at)
        if missing or unscored or args.shard:
            jobs.append(Job(name, task, numbers, unscored, missing))
if any(job.missing for job in jobs):
    model = load_model(args, device)
    for name, spec in loras.items():
        if name != "base":
            model.load_teacher(name, spec["value"])
    if args.compile:
        model.compile()
needed = {reward for job in jobs for reward in job.unscored}
check_rewards(rewards, prompts, args.resolution, device, needed=needed)
accelerator.wait_for_everyone()  # all have read, and nothing was refused, before anyone writes
for file, settings in all_settings.items():
    write_json(file, settings)

# -- draw; meanwhile one thread writes the pictures and one per reward scores them ---------------------------
MAX_PIXELS = 2**23  # that a reward gets at once; a larger picture comes alone
stop, failures = StopSignal(), []  # failures: exceptions that end the program
lock = threading.Lock()  # for the progress bar and the files of scores
waiting = {reward: queue.Queue() for reward in rewards}
unavailable = dict.fromkeys(rewards, 0)  # how often in a row; at 3 a reward is given up
unreadable = set()  # pictures that were reported
total = sum(len(job.numbers) * job.missing + sum(map(len, job.unscored.values())) for job in jobs)
progress = tqdm(total=total, disable=rank != 0, unit="picture or score", mininterval=1)


def report_picture(name, task, i, problem):
    tqdm.write(f"{name}, {task}, picture {i}: {problem}")


def draw_all():
    """Draw the missing pictures and pass them to the thread that writes them."""
    writer, written = ThreadPoolExecutor(1), []
    for job in jobs:
        if stop.told(device, args.shard):
            break
        pictures = None
        if job.missing:
            texts = [prompts[job.task][i]["prompt"] for i in job.numbers]
            gens = generators(args.seed, 0, job.numbers)
            how = loras[job.name]
            sampling = how["num_steps"], args.resolution, job.name, how["guidance"]
            pictures = model.generate(texts, gens, *sampling, strict=False)
        written.append(writer.submit(write_pictures, job, pictures))
        if len(written) > 2:  # so that pictures do not pile up
            written.pop(0).result()
    for future in written:
        future.result()


def write_pictures(job, pictures):
    """Write a batch that was drawn, then queue it for the rewards."""
    if job.missing:
        pictures = pictures.cpu()
        for i, tensor, picture in zip(job.numbers, pictures, pil(pictures)):
            if tensor.isfinite().all():
                write(files[job.name, job.task][i], encoded(picture))
            else:
                report_picture(job.name, job.task, i, f"not finite, so not written; is {job.name} broken?")
                unreadable.add((job.name, job.task, i))
        with lock:
            progress.update(len(job.numbers))
    for reward, numbers in job.unscored.items():
        waiting[reward].put((job.name, job.task, numbers))


def score_all(reward):
    """The thread of one reward."""
    for name, task, numbers in iter(waiting[reward].get, None):
        for pictures in read_pictures(name, task, numbers):
            score(reward, name, task, pictures)


def read_pictures(name, task, numbers):
    """Pictures by number, {number: (3, H, W)}: of one size and at most MAX_PIXELS at a time. One that cannot
    be read is reported once and left out."""
    group = {}
    for i in numbers:
        try:
            picture = read_picture(files[name, task][i])
        except RewardError as error:
            with lock:
                progress.update()
                if (name, task, i) not in unreadable:
                    report_picture(name, task, i, error)
                unreadable.add((name, task, i))
            continue
        shapes = {p.shape for p in group.values()}
        if group and (picture.shape not in shapes or (len(group) + 1) * picture[0].numel() > MAX_PIXELS):
            yield group
            group = {}
        group[i] = picture
    if group:
        yield group


def score(reward, name, task, pictures):
    """Score pictures and write the scores down. A batch that fails is tried again picture by picture. What
    cannot be scored stays without a score, and the table says how many are missing."""
    if unavailable[reward] == 3 or stop.name:
        return
    batch, scores, problem = [(task, prompts[task][i]) for i in pictures], [math.nan], "no score"
    try:
        images = torch.stack(list(pictures.values())).to(device)
        scores = score_batch(images, batch, {reward: rewards[reward]}, prompts)[reward].tolist()
        unavailable[reward] = 0
    except RewardError as error:
        if len(pictures) > 1:
            for i, picture in pictures.items():
                score(reward, name, task, {i: picture})
            return
        unavailable[reward] = unavailable[reward] + 1 if isinstance(error, Unavailable) else 0
        problem = f"{error}; {reward} is given up" if unavailable[reward] == 3 else error
    known = {}
    for i, value in zip(pictures, scores):
        if math.isnan(value):
            report_picture(name, task, i, problem)
        else:
            known[rewards[reward].identity, i] = value
    with lock:
        with open(os.path.join(folder_of(name, task), f"scores.{rank}.jsonl"), "a") as f:
            f.write("\n" * bool(known) + score_lines(known))  # after a line that a full disk cut
        progress.update(len(pictures))


def guarded(work, *details):
    """Do one thread's work. Its error ends the program, once the other threads have stopped."""
    try:
        work(*details)
    except BaseException as error:
        failures.append(error)
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
if failures:
    for thread in threads:
        thread.join(5)  # an interpreter that shuts down under a thread at work may abort
    raise failures[0]
if stop.arrived(device):
    end_processes(accelerator, f"stopped; the same command goes on with what is in {args.out}")
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
    """How much the pictures of a prompt differ: the mean over its pairs of the root mean square difference
    of pixels (in [0, 1], of pictures reduced to 64 x 64). -> (number of prompts,) float64, NaN where a
    picture cannot be read"""
    small = torch.full((len(files[name, task]), 3 * 64 * 64), math.nan, dtype=torch.float64)
    for i, file in enumerate(files[name, task]):
        with contextlib.suppress(RewardError):
            small[i] = F.interpolate(read_picture(file)[None], (64, 64), mode="area").flatten()
    groups = small.view(-1, per_prompt, 3 * 64 * 64)
    i, j = torch.triu_indices(per_prompt, per_prompt, 1)
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
    columns = {reward: [] for reward in rewards} | ({"diversity": []} if per_prompt > 1 else {})
    for task in prompts:  # a column has a (task, tag, score) for each of its pictures
        scores = read_scores(name, task)
        for reward in rewards_of(task, rewards, prompts):
            for i, prompt in enumerate(prompts[task]):
                value = scores.get((rewards[reward].identity, i), math.nan)
                tag = None if prompt.get("tag") is None else str(prompt["tag"])
                columns[reward].append((task, tag, value))
        if per_prompt > 1:
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
    """One reward by "tasks" or "tags" as a Markdown table; None if no model has more than one."""
    rows = []
    for result in results:
        row = {"model": result["model"], "scores": {}, "stderr": {}}
        for group, (mean, error) in result[kind].get(reward, {}).items():
            cell = " ".join(group.split()).replace("|", r"\|")  # a tag may hold what would end a cell
            row["scores"][cell], row["stderr"][cell] = mean, error
        if len(row["scores"]) > 1:
            rows.append(row)
    return markdown(rows) if rows else None


def cells_of(table):
    """A Markdown table's rows of cells, without the line below its header."""
    header, _, *lines = table.split("\n")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (header, *lines)]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]


def page(tables):
    """The report: assets/report.html with the tables and, for every prompt, its pictures and their scores."""
    rows = []
    for task in prompts:
        scores = {name: read_scores(name, task) for name in names}
        for first in range(0, len(prompts[task]), per_prompt):
            pictures = {name: [] for name in names}
            for name in names:
                for i in range(first, first + per_prompt):
                    path = pathlib.Path(os.path.relpath(files[name, task][i], args.out)).as_posix()
                    scored = rewards_of(task, rewards, prompts)
                    values = {reward: scores[name].get((rewards[reward].identity, i)) for reward in scored}
                    pictures[name].append({"file": urllib.parse.quote(path), "scores": values})
            row = {"task": task, "number": first // per_prompt, "prompt": prompts[task][first]["prompt"]}
            rows.append(row | {"pictures": pictures})
    data = {"tables": [(title, cells_of(table)) for title, table in tables.items()], "prompts": rows}
    data |= {"tasks": list(prompts), "rewards": list(rewards), "models": names}
    template = pathlib.Path(HERE, "assets/report.html").read_text(encoding="utf-8")
    return template.replace("$data", json.dumps(data).replace("<", r"\u003c"))  # no text can end the script


if rank == 0:
    results = [summary(name) for name in names]
    tables = {"": markdown(results)}
    for kind in ("tasks", "tags"):
        for reward in dict.fromkeys(reward for result in results for reward in result[kind]):
            table = breakdown(results, kind, reward)
            if table:
                tables[f"{reward} by {kind[:-1]}:"] = table
    text = "\n\n".join(f"{title}\n\n{table}".strip() for title, table in tables.items())
    columns = max(2, 12 // len(prompts))  # of the grid, for each task; one picture a prompt
    chosen = [(task, i) for task in prompts for i in range(0, len(prompts[task]), per_prompt)[:columns]]
    captions = [prompts[task][i]["prompt"] for task, i in chosen]
    grid = {name: [thumbnail(files[name, task][i], 512) for task, i in chosen] for name in names}
    save_grid(os.path.join(args.out, "samples.png"), grid, captions)
    write_json(os.path.join(args.out, "results.json"), results)
    write(os.path.join(args.out, "results.md"), text + "\n")
    print(text)
    also = "results.md, samples.png"
    if args.report:
        write(os.path.join(args.out, "report.html"), page(tables))
        also += ", report.html"
    print(f"done: {args.out}/results.json (also {also})")
    lost = {f"{r['model']}: {n} of {reward}" for r in results for reward, n in r["missing"].items()}
    if lost:
        reason = f"scores are missing ({', '.join(sorted(lost))}); the same command tries again"
        end_processes(accelerator, reason)
end_processes(accelerator)
