"""What an update costs: runs the real distill.py or train_teacher.py, times and counts one update, and sets
it beside the floor, the fewest operations an update of this shape can do with, and beside other recipes.

    python experiments/bench.py --recipe ours two-pass released    # a random SD3 of 121 M parameters
    python experiments/bench.py --script train_teacher.py          # stage 1

SD3.5-Medium's architecture on a GPU; its second command is one step of an update, in many sizes:

    sd35m="--model sd35m-random --dtype float16 --resolution 512 --num-steps 10 --guidance 4.5"
    python experiments/bench.py $sd35m --batch-size 8 --recipe ours two-pass released
    python experiments/bench.py $sd35m --batch-size 8 --gpu-report

What fits on which card, counted in a minute: python experiments/bench.py --what-fits

`ours` is the script itself, watched from outside; flags that are not listed below are handed to it.
`two-pass` stores the trajectory and walks it again to learn. `released` does so too, with a float32 network
of its own for every teacher, asked one after another, computing in --dtype under autocast: the ways of the
released code (which also decodes and scores every rollout: not counted). Each recipe runs in a process of its
own. --gpu-report measures what an update consists of, the student's forward and backward at one state that
teachers and anchor label, at several sizes of micro-batch, with gradient checkpointing, fewer tokens, five
teachers and compiled, and lists what takes longest.

FLOPs are those of torch's flop counter. The floor is the student's forward, its backward as far as the first
LoRA, its teacher's and the anchor's forward at every learnt step, of the bare network (stage 1: sampling,
then forward, backward and the base's forward). MFU: FLOPs done over seconds, and over the rate of a large
matrix product in the same data type, measured in the same process.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time

import diffusers
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the scripts lie one folder above
import flow_sde
from experiments import meter
from flow_sde import (
    HERE,
    SD3,
    by_task,
    die,
    kl,
    pipeline_folder,
    randn,
    rollout,
    take_rows,
    transition,
    write_json,
)

RECIPES = ["ours", "two-pass", "released"]
DTYPES = ["float32", "bfloat16", "float16"]

parser = argparse.ArgumentParser(
    description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
add = parser.add_argument
add("--script", choices=["distill.py", "train_teacher.py"], default="distill.py", help="whose update")
add("--recipe", nargs="+", choices=RECIPES, default=["ours"], help="ways to make distill.py's update")
add("--model", default="mid-random", help=f"{', '.join(meter.SIZES)} (SD3.5's classes), or a folder")
add("--t5", action="store_true", help="give the random model T5's encoder too (XXL: 9.5 GB in 16 bits)")
add("--teachers", type=int, default=3, help="LoRA teachers, rank 32, besides the anchor")
add("--batch-size", type=int, default=6, help="trajectories an update")
add("--micro-batch-size", type=int, default=6, help="samples per forward")
add("--num-steps", type=int, default=5, help="sampling steps, of which the last is left out")
add("--resolution", type=int, default=128, help="pixels")
add("--guidance", type=float, default=1.0, help="of everyone")
add("--dtype", choices=DTYPES, default="float32", help="networks compute in it")
add("--gradient-checkpointing", action="store_true", help="as distill.py's")
add("--updates", type=int, default=3, help="timed updates (or steps), after one that is not")
add("--gpu-report", action="store_true", help="one step of distill.py in many sizes, on a GPU or not")
add("--what-fits", action="store_true", help="count the published models' memory (see fits.py), no more")
add("--out", help="JSON file for the figures")
add("--inside", help=argparse.SUPPRESS)  # the folder of a recipe's own process
args, handed_on = parser.parse_known_args()

if handed_on and (args.recipe != ["ours"] or args.gpu_report):
    die(f"{' '.join(handed_on)}: no flags of this program, and the script's own are for --recipe ours alone")
if args.script != "distill.py" and args.recipe != ["ours"]:
    die("--recipe is for --script distill.py")
for flag, least in dict(teachers=1, updates=1, batch_size=1, micro_batch_size=1, num_steps=2).items():
    if getattr(args, flag) < least:
        die(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")
if args.model not in meter.SIZES:
    _, pipeline_class, _ = pipeline_folder(args.model, only=())
    if pipeline_class.__name__ != "StableDiffusion3Pipeline":
        die(f"--model {args.model}: only Stable Diffusion 3 is measured here")
if args.out and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
    die(f"--out {args.out}: there is no such folder")
if args.what_fits:
    from experiments import fits

    text, figures = fits.table()
    print(text)
    if args.out:
        write_json(args.out, figures)
    raise SystemExit
device, dtype = meter.device, getattr(torch, args.dtype)


# ------------------------------------------------------------------------------------------------------------
# an update, measured


def count_tokens(model):
    """The transformer's, of a picture and its prompt."""
    patches = math.prod(model.latent_shape(args.resolution)[1:]) // model.transformer.config.patch_size**2
    return patches + model.null[0].shape[1]


