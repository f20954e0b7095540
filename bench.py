"""What an update costs: runs the real distill.py or train_teacher.py, counts and times one update, and compares it with the floor, the fewest
operations that an update of this shape can do with, and with the way the released code goes about it.

    python bench.py                                             # distill.py on a random SD3 of 112 M parameters, two CPU cores, 3 minutes
    python bench.py --script train_teacher.py                   # stage 1
    python bench.py --recipe released                           # the same update, trajectory stored and walked again, a float32 copy per teacher
    python bench.py --recipe two-pass                           # ours, but with the trajectory stored and walked again
    python bench.py --model sd35m-random --teachers 3 --batch-size 12 --num-steps 10 --resolution 512 --guidance 4.5   # a GPU

`ours` is the script itself, started with flags of its own and watched from outside. The other recipes are written here with the same
functions. FLOPs are torch's flop counter's; floor: every sample's student forward and backward, one teacher's and the anchor's forward at every
learnt step, without LoRA. MFU is FLOPs over seconds and the rate of a large matrix product in the same data type, measured first.
"""

import argparse
import collections
import contextlib
import json
import os
import resource
import runpy
import sys
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import flow_sde
import rewards
from flow_sde import HERE, SD3, die, kl, randn, rollout, save_lora, sigma_schedule, transition, write_json

SIZES = {  # layers, heads, width of a head, layers with two attentions, text width, CLIP layers, VAE channels
    "tiny-random": (2, 2, 16, 1, 64, 1, 8), "mid-random": (4, 14, 64, 2, 512, 1, 16), "sd35m-random": (24, 24, 64, 13, 4096, 12, 128)}

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=flow_sde.Help)
add = parser.add_argument
add("--script", choices=["distill.py", "train_teacher.py"], default="distill.py", help="whose update")
add("--recipe", nargs="+", choices=["ours", "two-pass", "released"], default=["ours"], help="ways to make distill.py's update")
add("--model", default="mid-random", help=f"{', '.join(SIZES)}, or a diffusers folder; sd35m-random is SD3.5-Medium's architecture without T5's encoder")
add("--teachers", type=int, default=3, help="LoRA teachers, rank 32, besides the anchor")
add("--batch-size", type=int, default=6, help="trajectories an update")
add("--micro-batch-size", type=int, default=6, help="samples per forward")
add("--num-steps", type=int, default=5, help="sampling steps, of which the last is left out")
add("--resolution", type=int, default=128, help="pixels")
add("--guidance", type=float, default=1.0, help="of everyone")
add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the frozen networks; released: always float32")
add("--gradient-checkpointing", action="store_true", help="as distill.py's")
add("--updates", type=int, default=3, help="timed updates, after one that is not")
add("--out", help="JSON file for the figures")
args = parser.parse_args()
if args.script != "distill.py" and args.recipe != ["ours"]:
    die("--recipe is for --script distill.py")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# something to measure

