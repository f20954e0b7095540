"""What an update costs: runs the real distill.py or train_teacher.py, times and counts one update, and sets it beside the floor, the fewest
operations an update of this shape can do with, and beside other recipes for the same update.

    python bench.py --recipe ours two-pass released                  # a random SD3 of 121 M parameters on two CPU cores
    python bench.py --script train_teacher.py                        # stage 1
    python bench.py --model sd35m-random --dtype float16 --resolution 512 --num-steps 10 --guidance 4.5 \\
        --batch-size 8 --recipe ours two-pass released               # SD3.5-Medium's architecture on a GPU
    python bench.py --model sd35m-random --dtype float16 --resolution 512 --num-steps 10 --guidance 4.5 \\
        --batch-size 8 --gpu-report                                  # one step of it, in many sizes

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
import collections
import contextlib
import copy
import gc
import json
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import flow_sde
import rewards
from flow_sde import HERE, SD3, die, kl, pipeline_folder, randn, rollout, save_lora, transition, write_json

SIZES = {  # layers, heads, width of a head, layers with two attentions, text width, CLIP layers, VAE channels
    "tiny-random": (2, 2, 16, 1, 64, 1, 8),
    "mid-random": (4, 14, 64, 2, 512, 1, 16),
    "sd35m-random": (24, 24, 64, 13, 4096, 12, 128),
}

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=flow_sde.Help)
add = parser.add_argument
add("--script", choices=["distill.py", "train_teacher.py"], default="distill.py", help="whose update")
add(
    "--recipe",
    nargs="+",
    choices=["ours", "two-pass", "released"],
    default=["ours"],
    help="ways to make distill.py's update",
)
add(
    "--model",
    default="mid-random",
    help=f"{', '.join(SIZES)} (SD3.5-Medium's architecture without T5's encoder), or a folder",
)
add("--teachers", type=int, default=3, help="LoRA teachers, rank 32, besides the anchor")
add("--batch-size", type=int, default=6, help="trajectories an update")
add("--micro-batch-size", type=int, default=6, help="samples per forward")
add("--num-steps", type=int, default=5, help="sampling steps, of which the last is left out")
add("--resolution", type=int, default=128, help="pixels")
add("--guidance", type=float, default=1.0, help="of everyone")
add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="networks compute in it")
add("--t5", action="store_true", help="give the random model T5-XXL's encoder too (9.5 GB in half precision)")
add("--gradient-checkpointing", action="store_true", help="as distill.py's")
add("--updates", type=int, default=3, help="timed updates, after one that is not")
add("--gpu-report", action="store_true", help="one step of distill.py in many sizes, on a GPU or not")
add("--out", help="JSON file for the figures")
add("--inside", help=argparse.SUPPRESS)  # the folder of a recipe's own process
args, handed_on = parser.parse_known_args()
if handed_on and (args.recipe != ["ours"] or args.gpu_report):
    die(f"{' '.join(handed_on)}: no flags of this program, and the script's own are for --recipe ours alone")
if args.script != "distill.py" and args.recipe != ["ours"]:
    die("--recipe is for --script distill.py")
if min(args.teachers, args.updates, args.batch_size, args.micro_batch_size) < 1 or args.num_steps < 2:
    die(
        "--teachers, --updates, --batch-size and --micro-batch-size must be at least 1, --num-steps at least 2"
    )
if args.model not in SIZES and pipeline_folder(args.model, only=())[1].__name__ != "StableDiffusion3Pipeline":
    die(f"--model {args.model}: only Stable Diffusion 3 is measured here")
if args.out and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
    die(f"--out {args.out}: there is no such folder")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# something to measure


def random_pipeline(folder, layers, heads, head_dim, dual, text, clip_layers, channels):
    """A StableDiffusion3Pipeline with random weights: SD3.5's classes and settings at any size. Without --t5
    it has no T5 encoder (its rows are zeros)."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(0)
    signs, ends = [chr(c) for c in range(33, 127)], ["<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate([*signs, *(s + "</w>" for s in signs), *ends])}
    real = text == 4096
    widths, depths = (
        ((768, 1280), (clip_layers, 32)) if real else ((text // 8, text // 8), (clip_layers, clip_layers))
    )
    with torch.device(device):
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(vocab),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=depth,
                    num_attention_heads=max(1, width // 64),
                    projection_dim=width,
                    bos_token_id=len(vocab) - 2,
                    eos_token_id=len(vocab) - 1,
                    pad_token_id=1,
                )
            )
            for width, depth in zip(widths, depths)
        ]
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=text,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=sum(widths),
            qk_norm="rms_norm",
            pos_embed_max_size=384 if real else 96,
            dual_attention_layers=tuple(range(dual)),
        )
        vae = AutoencoderKL(
            block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16,
            layers_per_block=2,
            norm_num_groups=min(32, channels // 2),
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        t5 = args.t5 and T5EncoderModel(
            T5Config(
                vocab_size=4 + len(signs),
                d_model=text,
                d_kv=64,
                d_ff=10240 if real else text,
                num_layers=24 if real else 1,
                num_heads=max(1, text // 64),
                feed_forward_proj="gated-gelu",
            )
        )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((s, -4.0) for s in signs)]
    tokenizers = [
        CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77) for pad in (ends[1], "!")
    ]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5 or None,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512) if args.t5 else None,
    )
    pipe.to(getattr(torch, args.dtype)).save_pretrained(folder)
    return folder