class Done(BaseException):
    """The last update has been measured."""


def measure(recipe):
    """Call recipe(boundary), which calls boundary() where an update begins, until all is known: one update to
    warm up, `--updates` timed, one with a clock on every part, one with the flop counter."""
    watch, flops = meter.Watch(), meter.counter()
    times, figures = [], {}
    stack = contextlib.ExitStack()

    def boundary():
        meter.synchronize()
        times.append(time.perf_counter())
        made = len(times) - 1
        if made == 1:
            meter.free()
        if made == 1 + args.updates:
            figures.update(meter.most_memory())
            watch.counts.clear()
            watch.on = True
        if made == 2 + args.updates:
            watch.on = False
            figures["samples"] = dict(watch.counts)
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.nn.Module):
                    thing._compiled_call_impl = None  # --compile: operations of compiled blocks are not seen
            stack.enter_context(flops)
        if made == 3 + args.updates:
            raise Done

    with stack, contextlib.suppress(Done):
        recipe(boundary)
    took = [after - before for before, after in zip(times, times[1:])]
    parts = {part: seconds / took[1 + args.updates] for part, seconds in watch.seconds.most_common()}
    parts["the rest"] = 1 - sum(share for part, share in parts.items() if "beside" not in part)
    timed = took[1 : 1 + args.updates]
    return figures | dict(
        seconds=statistics.median(timed), all_seconds=timed, parts=parts, flops=flops.get_total_flops()
    )


# ------------------------------------------------------------------------------------------------------------
# the recipes


def ours(folder, base, boundary):
    """The script itself; an update begins where it picks its prompts."""
    pick_prompts = flow_sde.pick_prompts

    def watched_pick(*a):
        boundary()
        return pick_prompts(*a)

    flow_sde.pick_prompts = watched_pick
    flags = dict(model=base, out=f"{folder}/out", dtype=args.dtype, resolution=args.resolution)
    flags |= dict(guidance=args.guidance, num_steps=args.num_steps, micro_batch_size=args.micro_batch_size)
    flags |= dict(steps=1000, save_every=1000, eval_every=1000)
    if args.script == "distill.py":
        flags["teachers"] = [f"t{i}={folder}/{i}" for i in range(args.teachers)]
        flags["prompts"] = [f"t{i}={folder}/prompts.txt" for i in range(args.teachers)]
        flags |= dict(anchor=f"{folder}/{args.teachers}", init=f"{folder}/{args.teachers + 1}")
        flags |= dict(batch_size=args.batch_size)
    else:
        flags |= dict(prompts=[f"t={folder}/prompts.txt"], reward=["jpeg"])
        flags |= dict(batch_size=1, group_size=args.batch_size, updates_per_rollout=1)
    sys.argv = [f"{HERE}/{args.script}"]
    for flag, value in flags.items():
        values = value if isinstance(value, list) else [value]
        sys.argv += ["--" + flag.replace("_", "-"), *map(str, values)]
    if args.gradient_checkpointing:
        sys.argv.append("--gradient-checkpointing")
    sys.argv += handed_on  # the last of a flag counts
    runpy.run_path(sys.argv[0], run_name="__main__")


def ask_teachers(model, x, t, cond, tasks):
    """Every task's teacher, as distill.py's `label`."""
    answers = []
    pairs = [(task, None) for task in tasks]
    for task, rows in by_task(pairs, pairs).items():
        answers.append(model.velocity(x[rows], t, take_rows(cond, rows), task, args.guidance))
    return torch.cat(answers)


def alone(base):
    """A float32 network for one model, with diffusers' own norms."""
    model = SD3(base, torch.float32, device, gradient_checkpointing=args.gradient_checkpointing)
    for norm in model.transformer.modules():
        if type(norm) is flow_sde.RMSNorm:
            norm.__class__ = diffusers.models.normalization.RMSNorm
    return model


