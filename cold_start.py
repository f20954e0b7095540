"""Stage 2 of Flow-OPD: where the student starts.

    python cold_start.py merge       # the weighted average of the teachers' weight changes (a second)
    python cold_start.py sft         # off-policy: the student learns on trajectories the teachers sample
    torchrun --nproc_per_node=8 cold_start.py sft --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers ocr=jieliu/SD3.5M-FlowGRPO-Text --prompts ocr=ocr.txt

merge: a LoRA changes a weight by alpha/r B A, and it is these changes that are averaged; no model is loaded.
`--method cat` is exact (ranks add up), `svd` the best approximation at --rank, `factors` the average of the
A's and of the B's, as in the released code, kept for comparison. sft: the loss is distill.py's without MAR;
what differs is who samples. Here each teacher samples, on its own task's prompts, so the student never learns
what to do where only it would go.
"""

import argparse
import itertools
import math
import os
import time
from functools import partial

import torch
from tqdm import tqdm

# isort: off
from flow_sde import WEIGHTINGS, generators, mean_velocity, randn, rollout, step_weights, training_sigmas
from flow_sde import update_average, velocity_distance
from flow_sde import by_task, load_model, merge_loras, merge_ties, read_lora, save_lora, skeleton, take_rows
from flow_sde import TOY_DIR, Run, check, claim_folder, descend, load_prompts, parse_args
from flow_sde import parse_specs, parse_tasks, pick_prompts, plot_curves, reduce_sum, refuse_given, write_json
# isort: on

TASKS = ("compose", "ocr", "scene")
TOY = dict(
    model=f"{TOY_DIR}/base",
    teachers=[f"{task}={TOY_DIR}/teachers/{task}" for task in TASKS],
    prompts=[f"{task}={TOY_DIR}/prompts/{task}_train.txt" for task in TASKS],
    resolution=32,
    guidance=1.0,
    dtype="float32",
    batch_size=48,
    micro_batch_size=48,
    steps=100,
    lr=2e-3,
    rank=16,
    alpha=32,
    ema=0.7,
    save_every=20,
)

LORAS = "or @FILE, one a line; [FULL+]LORA[,scale=S][,text=0][+LORA...][,guidance=G][,weight=W], or base"
# -- flags (the evidence for the defaults: experiments/README.md) --------------------------------------------
parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars="@")
add = parser.add_argument_group("what").add_argument
add("mode", nargs="?", choices=["merge", "sft"], default="merge", help="average, or learn from, the teachers")
add("--model", help="diffusers folder or hub id of the base; without it, the toy and its settings")
add("--teachers", nargs="+", metavar="TASK=LORA", help=LORAS)
add("--out", help="folder of the run (default: out/merge or out/sft)")
add = parser.add_argument_group("merge").add_argument
METHODS = ["cat", "svd", "factors", "ties", "dare_ties"]
add("--method", choices=METHODS, default="cat", help="average, exact or by SVD at --rank or of factors; TIES")
add("--scale", type=float, default=1, help="times that; the number of teachers makes an average their sum")
add("--density", type=float, default=0.3, help="of ties and dare_ties: the share of entries kept")
add("--rank", type=int, default=32, help="of svd, and of sft's untrained LoRA (paper: 32)")
add = parser.add_argument_group("sft").add_argument
add("--prompts", nargs="+", metavar="TASK=FILE", help="every task's prompts (.txt or .jsonl)")
add("--init", help="LoRA to start from (default: an untrained one)")
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps (paper: 10)")
add("--guidance", type=float, help="of student and teachers without their own (paper: 4.5)")
add("--sde", choices=["flow", "cps", "ode"], default="flow", help="how the teachers sample (KL: of flow)")
add("--noise-level", type=float, default=0.7, help="a of the SDE (paper: 0.7)")
add("--teacher-substeps", type=int, default=1, help="teacher steps per student step, for few-step students")
add = parser.add_argument_group("sft, learning").add_argument
add("--weighting", choices=WEIGHTINGS, default="uniform", help="of the steps (paper: kl)")
add("--batch-size", type=int, default=8, help="prompts per process and update")
add("--micro-batch-size", type=int, default=8, help="samples per forward: memory and speed only")
add("--steps", type=int, default=1000, help="updates")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add("--alpha", type=float, default=64, help="of an untrained LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("sft, running").add_argument
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--quantize", choices=["int8", "nf4"], help="of large frozen weights: 1 or 0.56 bytes each, less exact")
add("--shard", action="store_true", help="spread what is frozen over the processes (FSDP): slower")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="in CPU memory except while they encode")
add("--gradient-checkpointing", action="store_true", help="the same gradients, less memory, more time")
add("--compile", action="store_true", help="torch.compile: slow at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of everything drawn")
add("--save-every", type=int, default=50, help="updates between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="continue from the last checkpoint in --out, or from DIR")
add("--dry-run", action="store_true", help="a few updates, what the run will take, and nothing is written")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker, curves too")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
out = args.out or os.path.join("out", args.mode)
if args.mode == "merge":
    own = {"mode", "model", "teachers", "out", "method", "rank", "scale", "density"}
    refuse_given(parser, sorted(parser.given - own), "only for sft")
    check(args.teachers, "--model needs --teachers TASK=LORA with it")
    teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
    if args.method != "svd":
        refuse_given(parser, ("rank",), f"--method {args.method} has its own rank")
    if "ties" not in args.method:
        refuse_given(parser, ("density",), "only for --method ties and dare_ties")
    check(0 < args.density <= 1, f"--density {args.density}: must be above 0 and at most 1")
else:
    refuse_given(parser, ("method", "scale", "density"), "only for merge")
    teachers, prompt_files = parse_tasks(args, guidance=args.guidance, weight=1.0)
    if args.init:
        refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
    prompts = {task: load_prompts(task, file) for task, file in prompt_files.items()}
total = sum(teacher["weight"] for teacher in teachers.values())
# Of the prompts, and of the merge
shares = {task: teacher["weight"] / total for task, teacher in teachers.items()}


# -- merge ---------------------------------------------------------------------------------------------------
def truncated(lora, rank):
    """The best approximation of every module's delta at a lower rank (SVD), in the same form."""
    found = {}
    for n, (A, B, alpha) in lora.items():
        Qb, Rb = torch.linalg.qr(B.double())
        Qa, Ra = torch.linalg.qr(A.double().T)  # B A = Qb (Rb Ra^T) Qa^T
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T * (alpha / len(A)))
        root = S[:rank].sqrt()
        found[n] = (root[:, None] * (Vh[:rank] @ Qa.T)).float(), (Qb @ U[:, :rank] * root).float(), len(root)
    return found


