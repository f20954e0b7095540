"""Stage 2 of Flow-OPD: where the student starts.

    python cold_start.py merge       # the weighted average of the teachers' weight changes (a second)
    python cold_start.py sft         # off-policy: the student learns on trajectories the teachers sample
    torchrun --nproc_per_node=8 cold_start.py sft --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers ocr=jieliu/SD3.5M-FlowGRPO-Text --prompts ocr=ocr.txt

merge: a LoRA changes a weight by alpha/r B A, and it is these changes that are averaged; no model is loaded.
`--method cat` is exact (ranks add up), `svd` the best approximation at --rank, `factors` the average of the
A's and of the B's, as in the released code, kept to be seen. sft: the loss is distill.py's without MAR; what
differs is who walks. Here each teacher walks, on its own task's prompts, so the student never learns what to
do where only it would go.
"""

import argparse
import math
import os
import time
from functools import partial

import torch
from tqdm import tqdm

from flow_sde import (
    MORE_FINITE,
    WEIGHTINGS,
    Run,
    check,
    claim_folder,
    clear_folder,
    descend,
    die,
    generators,
    kl,
    learnt,
    load_model,
    load_prompts,
    merge_loras,
    parse_args,
    parse_specs,
    pick_prompts,
    plot_curves,
    randn,
    read_lora,
    reduce_sum,
    refuse_given,
    rollout,
    save_lora,
    skeleton,
    step_weights,
    transition,
    truncate_lora,
    update_average,
    what_fits,
    write_json,
)

