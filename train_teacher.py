"""Stage 1 of Flow-OPD: make a teacher. Flow-GRPO (arXiv 2505.05470) on one reward: sample groups of pictures with the flow-SDE,
score them, and push the log-probability of every transition up or down by how its picture fared within its group. The base
model stays frozen; the teacher is a LoRA. With several rewards and prompt files this is the GRPO-Mix baseline instead: every
prompt is scored by its own task's reward (and by the task-agnostic ones), all in one run.

    python train_teacher.py                                                              # toy.compose on two CPU cores
    python train_teacher.py --reward toy.ocr --prompts ocr=toy/prompts/ocr_train.txt --eval-prompts ocr=toy/prompts/ocr_val.txt
    torchrun --nproc_per_node=8 train_teacher.py --model stabilityai/stable-diffusion-3.5-medium \\
        --reward jpeg --prompts jpeg=prompts.txt --out out/jpeg                          # SD3.5 on eight GPUs

Left out: full fine-tuning.
"""

import argparse
import json
import math
import os
import re
import time

import torch
from tqdm import tqdm

from flow_sde import (
    StopSignal,
    centred_log_ratio,
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
    say,
    start_processes,
    start_run,
    take_rows,
    to_device,
    transition,
    update_average,
    what_fits,
    write_json,
)
from rewards import (
    RewardError,
    Scorer,
    check_rewards,
    evaluate,
    markdown,
    parse_rewards,
    rewards_of,
    weighted_sum,
)

TOY = dict(
    model="toy/base",
    reward=["toy.compose"],
    prompts=["compose=toy/prompts/compose_train.txt"],
    eval_prompts=["compose=toy/prompts/compose_val.txt"],
    out="out/teacher",
    resolution=32,
    dtype="float32",
    guidance=1.0,
    eval_num_steps=10,
    batch_size=16,
    group_size=16,
    micro_batch_size=128,
    eval_batch_size=128,
    steps=120,
    lr=2e-3,
    rank=16,
    alpha=32,
    ema=0.7,
    same_noise=True,
    ratio_norm=True,
    sde_window=4,
    clip_range=5e-4,
    beta=0.04,
    eval_every=10,
    save_every=10,
)

# -- flags ---------------------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add(
    "--model",
    help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it",
)
add(
    "--reward",
    nargs="+",
    metavar="NAME=WEIGHT",
    help="one reward; several: a mix, and the GRPO-Mix baseline (python rewards.py: the list)",
)
add("--reward-option", nargs="+", metavar="NAME.KEY=VALUE", help="a reward's own settings")
add(
    "--prompts",
    nargs="+",
    metavar="TASK=FILE[,weight=W]",
    help="training prompts (.txt, .jsonl, .json, .csv, .tsv)",
)
add(
    "--eval-prompts",
    nargs="+",
    metavar="TASK=FILE",
    help="validation prompts: the LoRA that scores best on them is kept",
)
add("--init", help="LoRA to start from (default: an untrained one)")
add("--out", default="out/teacher", help="folder of the run")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=10, help="sampling steps while training (paper: 10)")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add(
    "--sde",
    choices=["flow", "cps"],
    default="flow",
    help="the stochastic sampler; cps: Flow-GRPO's log-probability leaves 1/(2 std^2) out, ours does not, so its clip ranges are others",
)
add("--noise-level", type=float, default=0.7, help="a of the sampler (paper: 0.7)")
add(
    "--sde-window",
    type=int,
    default=0,
    help="steps with noise and training, at random in the first half (Flow-GRPO-Fast: 2); 0: all",
)
add(
    "--same-noise",
    action=argparse.BooleanOptionalAction,
    help="a group's pictures start from the same noise, so they differ only by what is trained",
)
add = parser.add_argument_group("learning").add_argument
add("--batch-size", type=int, default=6, help="prompts per process and rollout")
add("--group-size", type=int, default=24, help="pictures per prompt (Flow-GRPO: 24)")
add("--micro-batch-size", type=int, help="samples per forward, for speed alone (default: what fits, to 16)")
add(
    "--updates-per-rollout",
    type=int,
    default=2,
    help="optimizer updates, each on its share of the samples (paper: 2)",
)
add("--steps", type=int, default=1000, help="rollouts")
add("--lr", type=float, default=3e-4, help="AdamW learning rate (paper: 3e-4, 1e-4 for mixes)")
add("--clip-range", type=float, default=1e-4, help="of the per-dimension probability ratio (paper: 1e-4)")
add(
    "--ratio-norm",
    action=argparse.BooleanOptionalAction,
    help="centred log-ratios over their step's scale: one clip range fits all steps (GRPO-Guard, arXiv 2510.22319)",
)
add(
    "--beta",
    type=float,
    default=0.009,
    help="weight of the KL to the base (paper: 0.04; its std is without sqrt(dt), which makes that 0.009 here)",
)
add(
    "--schedule",
    choices=["mixed", "alternate"],
    default="mixed",
    help="all tasks in every rollout, or whole rollouts in turn",
)
add("--rank", type=int, default=32, help="of the LoRA (paper: 32)")
add("--alpha", type=float, default=64, help="of the LoRA (paper: 64)")
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
add("--eval-every", type=int, default=50, help="rollouts between validations and grids")
add("--eval-num-steps", type=int, default=40, help="sampling steps of a validation (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward of a validation")
add("--save-every", type=int, default=50, help="rollouts between checkpoints")
add("--keep", type=int, default=2, help="checkpoints kept")
add("--resume", metavar="auto|DIR", help="go on from the last checkpoint in --out, or from DIR")
add("--overwrite", action="store_true", help="delete what an earlier run left in --out")
add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker")
args = parse_args(parser, TOY)