def average_factors(loras):
    """The weighted mean of the A's and that of the B's: 1/K^2 of each product B A, and cross terms of one
    teacher's B with another's A. loras: [({module: (A, B, alpha)}, share), ...]."""
    merged, [(first, _), *_] = {}, loras
    for n in dict.fromkeys(n for lora, _ in loras for n in lora):
        kinds = {(len(lora[n][0]), lora[n][2]) if n in lora else None for lora, _ in loras}
        check(len(kinds) == 1, f"--method factors: these LoRAs differ in layers, rank or alpha: {n}")
        A = sum(share * lora[n][0] for lora, share in loras)
        B = sum(share * lora[n][1] for lora, share in loras)
        merged[n] = A, B, first[n][2]
    return merged


def delta(lora, n):
    """What a LoRA adds to a module's weight."""
    A, B, alpha = lora[n]
    return alpha / len(A) * B.double() @ A.double()


def merge():
    claim_folder(out)
    network = skeleton(args.model)
    loras = [(read_lora(teachers[task]["value"], network), share) for task, share in shares.items()]
    exact = merge_loras(loras)
    merged = exact
    if args.method == "svd":
        merged = truncated(exact, args.rank)
    elif args.method == "factors":
        merged = average_factors(loras)
    elif args.method != "cat":
        merged = merge_ties([lora for lora, _ in loras], args.density, args.method)
    error = sum((delta(merged, n) - delta(exact, n)).square().sum().item() for n in exact)
    size = sum(delta(exact, n).square().sum().item() for n in exact)
    check(size > 0, "--teachers: the average of these LoRAs changes nothing; are they untrained?")
    error, rank = math.sqrt(error / size), max(len(A) for A, _, _ in merged.values())
    if args.scale != 1:
        merged = merge_loras([(merged, args.scale)])
    save_lora(merged, os.path.join(out, "lora"))
    about = {"method": args.method, "scale": args.scale, "teachers": list(teachers), "rank": rank}
    about["relative_error"] = error  # against the exact average, before the scale, in the Frobenius norm
    write_json(os.path.join(out, "results.json"), about)
    result = f"rank {rank}; {error:.1e} of its norm from the exact average: {out}/lora"
    print(f"merged {', '.join(teachers)} by {args.method} into {result}")


if args.mode == "merge":
    merge()
    raise SystemExit

# -- sft: devices and models: one frozen base, everyone else an adapter on it --------------------------------
run = Run(args, out)
rank, world, device = run.rank, run.world, run.device
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
for task, teacher in teachers.items():
    model.load_teacher(task, teacher["value"])
if args.init:
    model.load_adapter("student", args.init)
else:
    model.new_adapter("student", args.rank, args.alpha, args.seed)
model.copy_adapter("student", "ema")
params, ema = model.train_adapter("student"), model.adapters["ema"]
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
if args.compile:
    model.compile()