def random_loras(folder, model, count):
    """LoRAs of rank 32 with random weights in folder/0, folder/1, ..."""
    model.new_adapter("x", 32, 64)
    for i in range(count):
        gen = torch.Generator().manual_seed(i)
        lora = {
            n: (A, torch.randn(B.shape, generator=gen) * 0.02, alpha)
            for n, (A, B, alpha) in model.lora("x").items()
        }
        save_lora(lora, os.path.join(folder, str(i)))


def matrix_rate(dtype):
    """FLOP/s of a large matrix product: what the device can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    best = float("inf")
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronize()
        best = min(best, (time.perf_counter() - began) / 3)
    return 2 * n**3 / best


def count_tokens(model):
    """The transformer's, of a picture and its prompt."""
    patches = math.prod(model.latent_shape(args.resolution)[1:]) // model.transformer.config.patch_size**2
    return patches + model.null[0].shape[1]


def free():
    """Give the GPU's memory back, for models hang in cycles and PyTorch keeps what it once had; watch its
    peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def most_memory():
    """In GB, the most memory that tensors have had since the last `free`, and what PyTorch held for them; on
    a CPU, the most that this process has had, and 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    if os.path.exists("/proc/self/status"):
        most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(most.split()[1]) * 1024 / 1e9, 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9, 0.0  # macOS, in bytes


def memory(row):
    """A row's memory as the tables show it."""
    return f"{row['memory_gb']:.2f}" + (f" ({row['reserved_gb']:.2f})" if row["reserved_gb"] else "")


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# watching an update


class Watch:
    """Seconds by part and forwards in samples, while `on`."""

    def __init__(self):
        self.seconds, self.counts, self.on, self.inside = (
            collections.Counter(),
            collections.Counter(),
            False,
            False,
        )

    def wrap(self, owner, name, part):
        """Time owner.name as a part (or the part that part(*arguments) says); what runs inside another part belongs to that one. Rewards run in
        threads of their own, beside the sampling."""
        function = getattr(owner, name)

        def timed(*a, **k):
            beside = threading.current_thread() is not threading.main_thread()
            if not self.on or self.inside and not beside:
                return function(*a, **k)
            if not beside:
                self.inside = True
            synchronize()
            began = time.perf_counter()
            try:
                return function(*a, **k)
            finally:
                synchronize()
                self.seconds[part if isinstance(part, str) else part(*a, **k)] += time.perf_counter() - began
                if not beside:
                    self.inside = False

        setattr(owner, name, timed)

    def wrap_all(self):
        self.wrap(SD3, "encode", "text encoding")
        self.wrap(SD3, "velocity", velocity_part)
        self.wrap(SD3, "decode", "decode")
        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(torch.optim.AdamW, "step", "optimizer")
        self.wrap(rewards, "score_batch", "reward, beside the sampling")

    def count(self, network):
        forward = network.forward

        def counted(module, *a, **k):
            self.counts["forwards"] += len(k["hidden_states"])
            self.counts["with a graph"] += len(k["hidden_states"]) * torch.is_grad_enabled()
            return forward(module, *a, **k)

        network.forward = counted


