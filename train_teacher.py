"""Stage 1 of Flow-OPD, a teacher by Flow-GRPO (arXiv 2505.05470) on one reward.

Sample groups of pictures with the flow-SDE, score them, and push the log-probability of every transition up
or down by how its picture fared within its group. The base stays frozen; the teacher is a LoRA. With several
rewards and prompt files this is the GRPO-Mix baseline instead: every prompt is scored by its own task's
reward, and by the task-agnostic ones, all in one run. With --teachers, its KL penalty is measured against its
task's teacher instead of the base: distillation and rewards in one update.

    python train_teacher.py                 # toy.compose on two CPU cores
    python train_teacher.py --reward toy.ocr --prompts ocr=toy/prompts/ocr_train.txt \\
        --eval-prompts ocr=toy/prompts/ocr_val.txt
    torchrun --nproc_per_node=8 train_teacher.py --model stabilityai/stable-diffusion-3.5-medium \\
        --reward jpeg --prompts jpeg=prompts.txt --out out/jpeg

Left out: full fine-tuning.
"""

import argparse
import json
import math
import os
import pathlib
import re
import time
from functools import partial

import torch
from tqdm import tqdm

# isort: off
from flow_sde import centred_log_ratio, clipped_surrogate, generators, kl, kl_weight, log_prob, randn, rollout
from flow_sde import training_sigmas, transition, update_average
from flow_sde import by_task, load_model, save_lora, take_rows, to_device
from flow_sde import TOY_DIR, Run, check, check_turns, descend, draw_rows, listing, load_prompts
from flow_sde import parse_args, parse_specs, pick_prompts, plot_curves, reduce_sum, refuse_given
from flow_sde import save_grid, write_json
from rewards import RewardError, Scorer, check_rewards, evaluate, markdown, parse_rewards
from rewards import rewards_of, weighted_sum
# isort: on

TOY = dict(
    model=f"{TOY_DIR}/base",
    reward=["toy.compose"],
    prompts=[f"compose={TOY_DIR}/prompts/compose_train.txt"],
    eval_prompts=[f"compose={TOY_DIR}/prompts/compose_val.txt"],
    resolution=32,
    guidance=1.0,
    dtype="float32",
    sde_window=4,
    same_noise=True,
    batch_size=16,
    group_size=16,
    micro_batch_size=128,
    steps=120,
    lr=2e-3,
    clip_range=5e-4,
    ratio_norm=True,
    beta=0.04,
    rank=16,
    alpha=32,
    ema=0.1,
    eval_num_steps=10,
    eval_batch_size=128,
    save_every=10,
    eval_every=10,
)

