"""Stage 3, Flow-OPD (arXiv 2605.08063): one student learns from several teachers, on its own trajectories. At every state the student visits,
the teacher of the prompt's task says which way it would go; the loss is the closed-form KL between the two transitions, reweighted so that all
steps count alike. Manifold Anchor Regularization (MAR) adds the same distance, times lambda, to a task-agnostic aesthetic teacher. All teachers
are LoRA adapters on one frozen base, so memory hardly grows with their number. No reward is computed in training.

    python distill.py                                                     # the toy: three teachers, two CPU cores, minutes
    torchrun --nproc_per_node=8 distill.py --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers geneval=jieliu/SD3.5M-FlowGRPO-GenEval ocr=jieliu/SD3.5M-FlowGRPO-Text \\
        --prompts geneval=geneval.jsonl ocr=ocr.txt --init merge --anchor CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix

A step's KL is w(t) times the squared distance of the two velocities. `--weighting kl` leaves it so, as in the paper; by default w(t) gives way to its
mean, since most of the KL comes from the last step learnt and the noisier ones, which decide what is drawn, would lag behind. `step_weights` has the
other two: what the paper's released code descends, and DiffusionOPD's.

Objectives. `kl` (default) differentiates this loss. `ppo` is the clipped policy gradient with the action-dependent
reward log pi_teacher(a|s) - log pi_student(a|s), whose expected gradient is the same, with more noise. `ppo-paper` is the
policy gradient with the paper's reward, the detached closed-form -KL: credited to its own step it depends on the state
alone, so its expected gradient is zero. It is here so that anyone can see it.
"""

import argparse
import json
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from flow_sde import (
    WEIGHTINGS,
    StopSignal,
    clipped_surrogate,
    die,
    draw_rows,
    end_processes,
    generators,
    kl,
    learnt,
    load_model,
    load_prompts,
    log_prob,
    merge_loras,
    own_folder,
    parse_args,
    parse_specs,
    pick_prompts,
    plot_curves,
    randn,
    reduce_gradients,
    reduce_sum,
    refuse_given,
    resume_checkpoint,
    rollout,
    run_identity,
    save_checkpoint,
    save_grid,
    save_lora,
    split_options,
    start_processes,
    start_run,
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
    prompts=[f"{t}=toy/prompts/{t}_train.txt" for t in TASKS],
    teachers=[
        "compose=toy/teachers/compose,weight=2",
        "ocr=toy/teachers/ocr",
        "scene=toy/teachers/scene",
    ],  # compose is the hardest
    anchor="toy/teachers/quality",
    init="merge",
    out="out/distill",
    resolution=32,
    dtype="float32",
    guidance=1.0,
    batch_size=48,
    micro_batch_size=48,
    steps=140,
    lr=2e-3,
    eval_prompts=[f"{t}=toy/prompts/{t}_test.txt" for t in TASKS],
    reward=[f"toy.{t}" for t in (*TASKS, "quality")],
    eval_num_steps=10,
    eval_batch_size=128,
    save_every=20,
    eval_every=20,
)

