"""Stage 2 of Flow-OPD: where the student starts.

    python cold_start.py merge       # the weighted average of the teachers' weight changes; no model is loaded  (a second)
    python cold_start.py sft         # off-policy distillation: the student learns on trajectories the teachers sample
    torchrun --nproc_per_node=8 cold_start.py sft --model stabilityai/stable-diffusion-3.5-medium \\
        --teachers ocr=jieliu/SD3.5M-FlowGRPO-Text --prompts ocr=ocr.txt

merge: a LoRA changes a weight by alpha/r B A, and it is these changes that are averaged. `--method cat` is exact (ranks add up),
`svd` the best approximation at --rank, `factors` the average of the A's and of the B's, kept to be seen. sft: the loss is distill.py's without
MAR; what differs is who walks. Here each teacher walks, on its own task's prompts, so the student never learns what to do where only it would go.
"""

import argparse
import json
import math
import os
import time

import torch
from tqdm import tqdm

from flow_sde import (
    WEIGHTINGS,
    StopSignal,
    clear_folder,
    die,
    end_processes,
    generators,
    kl,
    learnt,
    listing,
    load_model,
    load_prompts,
    merge_loras,
    own_folder,
    parse_args,
    parse_specs,
    pick_prompts,
    plot_curves,
    randn,
    read_lora,
    reduce_gradients,
    reduce_sum,
    refuse_given,
    resume_checkpoint,
    rollout,
    run_identity,
    save_checkpoint,
    save_lora,
    skeleton,
    start_processes,
    start_run,
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
    prompts=[f"{t}=toy/prompts/{t}_train.txt" for t in TASKS],
    teachers=["compose=toy/teachers/compose,weight=2", "ocr=toy/teachers/ocr", "scene=toy/teachers/scene"],
    resolution=32,
    dtype="float32",
    guidance=1.0,
    batch_size=48,
    micro_batch_size=48,
    steps=100,
    lr=2e-3,
    ema=0.7,
    rank=16,
    alpha=32,
    save_every=20,
)