class Done(BaseException):
    """The last update has been measured."""


def velocity_part(model, x, t, cond, adapter="base", guidance=1.0):
    """Whose forward a call of SD3.velocity is."""
    learner = torch.is_grad_enabled() or adapter in ("student", "teacher")
    return "student" if learner else "anchor or base" if adapter in ("anchor", "base") else "teachers"


def measure(run):
    """Call run(boundary), which calls boundary() where an update begins, until all is known: one update to warm up, `--updates` timed, one with
    a clock on every part, one with the flop counter."""
    from diffusers import SD3Transformer2DModel

    watch, times, figures, stack = Watch(), [], {}, contextlib.ExitStack()
    watch.wrap_all()
    watch.count(SD3Transformer2DModel)

    def boundary():
        synchronize()
        times.append(time.perf_counter())
        made = len(times) - 1
        if made == 1:
            free()
        if made == 1 + args.updates:
            figures["memory_gb"], figures["reserved_gb"] = most_memory()
            watch.counts.clear()
            watch.on = True
        elif made == 2 + args.updates:
            watch.on = False
            figures["samples"] = dict(watch.counts)
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.nn.Module):
                    thing._compiled_call_impl = None  # --compile: operations of compiled blocks are not seen
            watch.flops = stack.enter_context(counter())
        elif made == 3 + args.updates:
            figures["flops"] = watch.flops.get_total_flops()
            raise Done

    with contextlib.suppress(Done):
        run(boundary)
    stack.close()
    watch.on = False
    took = [b - a for a, b in zip(times, times[1:])]
    figures["seconds"] = statistics.median(took[1 : 1 + args.updates])
    figures["all_seconds"] = took[1 : 1 + args.updates]
    parted = took[1 + args.updates]
    figures["parts"] = {part: seconds / parted for part, seconds in watch.seconds.most_common()}
    figures["parts"]["the rest"] = 1 - sum(
        share for part, share in figures["parts"].items() if "beside" not in part
    )
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# the recipes