def walked_again(folder, base, boundary, released):
    """distill.py's update with a stored trajectory: on one shared base (two-pass), or with a float32 network
    for everyone (released)."""
    names = [*(f"t{i}" for i in range(args.teachers)), "anchor", "student"]
    if released:
        student = alone(base)
    else:
        student = SD3(base, dtype, device, gradient_checkpointing=args.gradient_checkpointing)
    models = dict.fromkeys(names, student)
    for i, name in enumerate(names):
        if released and name != "student":
            models[name] = alone(base)
            # Text encoders and the VAE are not what is compared
            for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
                setattr(models[name].pipe, part, None)
        models[name].load_adapter(name, f"{folder}/{i}")
    params = student.train_adapter("student")
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=1e-4, fused=True)
    shape, sigmas = student.latent_shape(args.resolution), student.sigmas(args.num_steps, args.resolution)
    prompts = pathlib.Path(folder, "prompts.txt").read_text().splitlines()
    autocast = torch.autocast(device.type, dtype, enabled=released and dtype != torch.float32)
    while True:
        boundary()
        conds = student.encode([prompts[i % len(prompts)] for i in range(args.batch_size)])
        for i in range(0, args.batch_size, args.micro_batch_size):
            cond = [c[i : i + args.micro_batch_size] for c in conds]
            tasks = sorted(names[k % args.teachers] for k in range(len(cond[0])))
            if released:
                tasks = ["t0"] * len(tasks)  # a batch of one task at a time
            teacher = models["t0"] if released else student
            gens = flow_sde.generators(0, len(prompts), range(len(cond[0])))

            def draw(gens=gens):
                return randn(gens, shape, device)

            def walk(x, t, cond=cond):
                return student.velocity(x, t, cond, "student", args.guidance)

            with torch.no_grad(), autocast:
                steps = list(rollout(walk, draw(), sigmas[:-1], 0.7, "flow", draw))
            for x, _, t, t_next, _, _ in steps:
                with autocast:
                    v = student.velocity(x, t, cond, "student", args.guidance)
                with torch.no_grad(), autocast:
                    v_teacher = ask_teachers(teacher, x, t, cond, tasks)
                    v_anchor = models["anchor"].velocity(x, t, cond, "anchor", args.guidance)
                mean, std = transition(x, v, t, t_next, 0.7)
                to_teacher = kl(mean, transition(x, v_teacher, t, t_next, 0.7)[0], std)
                to_anchor = kl(mean, transition(x, v_anchor, t, t_next, 0.7)[0], std)
                (to_teacher + 0.5 * to_anchor).sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()


def floor(base):
    """The fewest FLOPs of an update of this shape."""
    model = SD3(base, dtype, device)
    cond = model.encode(["x"])
    x = torch.randn(1, *model.latent_shape(args.resolution), device=device)
    with meter.counter() as forward, torch.no_grad():
        model.velocity(x, 0.5, cond)

    def needs_gradient(layer, inputs, output):
        output.requires_grad_()

    attention = model.transformer.transformer_blocks[0].attn  # the first LoRAs, where the gradient ends
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        getattr(attention, name).register_forward_hook(needs_gradient)
    with meter.counter() as both:
        model.velocity(x, 0.5, cond).sum().backward()
    f, f_and_b = forward.get_total_flops(), both.get_total_flops()
    learnt = args.num_steps - 1
    halves = 1 if args.guidance == 1 else 2
    if args.script == "distill.py":
        return args.batch_size * halves * learnt * (f_and_b + 2 * f)
    return args.batch_size * halves * (args.num_steps * f + learnt * (f_and_b + f))


# ------------------------------------------------------------------------------------------------------------
# --gpu-report: one step of distill.py's loop, in many sizes


