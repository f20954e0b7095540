"""What came of it: rows are checkpoints, columns are rewards, every model on the same held-out prompts from the same noise. Pictures are
made once, and every reward looks at the same files; a run that was killed goes on where it was; more rewards, tasks and models can be
added to the same --out later.

    python evaluate.py                                                     # the toy's base and teachers on its test prompts
    python evaluate.py --models base opd=out/distill/lora sft=out/sft/lora
    torchrun --nproc_per_node=8 evaluate.py --model stabilityai/stable-diffusion-3.5-medium --models base flow-opd=out/distill/lora \\
        --tasks geneval=evaluation_metadata.jsonl ocr=ocr_test.txt drawbench=drawbench.txt --reward geneval geneval_strict ocr \\
        pickscore@drawbench aesthetic@drawbench deqa@drawbench,openai+http://localhost:8000/v1                    # the paper's tables
    python evaluate.py --folders theirs=pictures --tasks ocr=ocr_test.txt --reward ocr       # pictures that any program made

Pictures lie in OUT/MODEL/TASK/samples/PROMPT_000000.png, the layout of T2I-CompBench++: its own scorers take --out_dir OUT/MODEL/TASK.
Beside results.json there are results.md and samples.png. The table does not depend on the number of processes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import threading

import torch
import torch.nn.functional as F
from tqdm import tqdm

from flow_sde import (SD3, StopSignal, die, end_processes, fingerprint, generators, load_prompts, parse_args, parse_specs, save_grid, start_processes,
                      write, write_json)
from rewards import RewardError, Unavailable, check_rewards, encoded, markdown, mean_error, parse_rewards, pil, read_picture, rewards_of, score_batch

TASKS = ("compose", "ocr", "scene")
TOY = dict(model="toy/base", models=["base"] + [f"{t}=toy/teachers/{t}" for t in (*TASKS, "quality")],
           tasks=[f"{t}=toy/prompts/{t}_test.txt" for t in TASKS], reward=[f"toy.{t}" for t in (*TASKS, "quality")],
           resolution=32, dtype="float32", guidance=1.0, eval_num_steps=10, eval_batch_size=128)
PAPER = ("geneval", "ocr", "deqa", "pickscore")  # the paper's Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4; ours are divided already

# -- flags ---------------------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it")
add("--models", nargs="+", metavar="NAME=LORA[,guidance=G]", default=["base"], help="the rows, LoRAs or full fine-tunes; `base` is the bare model")
add("--folders", nargs="+", metavar="NAME=DIR", help="instead of models: pictures in DIR/TASK (or DIR), numbered from 0 in the prompts' order")
add("--tasks", "--prompts", nargs="+", metavar="TASK=FILE", help="held-out prompts (.txt or .jsonl)")
add("--samples-per-prompt", type=int, default=1, help="pictures of each prompt (GenEval: 4); from 2 on, the table has their diversity")
add("--reward", nargs="+", metavar="NAME[@TASK]", help="the columns; one called like a task, or tied to one, scores that task only")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--out", default="out/evaluate", help="folder of the pictures, scores and tables")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, default=512, help="pixels")
add("--guidance", type=float, default=4.5, help="classifier-free guidance (paper: 4.5)")
add("--eval-num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], default="float16", help="of the frozen networks; what is trained is float32")
add("--no-t5", action="store_true", help="leave out the T5 text encoder, the largest network of SD3.5-M (long prompts suffer)")
add("--max-sequence-length", type=int, default=256, help="tokens that T5 reads of a prompt (the model's card: 256; Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="keep them in the CPU's memory but while they encode")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

# -- what is asked, checked before anything slow --------------------------------------------------------------------------
if not args.tasks or not args.reward:
    die("--model needs --tasks TASK=FILE and --reward NAME with it")
rewards = parse_rewards(args.reward, args.reward_option)
task_files = {task: s["value"] for task, s in parse_specs("--tasks", args.tasks).items()}
prompts = {task: [row for row in load_prompts(task, file) for _ in range(args.samples_per_prompt)] for task, file in task_files.items()}
if idle := [t for t in prompts if not rewards_of(t, rewards, prompts)]:
    die(f"--tasks {', '.join(idle)}: no reward scores this task; --reward has {', '.join(rewards)}")
if any(m.startswith("base=") for m in args.models):
    die("--models base=...: `base` is the bare model; call the LoRA something else")
folders = {name: s["value"] for name, s in parse_specs("--folders", args.folders).items()}
specs = parse_specs("--models", [m for m in args.models if m != "base" and not folders], guidance=args.guidance)
names = list(folders) or (["base"] if "base" in args.models else []) + list(specs)
guidance = {name: specs[name]["guidance"] if name in specs else args.guidance for name in names}


def made_elsewhere(name, task):
    """The files of --folders that belong to a task's prompts: the last number in a file's name is its place."""
    place = os.path.join(folders[name], task)
    if not os.path.isdir(place):
        place = folders[name] if len(prompts) == 1 else place
    files = {}
    for file in sorted(os.listdir(place)) if os.path.isdir(place) else die(f"--folders {name}: there is no folder {place}"):
        if (number := re.search(r"(\d+)\D*\.(png|jpe?g|webp)$", file, re.I)):
            if int(number[1]) in files:
                die(f"--folders {name}: {place} has two pictures with the number {int(number[1])}")
            files[int(number[1])] = os.path.join(place, file)
    if missing := [i for i in range(len(prompts[task])) if i not in files]:
        die(f"--folders {name}: {place} has no picture number {missing[0]}; the task's prompts need 0 to {len(prompts[task]) - 1}")
    return [files[i] for i in range(len(prompts[task]))]


def to_be_made(name, task):
    """Where this program's pictures go: the prompt, as far as a file name can hold it, and the number."""
    title = lambda row: re.sub(r"[/\\\x00-\x1f_]", " ", row["prompt"]).encode(errors="ignore")[:200].decode(errors="ignore")
    return [os.path.join(args.out, name, task, "samples", f"{title(row)}_{i:06d}.png") for i, row in enumerate(prompts[task])]