def ours(folder, base, boundary):
    """The script itself."""
    pick = flow_sde.pick_prompts
    flow_sde.pick_prompts = lambda *a: boundary() or pick(*a)  # an update begins where it picks its prompts
    tasks = [f"t{i}" for i in range(args.teachers)]
    flags = {
        "model": base,
        "prompts": [f"{t}={folder}/prompts.txt" for t in tasks],
        "batch-size": args.batch_size,
        "micro-batch-size": args.micro_batch_size,
        "num-steps": args.num_steps,
        "resolution": args.resolution,
        "guidance": args.guidance,
        "dtype": args.dtype,
        "steps": 1000,
        "save-every": 1000,
        "eval-every": 1000,
        "out": os.path.join(folder, "out"),
    }
    if args.script == "distill.py":
        flags |= {
            "teachers": [f"{t}={folder}/{i}" for i, t in enumerate(tasks)],
            "anchor": f"{folder}/{args.teachers}",
            "init": f"{folder}/{args.teachers + 1}",
        }
    else:
        flags |= {
            "prompts": [f"t={folder}/prompts.txt"],
            "reward": ["jpeg"],
            "batch-size": 1,
            "group-size": args.batch_size,
            "updates-per-rollout": 1,
        }
    sys.argv = [os.path.join(HERE, args.script)]
    for flag, value in flags.items():
        sys.argv += ["--" + flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    sys.argv += handed_on + ["--gradient-checkpointing"] * args.gradient_checkpointing
    runpy.run_path(sys.argv[0], run_name="__main__")


def walked_again(folder, base, boundary):
    """distill.py's update with a stored trajectory: on one shared base (two-pass), or with a float32 network for everyone (released)."""
    released, dtype = args.recipe == ["released"], getattr(torch, args.dtype)
    names = [*(f"t{i}" for i in range(args.teachers)), "anchor", "student"]
    stored = torch.float32 if released else dtype
    shared = SD3(base, stored, device, gradient_checkpointing=args.gradient_checkpointing)
    models = {name: copy.copy(shared) if released and name != "student" else shared for name in names}
    for name, model in models.items():
        if model is not shared:  # the text encoders and the VAE are not what is compared
            model.pipe = copy.copy(shared.pipe)
            model.pipe.transformer = model.transformer = copy.deepcopy(shared.transformer)
            model.asked, model.adapters, model.stacked = flow_sde.Asked(), {}, {}
    for i, name in enumerate(names):
        models[name].load_adapter(name, f"{folder}/{i}")
        for norm in models[name].transformer.modules() if released else ():
            if type(norm) is flow_sde.RMSNorm:
                norm.__class__ = diffusers.models.normalization.RMSNorm
    params = shared.train_adapter("student")
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=1e-4, fused=True)
    shape, sigmas = shared.latent_shape(args.resolution), shared.sigmas(args.num_steps, args.resolution)[:-1]
    prompts = open(f"{folder}/prompts.txt").read().splitlines()
    halves = torch.autocast(device.type, dtype, enabled=released and dtype != torch.float32)
    while True:
        boundary()
        conds = shared.encode([prompts[i % len(prompts)] for i in range(args.batch_size)])
        for i in range(0, args.batch_size, args.micro_batch_size):
            cond = [c[i : i + args.micro_batch_size] for c in conds]
            tasks = [f"t{k % args.teachers}" for k in range(len(cond[0]))]
            gens = flow_sde.generators(0, len(prompts), range(len(tasks)))
            draw = lambda: randn(gens, shape, device)
            with torch.no_grad(), halves:
                steps = list(
                    rollout(
                        lambda x, t: shared.velocity(x, t, cond, "student", args.guidance),
                        draw(),
                        sigmas,
                        0.7,
                        "flow",
                        draw,
                    )
                )
            for s in steps:
                with halves:
                    v = shared.velocity(s.x, s.t, cond, "student", args.guidance)
                with torch.no_grad(), halves:
                    if released:  # a batch of one task at a time
                        v_teacher = models[tasks[0]].velocity(s.x, s.t, cond, tasks[0], args.guidance)
                    else:
                        v_teacher = shared.velocity(s.x, s.t, cond, tasks, args.guidance)
                    v_anchor = models["anchor"].velocity(s.x, s.t, cond, "anchor", args.guidance)
                mean, std = transition(s.x, v, s.t, s.t_next, 0.7)
                distance = lambda other: kl(mean, transition(s.x, other, s.t, s.t_next, 0.7)[0], std)
                (distance(v_teacher) + 0.5 * distance(v_anchor)).sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()


def counter():
    """torch's flop counter, which does not know the CPU's attention, or products that are added in place."""
    cpu = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            cpu.addmm_: lambda y, a, b, *_, **o: 2 * math.prod(a) * b[-1],
            cpu.baddbmm_: lambda y, a, b, *_, **o: 2 * math.prod(a) * b[-1],
            cpu._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **o: sdpa_flop_count(
                q, k, v
            ),
            cpu._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **o: (
                sdpa_backward_flop_count(g, q, k, v)
            ),
        },
    )


def floor(base):
    """The fewest FLOPs of an update of this shape."""
    model = SD3(base, getattr(torch, args.dtype), device)
    cond = model.encode(["x"])
    x = torch.randn(1, *model.latent_shape(args.resolution), device=device)
    with counter() as forward, torch.no_grad():
        model.velocity(x, 0.5, cond)
    for name, layer in model.transformer.transformer_blocks[0].named_modules():
        if name.startswith("attn.") and name.endswith(
            ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        ):
            layer.register_forward_hook(
                lambda layer, x, y: y.requires_grad_()
            )  # where the first LoRA stands, the gradient ends
    with counter() as both:
        model.velocity(x, 0.5, cond).sum().backward()
    f, fb = forward.get_total_flops(), both.get_total_flops()
    learnt = args.num_steps - 1
    per_sample = (
        learnt * (fb + 2 * f) if args.script == "distill.py" else args.num_steps * f + learnt * (fb + f)
    )
    return per_sample * args.batch_size * (1 if args.guidance == 1 else 2)