def random_pipeline(folder, layers, heads, head_dim, dual, text, clip_layers, channels):
    """A StableDiffusion3Pipeline with random weights: SD3.5's classes and settings at any size, without T5's encoder (its rows are zeros)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
    torch.manual_seed(0)
    signs, ends = [chr(c) for c in range(33, 127)], ["<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate([*signs, *(s + "</w>" for s in signs), *ends])}
    real = text == 4096
    widths = (768, 1280) if real else (text // 8, text // 8)
    with torch.device(device):
        clips = [CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=w, intermediate_size=4 * w, num_hidden_layers=n, num_attention_heads=max(1, w // 64), projection_dim=w,
            bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=1)) for w, n in zip(widths, (clip_layers, 32 if real else clip_layers))]
        transformer = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=head_dim, num_attention_heads=heads,
            joint_attention_dim=text, caption_projection_dim=heads * head_dim, pooled_projection_dim=sum(widths), pos_embed_max_size=384 if real else 96,
            dual_attention_layers=tuple(range(dual)), qk_norm="rms_norm")
        vae = AutoencoderKL(block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels), down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=16, layers_per_block=2, norm_num_groups=min(32, channels // 2),
                            sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    tokenizers = [CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77) for pad in (ends[1], "!")]
    StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clips[0], tokenizer=tokenizers[0],
                             text_encoder_2=clips[1], tokenizer_2=tokenizers[1], text_encoder_3=None, tokenizer_3=None,
                             ).to(getattr(torch, args.dtype)).save_pretrained(folder)
    return folder


def random_loras(folder, model, count):
    """LoRAs of rank 32 with random weights in folder/0, folder/1, ..."""
    model.new_adapter("x", 32, 64)
    for i in range(count):
        gen = torch.Generator().manual_seed(i)
        save_lora({n: (A, torch.randn(B.shape, generator=gen) * 0.02, alpha) for n, (A, B, alpha) in model.lora("x").items()}, os.path.join(folder, str(i)))


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
    return 2 * n ** 3 / best


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------------------------
# watching an update

class Watch:
    """Seconds by part, forwards and backwards in samples, while `on`."""

    def __init__(self):
        self.seconds, self.counts, self.on, self.inside = collections.Counter(), collections.Counter(), False, 0

    def wrap(self, owner, name, part):
        """Time owner.name under the part's name (or the name that part(*arguments) gives); what runs inside another part belongs to that."""
        function = getattr(owner, name)

        def timed(*a, **k):
            if not self.on or self.inside:
                return function(*a, **k)
            self.inside += 1
            synchronize()
            began = time.perf_counter()
            try:
                return function(*a, **k)
            finally:
                synchronize()
                self.seconds[part if isinstance(part, str) else part(*a, **k)] += time.perf_counter() - began
                self.inside -= 1
        setattr(owner, name, timed)

    def count(self, owner):
        forward = owner.forward

        def counted(module, *a, **k):
            samples = len(k.get("hidden_states", a[0] if a else ()))
            self.counts["forwards"] += samples
            self.counts["forwards with a graph"] += samples * torch.is_grad_enabled()
            return forward(module, *a, **k)
        owner.forward = counted


class Done(BaseException):
    """The last update has been measured."""


def who(model, x, t, cond, adapter="base", guidance=1.0):
    """The part of an update that a call of SD3.velocity belongs to."""
    if torch.is_grad_enabled() or adapter in ("student", "teacher"):
        return "student's forward"
    return "anchor" if adapter in ("anchor", "base") else "teachers"


def measure(update):
    """Call update() until everything is known: one to warm up, the timed ones, one with a clock for every part, one with the flop counter."""
    watch = Watch()
    for owner, name, part in ((SD3, "encode", "text encoding"), (SD3, "velocity", who), (SD3, "decode", "decode"), (torch.Tensor, "backward", "backward"),
                              (torch.optim.AdamW, "step", "optimizer"), (rewards, "score_batch", "reward")):
        watch.wrap(owner, name, part)
    from diffusers import SD3Transformer2DModel
    watch.count(SD3Transformer2DModel)
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stack = contextlib.ExitStack()

    def boundary():
        """Called where an update begins."""
        synchronize()
        times.append(time.perf_counter())
        k = len(times) - 1                                        # updates made so far
        if k == 1 + args.updates:
            watch.on = True
            watch.counts.clear()
        elif k == 2 + args.updates:
            watch.on = False
            figures["counts"] = dict(watch.counts)
            watch.counter = stack.enter_context(FlopCounterMode(display=False))
        elif k == 3 + args.updates:
            figures["flops"] = watch.counter.get_total_flops()
            stack.close()
            raise Done
    figures = {}
    try:
        update(boundary)
    except Done:
        pass
    parted = times[2 + args.updates] - times[1 + args.updates]
    figures["seconds"] = sorted(b - a for a, b in zip(times[1:], times[2:2 + args.updates]))[args.updates // 2]
    figures["all seconds"] = [round(b - a, 3) for a, b in zip(times[1:], times[2:2 + args.updates])]
    figures["parts"] = {k: v / parted for k, v in watch.seconds.most_common()} | {"the rest": 1 - sum(watch.seconds.values()) / parted}
    figures["memory_gb"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
    return figures