files = {(name, task): (made_elsewhere if folders else to_be_made)(name, task) for name in names for task in prompts}
accelerator = start_processes()
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device

# -- what is there already ------------------------------------------------------------------------------------------------
def score_rows(place):
    """The scores written so far, [{"picture", "reward", "score"}], without a line that a kill or a full disk cut."""
    rows = []
    for part in sorted(os.listdir(place)):
        for line in open(os.path.join(place, part)) if re.fullmatch(r"scores(\.\d+)?\.jsonl", part) else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


settings_files = {}
for name, task in files if rank == 0 else ():
    place = os.path.join(args.out, name, task)
    os.makedirs(os.path.join(place, "samples"), exist_ok=True)
    if folders:
        listing = [(os.path.abspath(f), os.path.getsize(f), os.path.getmtime(f)) for f in files[name, task]]
        settings = {"pictures": hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:12]}
    else:
        settings = {"model": fingerprint(args.model), "LoRA": fingerprint(specs[name]["value"]) if name in specs else None,
                    "guidance": guidance[name], **{k: getattr(args, k) for k in ("resolution", "eval_num_steps", "seed", "dtype", "no_t5", "max_sequence_length")}}
    settings |= {"prompts": fingerprint(task_files[task]), "samples_per_prompt": args.samples_per_prompt}
    if os.path.exists(path := os.path.join(place, "settings.json")):
        before = json.load(open(path))
        if changed := [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]:
            die(f"--out {args.out}: {place} is of another evaluation: {'; '.join(changed)}. Give another --out, or delete that folder")
    settings_files[path] = settings
    write(os.path.join(place, "scores.jsonl"), "".join(json.dumps(row) + "\n" for row in score_rows(place)))  # what each process wrote, in one file
    for part in os.listdir(place):
        if re.fullmatch(r"scores\.\d+\.jsonl", part):
            os.remove(os.path.join(place, part))
accelerator.wait_for_everyone()


def read_scores(name, task):
    """{(reward's identity, picture's number): score}, of all processes."""
    return {(row["reward"], row["picture"]): row["score"] for row in score_rows(os.path.join(args.out, name, task))}


jobs = []  # this process's (name, task, numbers, {reward: numbers to score}, whether pictures are to be made)
for name, task in files:
    have = read_scores(name, task)
    numbers = list(range(len(prompts[task])))
    for start in range(rank * args.eval_batch_size, len(numbers), world * args.eval_batch_size):  # the same batches whatever the number of processes
        batch = numbers[start:start + args.eval_batch_size]
        unscored = {n: [i for i in batch if (rewards[n].identity, i) not in have] for n in rewards_of(task, rewards, prompts)}
        missing = not all(os.path.exists(files[name, task][i]) for i in batch)
        if missing or any(unscored.values()):
            jobs.append((name, task, batch, {n: some for n, some in unscored.items() if some}, missing))