# -- flags ---------------------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add(
    "mode",
    nargs="?",
    choices=["merge", "sft"],
    default="merge",
    help="average the teachers, or learn from their trajectories",
)
add(
    "--model",
    help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it",
)
add(
    "--teachers",
    nargs="+",
    metavar="TASK=LORA[,guidance=G][,weight=W]",
    help="one teacher a task; weight: its share of the merge or of the prompts",
)
add("--out", help="folder of the run (default: out/merge or out/sft)")
add("--rank", type=int, default=32, help="of the student LoRA, for sft and --method svd (paper: 32)")
add = parser.add_argument_group("merge").add_argument
add(
    "--method",
    choices=["cat", "svd", "factors"],
    default="cat",
    help="exact, ranks add up; the best approximation at --rank; or the mean A and the mean B, which is neither (the released code's)",
)
add = parser.add_argument_group("sft").add_argument
add(
    "--prompts",
    nargs="+",
    metavar="TASK=FILE",
    help="every teacher's prompts (.txt, .jsonl, .json, .csv, .tsv)",
)
add("--init", help="LoRA to start from (default: an untrained one)")
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps (paper: 10)")
add("--guidance", type=float, help="of student and teachers without their own (paper: 4.5)")
add("--sde", choices=["flow", "cps", "ode"], default="flow", help="how the teachers sample")
add("--noise-level", type=float, default=0.7, help="a of the sampler (paper: 0.7)")
add = parser.add_argument_group("sft, learning").add_argument
add(
    "--weighting",
    choices=WEIGHTINGS,
    default="uniform",
    help="of the steps' velocity distances, as in distill.py",
)
add("--batch-size", type=int, default=8, help="prompts per process and update")
add("--micro-batch-size", type=int, help="samples per forward, for speed alone (default: what fits, to 16)")
add("--steps", type=int, default=1000, help="updates")
add("--lr", type=float, default=1e-4, help="AdamW learning rate")
add("--alpha", type=float, default=64, help="of the student LoRA (paper: 64)")
add("--ema", type=float, default=0.9, help="decay of the averaged LoRA per 8 updates (paper: 0.9)")
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
add("--save-every", type=int, default=50, help="updates between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="go on from the last checkpoint in --out, or from DIR")
add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker")
args = parse_args(parser, TOY)
out = args.out or os.path.join("out", args.mode)

if not args.teachers:
    die("--model needs --teachers TASK=LORA with it")
teachers = parse_specs("--teachers", args.teachers, guidance=args.guidance, weight=1.0)
if taken := teachers.keys() & {"base", "student", "ema"}:
    die(f"--teachers {taken.pop()}: that name is taken; call the task something else")

# -- merge ---------------------------------------------------------------------------------------------------------------
if args.mode == "merge":
    if args.method != "svd":
        refuse_given(parser, ("rank",), f"--method {args.method} has its own rank")
    own_folder(out, overwrite=args.overwrite)
    base = skeleton(args.model)
    loras = [(read_lora(s["value"], *base), s["weight"]) for s in teachers.values()]
    exact = merge_loras(loras)
    merged = truncate_lora(exact, args.rank) if args.method == "svd" else exact
    if (
        args.method == "factors"
    ):  # 1/K^2 of each product B A, and cross terms of one teacher's B with another's A
        if odd := [
            n
            for n in exact
            if len({(len(lora[n][0]), lora[n][2]) if n in lora else None for lora, _ in loras}) > 1
        ]:
            die(
                f"--method factors: these LoRAs differ in layers, rank or alpha, so their factors have no average: {listing(odd)}"
            )
        mean = lambda n, k: sum(w * lora[n][k] for lora, w in loras) / sum(w for _, w in loras)
        merged = {n: (mean(n, 0), mean(n, 1), loras[0][0][n][2]) for n in exact}
    delta = lambda lora, n: lora[n][2] / len(lora[n][0]) * lora[n][1].double() @ lora[n][0].double()
    error, size, total = 0.0, 0.0, sum(w for _, w in loras)
    for n in exact:
        average = sum(w / total * delta(lora, n) for lora, w in loras if n in lora)
        error += (delta(merged, n) - average).square().sum().item()
        size += average.square().sum().item()
    error, size = math.sqrt(error), math.sqrt(size)
    if size == 0:
        die("--teachers: the average of these LoRAs changes nothing; are they untrained?")
    if args.overwrite:
        clear_folder(out)
    save_lora(merged, os.path.join(out, "lora"))
    write_json(
        os.path.join(out, "results.json"),
        {
            "method": args.method,
            "relative_error": error / size,
            "teachers": list(teachers),
            "rank": max(len(A) for A, _, _ in merged.values()),
        },
    )
    print(
        f"merged {', '.join(teachers)} by {args.method} into rank {max(len(A) for A, _, _ in merged.values())}; relative Frobenius "
        f"error {error / size:.1e}: {out}/lora"
    )
    raise SystemExit

# -- sft: prompts, devices, models ------------------------------------------------------------------------------------------
prompt_files = parse_specs("--prompts", args.prompts)
if prompt_files.keys() != teachers.keys():
    die(
        f"--teachers has {', '.join(teachers)}, but --prompts has {', '.join(prompt_files) or 'nothing'}: every task needs both"
    )
prompts = {task: load_prompts(task, prompt_files[task]["value"]) for task in teachers}
if args.num_steps < 2:
    die(f"--num-steps {args.num_steps}: must be at least 2, since the last step may not be learnt")
if args.noise_level == 0:
    die("--noise-level 0: must be positive (for deterministic trajectories: --sde ode)")
if args.init:
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")
accelerator = start_processes(args.track, out)
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
init = own_folder(out, accelerator, args.resume, args.overwrite, args.init)
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
model.note_long(row["prompt"] for rows in prompts.values() for row in rows)
for task, spec in teachers.items():
    model.load_teacher(task, spec["value"])
if init:
    model.load_adapter("student", init)
else:
    model.new_adapter("student", args.rank, args.alpha, args.seed)
model.copy_adapter("student", "ema")
params, ema = model.train_adapter("student"), list(model.weights("ema").values())
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
sigmas = learnt(model.sigmas(args.num_steps, args.resolution))
transitions = len(sigmas) - 1
if args.compile:
    model.compile()
micro = args.micro_batch_size or what_fits(model, args.batch_size, shape, args.guidance)
kl_sde = args.sde if args.sde == "cps" and sigmas[-1] > 0 else "flow"  # as in distill.py
scale = step_weights(list(zip(sigmas, sigmas[1:])), args.noise_level, kl_sde, args.weighting)
weights = {task: spec["weight"] for task, spec in teachers.items()}
files = {
    "base": args.model,
    "init": init,
    **{f"prompts {task}": s["value"] for task, s in prompt_files.items()},
    **{f"teacher {task}": s["value"] for task, s in teachers.items()},
}
identity = run_identity(args, world, files) | {
    f"teacher {task}'s guidance and weight": [s["guidance"], s["weight"]] for task, s in teachers.items()
}
start = resume_checkpoint(args.resume, out, args.steps, model, "student", optimizer, identity)
log = start_run(out, start, args) if rank == 0 else None
if args.track:
    accelerator.init_trackers(
        "flow-opd", config={k: str(v) for k, v in vars(args).items()}, init_kwargs={"wandb": {"dir": out}}
    )
stop, stopping = StopSignal(), False

# -- sft: the loop ------------------------------------------------------------------------------------------------------------
progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank != 0, mininterval=1)
for step in progress:
    began = time.time()
    batch = pick_prompts(prompts, weights, args.seed, step, args.batch_size * world)[
        rank * args.batch_size : (rank + 1) * args.batch_size
    ]
    gens = generators(args.seed, step, range(rank * args.batch_size, (rank + 1) * args.batch_size))
    kl_sum = torch.zeros((), device=device)
    conds = model.encode([row["prompt"] for _, row in batch])
    for i in range(0, args.batch_size, micro):
        if stop.name:
            break
        rows, g = batch[i : i + micro], gens[i : i + micro]
        tasks, cond = [task for task, _ in rows], [c[i : i + micro] for c in conds]
        draw = lambda: randn(g, shape, device)

        def teacher(x, t):  # the teacher walks, each on its own task's prompts
            with torch.no_grad():
                return model.velocity(x, t, cond, tasks, [teachers[task]["guidance"] for task in tasks])

        for x, v_teacher, t, t_next, _, _ in rollout(
            teacher, draw(), sigmas, args.noise_level, args.sde, draw
        ):
            mean_teacher, std = transition(x, v_teacher, t, t_next, args.noise_level, kl_sde)
            v = model.velocity(x, t, cond, "student", args.guidance)
            loss = kl(transition(x, v, t, t_next, args.noise_level, kl_sde)[0], mean_teacher, std)  # (B,)
            (loss.sum() * scale[t] * x[0].numel()).backward()
            kl_sum += loss.detach().sum()
    if stopping := stop.arrived(device):  # the update in hand is given up
        break
    reduce_gradients(params, world * args.batch_size * transitions * math.prod(shape))
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    if not math.isfinite(norm):
        die(
            f"step {step + 1}: the loss on {', '.join(sorted({task for task, _ in batch}))} is not finite; checkpoints in {out} are as they were. "
            "Try a smaller --lr or another --dtype"
        )
    optimizer.step()
    optimizer.zero_grad()
    update_average(ema, params, args.ema, step + 1)
    record = {
        "step": step + 1,
        "kl": reduce_sum(kl_sum).item() / (args.batch_size * world * transitions),
        "grad_norm": norm,
        "seconds": time.time() - began,
    }
    last = step + 1 == args.steps
    if args.track:
        accelerator.log(record, step=step + 1)
    if rank == 0:
        log.write(json.dumps(record) + "\n"), log.flush()
        progress.set_postfix(kl=f"{record['kl']:.1e}")
        if (step + 1) % args.save_every == 0 or last:
            save_checkpoint(out, step + 1, model, "student", optimizer, identity, args.keep)
            plot_curves(out)
if rank == 0:
    if stopping and step > 0:
        save_checkpoint(out, step, model, "student", optimizer, identity, args.keep)
    save_lora(model.lora("ema"), os.path.join(out, "lora"))
    print(
        f"{'stopped (--resume auto goes on)' if stopping else 'done'}: {out}/lora (also log.jsonl, curves.png, checkpoints/)"
    )
end_processes(accelerator)