def gpu_report(folder, base, rate):
    """What one step of distill.py's loop takes, in many sizes: {"rows": [...], "kernels": [(share,
    milliseconds, times, name), ...], "matrix_flops_per_second"}."""
    model, watch, rows, flops = SD3(base, getattr(torch, args.dtype), device), Watch(), [], {}
    for i, name in enumerate(("t0", "t1", "t2", "t3", "t4", "anchor", "student")):
        model.load_adapter(name, f"{folder}/{i}")
    model.train_adapter("student")
    watch.wrap_all()
    shape, null = model.latent_shape(args.resolution), model.null

    def step(size, teachers=3):
        x, cond = torch.randn(size, *shape, device=device), [c.expand(size, *c.shape[1:]) for c in model.null]
        with torch.no_grad():
            v_teacher = model.velocity(x, 0.5, cond, [f"t{i % teachers}" for i in range(size)], args.guidance)
            v_anchor = model.velocity(x, 0.5, cond, "anchor", args.guidance)
        v = model.velocity(x, 0.5, cond, "student", args.guidance)
        ((v - v_teacher).square() + 0.02 * (v - v_anchor).square()).sum().backward()

    def row(what, size, teachers=3):
        tokens = count_tokens(model)
        rows.append({"what": what, "size": size, "tokens": tokens})
        try:
            if tokens not in flops:
                with counter() as counted:
                    step(1)
                flops[tokens] = counted.get_total_flops()
            step(size, teachers)
            step(size, teachers)
            free()
            times, launched = [], []
            for _ in range(3):
                synchronize()
                began = time.perf_counter()
                step(size, teachers)
                launched.append(time.perf_counter() - began)
                synchronize()
                times.append(time.perf_counter() - began)
            rows[-1]["memory_gb"], rows[-1]["reserved_gb"] = most_memory()
            watch.seconds.clear()
            watch.on = True
            step(size, teachers)
            watch.on = False
        except Exception as error:  # out of memory, or no compiler here: the other rows count all the same
            rows[-1]["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            return
        seconds = statistics.median(times)
        done = size * flops[tokens]
        rows[-1] |= {
            "seconds": seconds,
            "launched": statistics.median(launched),
            "flops": done,
            "mfu": done / seconds / rate,
            "parts": dict(watch.seconds),
        }

    for size in (1, 4, 8, 16):
        row("", size)
    with torch.profiler.profile() as profiler:
        step(8)
        synchronize()
    kernels = [(e.self_cpu_time_total, e.count, e.key[:100]) for e in profiler.key_averages()]
    if device.type == "cuda":
        kernels = [
            (e.self_device_time_total, e.count, e.key[:100])
            for e in profiler.key_averages()
            if e.device_type == torch.autograd.DeviceType.CUDA
        ]
    total = sum(took for took, _, _ in kernels)
    longest = sorted(kernels, reverse=True)[:15]
    kernels = [(took / total, took / 1e3, times, name) for took, times, name in longest]
    row("five teachers", 8, teachers=5)
    model.null = null[0][:, :-128], null[1]
    row("128 tokens fewer", 8)
    model.null = null
    model.transformer.enable_gradient_checkpointing(model._checkpointed)
    for size in (1, 8, 16, 32):
        row("gradient checkpointing", size)
    model.transformer.disable_gradient_checkpointing()
    model.compile()
    for size in (8, 16):
        row("compiled", size)
    return {"rows": rows, "kernels": kernels, "matrix_flops_per_second": rate}


def print_report(report):
    each = args.batch_size * (args.num_steps - 1)
    rate = report["matrix_flops_per_second"] / 1e12
    print(
        f"a step of distill.py, milliseconds; MFU is of {rate:.3g} TFLOP/s, the rate of a large matrix "
        f"product; an update: {args.batch_size} samples x {args.num_steps - 1} steps\n"
    )
    print(
        "| micro-batch | tokens | a step | CPU busy | student | backward | teachers | anchor | MFU | "
        "an update, s | memory, GB (reserved) |"
    )
    print("|---" * 11 + "|")
    for r in report["rows"]:
        name = " ".join(filter(None, (str(r["size"]), r["what"])))
        if "failed" in r:
            print(f"| {name} | {r['tokens']} | {r['failed']}" + " |" * 9)
            continue
        parts = [r["parts"][part] for part in ("student", "backward", "teachers", "anchor or base")]
        times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (r["seconds"], r["launched"], *parts))
        update = each * r["seconds"] / r["size"]
        print(f"| {name} | {r['tokens']} | {times} | {r['mfu']:.0%} | {update:.2f} | {memory(r)} |")
    print("\nwhat takes longest, micro-batch 8:")
    for share, milliseconds, times, name in report["kernels"]:
        print(f"{share:6.1%} {milliseconds:9.2f} ms {times:6d} x {name}")