# -- flags ---------------------------------------------------------------------------------------------------------------
# The figures beside some of them say why the default is what it is: average scores on the toy, one change at a time (README, "The paper in miniature").
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add(
    "--model",
    help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it",
)
add(
    "--teachers",
    nargs="+",
    metavar="TASK=LORA[,guidance=G][,weight=W]",
    help="one teacher a task, a LoRA or a full fine-tune; weight: its share of prompts and of --init merge",
)
add(
    "--prompts",
    nargs="+",
    metavar="TASK=FILE",
    help="training prompts of every teacher's task (.txt, .jsonl, .json, .csv, .tsv)",
)
add(
    "--anchor",
    default="none",
    metavar="LORA[,guidance=G]",
    help="MAR's aesthetic teacher: a LoRA or a full fine-tune, `base`, or `none`: no MAR",
)
# The paper's; on the toy it changes nothing that can be measured. At 0.2 quality on all prompts rose by 0.04 and one task fell by 0.03 (README, d).
add("--anchor-weight", type=float, default=0.02, help="lambda of MAR (paper: 0.02)")
# merge costs nothing and is at once on the way; after 40 updates SFT (0.003 behind) and an untrained student (0.008) have all but caught up. It
# takes LoRAs to merge, so with --model it has to be asked for.
add(
    "--init",
    default="none",
    help="where the student starts: a LoRA, `merge`: the exact average of the teachers, or `none`: untrained",
)
add("--out", default="out/distill", help="folder of the run")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps while training (paper: 10)")
# A guided teacher (TASK=LORA,guidance=G) can be better than itself, and teach a student that is then sampled with --guidance 1, at half the cost.
add("--guidance", type=float, help="of student, anchor and teachers without their own (paper: 4.5)")
# Students learn as much on the states of any of the three; flow is the paper's, and ppo needs its noise.
# CPS: log_prob is the density of its step; public codes leave out 1/(2 std^2), so their clip ranges mean something else.
add(
    "--sde",
    choices=["flow", "cps", "ode"],
    default="flow",
    help="how the student samples; ode: no noise, flow's KL",
)
add("--noise-level", type=float, default=0.7, help="a of the sampler (paper: 0.7)")
add = parser.add_argument_group("learning").add_argument
# kl is the exact gradient. ppo estimates it from sampled actions: after 8 rollouts it is seven tenths of the way, at twice the time, with a
# quarter of the learning rate, for its noise, and --clip-range 0.1. ppo-paper, so too, ends where it began or below: its expected gradient is zero.
add(
    "--objective",
    choices=["kl", "ppo", "ppo-paper"],
    default="kl",
    help="closed-form KL; clipped policy gradient; the same with the paper's reward (zero expected gradient)",
)
# uniform: most of the KL comes from the last step learnt, so under w(t) the noisier ones, which decide what is drawn, lag behind: by 0.039 of the
# average score after 8 updates, 0.025 after 40. The paper's is kl.
add(
    "--weighting",
    choices=WEIGHTINGS,
    default="uniform",
    help="of the steps' velocity distances: alike; the KL's w(t), as in the paper; see above",
)
add(
    "--label-steps",
    type=int,
    default=0,
    help="steps of a rollout that are labelled, drawn anew for every rollout; 0: all, as in the paper",
)
add(
    "--label-density",
    type=float,
    nargs=2,
    default=[1, 1],
    metavar=("A", "B"),
    help="Beta distribution they are drawn from, 0 the first step, 1 the last (1 1: uniform; DanceOPD: 5 2)",
)
# mixed: at equal updates, whole updates in turn were 0.08 behind, nearly all of it on the task furthest from its teacher.
add(
    "--schedule",
    choices=["mixed", "alternate"],
    default="mixed",
    help="all tasks in every update, or whole updates in turn",
)
add("--batch-size", type=int, default=8, help="prompts per process and update")
add(
    "--group-size",
    type=int,
    default=1,
    help="trajectories per prompt (one is enough: no advantage to estimate)",
)
add("--micro-batch-size", type=int, help="samples per forward, for speed alone (default: what fits, to 16)")
add("--steps", type=int, default=1000, help="rollouts; with kl, one update each")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add(
    "--clip-range",
    type=float,
    default=1e-4,
    help="of the per-dimension probability ratio, ppo only (paper: 1e-4)",
)
add(
    "--updates-per-rollout",
    type=int,
    default=2,
    help="passes over a rollout, one update each, ppo only (paper: 2)",
)
add("--rank", type=int, default=32, help="of an untrained student LoRA (paper: 32)")
add("--alpha", type=float, default=64, help="of an untrained student LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("running").add_argument
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
add("--gradient-checkpointing", action="store_true", help="the same gradients from less memory, in more time")
add("--compile", action="store_true", help="torch.compile the blocks: minutes at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of everything drawn")
add(
    "--eval-prompts",
    nargs="*",
    metavar="TASK=FILE",
    help="held-out prompts for the table at the end; with none given, no table",
)
add("--reward", nargs="*", metavar="NAME", help="rewards of the table at the end (never used in training)")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--eval-every", type=int, default=50, help="updates between curves and grids")
add("--eval-num-steps", type=int, default=40, help="sampling steps of grids and table (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward of the table")
add("--save-every", type=int, default=50, help="updates between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="go on from the last checkpoint in --out, or from DIR")
add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker")
args = parse_args(parser, TOY)

# -- teachers and prompts, checked before anything slow ---------------------------------------------------------------------
if not args.teachers or not args.prompts:
    die("--model needs --teachers TASK=LORA and --prompts TASK=FILE with it")
teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
prompt_files = parse_specs("--prompts", args.prompts)
if lonely := [t for t in prompt_files if t not in teachers]:
    die(f"--prompts {', '.join(lonely)}: no teacher of that task; --teachers has {', '.join(teachers)}")
if lonely := [t for t in teachers if t not in prompt_files]:
    die(f"--teachers {', '.join(lonely)}: no prompts of that task; --prompts has {', '.join(prompt_files)}")
if taken := teachers.keys() & {"base", "student", "start", "ema", "anchor"}:
    die(f"--teachers {taken.pop()}: that name is taken; call the task something else")
anchor_path, anchor_options = split_options("--anchor", args.anchor, guidance=args.guidance)
prompts = {task: load_prompts(task, prompt_files[task]["value"]) for task in teachers}
eval_prompts = {
    task: load_prompts(task, s["value"])
    for task, s in parse_specs("--eval-prompts", args.eval_prompts).items()
}
rewards = parse_rewards(args.reward, args.reward_option)
if lonely := eval_prompts.keys() - teachers.keys():
    die(f"--eval-prompts {', '.join(lonely)}: no teacher of that task; --teachers has {', '.join(teachers)}")
samples = args.batch_size * args.group_size  # per process and update
if args.num_steps < 2:
    die(f"--num-steps {args.num_steps}: must be at least 2, since the last step may not be learnt")
if bool(args.reward) != bool(args.eval_prompts):
    die("--reward and --eval-prompts make the table at the end together: give both or neither")
if args.noise_level <= 0:
    die(f"--noise-level {args.noise_level}: must be positive (for deterministic rollouts: --sde ode)")
if not 0 <= args.label_steps < args.num_steps:
    die(f"--label-steps {args.label_steps}: must lie in 0..{args.num_steps - 1}, one less than --num-steps")
if min(args.label_density) <= 0:
    die(f"--label-density {' '.join(map(str, args.label_density))}: both must be positive")
if args.objective != "kl" and args.sde == "ode":
    die(f"--objective {args.objective} needs a stochastic sampler: --sde flow or cps")
if args.schedule == "alternate" and any(s["weight"] % 1 for s in teachers.values()):
    die("--schedule alternate: the teachers' weights are numbers of updates, so they must be whole")
if args.init != "none":
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
if args.objective == "ppo-paper":
    print(
        "note: ppo-paper's reward depends on the state alone, so its expected gradient is zero: it is here to be seen not to learn"
    )

# -- devices and models: one frozen base, everyone else an adapter on it ------------------------------------------------------
accelerator = start_processes(args.track, args.out)
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
init = own_folder(args.out, accelerator, args.resume, args.overwrite, args.init)
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
model.note_long(row["prompt"] for rows in (*prompts.values(), *eval_prompts.values()) for row in rows)
if rank == 0:
    check_rewards(
        rewards, eval_prompts, args.resolution, tasks=prompts
    )  # on the CPU: they come back only for the table at the end
for task, spec in teachers.items():
    model.load_teacher(task, spec["value"])
anchor = {"none": None, "base": "base"}.get(anchor_path, "anchor")  # whom MAR asks
if anchor == "anchor":
    model.load_teacher("anchor", anchor_path)
for name, network in model.full.items() if rank == 0 else ():
    size = sum(p.nbytes for p in network.parameters()) / 1e9
    print(f"note: {name} is a full fine-tune, a transformer of its own: {size:.1f} GB more on every device")
if args.init == "merge":
    if whole := [t for t in teachers if t in model.full]:
        die(f"--init merge: {whole[0]} is a full fine-tune and LoRAs are what is merged; give another --init")
    model.add_adapter("student", merge_loras([(model.lora(t), s["weight"]) for t, s in teachers.items()]))
elif args.init == "none":
    model.new_adapter("student", args.rank, args.alpha, args.seed)
else:
    model.load_adapter("student", init)
model.copy_adapter("student", "start")
model.copy_adapter("student", "ema")
params, ema = model.train_adapter("student"), list(model.weights("ema").values())
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
sigmas = learnt(model.sigmas(args.num_steps, args.resolution))
transitions, dimensions = len(sigmas) - 1, math.prod(shape)
# What has no transition density, an ODE or CPS's step to 0, is judged by the flow-SDE's at the same states
kl_sde = args.sde if args.sde == "cps" and sigmas[-1] > 0 else "flow"
if args.objective != "kl" and args.sde == "cps" and sigmas[-1] == 0:
    die(
        f"--objective {args.objective} --sde cps: this model's last step, from t = {sigmas[-2]:.2f}, would have "
        "no noise to learn from; --sde flow"
    )
count = args.label_steps or transitions  # steps labelled in a rollout
factor = step_weights(
    [sigmas[k : k + 2] for k in range(transitions)], args.noise_level, kl_sde, args.weighting
)  # {t: factor of its KL}
weights = {task: spec["weight"] for task, spec in teachers.items()}
if args.compile:
    model.compile()
micro = args.micro_batch_size or what_fits(model, samples, shape, args.guidance)  # samples per forward
if rank == 0:
    print(
        f"student: {sum(p.numel() for p in params) / 1e6:.2f} M parameters, init {args.init}; teachers: {', '.join(teachers)}; "
        f"anchor: {args.anchor}; {samples * world} trajectories an update, {micro} at once"
    )
files = {
    "base": args.model,
    "anchor": anchor_path,
    "init": init,
    **{f"prompts {task}": s["value"] for task, s in prompt_files.items()},
    **{f"teacher {task}": s["value"] for task, s in teachers.items()},
}
settings = {
    f"teacher {task}'s guidance and weight": [s["guidance"], s["weight"]] for task, s in teachers.items()
}
settings["anchor's guidance"] = anchor_options["guidance"]
identity = run_identity(args, world, files, "reward", "reward_option") | settings
start = resume_checkpoint(args.resume, args.out, args.steps, model, "student", optimizer, identity)
log = start_run(args.out, start, args) if rank == 0 else None
if args.track:
    accelerator.init_trackers(
        "flow-opd",
        config={k: str(v) for k, v in vars(args).items()},
        init_kwargs={"wandb": {"dir": args.out}},
    )
stop, stopping = StopSignal(), False
fixed_rows = {}  # of the picture grid: drawn once


def labelled_steps(step):
    """The times t of this rollout's steps that are labelled, without repetition, a pure function of (seed, step). Uniformly drawn, their mean
    loss is an unbiased estimate of the whole rollout's; with another density that is what weighs its steps."""
    rng = np.random.default_rng([args.seed, step, 1])
    drawn = set(range(transitions)) if count == transitions else set()
    while len(drawn) < count:
        drawn.add(min(int(rng.beta(*args.label_density) * transitions), transitions - 1))
    return [sigmas[k] for k in sorted(drawn)]


def label(x, t, cond, tasks):
    """What teachers and anchor would do at (x, t), every sample its own task's teacher: data, made without a graph."""
    with torch.no_grad():
        v_teacher = model.velocity(x, t, cond, tasks, [guidance_of(task) for task in tasks])
        v_anchor = model.velocity(x, t, cond, anchor, guidance_of("anchor")) if anchor else None
    return v_teacher, v_anchor


def divergence(x, v, v_teacher, v_anchor, t, t_next):
    """KL to the teacher, and MAR's KL to the anchor (0 without one), of one step: ((B,), (B,))."""
    mean, std = transition(x, v, t, t_next, args.noise_level, kl_sde)
    distance = lambda other: kl(mean, transition(x, other, t, t_next, args.noise_level, kl_sde)[0], std)
    return distance(v_teacher), (distance(v_anchor) if anchor else mean.new_zeros(len(x)))


def update():
    """One optimizer step on the mean gradient over samples, steps and dimensions; returns its norm before clipping. A broken gradient
    changes nothing."""
    reduce_gradients(params, world * samples * count * dimensions)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def guidance_of(name):
    """A teacher's or the anchor's own guidance, or everyone's."""
    return (anchor_options if name == "anchor" else teachers.get(name, {})).get("guidance", args.guidance)


def draw_grid():
    """samples.png: the same prompts and noise for base, teachers, the student before and now."""
    texts = [row["prompt"] for rows in (eval_prompts or prompts).values() for row in rows[:4]]
    names = {"student": "ema"}
    if not fixed_rows:
        names = {"base": "base", **{f"teacher {task}": task for task in teachers}, "start": "start"} | names
    drawn = draw_rows(
        model, {row: (name, guidance_of(name)) for row, name in names.items()}, texts, args, rank, world, stop
    )
    if drawn and rank == 0:
        save_grid(os.path.join(args.out, "samples.png"), fixed_rows | drawn, texts)
    fixed_rows.update(drawn or {})


# -- the loop -----------------------------------------------------------------------------------------------------------------
progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank != 0, mininterval=1)
for step in progress:
    began = time.time()

    # pick prompts: a prompt's task decides its teacher
    chosen = pick_prompts(prompts, weights, args.seed, step, args.batch_size * world, args.schedule)
    chosen = chosen[rank * args.batch_size : (rank + 1) * args.batch_size]
    labelled = labelled_steps(step)
    batch = [pair for pair in chosen for _ in range(args.group_size)]
    gens = generators(args.seed, step, range(rank * samples, (rank + 1) * samples))
    kl_by_task = torch.zeros(len(teachers), count, device=device)  # sums, for the log
    anchor_sum, student_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    memory = []  # ppo only: the trajectories
    conds = model.encode([row["prompt"] for _, row in batch])

    for i in range(0, samples, micro):
        if stop.name:  # Ctrl-C or SIGTERM
            break
        rows, g = batch[i : i + micro], gens[i : i + micro]
        tasks = [task for task, _ in rows]
        index = to_device([list(teachers).index(t) for t in tasks], device)
        cond = [c[i : i + micro] for c in conds]
        draw = lambda: randn(g, shape, device)

        # act: the student samples its own trajectory, with a graph where the step's loss is learnt at once
        def student(x, t):
            with torch.set_grad_enabled(args.objective == "kl" and t in labelled):
                return model.velocity(x, t, cond, "student", args.guidance)

        for x, v, t, t_next, x_next, old in rollout(
            student, draw(), sigmas, args.noise_level, args.sde, draw
        ):
            if t not in labelled:
                continue
            # label: the teacher's and the anchor's whole velocity at the state visited (who answers is named with every call, so asking
            # them between the student's forward and its backward is safe)
            v_teacher, v_anchor = label(x, t, cond, tasks)
            to_teacher, to_anchor = divergence(x, v, v_teacher, v_anchor, t, t_next)  # (B,), (B,)
            # learn: KL + lambda MAR. The weights stand still during the rollout, so learning step by step is exact, and
            # neither the trajectory nor a second student forward is needed. Summed over dimensions: update() divides, in float32
            if args.objective == "kl":
                loss = to_teacher + args.anchor_weight * to_anchor
                (loss.sum() * factor[t] * dimensions).backward()
            else:
                # ppo: the sampled action's reward log pi_T(a|s) - log pi(a|s); its mean over actions is -KL, the baseline taken off.
                # ppo-paper: -KL itself, which no action can change. Rewards are in nats: log_prob and kl are means over dimensions
                mean, std = transition(x, v_teacher, t, t_next, args.noise_level, args.sde)
                reward = (
                    log_prob(x_next, mean, std) - old + to_teacher if args.objective == "ppo" else -to_teacher
                )
                memory.append((x, t, t_next, x_next, old, reward * dimensions, v_anchor, cond))
            student_sum += v.detach().sum()  # if something is not finite: is it the student?
            kl_by_task[:, labelled.index(t)].index_add_(0, index, to_teacher.detach())
            anchor_sum += to_anchor.detach().sum()
            if t == labelled[-1]:  # nobody asks where the rest of the trajectory leads
                break

    if stopping := stop.arrived(device):  # any process was told to leave: all give up the update in hand
        break

    # update: one step on the gradient of the whole batch; ppo walks its stored trajectories again, once per update
    if args.objective == "kl":
        norm = update()
    for k in range(args.updates_per_rollout if args.objective != "kl" else 0):
        for x, t, t_next, x_next, old, advantage, v_anchor, cond in memory:
            if k == 0 and stop.name:  # later updates follow one that was made, and are finished
                break
            v = model.velocity(x, t, cond, "student", args.guidance)
            mean, std = transition(x, v, t, t_next, args.noise_level, args.sde)
            to_anchor = (
                kl(mean, transition(x, v_anchor, t, t_next, args.noise_level, args.sde)[0], std)
                if anchor
                else 0.0
            )
            loss = (
                clipped_surrogate(log_prob(x_next, mean, std) - old, advantage, args.clip_range)
                + args.anchor_weight * to_anchor
            )
            (loss.sum() * factor[t] * dimensions).backward()
        if k == 0 and (stopping := stop.arrived(device)):
            break
        norm = update()
    if stopping:
        break
    update_average(ema, params, args.ema, step + 1)

    # report: KL per teacher, mean over its samples and steps
    counts = (
        reduce_sum(
            torch.tensor([float(sum(task == t for task, _ in batch)) for t in teachers], device=device)
        )
        * count
    )
    reduce_sum(kl_by_task), reduce_sum(anchor_sum), reduce_sum(student_sum)
    kls = {t: s / n for t, s, n in zip(teachers, kl_by_task.sum(1).tolist(), counts.tolist()) if n}
    if not math.isfinite(norm + sum(kls.values()) + anchor_sum.item()):
        broken = [f"the teacher of {t}" for t, value in kls.items() if not math.isfinite(value)]
        if not math.isfinite(student_sum.item()):
            broken = ["the student"]
        elif not broken:
            broken = ["the student's gradient" if math.isfinite(anchor_sum.item()) else "the anchor"]
        die(
            f"step {step + 1}: {' and '.join(broken)} is not finite; checkpoints in {args.out} are as they "
            "were. Try another --dtype or, if it is the student, a smaller --lr"
        )
    record = {
        "step": step + 1,
        **{f"kl/{t}": value for t, value in kls.items()},
        "grad_norm": norm,
        "seconds": time.time() - began,
    }
    if anchor:
        record["kl_to_anchor"] = anchor_sum.item() / counts.sum().item()
    if device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    last = step + 1 == args.steps
    now_and_then = (step + 1) % args.eval_every == 0 or last
    if now_and_then:
        record["kl_by_sigma"] = dict(
            zip(map("{:.3f}".format, labelled), (kl_by_task.sum(0) / counts.sum() * count).tolist())
        )
    if args.track:
        accelerator.log({k: v for k, v in record.items() if k != "kl_by_sigma"}, step=step + 1)
    if rank == 0:
        log.write(json.dumps(record) + "\n"), log.flush()
        progress.set_postfix({f"kl {t}": f"{value:.1e}" for t, value in kls.items()})
        if step == 0:
            progress.write(
                "KL to the teachers before the first update: "
                + ", ".join(f"{t} {value:.2e}" for t, value in kls.items())
            )
        if (step + 1) % args.save_every == 0 or last:
            save_checkpoint(args.out, step + 1, model, "student", optimizer, identity, args.keep)
        if now_and_then:
            plot_curves(args.out)
    if now_and_then:
        draw_grid()

# -- what came of it ------------------------------------------------------------------------------------------------------------
if rank == 0:
    if stopping and step > 0:
        save_checkpoint(args.out, step, model, "student", optimizer, identity, args.keep)
    save_lora(model.lora("ema"), os.path.join(args.out, "lora"))
stopping = stopping or stop.arrived(device)  # told during the last grid
table = bool(eval_prompts and rewards and not stopping)
if table:
    stop.disarm()
    names = {
        "base": "base",
        **{t: t for t in teachers},
        **({"anchor": "anchor"} if anchor == "anchor" else {}),
        "start": "start",
        "student": "ema",
    }
    total = len(names) * -(-sum(map(len, eval_prompts.values())) // world)
    with tqdm(total=total, disable=rank != 0, desc="evaluating", unit="picture", mininterval=1) as bar:
        results = [
            {"model": row_name}
            | evaluate(
                model, name, eval_prompts, rewards, args, rank, world, guidance_of(name), teachers, bar.update
            )
            for row_name, name in names.items()
        ]
    if rank == 0:
        write_json(os.path.join(args.out, "results.json"), results)
        print(markdown(results))
        score = {r["model"]: r["scores"] for r in results}
        closed = {
            task: (score["student"][task] - score["base"][task]) / gap
            for task in teachers
            if task in score["base"] and (gap := score[task][task] - score["base"][task]) > 0
        }
        if closed:
            print(
                "the student closes of the gap between base and teacher: "
                + ", ".join(f"{task} {share:.0%}" for task, share in closed.items())
            )
if rank == 0:
    print(
        f"{'stopped (--resume auto goes on)' if stopping else 'done'}: {args.out}/lora (also log.jsonl, curves.png, samples.png"
        f"{', results.json' if table else ''}, checkpoints/)"
    )
end_processes(accelerator)