# -- prompts and rewards, checked before anything slow --------------------------------------------------------------------
if not args.reward or not args.prompts:
    die("--model needs --reward NAME and --prompts TASK=FILE with it")
rewards = parse_rewards(args.reward, args.reward_option)
prompt_specs = parse_specs("--prompts", args.prompts, weight=1.0)
prompts = {task: load_prompts(task, s["value"]) for task, s in prompt_specs.items()}
eval_specs = parse_specs("--eval-prompts", args.eval_prompts)
eval_prompts = {task: load_prompts(task, s["value"]) for task, s in eval_specs.items()}
if unknown := eval_prompts.keys() - prompts.keys():
    die(f"--eval-prompts {', '.join(unknown)}: not among the tasks of --prompts ({', '.join(prompts)})")
for task in prompts:
    if not rewards_of(task, rewards, prompts):
        die(f"--prompts {task}: no reward scores this task; --reward has {', '.join(rewards)}")
samples = args.batch_size * args.group_size  # per process
if args.group_size < 2 or samples % args.updates_per_rollout:
    die(
        f"--group-size {args.group_size} must be at least 2, and --batch-size x --group-size a multiple of --updates-per-rollout"
    )
if not 0 <= args.sde_window <= args.num_steps // 2:
    die(f"--sde-window {args.sde_window}: must lie in 0..{args.num_steps // 2}, half of --num-steps")
if args.schedule == "alternate" and any(s["weight"] % 1 for s in prompt_specs.values()):
    die("--schedule alternate: the weights of --prompts are numbers of rollouts, so they must be whole")
if args.num_steps < 2:
    die("--num-steps 1: the last step may not be trained, so there must be at least 2")
if args.noise_level <= 0:
    die(f"--noise-level {args.noise_level}: must be positive; without noise there is nothing to reinforce")
if args.init:
    refuse_given(parser, ("rank", "alpha"), f"--init {args.init} has its own")

# -- devices and models ---------------------------------------------------------------------------------------------------
accelerator = start_processes(args.track, args.out)
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
init = own_folder(args.out, accelerator, args.resume, args.overwrite, args.init)
model = load_model(args, device)
shape = model.latent_shape(args.resolution)
model.note_long(row["prompt"] for rows in (*prompts.values(), *eval_prompts.values()) for row in rows)
check_rewards(rewards, prompts, args.resolution, device)
check_rewards(rewards, eval_prompts, args.resolution, device, prompts)
if init:
    model.load_adapter("teacher", init)
else:
    model.new_adapter("teacher", args.rank, args.alpha, args.seed)
