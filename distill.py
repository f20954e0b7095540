"""Stage 3, Flow-OPD (arXiv 2605.08063): one student learns from several teachers, on its own trajectories.

At every state the student visits, the teacher of the prompt's task says which way it would go. The loss is
the closed-form KL(student || teacher) between the two transitions, and Manifold Anchor Regularization (MAR)
adds lambda times the KL to a task-agnostic aesthetic teacher. Student, teachers and anchor are LoRA adapters
on one frozen base, so memory hardly grows with their number. No reward is computed in training.

    python distill.py                       # the toy: three teachers, two CPU cores, minutes
    torchrun --nproc_per_node=8 distill.py --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers geneval=jieliu/SD3.5M-FlowGRPO-GenEval ocr=jieliu/SD3.5M-FlowGRPO-Text \\
        --prompts geneval=geneval.jsonl ocr=ocr.txt --init merge --anchor CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix

A step's KL is w(t) mean (v - v_teacher)^2, with w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2 for t < 1. The paper's loss
is the sum of these (`--weighting kl`). Our default, `uniform`, puts the mean of w(t) in the place of w(t):
under w(t) the last learnt step holds most of the loss, and the noisier ones, which decide what is drawn, lag
behind.

`--objective kl` differentiates the loss. `ppo` is the clipped policy gradient with the advantage
log pi_teacher(a|s) - log pi_student(a|s) + KL: its expected gradient is the same, with more noise.
`ppo-paper` takes the paper's reward, the detached -KL: it depends on the state alone, no action can change
it, so its expected gradient is zero. It is here so that anyone can see it.

Left out: full fine-tuning of the student (teachers may be full fine-tunes).
"""

import argparse
import math
import os
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from flow_sde import (
    MORE_FINITE,
    WEIGHTINGS,
    Run,
    check,
    clipped_surrogate,
    descend,
    die,
    draw_rows,
    generators,
    kl,
    learnt,
    load_model,
    load_prompts,
    log_prob,
    merge_loras,
    parse_args,
    parse_specs,
    pick_prompts,
    plot_curves,
    randn,
    reduce_sum,
    refuse_given,
    rollout,
    save_grid,
    save_lora,
    split_options,
    step_weights,
    to_device,
    transition,
    update_average,
    what_fits,
    write_json,
)
from rewards import check_rewards, evaluate, markdown, parse_rewards

TASKS = ("compose", "ocr", "scene")
TOY = dict(
    model="toy/base",
    teachers=["compose=toy/teachers/compose,weight=2", "ocr=toy/teachers/ocr", "scene=toy/teachers/scene"],
    prompts=[f"{task}=toy/prompts/{task}_train.txt" for task in TASKS],
    anchor="toy/teachers/quality",
    init="merge",
    resolution=32,
    guidance=1.0,
    dtype="float32",
    batch_size=48,
    micro_batch_size=48,
    label_steps=5,
    steps=180,
    lr=2e-3,
    eval_prompts=[f"{task}=toy/prompts/{task}_test.txt" for task in TASKS],
    reward=["toy.compose", "toy.ocr", "toy.scene", "toy.quality"],
    eval_num_steps=10,
    eval_batch_size=128,
    save_every=20,
    eval_every=20,
)