def gpu_report(folder, base, rate, out):
    """Prints a row as soon as it is measured. `out`, a JSON file: {"rows": [...], "kernels": [(share,
    milliseconds, times, name), ...], "matrix_flops_per_second"}, with what is known so far."""
    watch, model = meter.Watch(), SD3(base, dtype, device)
    for i, name in enumerate(("t0", "t1", "t2", "t3", "t4", "anchor", "student")):
        model.load_adapter(name, f"{folder}/{i}")
    model.train_adapter("student")
    shape, null = model.latent_shape(args.resolution), model.null
    report, flops = dict(rows=[], kernels=[], matrix_flops_per_second=rate), {}

    def step(size, teachers=3):
        x = torch.randn(size, *shape, device=device)
        cond = [c.expand(size, *c.shape[1:]) for c in model.null]
        tasks = sorted(f"t{i % teachers}" for i in range(size))
        with torch.no_grad():
            v_teacher = ask_teachers(model, x, 0.5, cond, tasks)
            v_anchor = model.velocity(x, 0.5, cond, "anchor", args.guidance)
        v = model.velocity(x, 0.5, cond, "student", args.guidance)
        ((v - v_teacher).square() + 0.02 * (v - v_anchor).square()).sum().backward()

    def measure_step(size, teachers, tokens):
        if tokens not in flops:
            with meter.counter() as counted:
                step(1)
            flops[tokens] = counted.get_total_flops()
        step(size, teachers)
        meter.free()
        times, launched = [], []
        for _ in range(args.updates):
            meter.synchronize()
            began = time.perf_counter()
            step(size, teachers)
            launched.append(time.perf_counter() - began)
            meter.synchronize()
            times.append(time.perf_counter() - began)
        found = meter.most_memory()
        watch.seconds.clear()
        watch.on = True
        step(size, teachers)
        watch.on = False
        seconds, done = statistics.median(times), size * flops[tokens]
        found |= dict(seconds=seconds, launched=statistics.median(launched), parts=dict(watch.seconds))
        return found | dict(flops=done, mfu=done / seconds / rate)

    def row(what, size, teachers=3):
        tokens = count_tokens(model)
        try:
            found = measure_step(size, teachers, tokens)
        except Exception as error:  # out of memory, or no compiler here: the other rows count all the same
            found = dict(failed=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
        report["rows"].append(dict(what=what, size=size, tokens=tokens) | found)
        print_step(report["rows"][-1])
        write_json(out, report)

    print_report_head(rate)
    for size in (8, 1, 4, 16):
        row("", size)
    row("five teachers", 8, teachers=5)
    model.null = null[0][:, :-128], null[1]
    row("128 tokens fewer", 8)
    model.null = null
    model.transformer.enable_gradient_checkpointing(model._checkpointed)
    for size in (1, 8, 16, 32):
        row("gradient checkpointing", size)
    model.transformer.disable_gradient_checkpointing()
    report["kernels"] = longest_kernels(lambda: step(8))
    print_kernels(report["kernels"])
    model.compile()
    for size in (8, 16):
        row("compiled", size)


def longest_kernels(step):
    """The 15 that step() spends most time in."""
    with torch.profiler.profile() as profiler:
        step()
        meter.synchronize()
    kernels = []
    for event in profiler.key_averages():
        if device.type != "cuda":
            kernels.append((event.self_cpu_time_total, event.count, event.key[:100]))
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((event.self_device_time_total, event.count, event.key[:100]))
    total = sum(took for took, _, _ in kernels)
    longest = sorted(kernels, reverse=True)[:15]
    return [(took / total, took / 1e3, times, name) for took, times, name in longest]


# ------------------------------------------------------------------------------------------------------------
# what is printed


def memory(row):
    held = f" ({row['reserved_gb']:.2f})" if row["reserved_gb"] else ""
    return f"{row['memory_gb']:.2f}{held}"


def print_report_head(rate):
    print(
        f"a step of distill.py, milliseconds; MFU is of {rate / 1e12:.3g} TFLOP/s, the rate of a large matrix"
    )
    print(f"product; an update: {args.batch_size} samples x {args.num_steps - 1} steps\n")
    print(
        "| micro-batch | tokens | a step | CPU busy | student | backward | teachers | anchor | MFU | ", end=""
    )
    print("an update, s | memory, GB (reserved) |\n" + "|---" * 11 + "|", flush=True)


def print_step(row):
    name = f"{row['size']} {row['what']}".strip()
    if "failed" in row:
        print(f"| {name} | {row['tokens']} | {row['failed']}" + " |" * 9, flush=True)
        return
    parts = [row["parts"][part] for part in ("student", "backward", "teachers", "anchor or base")]
    times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (row["seconds"], row["launched"], *parts))
    update = args.batch_size * (args.num_steps - 1) * row["seconds"] / row["size"]
    print(
        f"| {name} | {row['tokens']} | {times} | {row['mfu']:.0%} | {update:.2f} | {memory(row)} |",
        flush=True,
    )