if any(missing for *_, missing in jobs):
    model = SD3(args.model, getattr(torch, args.dtype), device, not args.no_t5, args.offload_text_encoders, max_sequence_length=args.max_sequence_length)
    model.latent_shape(args.resolution)
    for name, spec in specs.items():
        model.load_teacher(name, spec["value"])
check_rewards(rewards, prompts, args.resolution, device, needed={reward for *_, unscored, _ in jobs for reward in unscored})
accelerator.wait_for_everyone()  # all have read, and nothing was refused, before anyone writes
for path, settings in settings_files.items():
    write_json(path, settings)

# -- make the pictures, and score them beside that: a thread per reward ----------------------------------------------------
stop, writing, broken = StopSignal(), threading.Lock(), []
waiting = {n: queue.Queue(maxsize=4) for n in rewards}
progress = tqdm(total=sum((len(batch) if missing else 0) + sum(map(len, unscored.values())) for _, _, batch, unscored, missing in jobs),
                disable=rank != 0, unit="picture or score", mininterval=1)


def score_all(reward):
    """One reward's thread. A batch that fails is tried picture by picture; what cannot be scored stays without a score, which the table
    calls missing; a reward that is unavailable three times in a row is left alone."""
    failures = 0
    while (job := waiting[reward].get()) is not None:
        name, task, numbers, pictures = job
        whole = len({p.shape for p in pictures}) == 1
        parts = [list(range(len(numbers)))] if whole else [[k] for k in range(len(numbers))]
        while parts and failures < 3 and not stop.name:
            part = parts.pop(0)
            try:
                values = score_batch(torch.stack([pictures[k] for k in part]).to(device), [(task, prompts[task][numbers[k]]) for k in part],
                                     {reward: rewards[reward]}, prompts)[reward]
            except RewardError as error:
                if len(part) > 1:
                    parts = [[k] for k in part]
                    continue
                failures = failures + 1 if isinstance(error, Unavailable) else 0
                tqdm.write(f"{name}, {task}, picture {numbers[part[0]]}: {error}" + (f"; {reward} is given up" if failures == 3 else ""))
            else:
                failures = 0
                rows = [{"picture": numbers[k], "reward": rewards[reward].identity, "score": v} for k, v in zip(part, values.tolist())]
                with writing, open(os.path.join(args.out, name, task, f"scores.{rank}.jsonl"), "a") as f:
                    f.write("".join("\n" * (k == 0) + json.dumps(row) + "\n" for k, row in enumerate(rows)))  # after a line that a full disk cut
            with writing:
                progress.update(len(part))


def guarded(reward):
    """A bug or a full disk in a reward's thread ends the program, not only the thread."""
    try:
        score_all(reward)
    except BaseException as error:
        broken.append(error)
        stop.name = "failure"


threads = [threading.Thread(target=guarded, args=(n,), name=f"reward {n}", daemon=True) for n in rewards]
for thread in threads:
    thread.start()
for name, task, batch, unscored, missing in jobs:
    if stop.name:
        break
    if missing:
        made = model.generate([prompts[task][i]["prompt"] for i in batch], generators(args.seed, 0, batch), args.eval_num_steps,
                              args.resolution, name, guidance[name])
        for i, picture in zip(batch, pil(made)):
            write(files[name, task][i], encoded(picture))
        with writing:
            progress.update(len(batch))
    pictures = {i: read_picture(files[name, task][i]) for i in batch if unscored}
    for reward, numbers in unscored.items():
        while not stop.name:
            try:
                waiting[reward].put((name, task, numbers, [pictures[i] for i in numbers]), timeout=1)
                break
            except queue.Full:
                pass
for reward, thread in zip(rewards, threads):
    while thread.is_alive() and not stop.name:
        if not waiting[reward].full():
            waiting[reward].put(None)
            while thread.is_alive() and not stop.name:
                thread.join(0.2)
        thread.join(0.2)
progress.close()
if broken:
    raise broken[0]