guidance = {task: teacher["guidance"] for task, teacher in teachers.items()}

# The schedule: a step is named by its t. Whatever sampled the states, the KL is that of the flow-SDE.
sigmas = training_sigmas(model.sigmas(args.num_steps, args.resolution))
w = step_weights(sigmas, args.noise_level, "kl")  # {t: w(t)}
step_weight = step_weights(sigmas, args.noise_level, args.weighting)  # {t: what its distance counts}
following = dict(itertools.pairwise(sigmas))  # {t: t_next}
samples, dimensions = args.batch_size, math.prod(shape)  # of a rollout here; of a latent
terms = world * samples * len(w) * dimensions  # of a gradient

# What makes this run this run: --resume refuses a checkpoint where any of it differs.
files, settings = {"base": args.model, "init": args.init}, {"guidance of each": guidance, "shares": shares}
for task, teacher in teachers.items():
    files |= {f"prompts {task}": prompt_files[task], f"teacher {task}": teacher["value"]}
first_step = run.begin(model, "student", optimizer, files, settings)
if rank == 0:
    size = sum(p.numel() for p in params) / 1e6
    print(f"student: {size:.2f} M parameters; teachers: {', '.join(teachers)}")


@torch.no_grad()
def teacher_velocity(x, t, cond, tasks):
    """The guided velocity of each sample's own teacher; with --teacher-substeps, its mean velocity to the
    next t. tasks: {task: its rows}, see by_task."""
    answers = []
    for task, rows in tasks.items():
        velocity = partial(model.velocity, cond=take_rows(cond, rows), adapter=task, guidance=guidance[task])
        answers.append(mean_velocity(velocity, x[rows], t, following[t], args.teacher_substeps))
    return torch.cat(answers)


def pick(step):
    """The (task, row) pairs of an update, a pure function of (seed, step): all processes', and this one's. A
    prompt's task decides its teacher. Processes take turns, so each has its part of every task."""
    picked = pick_prompts(prompts, shares, args.seed, step, samples * world)
    return picked, picked[rank::world]


# -- sft: the loop -------------------------------------------------------------------------------------------
progress = tqdm(initial=first_step, total=args.steps, disable=rank != 0, mininterval=1)
for step in range(first_step, args.steps):
    began = time.perf_counter()

    picked, batch = pick(step)
    gens = generators(args.seed, step, range(rank, len(picked), world))
    conds = model.encode_update(batch, step, pick)
    distance_sum = kl_sum = torch.zeros((), device=device)

    for i in range(0, samples, args.micro_batch_size):
        part = slice(i, i + args.micro_batch_size)
        everyones = picked[i * world : part.stop * world]  # what all processes have in this micro-batch
        tasks, cond = by_task(batch[part], everyones), take_rows(conds, part)
        draw = partial(randn, gens[part], shape, device)

        # act: the teacher samples the trajectory; learn: the student's distance to it at every state
        teacher = partial(teacher_velocity, cond=cond, tasks=tasks)
        for x, v_teacher, t, *_ in rollout(teacher, draw(), sigmas, args.noise_level, args.sde, draw):
            if run.interrupted():
                break
            v = model.velocity(x, t, cond, "student", args.guidance)
            distance = velocity_distance(v, v_teacher)  # (B,)
            (step_weight[t] * distance.sum() * dimensions).backward()
            distance_sum = distance_sum + distance.detach().sum()
            kl_sum = kl_sum + w[t] * distance.detach().sum()
    if run.stopping():  # all processes give up the update in hand; --resume auto makes it again
        run.save(step)
        break

    # update: clip, AdamW, moving average
    norm = descend(optimizer, params, terms)
    if not math.isfinite(norm):
        run.count_skipped(f"the loss on {', '.join(teachers)}")
    else:
        run.skipped = 0
    update_average(ema, params, args.ema, step + 1)

    # report
    states = world * samples * len(w)
    distance, kl = (reduce_sum(total).item() / states for total in (distance_sum, kl_sum))
    record = {"step": step + 1, "distance": distance, "kl": kl, "grad_norm": norm}
    run.report(record | {"seconds": time.perf_counter() - began})
    progress.update()
    progress.set_postfix(distance=f"{distance:.1e}")
    if step + 1 == args.steps or (step + 1) % args.save_every == 0:
        run.save(step + 1)
        run.draw("curves", plot_curves)
progress.close()

# -- the end -------------------------------------------------------------------------------------------------
if rank == 0:
    save_lora(model.lora("ema"), os.path.join(out, "lora"), args)
how = "stopped (--resume auto continues)" if run.stopping() else "done"
run.end(f"{how}: {out}/lora (also log.jsonl, curves.png, checkpoints/)")