# -- flags (the evidence for the defaults: experiments/README.md) --------------------------------------------
parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@")
switch = argparse.BooleanOptionalAction
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the toy and its settings")
add("--reward", nargs="+", metavar="NAME=WEIGHT", help="one, or a mix (python rewards.py lists them)")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--prompts", nargs="+", metavar="TASK=FILE[,weight=W]", help="to train on (.txt or .jsonl)")
add("--eval-prompts", nargs="*", metavar="TASK=FILE", help="to validate on; the best LoRA is kept")
add("--teachers", nargs="+", metavar="TASK=LORA", help="--beta's KL is to these, not to the base")
add("--init", help="LoRA to start from (default: an untrained one)")
add("--out", default="out/teacher", help="folder of the run")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps while training (paper: 10)")
add("--guidance", type=float, help="of the teacher and of the base (paper: 4.5)")
add("--sde", choices=["flow", "cps"], default="flow", help="how the teacher samples")
add("--noise-level", type=float, default=0.7, help="a of the SDE (paper: 0.7)")
add("--sde-window", type=int, default=0, help="add noise to, and learn, only so many steps (Fast: 2); 0: all")
add("--same-noise", action=switch, help="a group starts from one noise, and differs by what is learnt only")
add = parser.add_argument_group("learning").add_argument
add("--schedule", choices=["mixed", "alternate"], default="mixed", help="tasks in every rollout, or in turn")
add("--batch-size", type=int, default=6, help="prompts per process and rollout")
add("--group-size", type=int, default=24, help="pictures per prompt (Flow-GRPO: 24)")
add("--micro-batch-size", type=int, default=8, help="samples per forward: memory and speed only")
add("--steps", type=int, default=1000, help="rollouts")
add("--lr", type=float, default=3e-4, help="AdamW learning rate (paper: 3e-4, 1e-4 for mixes)")
add("--clip-range", type=float, default=1e-4, help="of the probability ratio (paper: 1e-4)")
add("--ratio-norm", action=switch, help="centre and scale log-ratios (GRPO-Guard, arXiv 2510.22319)")
add("--updates-per-rollout", type=int, default=2, help="each on its share of the pictures (paper: 2)")
add("--beta", type=float, default=0.009, help="of the KL to base (paper: .04 without dt, which is .009)")
add("--rank", type=int, default=32, help="of an untrained LoRA (paper: 32)")
add("--alpha", type=float, default=64, help="of an untrained LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("running").add_argument
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--quantize", choices=["int8", "nf4"], help="of large frozen weights: 1 or 0.56 bytes each, less exact")
add("--shard", action="store_true", help="spread what is frozen over the processes (FSDP): slower")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="in CPU memory except while they encode")
add("--gradient-checkpointing", action="store_true", help="the same gradients, less memory, more time")
add("--compile", action="store_true", help="torch.compile: slow at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of everything drawn")
add("--eval-every", type=int, default=50, help="rollouts between validations and grids")
add("--eval-num-steps", type=int, default=40, help="sampling steps of a validation (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward of a validation")
add("--save-every", type=int, default=50, help="rollouts between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="continue from the last checkpoint in --out, or from DIR")
add("--dry-run", action="store_true", help="a few updates, what the run will take, and nothing is written")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker, pictures too")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
check(args.reward and args.prompts, "--model needs --reward NAME and --prompts TASK=FILE with it")
rewards = parse_rewards(args.reward, args.reward_option)
prompt_files = parse_specs("--prompts", args.prompts, weight=1.0)
eval_files = parse_specs("--eval-prompts", args.eval_prompts)
teachers = parse_specs("--teachers", args.teachers)
for flag, tasks in {"--teachers": teachers, "--eval-prompts": eval_files}.items():
    strange = tasks.keys() - prompt_files.keys()
    check(not strange, f"{flag} {listing(strange)}: no such task in --prompts ({', '.join(prompt_files)})")
for task in prompt_files:
    has_reward = rewards_of(task, rewards, prompt_files)
    check(has_reward, f"--prompts {task}: no reward scores this task; --reward has {', '.join(rewards)}")
check(args.group_size >= 2, f"--group-size {args.group_size}: must be at least 2")
half = args.num_steps // 2
check(args.sde_window <= half, f"--sde-window {args.sde_window}: at most {half}, half of --num-steps")
if args.init:
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
prompts = {task: load_prompts(task, file["value"]) for task, file in prompt_files.items()}
eval_prompts = {task: load_prompts(task, file["value"]) for task, file in eval_files.items()}
shares = {task: file["weight"] for task, file in prompt_files.items()}  # of the prompts
check_turns(args, "--prompts", shares)

# -- devices and models: one frozen base, the teacher an adapter on it ---------------------------------------
run = Run(args)
rank, world, device = run.rank, run.world, run.device
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
check_rewards(rewards, prompts, args.resolution, device)
check_rewards(rewards, eval_prompts, args.resolution, device, prompts)
if args.init:
    model.load_adapter("teacher", args.init)
else:
    model.new_adapter("teacher", args.rank, args.alpha, args.seed)
model.copy_adapter("teacher", "ema")
reference = dict.fromkeys(prompts, "base")  # {task: the adapter that the KL is to}
for task, teacher in teachers.items():
    reference[task] = f"teacher_of_{task}"
    model.load_teacher(reference[task], teacher["value"])
params, ema = model.train_adapter("teacher"), model.adapters["ema"]
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
if args.compile:
    model.compile()

# The schedule: all steps are sampled, those learnt that have noise.
sigmas = model.sigmas(args.num_steps, args.resolution)
learnt_count = len(training_sigmas(sigmas)) - 1
gaussian = partial(transition, noise_level=args.noise_level, sde=args.sde)  # (x, v, t, t_next) -> mean, std
samples, dimensions = args.batch_size * args.group_size, math.prod(shape)  # of a rollout here; of a latent

# What makes this run this run: --resume refuses a checkpoint where any of it differs.
files, settings = {"base": args.model, "init": args.init}, {"eval_num_steps": args.eval_num_steps}
for task, file in prompt_files.items():
    files[f"prompts {task}"], settings[f"prompts {task}'s weight"] = file["value"], file["weight"]
for task, file in eval_files.items():
    files[f"validation prompts {task}"] = file["value"]
for task, teacher in teachers.items():
    files[f"teacher {task}"] = teacher["value"]
for name, reward in rewards.items():
    identity = re.sub('://[^/"]+', "://", reward.identity)  # a server may move
    settings[f"reward {name}"] = [identity, reward.weight, reward.task]
drawn = (1 + math.ceil(args.steps / args.eval_every)) * sum(map(len, eval_prompts.values()))  # to validate
first_step = run.begin(model, "teacher", optimizer, files, settings, drawn)
if rank == 0:
    on = ", ".join(f"{task} ({len(rows)} prompts)" for task, rows in prompts.items())
    print(
        f"teacher: {sum(p.numel() for p in params) / 1e6:.2f} M parameters; {samples * world} pictures a "
        f"rollout, {' + '.join(rewards)} on {on}"
    )


def pick(step):
    """The (task, row) pairs of an update, one a group, a pure function of (seed, step): all processes', and
    this one's. Processes take turns, so each has its part of every task."""
    picked = pick_prompts(prompts, shares, args.seed, step, args.batch_size * world, args.schedule)
    return picked, picked[rank::world]


def advantages(rewards, tasks):
    """How much better a picture is than its group, in units of the spread of its task's rewards, within +-5:
    tasks whose rewards have other scales weigh alike. rewards (groups, group size), tasks: one name a group
    -> (groups, group size). A picture without a score (NaN) is in no mean and no spread, and stays NaN."""
    spread = torch.ones(len(rewards), 1)
    for task in set(tasks):
        its_groups = torch.tensor([t == task for t in tasks])
        its_rewards = rewards[its_groups]
        scored = its_rewards[~its_rewards.isnan()]
        if len(scored) > 1:
            spread[its_groups] = scored.std()
    return ((rewards - rewards.nanmean(1, keepdim=True)) / (spread + 1e-4)).clamp(-5, 5)


@torch.no_grad()
def reference_velocity(x, t, cond, tasks):
    """The velocity that the KL is to, of the base or of each task's teacher. tasks: {task: its rows}, see
    by_task."""
    answers = []
    for task, rows in tasks.items():
        answers.append(model.velocity(x[rows], t, take_rows(cond, rows), reference[task], args.guidance))
    return torch.cat(answers)


def micro_batches(share, picked):
    """The pictures of an update, a micro-batch at a time: (their numbers here, the (task, row) pairs of all
    processes' in it). share: (groups of all processes, group size) of bool. With --shard all processes make
    as many; one that has no more makes empty ones."""
    parts = []  # of each process
    for k in range(world):
        numbers = share[k::world].flatten().nonzero().flatten()
        parts.append(numbers.split(args.micro_batch_size) if len(numbers) else ())
    count = max(map(len, parts)) if args.shard else len(parts[rank])
    for j in range(count):
        groups = {}  # of all processes in this micro-batch
        for k in range(world):
            chosen = parts[k][j] if j < len(parts[k]) else torch.zeros(0, dtype=torch.long)
            groups |= {g * world + k: picked[g * world + k] for g in (chosen // args.group_size).tolist()}
            if k == rank:
                mine = chosen
        yield mine, [groups[g] for g in sorted(groups)]


def log_ratio_of(s, rows, mean, std):
    """log pi(a|s) - log pi_old(a|s) of a step's rows: (B,). With --ratio-norm centred, and over the step's
    scale, so that one clip range fits all steps."""
    if not args.ratio_norm:
        return log_prob(s.x_next[rows], mean, std) - s.log_prob[rows]
    mean_old, _ = gaussian(s.x[rows], s.v[rows], s.t, s.t_next)
    centred = centred_log_ratio(s.x_next[rows], mean, mean_old, std)
    return centred / math.sqrt(2 * kl_weight(s.t, s.t_next, args.noise_level, args.sde))


def validate(adapter, label, step):
    """A row of results.json: the adapter's scores on the validation prompts, and `score`, the weighted mean
    it is chosen by; None if a process was told to stop."""
    row = evaluate(model, adapter, eval_prompts, rewards, args, rank, world, tasks=prompts, stop=run.stop)
    if row is None:
        return None
    total = sum(rewards[name].weight for name in row["scores"])
    score = sum(rewards[name].weight * value for name, value in row["scores"].items()) / total
    return {"model": label, "step": step, "score": score} | row


def keep_best(best, step):
    """Validate the average after `step` rollouts. The best so far (without validation, the latest) is kept as
    OUT/lora; returns its row of results.json."""
    row = {"model": "teacher", "step": step}
    if eval_prompts:
        row = validate("ema", "teacher", step)
        if row is None:
            return best
        run.report({"step": step, **{f"validation/{name}": value for name, value in row["scores"].items()}})
        if best and row["score"] <= best["score"]:
            return best
    if rank == 0:
        save_lora(model.lora("ema"), os.path.join(args.out, "lora"), args)
        write_json(results_file, [base_row, row] if eval_prompts else [])
    return row


def draw_grid():
    """samples.png: the same prompts and noise for the base and the teacher."""
    columns = max(2, 8 // len(prompts))  # of a task
    texts = [row["prompt"] for rows in (eval_prompts or prompts).values() for row in rows[:columns]]
    rows = {
        name: [(adapter, args.guidance)] * len(texts)
        for name, adapter in (("base", "base"), ("teacher", "ema"))
    }
    drawn = draw_rows(run, rows, texts)
    if drawn:
        run.draw("samples", save_grid, drawn, texts)


def is_due(step):
    """Whether the teacher is validated after `step` rollouts."""
    return not args.dry_run and step > 0 and (step % args.eval_every == 0 or step == args.steps)


base_row = best = None  # rows of results.json
results_file = pathlib.Path(args.out, "results.json")
if first_step and results_file.exists():
    for row in json.loads(results_file.read_text()):
        if row["step"] == 0:
            base_row = row
        elif row["step"] <= first_step:
            best = row
if eval_prompts and base_row is None and not args.dry_run:
    base_row = validate("base", "base", 0)
if is_due(first_step):  # a run that was stopped there
    best = keep_best(best, first_step)

# -- the loop ------------------------------------------------------------------------------------------------
progress = tqdm(initial=first_step, total=args.steps, disable=rank != 0, mininterval=1)
for step in range(first_step, args.steps):
    began = time.perf_counter()

    # pick: groups of pictures, one group a prompt
    picked, mine = pick(step)
    batch = [pair for pair in mine for _ in range(args.group_size)]
    numbers = torch.arange(len(picked) * args.group_size).view(-1, args.group_size)  # of all pictures
    gens = generators(args.seed, step, numbers[rank::world].flatten().tolist())
    conds = model.encode_update(mine, step, pick)
    first_noise = randn(gens, shape, device)
    if args.same_noise:
        first_noise = first_noise[:: args.group_size].repeat_interleave(args.group_size, 0)
    noise_levels = [args.noise_level] * args.num_steps
    if args.sde_window:
        [gen] = generators(args.seed, step, [2**31])
        first = int(torch.randint(half - args.sde_window + 1, (), generator=gen))
        in_window = range(first, first + args.sde_window)
        noise_levels = [args.noise_level * (i in in_window) for i in range(args.num_steps)]

    # act: each trajectory a chain of Gaussian transitions; pictures are scored while the next are sampled
    memory, scorer = [], Scorer(rewards, prompts, run.stop)
    try:
        for i in range(0, samples, args.micro_batch_size):
            if run.interrupted():
                break
            part = slice(i, i + args.micro_batch_size)
            cond = take_rows(conds, [j // args.group_size for j in range(samples)[part]])
            draw = partial(randn, gens[part], shape, device)
            teacher = partial(model.velocity, cond=cond, adapter="teacher", guidance=args.guidance)
            with torch.no_grad():
                steps = list(rollout(teacher, first_noise[part], sigmas, noise_levels, args.sde, draw))
            memory.append([s for s in steps[:learnt_count] if s.log_prob is not None])
            scorer.submit(model.decode(steps[-1].x_next), batch[part])
        all_drawn = time.perf_counter()
        scores = scorer.collect()
    except RewardError as error:
        run.stop.fail(f"--reward {error}")
    if run.stopping():  # all processes give up the rollout in hand; --resume auto makes it again
        run.save(step)
        break

    waiting = time.perf_counter() - all_drawn  # for scores
    # judge: how much better than its group. Groups that tie and pictures without a score are left out
    reward = weighted_sum(scores, rewards, batch, prompts)  # (pictures here,)
    groups = run.accelerator.gather(reward.to(device)).cpu().view(world, -1, args.group_size)
    groups = groups.transpose(0, 1).flatten(0, 1)  # (prompts of all processes, group size)
    advantage = advantages(groups, [task for task, _ in picked])
    tied = groups.nan_to_num(-math.inf).amax(1) - groups.nan_to_num(math.inf).amin(1) < 1e-6
    telling = ~tied[:, None] & ~groups.isnan()
    advantage = advantage[rank::world].flatten().to(device)  # (pictures here,)

    # learn: the clipped surrogate and the KL to the base, or to the task's teacher, at every learnt step
    trajectory = []
    for parts in zip(*memory):
        names = ("x", "v", "x_next", "log_prob")
        joined = {name: torch.cat([getattr(s, name) for s in parts]) for name in names}
        trajectory.append(parts[0]._replace(**joined))
    kl_sum, clipped = torch.zeros(2, device=device)
    terms, norms = 0, []
    before = run.now()
    for k in range(args.updates_per_rollout):
        share = telling & (numbers % args.updates_per_rollout == k)  # every update sees every group
        count = share.sum().item() * len(trajectory)  # pictures x steps
        if count == 0:
            continue
        for chosen, everyones in micro_batches(share, picked):
            if run.interrupted():
                break
            rows, groups_of = to_device(chosen, device), (chosen // args.group_size).tolist()
            cond, tasks = take_rows(conds, groups_of), by_task([mine[g] for g in groups_of], everyones)
            for s in trajectory:
                x = s.x[rows]
                v = model.velocity(x, s.t, cond, "teacher", args.guidance)
                mean, std = gaussian(x, v, s.t, s.t_next)
                log_ratio = log_ratio_of(s, rows, mean, std)  # (B,)
                loss = clipped_surrogate(log_ratio, advantage[rows], args.clip_range)
                if args.beta:
                    mean_other, _ = gaussian(x, reference_velocity(x, s.t, cond, tasks), s.t, s.t_next)
                    to_other = kl(mean, mean_other, std)  # (B,)
                    loss = loss + args.beta * to_other
                    kl_sum += to_other.detach().sum()
                (loss.sum() * dimensions).backward()
                clipped += (log_ratio.detach().abs() > args.clip_range).sum()
        if run.stopping():
            run.back_to(before)
            break
        # update: clip, AdamW, moving average
        norms.append(descend(optimizer, params, count * dimensions))
        if not math.isfinite(norms[-1]):
            run.count_skipped(f"the gradient on {', '.join(prompts)}")
        else:
            run.skipped = 0
        update_average(ema, params, args.ema, step * args.updates_per_rollout + k + 1)
        terms += count
    if run.stopping():
        run.save(step)
        break

    # report
    record = {"step": step + 1, "waiting": waiting}
    for name, values in scores.items():
        count, total = reduce_sum(
            torch.tensor([(~values.isnan()).sum(), values.nansum()], device=device)
        ).tolist()
        if count:
            record[f"reward/{name}"] = total / count
    if args.beta:
        record["kl_to_teachers" if teachers else "kl_to_base"] = reduce_sum(kl_sum).item() / max(terms, 1)
    record["clip_fraction"] = reduce_sum(clipped).item() / max(terms, 1)
    record |= {"tied_groups": tied.float().mean().item(), "grad_norm": max(norms, default=0.0)}
    run.report(record | {"seconds": time.perf_counter() - began})
    progress.update()
    progress.set_postfix(reward=f"{groups.nanmean():.3f}", clip=f"{record['clip_fraction']:.2f}")
    if step + 1 == args.steps or (step + 1) % args.save_every == 0:
        run.save(step + 1)
    if is_due(step + 1):
        best = keep_best(best, step + 1)
        run.draw("curves", plot_curves)
        draw_grid()
        if run.stopping():  # told during the validation, which a resumed run makes again
            run.save(step + 1)
            break
progress.close()

# -- the end -------------------------------------------------------------------------------------------------
if run.stopping():
    run.end(f"stopped (--resume auto continues): {args.out}/checkpoints")
else:
    if best and eval_prompts and rank == 0:
        print(markdown([base_row, best]))
    run.end(f"done: {args.out}/lora (also log.jsonl, curves.png, samples.png, checkpoints/)")