def print_kernels(kernels):
    print("\nwhat takes longest, micro-batch 8:")
    for share, milliseconds, times, name in kernels:
        print(f"{share:6.1%} {milliseconds:9.2f} ms {times:6d} x {name}")
    print(flush=True)


def print_recipes_head():
    print("| recipe | seconds | forwards (with a graph), samples | TFLOP | over the floor | MFU |", end="")
    print(" memory, GB (reserved) | outside the network |\n" + "|---" * 8 + "|", flush=True)


def print_recipe(row):
    inside = [row["parts"].get(part, 0) for part in ("student", "teachers", "anchor or base", "backward")]
    samples = f"{row['samples']['forwards']} ({row['samples']['with a graph']})"
    costs = f"{row['flops'] / 1e12:.3f} | {row['flops'] / row['floor']:.2f} | {row['mfu']:.0%}"
    last = f"{memory(row)} | {1 - sum(inside):.1%}"
    print(f"| {row['recipe']} | {row['seconds']:.2f} | {samples} | {costs} | {last} |", flush=True)


def print_parts(rows):
    for row in rows:
        parts = ", ".join(f"{part} {share:.1%}" for part, share in row["parts"].items())
        print(f"\n{row['recipe']}: {parts}")
        if row is not rows[0]:
            times = row["seconds"] / rows[0]["seconds"]
            print(f"{row['recipe']} takes {times:.2f} times the seconds of {rows[0]['recipe']}")


# ------------------------------------------------------------------------------------------------------------
# a recipe's own process

if args.inside:
    base = f"{args.inside}/base" if args.model in meter.SIZES else args.model
    rate = meter.matrix_rate(dtype)
    if args.gpu_report:
        gpu_report(args.inside, base, rate, args.out)
        sys.exit()

    def recipe(boundary):
        if args.recipe == ["ours"]:
            ours(args.inside, base, boundary)
        else:
            walked_again(args.inside, base, boundary, released=args.recipe == ["released"])

    figures = dict(recipe=args.recipe[0]) | measure(recipe)
    meter.free()
    figures |= dict(floor=floor(base), matrix_flops_per_second=rate)
    figures["mfu"] = figures["flops"] / figures["seconds"] / rate
    write_json(args.out, figures)
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# the process that starts them

rows, failed = [], []
with tempfile.TemporaryDirectory() as folder:
    base = args.model
    if args.model in meter.SIZES:
        base = f"{folder}/base"
        meter.random_pipeline(base, dtype, args.t5, *meter.SIZES[args.model])
    model = SD3(base, dtype, device)
    size = sum(p.numel() for p in model.transformer.parameters()) / 1e6
    tokens = count_tokens(model)
    meter.random_loras(folder, model, 2 + max(args.teachers, 5 if args.gpu_report else 0))
    del model
    meter.free()
    prompts = ("a red fox", "two cups", "a quiet harbour", "an old clock")
    pathlib.Path(folder, "prompts.txt").write_text("\n".join(f"a picture of {what}" for what in prompts))
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(
        f"\n{args.script} on {args.model} ({size:.0f} M), "
        f"{args.batch_size} samples x {args.num_steps} steps, {args.resolution} px, {tokens} tokens, "
        f"guidance {args.guidance:g}, {args.dtype}, {args.teachers} teachers and an anchor; "
        f"{where}, torch {torch.__version__}\n",
        flush=True,
    )
    if not args.gpu_report:
        print_recipes_head()
    for recipe in args.recipe:
        figures = f"{folder}/figures.json"
        if args.gpu_report:  # which prints and writes a row at a time
            figures = args.out or figures
        own = ["--recipe", recipe, "--inside", folder, "--out", figures]
        command = [sys.executable, __file__, *sys.argv[1:], *own]
        if subprocess.run(command, stdout=None if args.gpu_report else subprocess.DEVNULL).returncode:
            failed.append(recipe)
            continue
        if not args.gpu_report:
            rows.append(json.loads(pathlib.Path(figures).read_text()))
            print_recipe(rows[-1])
            if args.out:
                write_json(args.out, rows)

print_parts(rows)
if failed:
    die(f"--recipe {', '.join(failed)} failed: what was said stands above")