# -- flags (what speaks for a default: experiments/README.md) ------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__)
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; leave it out for the toy and its settings")
add("--teachers", nargs="+", metavar="TASK=LORA[,guidance=G][,weight=W]", help="W: share of prompts, merge")
add("--prompts", nargs="+", metavar="TASK=FILE", help="every task's prompts (.txt .jsonl .json .csv .tsv)")
add("--anchor", default="none", metavar="LORA[,guidance=G]", help="MAR's teacher, `base`, or `none`: no MAR")
add("--anchor-weight", type=float, default=0.02, help="lambda of MAR (paper: 0.02)")
add("--init", default="none", help="a LoRA; `merge`: the average of the teachers; `none`: an untrained LoRA")
add("--out", default="out/distill", help="folder of the run")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps while training (paper: 10)")
add("--guidance", type=float, help="of student, anchor and teachers without their own (paper: 4.5)")
add("--sde", choices=["flow", "cps", "ode"], default="flow", help="how the student samples (KL: of flow)")
add("--noise-level", type=float, default=0.7, help="a of the SDE (paper: 0.7)")
add = parser.add_argument_group("learning").add_argument
add("--objective", choices=["kl", "ppo", "ppo-paper"], default="kl", help="see above")
add("--weighting", choices=WEIGHTINGS, default="uniform", help="of the steps, see above (paper: kl)")
add("--label-steps", type=int, default=0, help="most steps of a rollout to label, drawn anew; 0: all")
add("--label-density", type=float, nargs=2, default=[1, 1], help="Beta(A, B) they are drawn by, 0: noise")
add("--schedule", choices=["mixed", "alternate"], default="mixed", help="tasks in every update, or in turn")
add("--batch-size", type=int, default=8, help="prompts per process and rollout")
add("--group-size", type=int, default=1, help="trajectories per prompt (there is no advantage to estimate)")
add("--micro-batch-size", type=int, help="samples per forward, for speed alone (default: what fits, to 16)")
add("--steps", type=int, default=1000, help="rollouts; with kl, one update each")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add("--clip-range", type=float, default=1e-4, help="of the probability ratio, ppo only (paper: 1e-4)")
add("--updates-per-rollout", type=int, default=2, help="passes over a rollout, ppo only (paper: 2)")
add("--rank", type=int, default=32, help="of an untrained student LoRA (paper: 32)")
add("--alpha", type=float, default=64, help="of an untrained student LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("running").add_argument
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="on the CPU except while they encode")
add("--gradient-checkpointing", action="store_true", help="the same gradients, less memory, more time")
add("--compile", action="store_true", help="torch.compile: slow at first, then 1.4 times faster (on an H200)")
add("--seed", type=int, default=0, help="of everything drawn")
add("--eval-prompts", nargs="*", metavar="TASK=FILE", help="of the table at the end; none: no table")
add("--reward", nargs="*", metavar="NAME", help="of the table; none with no --eval-prompts")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--eval-every", type=int, default=50, help="rollouts between curves and grids")
add("--eval-num-steps", type=int, default=40, help="sampling steps of grids and table (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward of grids and table")
add("--save-every", type=int, default=50, help="rollouts between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="go on from the last checkpoint in --out, or from DIR")
add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
check(args.teachers and args.prompts, "--model needs --teachers TASK=LORA and --prompts TASK=FILE with it")
teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
prompt_files = parse_specs("--prompts", args.prompts)
eval_files = parse_specs("--eval-prompts", args.eval_prompts)
for flag, files in {"prompts": prompt_files, "eval_prompts": eval_files}.items():
    whose = f"--{flag.replace('_', '-')}" + ("" if flag in parser.given else " (the toy's; give your own)")
    for task in files:
        has = ", ".join(teachers)
        check(task in teachers, f"{whose} {task}: no teacher of that task; --teachers has {has}")
for task in teachers:
    has = ", ".join(prompt_files)
    check(task in prompt_files, f"--teachers {task}: no prompts of that task; --prompts has {has}")
    check(task not in ("base", "student", "start", "ema", "anchor"), f"--teachers {task}: that name is taken")
prompts = {task: load_prompts(task, prompt_files[task]["value"]) for task in teachers}
eval_prompts = {task: load_prompts(task, file["value"]) for task, file in eval_files.items()}
check(bool(args.reward) == bool(args.eval_prompts), "--reward and --eval-prompts: give both or neither")
check(args.num_steps >= 2, f"--num-steps {args.num_steps}: must be at least 2; the last may not be learnt")
check(args.noise_level > 0, "--noise-level 0: must be positive (for deterministic rollouts: --sde ode)")
check(min(args.label_density) > 0, "--label-density: both must be positive")
if args.objective == "kl":
    refuse_given(parser, ("clip_range", "updates_per_rollout"), "only for --objective ppo and ppo-paper")
else:
    check(args.sde == "flow", f"--objective {args.objective}: needs the noise of --sde flow")
if not args.label_steps:
    refuse_given(parser, ("label_density",), "says which --label-steps are drawn; without it all are")
if args.schedule == "alternate":
    whole = all(teacher["weight"] % 1 == 0 for teacher in teachers.values())
    check(whole, "--schedule alternate: the teachers' weights are numbers of updates, so they must be whole")
if args.init != "none":
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
rewards = parse_rewards(args.reward, args.reward_option)
anchor_path, anchor_options = split_options("--anchor", args.anchor, guidance=args.guidance)
anchor = anchor_path if anchor_path in ("none", "base") else "anchor"  # the adapter that MAR asks
if anchor == "none":
    refuse_given(parser, ("anchor_weight",), "without --anchor there is no MAR")
shares = {task: teacher["weight"] for task, teacher in teachers.items()}  # of the prompts, of the merge
guidance = {"anchor": anchor_options["guidance"]}  # by adapter
guidance |= {task: teacher["guidance"] for task, teacher in teachers.items()}
guidance |= dict.fromkeys(("base", "start", "student", "ema"), args.guidance)

# -- devices and models: one frozen base, everyone else an adapter on it -------------------------------------
run = Run(args)
rank, world, device = run.rank, run.world, run.device
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
model.note_long(row["prompt"] for rows in (*prompts.values(), *eval_prompts.values()) for row in rows)
if rank == 0:  # tried once, on the CPU; then they rest until the table at the end
    check_rewards(rewards, eval_prompts, args.resolution, tasks=prompts)
for task, teacher in teachers.items():
    model.load_teacher(task, teacher["value"])
if anchor == "anchor":
    model.load_teacher("anchor", anchor_path)
if args.init == "merge":
    for task in teachers:
        check(task not in model.full, f"--init merge: {task} is a full fine-tune; LoRAs are what is merged")
    model.add_adapter("student", merge_loras([(model.lora(task), share) for task, share in shares.items()]))
elif args.init == "none":
    model.new_adapter("student", args.rank, args.alpha, args.seed)
else:
    model.load_adapter("student", run.init)
model.copy_adapter("student", "start")
model.copy_adapter("student", "ema")
params, ema = model.train_adapter("student"), model.adapters["ema"]
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
if args.compile:
    model.compile()

# The schedule: a step is named by its t. Whatever sampled the states, the KL is that of the flow-SDE.
sigmas = learnt(model.sigmas(args.num_steps, args.resolution))
learnt_steps = list(zip(sigmas[:-1], sigmas[1:]))
gaussian = partial(transition, noise_level=args.noise_level, sde="flow")  # (x, v, t, t_next) -> mean, std
weight_at = step_weights(learnt_steps, args.noise_level, "flow", args.weighting)  # {t: what its KL counts}
uniform_at = step_weights(learnt_steps, args.noise_level, "flow", "uniform")  # {t: mean of all w(t) / w(t)}
label_count = min(args.label_steps or len(learnt_steps), len(learnt_steps))  # steps labelled in a rollout
samples, dimensions = args.batch_size * args.group_size, math.prod(shape)  # of a rollout here; of a latent
terms = world * samples * label_count * dimensions  # of a gradient
micro = args.micro_batch_size or what_fits(model, samples, shape, args.guidance)  # samples per forward

# What makes this run this run: --resume refuses a checkpoint where any of it differs.
files, settings = {"base": args.model}, {"anchor's guidance": anchor_options["guidance"]}
(files if anchor == "anchor" else settings)["anchor"] = anchor_path  # "base" and "none" are no files
(settings if args.init in ("none", "merge") else files)["init"] = run.init
for task, teacher in teachers.items():
    files |= {f"prompts {task}": prompt_files[task]["value"], f"teacher {task}": teacher["value"]}
    settings[f"teacher {task}'s guidance and weight"] = [teacher["guidance"], teacher["weight"]]
first_step = run.begin(model, "student", optimizer, files, settings)
if rank == 0:
    if args.objective == "ppo-paper":
        print("note: the expected gradient of ppo-paper's reward is zero: it is here to be seen not to learn")
    print(
        f"student: {sum(p.numel() for p in params) / 1e6:.2f} M parameters, init {args.init}; "
        f"teachers: {', '.join(teachers)}; anchor: {args.anchor}; "
        f"{samples * world} trajectories a rollout, {min(micro, samples)} at once"
    )


def labelled_steps(step):
    """The times t of this rollout's steps that are labelled, a pure function of (seed, step): all, or
    --label-steps of them, drawn without repetition by the density of Beta(A, B) at their place in the
    schedule. Uniformly drawn, their mean loss is an unbiased estimate of the whole rollout's."""
    if label_count == len(learnt_steps):
        return sigmas[:-1]
    (a, b), n = args.label_density, len(learnt_steps)
    place = (np.arange(n) + 0.5) / n
    density = place ** (a - 1) * (1 - place) ** (b - 1)
    rng = np.random.default_rng([args.seed, step, 1])
    drawn = rng.choice(n, label_count, replace=False, p=density / density.sum())
    return [sigmas[k] for k in sorted(drawn)]


def student_velocity(x, t, cond, labelled):
    """The student's guided velocity, with a graph where --objective kl learns from this step."""
    with torch.set_grad_enabled(args.objective == "kl" and t in labelled):
        return model.velocity(x, t, cond, "student", args.guidance)


def label(x, t, cond, tasks):
    """The guided velocities of teacher and anchor at the states x, every sample its own task's teacher: data,
    made without a graph. (v_teacher, v_anchor), the latter None without MAR."""
    with torch.no_grad():
        v_teacher = model.velocity(x, t, cond, tasks, [guidance[task] for task in tasks])
        if anchor == "none":
            return v_teacher, None
        return v_teacher, model.velocity(x, t, cond, anchor, guidance["anchor"])


def step_kls(x, v, v_teacher, v_anchor, t, t_next):
    """KL(student || teacher) and KL(student || anchor), 0 without MAR, of one transition: (B,), (B,)."""
    mean, std = gaussian(x, v, t, t_next)
    mean_teacher, _ = gaussian(x, v_teacher, t, t_next)
    to_teacher = kl(mean, mean_teacher, std)
    if v_anchor is None:
        return to_teacher, torch.zeros_like(to_teacher)
    mean_anchor, _ = gaussian(x, v_anchor, t, t_next)
    return to_teacher, kl(mean, mean_anchor, std)


def ppo_updates(memory, step):
    """The clipped policy gradient: walk the stored trajectories again, once per update. The norm of the last
    gradient; None if the run is to stop, and then there was no update."""
    before = run.now()
    for k in range(args.updates_per_rollout):
        for x, t, t_next, x_next, old, advantage, v_anchor, cond in memory:
            if run.stop.name:
                break
            v = model.velocity(x, t, cond, "student", args.guidance)
            mean, std = gaussian(x, v, t, t_next)
            loss = clipped_surrogate(log_prob(x_next, mean, std) - old, advantage, args.clip_range)
            if v_anchor is not None:
                mean_anchor, _ = gaussian(x, v_anchor, t, t_next)
                loss = loss + args.anchor_weight * kl(mean, mean_anchor, std)
            (loss.sum() * weight_at[t] * dimensions).backward()
        if run.stopping():
            run.back_to(before)
            return None
        norm = descend(optimizer, params, terms)
        update_average(ema, params, args.ema, step * args.updates_per_rollout + k + 1)
    return norm


def blame(kls, anchor_sum, velocity_sum):
    """Whose numbers are not finite."""
    if not math.isfinite(velocity_sum):
        return "the student"
    broken = [f"the teacher of {task}" for task, value in kls.items() if not math.isfinite(value)]
    if broken:
        return " and ".join(broken)
    return "the student's gradient" if math.isfinite(anchor_sum) else "the anchor"


shown = {"base": "base"}  # {row: adapter} of grid and table
shown |= {f"{task} (teacher)": task for task in teachers}
shown |= {"anchor": "anchor"} if anchor == "anchor" else {}
shown |= {"start": "start", "student": "ema"}
fixed_rows = {}  # of the grid: drawn once


def draw_grid():
    """samples.png: the same prompts and noise for base, teachers, the student before and now."""
    texts = [row["prompt"] for rows in (eval_prompts or prompts).values() for row in rows[:4]]
    rows = {row: adapter for row, adapter in shown.items() if row not in fixed_rows or row == "student"}
    drawn = draw_rows(run, {row: (adapter, guidance[adapter]) for row, adapter in rows.items()}, texts)
    if drawn and rank == 0:
        save_grid(os.path.join(args.out, "samples.png"), fixed_rows | drawn, texts)
    fixed_rows.update(drawn or {})


# -- the loop ------------------------------------------------------------------------------------------------
stopping = False
steps = range(first_step, args.steps)
progress = tqdm(steps, initial=first_step, total=args.steps, disable=rank != 0, mininterval=1)
for step in progress:
    began = time.time()

    # pick: a prompt's task decides its teacher
    picked = pick_prompts(prompts, shares, args.seed, step, args.batch_size * world, args.schedule)
    mine = picked[rank * args.batch_size : (rank + 1) * args.batch_size]
    batch = [pair for pair in mine for _ in range(args.group_size)]
    gens = generators(args.seed, step, range(rank * samples, (rank + 1) * samples))
    conds = model.encode([row["prompt"] for _, row in batch])
    labelled = labelled_steps(step)
    memory = []  # ppo only: what is learnt when the rollout is done
    kl_sums = torch.zeros(len(teachers), label_count, device=device)  # for the log
    anchor_sum, velocity_sum = torch.zeros(2, device=device)

    for i in range(0, samples, micro):
        if run.stop.name:  # Ctrl-C or SIGTERM
            break
        part = slice(i, i + micro)
        tasks, cond = [task for task, _ in batch[part]], [c[part] for c in conds]
        draw = partial(randn, gens[part], shape, device)
        task_index = to_device([list(teachers).index(task) for task in tasks], device)

        # act: the student samples its own trajectory
        student = partial(student_velocity, cond=cond, labelled=labelled)
        trajectory = rollout(student, draw(), sigmas, args.noise_level, args.sde, draw)
        for x, v, t, t_next, x_next, old in trajectory:
            if t not in labelled:
                continue
            # label: what teacher and anchor would do at the state visited. (Between the student's forward and
            # its backward, which is safe: a forward that is computed again asks whom it asked before)
            v_teacher, v_anchor = label(x, t, cond, tasks)
            to_teacher, to_anchor = step_kls(x, v, v_teacher, v_anchor, t, t_next)  # (B,), (B,)
            # learn: KL + lambda MAR. Parameters change only in descend(), so going backward step by step adds
            # up to the gradient of the whole rollout: no stored trajectory, no second student forward.
            # to_teacher is w(t) mean (v - v_teacher)^2, and weight_at makes of w(t) what --weighting says.
            # Losses are summed over samples, steps and dimensions; descend() divides, in float32
            if args.objective == "kl":
                loss = to_teacher + args.anchor_weight * to_anchor
                (loss.sum() * weight_at[t] * dimensions).backward()
            else:
                mean_teacher, std = gaussian(x, v_teacher, t, t_next)
                log_ratio = log_prob(x_next, mean_teacher, std) - old  # its mean over actions is -KL
                advantage = log_ratio + to_teacher if args.objective == "ppo" else -to_teacher
                advantage = advantage * dimensions  # in nats; log_prob and kl are means over dimensions
                memory.append((x, t, t_next, x_next, old, advantage, v_anchor, cond))
            kl_sums[:, labelled.index(t)].index_add_(0, task_index, to_teacher.detach())
            anchor_sum += to_anchor.detach().sum()
            velocity_sum += v.detach().sum()  # only to see whether the student is finite
            if t == labelled[-1] or run.stop.name:  # where the rest of the trajectory leads is not asked
                break

    stopping = run.stopping()  # any process was told to leave: all give up the rollout in hand
    if stopping:
        break

    # update: clip, AdamW, moving average
    if args.objective == "kl":
        norm = descend(optimizer, params, terms)
        update_average(ema, params, args.ema, step + 1)
    else:
        norm = ppo_updates(memory, step)
        stopping = norm is None
        if stopping:
            break

    # report: the KL per teacher, w(t) and all, whatever --weighting learns; mean over samples and steps. A
    # step counts by its w(t): so steps that were drawn speak for all, however much of the KL is theirs
    batch_tasks = [task for task, _ in batch]
    steps_seen = sum(1 / uniform_at[t] for t in labelled)  # all of them, where all are labelled
    labels = torch.tensor([steps_seen * batch_tasks.count(task) for task in teachers], device=device)
    for tensor in (labels, kl_sums, anchor_sum, velocity_sum):
        reduce_sum(tensor)
    kls = {}
    for task, kl_sum, number in zip(teachers, kl_sums.sum(1).tolist(), labels.tolist()):
        if number:
            kls[task] = kl_sum / number
    record = {"step": step + 1, **{f"kl/{task}": value for task, value in kls.items()}, "grad_norm": norm}
    record["seconds"] = time.time() - began
    if anchor != "none":
        record["kl_to_anchor"] = anchor_sum.item() / labels.sum().item()
    if device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if not all(map(math.isfinite, record.values())):
        broken = blame(kls, anchor_sum.item(), velocity_sum.item())
        die(
            f"step {step + 1}: {broken} is not finite; checkpoints in {args.out} are as they were. "
            f"If it is the student: {MORE_FINITE}; else try another --dtype"
        )
    last = step + 1 == args.steps
    now_and_then = last or (step + 1) % args.eval_every == 0
    if now_and_then:
        by_sigma = (kl_sums.sum(0) / labels.sum() * steps_seen).tolist()
        record["kl_by_sigma"] = {f"{t:.3f}": value for t, value in zip(labelled, by_sigma)}
    run.report(record)
    kls_now = ", ".join(f"{task} {value:.1e}" for task, value in kls.items())
    progress.set_postfix_str(f"KL to {kls_now}")
    if step == 0 and rank == 0:
        progress.write(f"KL to the teachers before the first update: {kls_now}")
    if last or (step + 1) % args.save_every == 0:
        run.save(step + 1)
    if now_and_then:
        if rank == 0:
            plot_curves(args.out)
        draw_grid()

# -- what came of it -----------------------------------------------------------------------------------------
if rank == 0:
    if stopping:  # also before the first update, so that --resume auto does go on
        run.save(step)
    save_lora(model.lora("ema"), os.path.join(args.out, "lora"))
stopping = stopping or run.stopping()  # told during the last grid
has_table = bool(eval_prompts and rewards and not stopping)
if has_table:
    run.stop.disarm()  # from here on Ctrl-C ends at once
    check_rewards(rewards, eval_prompts, args.resolution, device, prompts)  # loads them, before threads score
    pictures = len(shown) * -(-sum(map(len, eval_prompts.values())) // world)
    results, where = [], (args, rank, world)
    with tqdm(total=pictures, disable=rank != 0, desc="evaluating", unit="picture", mininterval=1) as bar:
        for row, adapter in shown.items():
            how = dict(guidance=guidance[adapter], tasks=teachers, progress=bar.update)
            scores = evaluate(model, adapter, eval_prompts, rewards, *where, **how)
            results.append({"model": row} | scores)
    if rank == 0:
        write_json(os.path.join(args.out, "results.json"), results)
        print(markdown(results))
        score, closed = {row["model"]: row["scores"] for row in results}, []
        for task in teachers:
            for name in score["base"]:  # the rewards that are the task's own
                gap = score[f"{task} (teacher)"][name] - score["base"][name]
                if gap > 0 and task in (name, rewards[name].task):
                    closed.append(f"{name} {(score['student'][name] - score['base'][name]) / gap:.0%}")
        if closed:
            print(f"of the gap between base and teacher the student closes: {', '.join(closed)}")
if rank == 0:
    how = "stopped (--resume auto goes on)" if stopping else "done"
    table = ", results.json" if has_table else ""
    print(f"{how}: {args.out}/lora (also log.jsonl, curves.png, samples.png{table}, checkpoints/)")
run.end()
