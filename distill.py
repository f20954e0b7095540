"""Stage 3, Flow-OPD (arXiv 2605.08063): several teachers are distilled into one student, on-policy.

The student samples its own trajectories. At every state it visits, the teacher of the prompt's task gives the
target velocity. The loss is the closed-form KL(student || teacher) of the two transitions, a weighted
distance of velocities:

    KL = w(t) mean (v - v_teacher)^2,    w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2  for t < 1

Manifold Anchor Regularization (MAR) adds lambda times the same distance to a task-agnostic aesthetic teacher,
the anchor. Student, teachers and anchor are LoRA adapters on one frozen base. Training computes no reward.

    python distill.py                       # the toy: six teachers, two CPU cores, minutes
    torchrun --nproc_per_node=8 distill.py --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers geneval=jieliu/SD3.5M-FlowGRPO-GenEval ocr=jieliu/SD3.5M-FlowGRPO-Text \\
        --prompts geneval=geneval.jsonl ocr=ocr.txt --init merge --anchor CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix

`--weighting kl` is the paper's loss. The default, `uniform`, replaces w(t) by its mean, so all steps count
equally: under w(t) the last step holds most of the loss, and the noisier steps, which decide what is drawn,
learn slowly.

`--objective kl` differentiates the loss. `ppo` is the clipped policy gradient with the advantage
log pi_teacher(a|s) - log pi_student(a|s) + KL: in its first pass the same expected gradient, with more noise.
`ppo-paper` takes the paper's reward, the detached -KL of a step's state, credited to that step's action. The
action does not change it, so at the policy that sampled its expected gradient is zero; in later passes
clipping adds drift. It is kept for comparison.

`--num-steps 4 --teacher-substeps 4` makes a student of four steps: what it is taught at a state is the mean
velocity of four small steps of the teacher, from there to the student's next t, without noise. With 1 it is
the paper. With `--guidance 1` and teachers that have a guidance of their own, guidance is distilled too.

Left out: full fine-tuning of the student (teachers may be full fine-tunes).
"""

import argparse
import collections
import math
import os
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

# isort: off
from flow_sde import WEIGHTINGS, clipped_surrogate, generators, log_prob, mean_velocity, randn, rollout
from flow_sde import step_weights, training_sigmas, transition, update_average, velocity_distance
from flow_sde import by_task, load_model, merge_loras, merge_ties, read_lora, save_lora, take_rows
from flow_sde import TOY_DIR, Run, check, check_turns, descend, draw_rows, listing, load_prompts, parse_args
from flow_sde import parse_specs, parse_tasks, pick_prompts, plot_curves, reduce_sum, refuse_given
from flow_sde import save_grid, split_options, write_card, write_json
from rewards import check_rewards, evaluate, markdown, parse_rewards, release_models, rewards_of
# isort: on

TASKS = {"compose": "compose", "ocr": "ocr", "scene": "scene_dawn"}  # three skills {task: its prompt files}
TASKS |= {"blue": "blue", "green": "green", "red": "red"}  # three styles, for nights, noons and dusks
TOY = dict(
    model=f"{TOY_DIR}/base",
    teachers=[f"{task}={TOY_DIR}/teachers/{task}" + ",weight=2" * (task == "compose") for task in TASKS],
    prompts=[f"{task}={TOY_DIR}/prompts/{file}_train.txt" for task, file in TASKS.items()],
    init="merge",
    resolution=32,
    guidance=1.0,
    dtype="float32",
    batch_size=48,
    micro_batch_size=48,
    label_steps=3,
    steps=90,
    lr=3e-3,
    ema=0.6,
    compare=["sum", "ties"],
    eval_prompts=[f"{task}={TOY_DIR}/prompts/{file}_test.txt" for task, file in TASKS.items()],
    reward=[f"toy.{task}" for task in TASKS],
    eval_num_steps=10,
    eval_batch_size=128,
    save_every=20,
    eval_every=20,
)

LORAS = "or @FILE, one a line; [FULL+]LORA[,scale=S][,text=0][+LORA...][,guidance=G][,weight=W], or base"
MERGES = ["sum", "ties", "dare_ties"]