model.copy_adapter("teacher", "ema")
params, ema = model.train_adapter("teacher"), list(model.weights("ema").values())
optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4, fused=True)
sigmas = model.sigmas(args.num_steps, args.resolution)
trainable = len(learnt(sigmas)) - 1  # steps, those of them that have noise
if trainable == args.num_steps and args.sde == "flow" and not args.sde_window:
    say(
        f"note: noise of the last step, from t = {sigmas[-2]:.2f}, is left in the pictures that are scored; "
        "--sde cps and --sde-window leave none"
    )
if args.compile:
    model.compile()
micro = args.micro_batch_size or what_fits(model, samples, shape, args.guidance)  # samples per forward
if rank == 0:
    print(
        f"teacher: {sum(p.numel() for p in params) / 1e6:.2f} M parameters; "
        f"{samples * world} pictures a rollout, {micro} at once, "
        f"{' + '.join(rewards)} on {', '.join(f'{t} ({len(r)} prompts)' for t, r in prompts.items())}"
    )
files = {
    "base": args.model,
    "init": init,
    **{f"prompts {task}": s["value"] for task, s in prompt_specs.items()},
    **{f"validation prompts {task}": s["value"] for task, s in eval_specs.items()},
}
identity = run_identity(args, world, files, "reward", "reward_option") | {
    "eval_num_steps": args.eval_num_steps,
    **{f"prompts {task}'s weight": s["weight"] for task, s in prompt_specs.items()},
    **{
        f"reward {name}": [re.sub('://[^/"]+', "://", r.identity), r.weight, r.task]
        for name, r in rewards.items()
    },
}  # a server may move
start = resume_checkpoint(args.resume, args.out, args.steps, model, "teacher", optimizer, identity)
log = start_run(args.out, start, args) if rank == 0 else None
if args.track:
    accelerator.init_trackers(
        "flow-opd",
        config={k: str(v) for k, v in vars(args).items()},
        init_kwargs={"wandb": {"dir": args.out}},
    )
stop, stopping = StopSignal(), False


def validate(adapter, label, step):
    """A row of results.json: the adapter's scores on the validation prompts, and `score`, the weighted mean it is chosen by; None if
    a process was told to stop."""
    row = evaluate(model, adapter, eval_prompts, rewards, args, rank, world, tasks=prompts, stop=stop)
    if row is None:
        return None
    score = sum(rewards[n].weight * s for n, s in row["scores"].items()) / sum(
        rewards[n].weight for n in row["scores"]
    )
    return {"model": label, "step": step, "score": score} | row


def advantages(rewards, tasks):
    """How much better a picture is than its group, in units of the spread of its task's rewards, within +-5: tasks whose rewards
    have other scales weigh alike. rewards (groups, group size), tasks: one name a group -> (groups, group size). A picture
    without a score (NaN) is in no mean and no spread, and stays NaN."""
    spread = torch.empty(len(rewards), 1)
    for task in set(tasks):
        its_groups = torch.tensor([t == task for t in tasks])
        its_rewards = rewards[its_groups]
        spread[its_groups] = its_rewards[~its_rewards.isnan()].std()
    return ((rewards - rewards.nanmean(1, keepdim=True)) / (spread + 1e-4)).clamp(-5, 5)