if stop.arrived(device):
    end_processes(accelerator, f"stopped; the same command goes on from what lies in {args.out}")
accelerator.wait_for_everyone()


# -- the tables -------------------------------------------------------------------------------------------------------------
def diversity(name, task):
    """How much the pictures of one prompt differ: the mean over its pairs of the root mean square difference of pixels (in [0, 1], of
    pictures reduced to 64 x 64). -> (number of prompts,) float64"""
    small = torch.cat([F.interpolate(read_picture(f)[None], (64, 64), mode="area") for f in files[name, task]]).double().flatten(1)
    groups = small.view(-1, args.samples_per_prompt, small.shape[1])
    i, j = torch.triu_indices(args.samples_per_prompt, args.samples_per_prompt, 1)
    return (groups[:, i] - groups[:, j]).square().mean(-1).sqrt().mean(1)


def summary(name):
    """A model's row of results.json. A reward with a score missing has no mean. GenEval's is the mean of its tags' means, as its authors have it."""
    row = {"model": name, "n": sum(map(len, prompts.values())), "scores": {}, "stderr": {}, "tasks": {}, "tags": {}, "missing": {}}
    have = {task: read_scores(name, task) for task in prompts}
    for reward, (*_, identity) in rewards.items():
        scored = [task for task in prompts if reward in rewards_of(task, rewards, prompts)]
        values = {task: [have[task].get((identity, i)) for i in range(len(prompts[task]))] for task in scored}
        if lost := sum(v is None for some in values.values() for v in some):
            row["missing"][reward] = lost
            continue
        if not scored:
            continue
        everything = torch.tensor([v for some in values.values() for v in some], dtype=torch.float64)
        row["scores"][reward], row["stderr"][reward] = mean_error(everything)
        row["tasks"][reward] = {task: mean_error(torch.tensor(some, dtype=torch.float64)) for task, some in values.items()}
        tagged = {}
        for task in scored:
            for v, prompt in zip(values[task], prompts[task]):
                tagged.setdefault(prompt.get("tag"), []).append(v)
        if None not in tagged:
            row["tags"][reward] = {tag: mean_error(torch.tensor(some, dtype=torch.float64)) for tag, some in tagged.items()}
            if reward.startswith("geneval"):
                means, errors = zip(*row["tags"][reward].values())
                row["scores"][reward] = sum(means) / len(means)
                row["stderr"][reward] = sum(e ** 2 for e in errors) ** 0.5 / len(errors) if None not in errors else None
    if args.samples_per_prompt > 1:
        apart = {task: diversity(name, task) for task in prompts}
        row["scores"]["diversity"], row["stderr"]["diversity"] = mean_error(torch.cat(list(apart.values())))
        row["tasks"]["diversity"] = {task: mean_error(values) for task, values in apart.items()}
    if all(reward in row["scores"] for reward in PAPER):
        row["scores"]["average"] = sum(row["scores"][reward] for reward in PAPER) / len(PAPER)
    return row


if rank == 0:
    results = [summary(name) for name in names]
    tables = [markdown(results)]
    for kind in ("tasks", "tags"):
        for reward in dict.fromkeys(k for r in results for k in r[kind]):
            parts = [{"model": r["model"]} | dict(zip(("scores", "stderr"), ({k: v[i] for k, v in r[kind][reward].items()} for i in (0, 1))))
                     for r in results if len(r[kind].get(reward, ())) > 1]
            if parts:
                tables.append(f"{reward} by {kind[:-1]}:\n\n{markdown(parts)}")
    shown = max(2, 12 // len(prompts))  # of each task, one picture a prompt
    chosen = [(task, i) for task in prompts for i in range(0, len(prompts[task]), args.samples_per_prompt)[:shown]]
    save_grid(os.path.join(args.out, "samples.png"), {name: [read_picture(files[name, task][i]) for task, i in chosen] for name in names},
              [prompts[task][i]["prompt"] for task, i in chosen])
    write_json(os.path.join(args.out, "results.json"), results)
    write(os.path.join(args.out, "results.md"), "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    lost = {f"{r['model']}: {n} of {reward}" for r in results for reward, n in r["missing"].items()}
    print(f"done: {args.out}/results.json (also results.md, samples.png)")
    if lost:
        end_processes(accelerator, f"scores are missing ({', '.join(sorted(lost))}); the same command tries again")
end_processes(accelerator)