# -- flags (the evidence for the defaults: experiments/README.md) --------------------------------------------
parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@")
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the toy and its settings")
add("--teachers", nargs="+", metavar="TASK=LORA", help=LORAS)
add("--prompts", nargs="+", metavar="TASK=FILE", help="every task's prompts (.txt or .jsonl)")
add("--anchor", default="none", metavar="LORA[,guidance=G]", help="MAR's teacher, `base`, or `none`: no MAR")
add("--anchor-weight", type=float, default=0.02, help="lambda of MAR (paper: 0.02)")
add("--init", default="none", help="a LoRA; `merge`: the average of the teachers; `none`: an untrained LoRA")
add("--out", default="out/distill", help="folder of the run")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps while training (paper: 10)")
add("--guidance", type=float, help="of student, anchor and teachers without their own (paper: 4.5)")
add("--sde", choices=["flow", "cps", "ode"], default="flow", help="how the student samples; the KL is flow's")
add("--noise-level", type=float, default=0.7, help="a of the SDE (paper: 0.7)")
add = parser.add_argument_group("learning").add_argument
add("--objective", choices=["kl", "ppo", "ppo-paper"], default="kl", help="see above")
add("--weighting", choices=WEIGHTINGS, default="uniform", help="mean of w(t); w(t) (paper); dt w(t); dt^2/2")
add("--teacher-substeps", type=int, default=1, help="teacher steps per student step, for few-step students")
add("--label-steps", type=int, default=0, help="steps labelled in a rollout, resampled each time; 0: all")
add("--label-density", type=float, nargs=2, default=[1, 1], help="Beta(A, B) of their place; 0: noise")
add("--schedule", choices=["mixed", "alternate"], default="mixed", help="tasks in every update, or in turn")
add("--batch-size", type=int, default=8, help="prompts per process and rollout")
add("--group-size", type=int, default=1, help="trajectories per prompt (1 is enough: no group comparison)")
add("--micro-batch-size", type=int, default=8, help="samples per forward: memory and speed only")
add("--steps", type=int, default=1000, help="rollouts; with kl, one update each")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add("--clip-range", type=float, default=1e-4, help="of the probability ratio, ppo only (paper: 1e-4)")
add("--updates-per-rollout", type=int, default=2, help="passes over a rollout, ppo only (paper: 2)")
add("--rank", type=int, default=32, help="of an untrained student LoRA (paper: 32)")
add("--alpha", type=float, default=64, help="of an untrained student LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("running").add_argument
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--quantize", choices=["int8", "nf4"], help="of large frozen weights: 1 or 0.56 bytes each, less exact")
add("--shard", action="store_true", help="spread what is frozen over the processes (FSDP): slower")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="in CPU memory except while they encode")
add("--gradient-checkpointing", action="store_true", help="the same gradients, less memory, more time")
add("--compile", action="store_true", help="torch.compile: slow at first, then 1.4 times faster (on an H200)")
add("--seed", type=int, default=0, help="of everything drawn")
add("--eval-prompts", nargs="*", metavar="TASK=FILE", help="of the table at the end; none: no table")
add("--reward", nargs="*", metavar="NAME", help="of the table; none with no --eval-prompts")
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add("--compare", nargs="*", default=[], choices=MERGES, help="merges to show beside the student")
add("--eval-every", type=int, default=50, help="rollouts between curves and grids")
add("--eval-num-steps", type=int, default=40, help="sampling steps of grids and table (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward of grids and table")
add("--save-every", type=int, default=50, help="rollouts between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="continue from the last checkpoint in --out, or from DIR")
add("--dry-run", action="store_true", help="a few updates, what the run will take, and nothing is written")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker, pictures too")
args = parse_args(parser, TOY)
if "teachers" in parser.given and "eval_prompts" not in parser.given:
    args.eval_prompts, args.reward = None, args.reward if "reward" in parser.given else None  # not the toy's
if args.teacher_substeps > 1 and "eval_num_steps" not in parser.given:
    args.eval_num_steps = args.num_steps  # a few-step student is drawn as it was trained

# -- checks, before anything slow (a reader of the algorithm may skip them) ----------------------------------
teachers, prompt_files = parse_tasks(args, guidance=args.guidance, weight=1.0)
eval_files = {task: spec["value"] for task, spec in parse_specs("--eval-prompts", args.eval_prompts).items()}
strange = ", ".join(eval_files.keys() - teachers.keys())
check(not strange, f"--eval-prompts {strange}: no teacher of that task; give your own with --teachers")
check(bool(args.reward) == bool(eval_files), "--reward and --eval-prompts: give both or neither")
check(min(args.label_density) > 0, "--label-density: both must be positive")
if args.objective == "kl":
    refuse_given(parser, ("clip_range", "updates_per_rollout"), "only for --objective ppo and ppo-paper")
else:
    check(args.sde == "flow", f"--objective {args.objective}: needs the noise of --sde flow")
if not args.label_steps:
    refuse_given(parser, ("label_density",), "only with --label-steps; without it all steps are labelled")
if args.init != "none":
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
anchor_path, anchor_options = split_options("--anchor", args.anchor, guidance=args.guidance)
anchor = anchor_path if anchor_path in ("none", "base") else "anchor"  # the adapter that MAR asks
if anchor == "none":
    refuse_given(parser, ("anchor_weight",), "without --anchor there is no MAR")
shares = {task: teacher["weight"] for task, teacher in teachers.items()}  # of the prompts, of the merge
check_turns(args, "--teachers", shares)
prompts = {task: load_prompts(task, file) for task, file in prompt_files.items()}
eval_prompts = {task: load_prompts(task, file) for task, file in eval_files.items()}
rewards = parse_rewards(args.reward, args.reward_option)

# -- devices and models: one frozen base, everyone else an adapter on it -------------------------------------
run = Run(args)
rank, world, device = run.rank, run.world, run.device
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
if rank == 0:  # tried once on the CPU; loaded again for the table at the end
    check_rewards(rewards, eval_prompts, args.resolution, tasks=prompts)
    release_models()
for task, teacher in teachers.items():
    model.load_teacher(task, teacher["value"])
if anchor == "anchor":
    model.load_teacher("anchor", anchor_path)
if args.init == "merge" or args.compare:
    full = ", ".join(task for task in teachers if task in model.full)
    check(not full, f"--init merge, --compare: {full} is a full fine-tune; only LoRAs can be merged")
    loras = {}
    for task, teacher in teachers.items():
        loras[task] = read_lora(teacher["value"], model.transformer)
    total = sum(shares.values())
if args.init == "merge":
    model.add_adapter("student", merge_loras([(loras[task], shares[task] / total) for task in teachers]))
elif args.init == "none":
    model.new_adapter("student", args.rank, args.alpha, args.seed)
else:
    model.load_adapter("student", args.init)
for merge in args.compare:
    if merge == "sum":
        model.add_adapter(merge, merge_loras([(lora, 1.0) for lora in loras.values()]))
    else:
        model.add_adapter(merge, merge_ties(list(loras.values()), density=0.3, method=merge))
model.copy_adapter("student", "start")
model.copy_adapter("student", "ema")
params, ema = model.train_adapter("student"), model.adapters["ema"]
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
if args.compile:
    model.compile()
targets = [*teachers] + [anchor] * (anchor != "none")  # whose velocities the student is taught
guidance = {task: teacher["guidance"] for task, teacher in teachers.items()}
guidance[anchor] = anchor_options["guidance"]

# The schedule: a step is named by its t. Whatever sampled the states, the KL is that of the flow-SDE.
sigmas = training_sigmas(model.sigmas(args.num_steps, args.resolution))
gaussian = partial(transition, noise_level=args.noise_level, sde="flow")  # (x, v, t, t_next) -> mean, std
w = step_weights(sigmas, args.noise_level, "kl")  # {t: w(t)}
step_weight = step_weights(sigmas, args.noise_level, args.weighting)  # {t: what its distance counts}
label_count = min(args.label_steps or len(w), len(w))  # steps labelled in a rollout
samples, dimensions = args.batch_size * args.group_size, math.prod(shape)  # of a rollout here; of a latent
terms = world * samples * label_count * dimensions  # squared differences that one gradient sums

# What makes this run this run: --resume refuses a checkpoint where any of it differs.
files, settings = {"base": args.model}, {"guidance of each": guidance, "shares": shares}
(files if anchor == "anchor" else settings)["anchor"] = anchor_path  # "base" and "none" are no files
(settings if args.init in ("none", "merge") else files)["init"] = args.init
for task, teacher in teachers.items():
    files |= {f"prompts {task}": prompt_files[task], f"teacher {task}": teacher["value"]}
drawn = (4 + len(args.compare)) * sum(map(len, eval_prompts.values()))  # pictures of the table
first_step = run.begin(model, "student", optimizer, files, settings, drawn)
if rank == 0:
    if args.objective == "ppo-paper":
        print("note: the expected gradient of ppo-paper's reward is zero: it is here to be seen not to learn")
    print(
        f"student: {sum(p.numel() for p in params) / 1e6:.2f} M parameters, init {args.init}; teachers: "
        f"{', '.join(teachers)}; anchor: {args.anchor}; {samples * world} trajectories a rollout"
    )


def pick(step):
    """The (task, row) pairs of an update, a pure function of (seed, step): all processes', and this one's. A
    prompt's task decides its teacher. Processes take turns, so each has its part of every task."""
    picked = pick_prompts(prompts, shares, args.seed, step, args.batch_size * world, args.schedule)
    return picked, [pair for pair in picked[rank::world] for _ in range(args.group_size)]


def labelled_steps(step):
    """The times t of this rollout's labelled steps, a pure function of (seed, step): all, or --label-steps of
    them, drawn without repetition by the density of Beta(A, B) at their place in the schedule, from 0 (noise)
    to 1. Drawn uniformly, their mean loss is an unbiased estimate of the whole rollout's; other densities are
    not reweighted."""
    if label_count == len(w):
        return list(w)
    (a, b), n = args.label_density, len(w)
    place = (np.arange(n) + 0.5) / n
    density = place ** (a - 1) * (1 - place) ** (b - 1)
    rng = np.random.default_rng([args.seed, step, 1])
    drawn = rng.choice(n, label_count, replace=False, p=density / density.sum())
    return [sigmas[k] for k in sorted(drawn)]


def student_velocity(x, t, cond, labelled):
    """The student's guided velocity, with a graph where --objective kl learns from this step."""
    with torch.set_grad_enabled(args.objective == "kl" and t in labelled):
        return model.velocity(x, t, cond, "student", args.guidance)


@torch.no_grad()
def label(x, t, t_next, cond, tasks):
    """Ask each task's teacher, and the anchor, for their velocities at the states x: (v_teacher, v_anchor),
    data without a graph; v_anchor is None without MAR. tasks: {task: its rows}, see by_task. With
    --teacher-substeps, the mean velocities of so many of their steps on the way to t_next."""

    def ask(name, rows):
        velocity = partial(model.velocity, cond=take_rows(cond, rows), adapter=name, guidance=guidance[name])
        return mean_velocity(velocity, x[rows], t, t_next, args.teacher_substeps)

    v_teacher = torch.cat([ask(task, rows) for task, rows in tasks.items()])  # in the order of the batch
    return v_teacher, None if anchor == "none" else ask(anchor, slice(None))


def ppo_updates(memory, step):
    """The clipped policy gradient: walk the stored trajectories again, once per update. The gradients' norms;
    None if the run is to stop, and then there was no update."""
    before, norms = run.now(), []
    for k in range(args.updates_per_rollout):
        for x, t, t_next, x_next, old, advantage, v_anchor, cond in memory:
            if run.interrupted():
                break
            v = model.velocity(x, t, cond, "student", args.guidance)
            mean, std = gaussian(x, v, t, t_next)
            loss = clipped_surrogate(log_prob(x_next, mean, std) - old, advantage, args.clip_range)
            if v_anchor is not None:
                loss = loss + args.anchor_weight * w[t] * velocity_distance(v, v_anchor)
            (loss.sum() * step_weight[t] / w[t] * dimensions).backward()
        if run.stopping():
            run.back_to(before)
            return None
        norms.append(descend(optimizer, params, terms))
        update_average(ema, params, args.ema, step * args.updates_per_rollout + k + 1)
    return norms


def culprit(velocity_sums):
    """Who is not finite at the first step where someone is. velocity_sums: (targets and student, steps)."""
    for sums in reduce_sum(velocity_sums).T.tolist():
        broken = [name for name, value in zip([*targets, "student"], sums) if not math.isfinite(value)]
        names = [f"the teacher of {name}" if name in teachers else f"the {name}" for name in broken]
        if names:
            return " and ".join(names)
    return "the student's gradient"


columns = max(1, 8 // len(prompts))  # of the grid, for each task
grid_rows = [(task, row) for task, rows in (eval_prompts or prompts).items() for row in rows[:columns]][:16]
shown = {"base": "base"} | {merge: merge for merge in args.compare} | {"start": "start", "student": "ema"}
drawn_before = {}  # rows of the grid that do not change


def draw_grid():
    """samples.png: the same prompts and noise for base, merges, start, student, and each task's teacher."""
    rows = {}
    for name, adapter in shown.items():
        rows[name] = [(adapter, args.guidance)] * len(grid_rows)
    rows["teachers"] = [(task, guidance[task]) for task, _ in grid_rows]
    texts = [row["prompt"] for _, row in grid_rows]
    drawn = draw_rows(run, {name: row for name, row in rows.items() if name not in drawn_before}, texts)
    if drawn:
        pictures = drawn_before | drawn
        drawn_before.update({name: row for name, row in drawn.items() if name != "student"})
        run.draw("samples", save_grid, {name: pictures[name] for name in rows}, texts)


# -- the loop ------------------------------------------------------------------------------------------------
progress = tqdm(initial=first_step, total=args.steps, disable=rank != 0, mininterval=1)
for step in range(first_step, args.steps):
    began = time.perf_counter()

    # pick
    picked, batch = pick(step)
    numbers = np.arange(len(picked) * args.group_size).reshape(-1, args.group_size)[rank::world].flatten()
    gens = generators(args.seed, step, numbers)
    conds = model.encode_update(batch, step, pick)
    labelled = labelled_steps(step)
    memory = []  # ppo only: what is learnt when the rollout is done
    distances = torch.zeros(len(targets), label_count, device=device)  # for the log
    velocity_sums = torch.zeros(len(targets) + 1, label_count, device=device)  # to see who is not finite

    for i in range(0, samples, args.micro_batch_size):
        part = slice(i, i + args.micro_batch_size)
        first, end = i // args.group_size, math.ceil((i + args.micro_batch_size) / args.group_size)
        everyones = picked[first * world : end * world]  # what all processes have in this micro-batch
        tasks, cond = by_task(batch[part], everyones), take_rows(conds, part)
        draw = partial(randn, gens[part], shape, device)

        # act: the student samples its own trajectory
        student = partial(student_velocity, cond=cond, labelled=labelled)
        trajectory = rollout(student, draw(), sigmas, args.noise_level, args.sde, draw)
        for x, v, t, t_next, x_next, old in trajectory:
            if run.interrupted():
                break
            if t not in labelled:
                continue
            # label: what teacher and anchor would do at the state visited
            v_teacher, v_anchor = label(x, t, t_next, cond, tasks)
            # learn: KL + lambda MAR, each a weighted distance of velocities. Parameters change only in
            # descend(), so going backward step by step adds up to the gradient of the whole rollout: no
            # stored trajectory, no second student forward. Losses are sums; descend() divides, in float32
            distance = velocity_distance(v, v_teacher)  # (B,)
            anchor_distance = torch.zeros_like(distance)
            if v_anchor is not None:
                anchor_distance = velocity_distance(v, v_anchor)
            if args.objective == "kl":
                loss = step_weight[t] * (distance + args.anchor_weight * anchor_distance)
                (loss.sum() * dimensions).backward()
            else:
                mean_teacher, std = gaussian(x, v_teacher, t, t_next)
                log_ratio = log_prob(x_next, mean_teacher, std) - old  # its mean over actions is -KL
                kl = w[t] * distance
                advantage = log_ratio + kl if args.objective == "ppo" else -kl
                memory.append((x, t, t_next, x_next, old, advantage * dimensions, v_anchor, cond))
            k = labelled.index(t)
            for task, rows in tasks.items():
                distances[targets.index(task), k] += distance[rows].detach().sum()
                velocity_sums[targets.index(task), k] += v_teacher[rows].sum()
            if v_anchor is not None:
                distances[-1, k] += anchor_distance.detach().sum()
                velocity_sums[-2, k] += v_anchor.sum()
            velocity_sums[-1, k] += v.detach().sum()
            if t == labelled[-1]:  # where the rest of the trajectory leads is not asked
                break
    if run.stopping():  # all processes give up the rollout in hand; --resume auto makes it again
        run.save(step)
        break

    # update: clip, AdamW, moving average
    if args.objective == "kl":
        norms = [descend(optimizer, params, terms)]
        update_average(ema, params, args.ema, step + 1)
    else:
        norms = ppo_updates(memory, step)
        if norms is None:
            run.save(step)
            break

    # report: the distance to each teacher and the KL, w(t) times the distance, means over the labelled states
    reduce_sum(distances)
    w_labelled = torch.tensor([w[t] for t in labelled], device=device)
    record = {"step": step + 1}
    counts = collections.Counter(task for task, _ in picked)
    counts[anchor] = len(picked)
    for name, sums in zip(targets, distances):
        if counts[name]:
            states = counts[name] * args.group_size * label_count
            record[f"distance/{name}"] = sums.sum().item() / states
            record[f"kl/{name}"] = (sums * w_labelled).sum().item() / states
    if not all(map(math.isfinite, norms)):
        run.count_skipped(culprit(velocity_sums))
    else:
        run.skipped = 0
    record |= {"grad_norm": norms[-1], "seconds": time.perf_counter() - began}
    if device.type == "cuda":
        record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    last = step + 1 == args.steps
    now_and_then = last or (step + 1) % args.eval_every == 0
    if now_and_then:
        by_sigma = distances[: len(teachers)].sum(0) * w_labelled / (samples * world)
        record["kl_by_sigma"] = {f"{t:.3f}": value for t, value in zip(labelled, by_sigma.tolist())}
    run.report(record)
    progress.update()
    now = listing([f"{task} {record[f'distance/{task}']:.1e}" for task in teachers if counts[task]], 8)
    progress.set_postfix_str(f"distance to {now}")
    if step == 0 and rank == 0:
        progress.write(f"mean (v - v_teacher)^2 before the first update: {now}")
    if last or (step + 1) % args.save_every == 0:
        run.save(step + 1)
    if now_and_then and not last:
        run.draw("curves", plot_curves)
        draw_grid()
progress.close()

# -- the student and its table -------------------------------------------------------------------------------
if not run.stopping():
    draw_grid()
stopped, table = run.stopping(), None
run.draw("curves", plot_curves)
if rank == 0:
    save_lora(model.lora("ema"), os.path.join(args.out, "lora"), args)
if rewards and not stopped:
    run.stop.disarm()  # from here on Ctrl-C ends at once
    check_rewards(rewards, eval_prompts, args.resolution, device, prompts)  # loads them, before threads score
    where, total = (args, rank, world), (len(shown) + 1) * sum(map(len, eval_prompts.values())) // world
    own, results = {"model": "teachers, each on its own task", "scores": {}, "stderr": {}}, []
    with tqdm(total=total, disable=rank != 0, desc="evaluating", unit="picture", mininterval=1) as bar:
        for task, rows in eval_prompts.items():
            how = dict(guidance=guidance[task], tasks=teachers, progress=bar.update)
            found = evaluate(model, task, {task: rows}, rewards, *where, **how)
            for name, score in found["scores"].items():
                others = [other for other in teachers if other != task]
                if not any(name in rewards_of(other, rewards, teachers) for other in others):
                    own["scores"][name], own["stderr"][name] = score, found["stderr"][name]
        for name, adapter in shown.items():
            how = dict(guidance=args.guidance, tasks=teachers, progress=bar.update)
            results.append({"model": name} | evaluate(model, adapter, eval_prompts, rewards, *where, **how))
    results.append(own)
    base = results[0]["scores"]
    gaps = {name: score - base[name] for name, score in own["scores"].items() if score > base[name]}
    for row in results:  # the share of the gap from base to teacher that a model closes, mean of the tasks
        closed = [(row["scores"][name] - base[name]) / gap for name, gap in gaps.items()]
        if closed:
            row["scores"]["gap closed"] = sum(closed) / len(closed)
    if rank == 0:
        write_json(os.path.join(args.out, "results.json"), results)
        table = markdown(results)
        print(table)
if rank == 0 and not stopped:
    student_rank = max(len(A) for A, _, _ in model.lora("ema").values())
    write_card(os.path.join(args.out, "lora"), args, teachers, prompts, student_rank, table)
how = "stopped (--resume auto continues)" if stopped else "done"
run.end(f"{how}: {args.out}/lora (also log.jsonl, curves.png, samples.png, checkpoints/)")