def draw_grid():
    """samples.png: the same prompts and noise for the base and the teacher."""
    texts = [
        r["prompt"] for rows in (eval_prompts or prompts).values() for r in rows[: max(2, 8 // len(prompts))]
    ]
    grid = draw_rows(
        model,
        {"base": ("base", args.guidance), "teacher": ("ema", args.guidance)},
        texts,
        args,
        rank,
        world,
        stop,
    )
    if grid and rank == 0:
        save_grid(os.path.join(args.out, "samples.png"), grid, texts)


results = []  # the base, and the best teacher so far
if start and os.path.exists(path := os.path.join(args.out, "results.json")):
    results = [row for row in json.load(open(path)) if row["step"] <= start]
if eval_prompts and not results:
    results = [validate("base", "base", 0)]
    stopping = results == [None]
    if rank == 0 and not stopping:
        write_json(os.path.join(args.out, "results.json"), results)

# -- the loop ---------------------------------------------------------------------------------------------------------------
progress = tqdm(initial=start, total=args.steps, disable=rank != 0, mininterval=1)
for step in range(start, args.steps + 1):
    # validate what `step` rollouts have made, and keep it if it is the best: first of all, so that a resumed run does it too
    if not stopping and step > 0 and (step % args.eval_every == 0 or step == args.steps):
        best = True  # without validation the latest average is the teacher
        if eval_prompts:
            row = validate("ema", "teacher", step)
            if stopping := row is None:
                break
            best = len(results) < 2 or row["score"] > results[1]["score"]
            results[1:] = [row] if best else results[1:]
            record = {"step": step, **{f"validation/{n}": value for n, value in row["scores"].items()}}
            if args.track:
                accelerator.log(record, step=step)
        if rank == 0:
            if eval_prompts:
                log.write(json.dumps(record) + "\n"), log.flush()
            if best:
                save_lora(model.lora("ema"), os.path.join(args.out, "lora"))
                write_json(os.path.join(args.out, "results.json"), results)
            plot_curves(args.out)
        draw_grid()
    if stopping or step == args.steps:
        break

    # sample: a group of pictures per prompt, each trajectory a chain of Gaussian transitions
    began = time.time()
    chosen = pick_prompts(
        prompts,
        {t: s["weight"] for t, s in prompt_specs.items()},
        args.seed,
        step,
        args.batch_size * world,
        args.schedule,
    )
    batch = [
        pair
        for pair in chosen[rank * args.batch_size : (rank + 1) * args.batch_size]
        for _ in range(args.group_size)
    ]
    gens = generators(args.seed, step, range(rank * samples, (rank + 1) * samples))
    first_noise = randn(gens, shape, device)
    if args.same_noise:
        first_noise = first_noise[:: args.group_size].repeat_interleave(args.group_size, 0)
    noise_levels = [args.noise_level] * args.num_steps
    if args.sde_window:
        first = int(
            torch.randint(
                args.num_steps // 2 - args.sde_window + 1,
                (),
                generator=generators(args.seed, step, [2**31])[0],
            )
        )
        noise_levels = [
            args.noise_level * (first <= i < first + args.sde_window) for i in range(args.num_steps)
        ]
    conds = model.encode([row["prompt"] for _, row in batch[:: args.group_size]])  # one a group
    trajectories, scorer = (
        [],
        Scorer(rewards, prompts, stop),
    )  # pictures are scored while the next ones are sampled
    with torch.no_grad():
        for i in range(0, samples, micro):
            if stop.name:
                break
            rows, g = batch[i : i + micro], gens[i : i + micro]
            cond = take_rows(conds, [j // args.group_size for j in range(i, i + len(rows))])
            draw = lambda: randn(g, shape, device)
            velocity = lambda x, t: model.velocity(x, t, cond, "teacher", args.guidance)
            steps = list(rollout(velocity, first_noise[i : i + micro], sigmas, noise_levels, args.sde, draw))
            trajectories.append([s for s in steps[:trainable] if s.log_prob is not None])
            try:
                scorer.submit(model.decode(steps[-1].x_next), rows)
            except RewardError as error:
                stop.fail(f"--reward {error}")
    try:
        scores = scorer.collect()
    except RewardError as error:
        stop.fail(f"--reward {error}")
    if stopping := stop.arrived(device):  # told to leave: the rollout in hand is given up
        break

    # advantage: how much better than its group, in units of its task's spread. Groups that tie and pictures without a score are left out
    scores = {name: accelerator.gather(values.to(device)).cpu() for name, values in scores.items()}
    everyone = weighted_sum(
        scores, rewards, [pair for pair in chosen for _ in range(args.group_size)], prompts
    )  # (B,) over all processes
    groups = everyone.view(-1, args.group_size)
    advantage = (
        advantages(groups, [task for task, _ in chosen])
        .flatten()[rank * samples : (rank + 1) * samples]
        .to(device)
    )  # (B,)
    tied = groups.nan_to_num(-math.inf).amax(1) - groups.nan_to_num(math.inf).amin(1) < 1e-6
    telling = (~tied).repeat_interleave(args.group_size) & ~everyone.isnan()  # (B,) over all processes

    # learn: the clipped surrogate and the KL to the base, at every trained step
    trajectory = [
        parts[0]._replace(
            **{k: torch.cat([getattr(p, k) for p in parts]) for k in ("x", "v", "x_next", "log_prob")}
        )
        for parts in zip(*trajectories)
    ]
    kl_sum, clipped, terms, norms = torch.zeros((), device=device), torch.zeros((), device=device), 0, []
    for k in range(args.updates_per_rollout):
        share = torch.arange(
            k, samples, args.updates_per_rollout
        )  # every update sees pictures of every group
        share = share[telling[rank * samples + share]]
        count = telling[k :: args.updates_per_rollout].sum().item() * len(
            trajectory
        )  # of pictures x steps, over all processes
        if count == 0:
            continue
        optimizer.zero_grad()
        for i in range(0, len(share), micro):
            if k == 0 and stop.name:  # later ones follow an update made, and are finished
                break
            rows = to_device(share[i : i + micro], device)
            cond = take_rows(conds, (share[i : i + micro] // args.group_size).tolist())
            for s in trajectory:
                x, x_next = s.x[rows], s.x_next[rows]
                with torch.no_grad():
                    v_base = model.velocity(x, s.t, cond, "base", args.guidance)
                v = model.velocity(x, s.t, cond, "teacher", args.guidance)
                mean, std = transition(x, v, s.t, s.t_next, args.noise_level, args.sde)
                if args.ratio_norm:
                    mean_old = transition(x, s.v[rows], s.t, s.t_next, args.noise_level, args.sde)[0]
                    scale = abs(transition(0.0, 1.0, s.t, s.t_next, args.noise_level, args.sde)[0]) / std
                    log_ratio = centred_log_ratio(x_next, mean, mean_old, std) / scale  # (B,)
                else:
                    log_ratio = log_prob(x_next, mean, std) - s.log_prob[rows]
                to_base = kl(mean, transition(x, v_base, s.t, s.t_next, args.noise_level, args.sde)[0], std)
                loss = clipped_surrogate(log_ratio, advantage[rows], args.clip_range) + args.beta * to_base
                (loss.sum() * x[0].numel()).backward()
                kl_sum += to_base.detach().sum()
                clipped += (log_ratio.detach().abs() > args.clip_range).sum()
        if k == 0 and (stopping := stop.arrived(device)):
            break
        reduce_gradients(params, count * math.prod(shape))
        terms += count
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        if not math.isfinite(norms[-1]):
            die(
                f"step {step + 1}: the gradient on {', '.join(prompts)} is not finite; checkpoints in {args.out} are as they were. "
                "Try a smaller --lr or another --dtype"
            )
        optimizer.step()
        update_average(ema, params, args.ema, step * args.updates_per_rollout + k + 1)

    if stopping:
        break

    # report, save
    record = {
        "step": step + 1,
        **{f"reward/{n}": v[~v.isnan()].mean().item() for n, v in scores.items() if not v.isnan().all()},
        "kl_to_base": reduce_sum(kl_sum).item() / max(terms, 1),
        "clip_fraction": reduce_sum(clipped).item() / max(terms, 1),
        "tied_groups": tied.float().mean().item(),
        "grad_norm": max(norms, default=0.0),
        "seconds": time.time() - began,
    }
    if args.track:
        accelerator.log(record, step=step + 1)
    if rank == 0:
        log.write(json.dumps(record) + "\n"), log.flush()
        progress.update()
        progress.set_postfix(
            reward=f"{everyone.nanmean():.3f}",
            kl=f"{record['kl_to_base']:.1e}",
            clip=f"{record['clip_fraction']:.2f}",
        )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(args.out, step + 1, model, "teacher", optimizer, identity, args.keep)

# -- the end ------------------------------------------------------------------------------------------------------------------
progress.close()
if rank == 0:
    if stopping and step > 0:
        save_checkpoint(args.out, step, model, "teacher", optimizer, identity, args.keep)
    if results and not stopping:
        print(markdown(results))
    print(
        f"stopped (--resume auto goes on): {args.out}/checkpoints"
        if stopping
        else f"done: {args.out}/lora (also log.jsonl, curves.png, samples.png, checkpoints/)"
    )
end_processes(accelerator, stop.failure)