TASKS = ("compose", "ocr", "scene")
TOY = dict(
    model="toy/base",
    teachers=["compose=toy/teachers/compose,weight=2", "ocr=toy/teachers/ocr", "scene=toy/teachers/scene"],
    prompts=[f"{task}=toy/prompts/{task}_train.txt" for task in TASKS],
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

# -- flags (what speaks for a default: experiments/README.md) ------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__)
add = parser.add_argument_group("what").add_argument
add("mode", nargs="?", choices=["merge", "sft"], default="merge", help="average, or learn from, the teachers")
add("--model", help="diffusers folder or hub id of the base; leave it out for the toy and its settings")
add("--teachers", nargs="+", metavar="TASK=LORA[,guidance=G][,weight=W]", help="W: share of prompts, merge")
add("--out", help="folder of the run (default: out/merge or out/sft)")
add = parser.add_argument_group("merge").add_argument
add("--method", choices=["cat", "svd", "factors"], default="cat", help="exact; best at --rank; by factors")
add("--rank", type=int, default=32, help="of svd, and of sft's untrained LoRA (paper: 32)")
add = parser.add_argument_group("sft").add_argument
add("--prompts", nargs="+", metavar="TASK=FILE", help="every task's prompts (.txt .jsonl .json .csv .tsv)")
add("--init", help="LoRA to start from (default: an untrained one)")
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps (paper: 10)")
add("--guidance", type=float, help="of student and teachers without their own (paper: 4.5)")
add("--sde", choices=["flow", "cps", "ode"], default="flow", help="how the teachers sample (KL: of flow)")
add("--noise-level", type=float, default=0.7, help="a of the SDE (paper: 0.7)")
add = parser.add_argument_group("sft, learning").add_argument
add("--weighting", choices=WEIGHTINGS, default="uniform", help="of the steps (paper: kl)")
add("--batch-size", type=int, default=8, help="prompts per process and update")
add("--micro-batch-size", type=int, help="samples per forward, for speed alone (default: what fits, to 16)")
add("--steps", type=int, default=1000, help="updates")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add("--alpha", type=float, default=64, help="of an untrained LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
add = parser.add_argument_group("sft, running").add_argument
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is frozen; the rest is float32")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="on the CPU except while they encode")
add("--gradient-checkpointing", action="store_true", help="the same gradients, less memory, more time")
add("--compile", action="store_true", help="torch.compile: slow at first, then faster on a GPU")
add("--seed", type=int, default=0, help="of everything drawn")
add("--save-every", type=int, default=50, help="updates between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="go on from the last checkpoint in --out, or from DIR")
add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
out = args.out or os.path.join("out", args.mode)
check(args.teachers, "--model needs --teachers TASK=LORA with it")
teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
for task in teachers:
    check(task not in ("base", "student", "start", "ema", "anchor"), f"--teachers {task}: that name is taken")
shares = {task: teacher["weight"] for task, teacher in teachers.items()}  # of the prompts, of the merge


# -- merge ---------------------------------------------------------------------------------------------------
def average_factors(loras, total):
    """The weighted mean of the A's and that of the B's: 1/K^2 of each product B A, and cross terms of one
    teacher's B with another's A. loras: [({module: (A, B, alpha)}, weight), ...]."""
    merged, [(first, _), *_] = {}, loras
    for n in dict.fromkeys(n for lora, _ in loras for n in lora):
        kinds = {(len(lora[n][0]), lora[n][2]) if n in lora else None for lora, _ in loras}
        check(len(kinds) == 1, f"--method factors: these LoRAs differ in layers, rank or alpha: {n}")
        A = sum(weight * lora[n][0] for lora, weight in loras) / total
        B = sum(weight * lora[n][1] for lora, weight in loras) / total
        merged[n] = A, B, first[n][2]
    return merged


def delta(lora, n):
    """What a LoRA adds to a module's weight."""
    A, B, alpha = lora[n]
    return alpha / len(A) * B.double() @ A.double()


def merge():
    if args.method != "svd":
        refuse_given(parser, ("rank",), f"--method {args.method} has its own rank")
    claim_folder(out, overwrite=args.overwrite)
    network, pipeline = skeleton(args.model)
    loras = [(read_lora(teachers[task]["value"], network, pipeline), shares[task]) for task in teachers]
    total = sum(shares.values())
    exact = merge_loras(loras)
    merged = exact
    if args.method == "svd":
        merged = truncate_lora(exact, args.rank)
    elif args.method == "factors":
        merged = average_factors(loras, total)
    error, size = 0.0, 0.0
    for n in exact:
        average = sum(weight / total * delta(lora, n) for lora, weight in loras if n in lora)
        error += (delta(merged, n) - average).square().sum().item()
        size += average.square().sum().item()
    check(size > 0, "--teachers: the average of these LoRAs changes nothing; are they untrained?")
    error, rank = math.sqrt(error / size), max(len(A) for A, _, _ in merged.values())
    if args.overwrite:
        clear_folder(out)
    save_lora(merged, os.path.join(out, "lora"))
    about = {"method": args.method, "relative_error": error, "teachers": list(teachers), "rank": rank}
    write_json(os.path.join(out, "results.json"), about)
    result = f"rank {rank}; relative Frobenius error {error:.1e}: {out}/lora"
    print(f"merged {', '.join(teachers)} by {args.method} into {result}")


if args.mode == "merge":
    merge()
    raise SystemExit

# -- sft: checks ---------------------------------------------------------------------------------------------
prompt_files = parse_specs("--prompts", args.prompts)
same = prompt_files.keys() == teachers.keys()
has = ", ".join(prompt_files) or "nothing"
check(same, f"--teachers has {', '.join(teachers)}, but --prompts has {has}: every task needs both")
check(args.num_steps >= 2, f"--num-steps {args.num_steps}: must be at least 2; the last may not be learnt")
check(args.noise_level > 0, "--noise-level 0: must be positive (for deterministic trajectories: --sde ode)")
if args.init:
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
prompts = {task: load_prompts(task, prompt_files[task]["value"]) for task in teachers}

# -- sft: devices and models: one frozen base, everyone else an adapter on it --------------------------------
run = Run(args, out)
rank, world, device = run.rank, run.world, run.device
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
model.note_long(row["prompt"] for rows in prompts.values() for row in rows)
for task, teacher in teachers.items():
    model.load_teacher(task, teacher["value"])
if run.init:
    model.load_adapter("student", run.init)
else:
    model.new_adapter("student", args.rank, args.alpha, args.seed)
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
samples, dimensions = args.batch_size, math.prod(shape)  # of a rollout here; of a latent
terms = world * samples * len(learnt_steps) * dimensions  # of a gradient
micro = args.micro_batch_size or what_fits(model, samples, shape, args.guidance)  # samples per forward

# What makes this run this run: --resume refuses a checkpoint where any of it differs.
files, settings = {"base": args.model, "init": run.init}, {}
for task, teacher in teachers.items():
    files |= {f"prompts {task}": prompt_files[task]["value"], f"teacher {task}": teacher["value"]}
    settings[f"teacher {task}'s guidance and weight"] = [teacher["guidance"], teacher["weight"]]
first_step = run.begin(model, "student", optimizer, files, settings)
if rank == 0:
    print(
        f"student: {sum(p.numel() for p in params) / 1e6:.2f} M parameters; teachers: {', '.join(teachers)}; "
        f"{samples * world} trajectories a rollout, {min(micro, samples)} at once"
    )


def teacher_velocity(x, t, cond, tasks):
    """The guided velocity of each sample's own teacher."""
    with torch.no_grad():
        return model.velocity(x, t, cond, tasks, [teachers[task]["guidance"] for task in tasks])


# -- sft: the loop -------------------------------------------------------------------------------------------
stopping = False
steps = range(first_step, args.steps)
progress = tqdm(steps, initial=first_step, total=args.steps, disable=rank != 0, mininterval=1)
for step in progress:
    began = time.time()

    # pick: a prompt's task decides its teacher
    picked = pick_prompts(prompts, shares, args.seed, step, samples * world)
    batch = picked[rank * samples : (rank + 1) * samples]
    gens = generators(args.seed, step, range(rank * samples, (rank + 1) * samples))
    conds = model.encode([row["prompt"] for _, row in batch])
    kl_sum = torch.zeros((), device=device)

    for i in range(0, samples, micro):
        if run.stop.name:  # Ctrl-C or SIGTERM
            break
        part = slice(i, i + micro)
        tasks, cond = [task for task, _ in batch[part]], [c[part] for c in conds]
        draw = partial(randn, gens[part], shape, device)
        teacher = partial(teacher_velocity, cond=cond, tasks=tasks)

        # act: the teacher samples the trajectory; learn: the student's KL to it at every state
        trajectory = rollout(teacher, draw(), sigmas, args.noise_level, args.sde, draw)
        for x, v_teacher, t, t_next, _, _ in trajectory:
            mean_teacher, std = gaussian(x, v_teacher, t, t_next)
            v = model.velocity(x, t, cond, "student", args.guidance)
            mean, _ = gaussian(x, v, t, t_next)
            loss = kl(mean, mean_teacher, std)  # (B,)
            (loss.sum() * weight_at[t] * dimensions).backward()
            kl_sum += loss.detach().sum()

    stopping = run.stopping()  # any process was told to leave: all give up the update in hand
    if stopping:
        break

    # update: clip, AdamW, moving average
    norm = descend(optimizer, params, terms)
    if not math.isfinite(norm):
        names = ", ".join(sorted({task for task, _ in batch}))
        die(
            f"step {step + 1}: the loss on {names} is not finite; checkpoints in {out} are as they were: "
            f"{MORE_FINITE}"
        )
    update_average(ema, params, args.ema, step + 1)

    # report
    mean_kl = reduce_sum(kl_sum).item() / (world * samples * len(learnt_steps))
    run.report({"step": step + 1, "kl": mean_kl, "grad_norm": norm, "seconds": time.time() - began})
    progress.set_postfix(kl=f"{mean_kl:.1e}")
    if step + 1 == args.steps or (step + 1) % args.save_every == 0:
        run.save(step + 1)
        if rank == 0:
            plot_curves(out)

# -- what came of it -----------------------------------------------------------------------------------------
if rank == 0:
    if stopping:  # also before the first update, so that --resume auto does go on
        run.save(step)
    save_lora(model.lora("ema"), os.path.join(out, "lora"))
    how = "stopped (--resume auto goes on)" if stopping else "done"
    print(f"{how}: {out}/lora (also log.jsonl, curves.png, checkpoints/)")
run.end()