# ----------------------------------------------------------------------------------------------------------------------

if args.inside:
    base = os.path.join(args.inside, "base") if args.model in SIZES else args.model
    rate = matrix_rate(getattr(torch, args.dtype))
    if args.gpu_report:
        write_json(args.out, gpu_report(args.inside, base, rate))
        os._exit(0)
    figures = {"recipe": args.recipe[0]} | measure(
        lambda boundary: (ours if args.recipe == ["ours"] else walked_again)(args.inside, base, boundary)
    )
    free()
    figures |= {
        "floor": floor(base),
        "matrix_flops_per_second": rate,
        "mfu": figures["flops"] / figures["seconds"] / rate,
    }
    write_json(args.out, figures)
    os._exit(0)

with tempfile.TemporaryDirectory() as folder:
    base = (
        random_pipeline(os.path.join(folder, "base"), *SIZES[args.model])
        if args.model in SIZES
        else args.model
    )
    model = SD3(base, getattr(torch, args.dtype), device)
    size = sum(p.numel() for p in model.transformer.parameters()) / 1e6
    tokens = count_tokens(model)
    random_loras(folder, model, max(args.teachers, 5 * args.gpu_report) + 2)
    del model
    free()
    with open(os.path.join(folder, "prompts.txt"), "w") as f:
        f.writelines(
            f"a picture of {n}\n" for n in ("a red fox", "two cups", "a quiet harbour", "an old clock")
        )
    rows, failed = [], []
    for recipe in args.recipe:
        file = os.path.join(folder, "figures.json")
        command = [
            sys.executable,
            os.path.join(HERE, "bench.py"),
            *sys.argv[1:],
            "--recipe",
            recipe,
            "--inside",
            folder,
            "--out",
            file,
        ]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            failed.append(recipe)
            continue
        rows.append(json.load(open(file)))
        if args.out:
            write_json(args.out, rows)

where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
print(
    f"\n{args.script} on {args.model} ({size:.0f} M), {args.batch_size} samples x {args.num_steps} steps, "
    f"{args.resolution} px, {tokens} tokens, guidance {args.guidance:g}, {args.dtype}, "
    f"{args.teachers} teachers and an anchor; {where}, torch {torch.__version__}\n"
)
if args.gpu_report and rows:
    print_report(rows.pop())
elif rows:
    print(
        "| recipe | seconds | forwards (with a graph), samples | TFLOP | over the floor | MFU | "
        "memory, GB (reserved) | outside the network |"
    )
    print("|---" * 8 + "|")
for r in rows:
    outside = 1 - sum(
        r["parts"].get(part, 0) for part in ("student", "teachers", "anchor or base", "backward")
    )
    print(
        f"| {r['recipe']} | {r['seconds']:.2f} | {r['samples']['forwards']} ({r['samples']['with a graph']}) | {r['flops'] / 1e12:.3f} | "
        f"{r['flops'] / r['floor']:.2f} | {r['mfu']:.0%} | {memory(r)} | {outside:.1%} |"
    )
for r in rows:
    print(f"\n{r['recipe']}: " + ", ".join(f"{part} {share:.1%}" for part, share in r["parts"].items()))
    if r is not rows[0]:
        print(
            f"{r['recipe']} takes {r['seconds'] / rows[0]['seconds']:.2f} times the seconds of {rows[0]['recipe']}"
        )
if failed:
    die(f"--recipe {', '.join(failed)} failed: what was said stands above")
