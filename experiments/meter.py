"""What bench.py measures, and what it measures with: random models and LoRAs, a clock on every part of an
update, the memory, a counter of operations."""

import collections
import gc
import math
import pathlib
import resource
import threading
import time

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import rewards
from flow_sde import HERE, SD3, save_lora

# Layers, heads, a head's width, layers with two attentions, tokens along a picture's side, (width, layers) of
# the CLIPs, (width, inner width, layers) of T5, channels of the VAE
SIZES = {
    "tiny-random": (2, 2, 16, 1, 96, [(8, 1), (8, 1)], (64, 64, 1), 8),
    "mid-random": (4, 14, 64, 2, 96, [(64, 1), (64, 1)], (512, 512, 1), 16),
    "sd35m-random": (24, 24, 64, 13, 384, [(768, 12), (1280, 32)], (4096, 10240, 24), 128),
}
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------------
# something to measure


def random_pipeline(folder, dtype, with_t5, layers, heads, head_width, dual, grid, clips, t5, channels):
    """A StableDiffusion3Pipeline with random weights, saved in `folder`: SD3.5's classes and settings at any
    size, with the toy's tokenizers. Without --t5 it has no T5 encoder (its rows are zeros)."""
    torch.manual_seed(0)
    pipe = SD3(f"{HERE}/toy/base").pipe
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 77
    pipe.tokenizer_3.model_max_length = 512
    with torch.device(device):
        for name, (width, depth) in zip(("text_encoder", "text_encoder_2"), clips):
            size = dict(hidden_size=width, intermediate_size=4 * width, projection_dim=width)
            size |= dict(num_hidden_layers=depth, num_attention_heads=max(1, width // 64))
            config = getattr(pipe, name).config
            config.update(size | dict(max_position_embeddings=77))
            setattr(pipe, name, transformers.CLIPTextModelWithProjection(config))
        width, inner_width, depth = t5
        if with_t5:
            config = pipe.text_encoder_3.config
            config.update(dict(d_model=width, d_ff=inner_width, d_kv=64, num_layers=depth))
            config.update(dict(num_heads=max(1, width // 64)))
            pipe.text_encoder_3 = transformers.T5EncoderModel(config)
        else:
            pipe.text_encoder_3 = pipe.tokenizer_3 = None
        size = dict(num_layers=layers, num_attention_heads=heads, attention_head_dim=head_width)
        size |= dict(joint_attention_dim=width, caption_projection_dim=heads * head_width)
        size |= dict(pooled_projection_dim=sum(width for width, _ in clips), pos_embed_max_size=grid)
        size |= dict(in_channels=16, out_channels=16, patch_size=2, sample_size=128)
        size |= dict(dual_attention_layers=tuple(range(dual)))
        pipe.transformer = pipe.transformer.from_config(pipe.transformer.config, **size)
        size = dict(block_out_channels=[channels, 2 * channels, 4 * channels, 4 * channels])
        size |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        size |= dict(layers_per_block=2, norm_num_groups=min(32, channels // 2), latent_channels=16)
        size |= dict(mid_block_add_attention=True, scaling_factor=1.5305, shift_factor=0.0609)
        pipe.vae = pipe.vae.from_config(pipe.vae.config, **size)
    pipe.to(dtype).save_pretrained(folder)


def random_loras(folder, model, count):
    """LoRAs of rank 32 with random weights in folder/0, folder/1, ..."""
    model.new_adapter("x", 32, 64)
    untrained = model.lora("x")
    for i in range(count):
        gen = torch.Generator().manual_seed(i)
        lora = {}
        for name, (A, B, alpha) in untrained.items():
            lora[name] = A, 0.02 * torch.randn(B.shape, generator=gen), alpha
        save_lora(lora, f"{folder}/{i}")


# ------------------------------------------------------------------------------------------------------------
# time and memory


def free():
    """Give the GPU's memory back, for models hang in cycles and PyTorch keeps what it once had; watch its
    peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def most_memory():
    """The most memory, in GB, that tensors have had since the last `free`, and that PyTorch held for them; on
    a CPU, the most that this process has had, and 0."""
    if device.type == "cuda":
        tensors, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return dict(memory_gb=tensors / 1e9, reserved_gb=held / 1e9)
    status = pathlib.Path("/proc/self/status")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes, on macOS
    if status.exists():  # on Linux, where ru_maxrss counts the parent's memory too
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        most = 1024 * int(peak.split()[1])
    return dict(memory_gb=most / 1e9, reserved_gb=0.0)


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize()


class Watch:
    """Seconds by part, and forwards in samples, while `on`."""

    def __init__(self):
        self.seconds, self.counts = collections.Counter(), collections.Counter()
        self.on = self.inside = False
        self.wrap(SD3, "encode", "text encoding")
        self.wrap(SD3, "velocity", velocity_part)
        self.wrap(SD3, "decode", "decode")
        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(torch.optim.AdamW, "step", "optimizer")
        self.wrap(rewards, "score_batch", "reward, beside the sampling")
        self.count_forwards(diffusers.SD3Transformer2DModel)

    def wrap(self, owner, name, part):
        """Time owner.name as a part (or the part that part(*arguments) says); what runs inside another part
        belongs to that one. Rewards run in threads of their own, beside the sampling."""
        function = getattr(owner, name)

        def timed(*a, **k):
            beside = threading.current_thread() is not threading.main_thread()
            if not self.on or (self.inside and not beside):
                return function(*a, **k)
            if not beside:
                self.inside = True
            synchronize()
            began = time.perf_counter()
            try:
                return function(*a, **k)
            finally:
                synchronize()
                key = part if isinstance(part, str) else part(*a, **k)
                self.seconds[key] += time.perf_counter() - began
                if not beside:
                    self.inside = False

        setattr(owner, name, timed)

    def count_forwards(self, network):
        forward = network.forward

        def counted(module, *a, **k):
            samples = len(a[0] if a else k["hidden_states"])
            self.counts["forwards"] += samples
            self.counts["with a graph"] += samples * torch.is_grad_enabled()
            return forward(module, *a, **k)

        network.forward = counted


def velocity_part(model, x, t, cond, adapter="base", guidance=1.0):
    """Whose forward a call of SD3.velocity is."""
    if torch.is_grad_enabled() or adapter in ("student", "teacher"):
        return "student"
    return "anchor or base" if adapter in ("anchor", "base") else "teachers"


# ------------------------------------------------------------------------------------------------------------
# operations


def product_flops(y, a, b, *rest, **options):
    return 2 * math.prod(a) * b[-1]


def attention_flops(q, k, v, *rest, **options):
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad, q, k, v, *rest, **options):
    return sdpa_backward_flop_count(grad, q, k, v)


def counter():
    """torch's flop counter, taught the CPU's attention, and products that are added in place (it gives the
    shapes of an operation's tensors)."""
    aten = torch.ops.aten
    unknown = {aten.addmm_: product_flops, aten.baddbmm_: product_flops}
    unknown[aten._scaled_dot_product_flash_attention_for_cpu] = attention_flops
    unknown[aten._scaled_dot_product_flash_attention_for_cpu_backward] = attention_backward_flops
    return FlopCounterMode(display=False, custom_mapping=unknown)


def matrix_rate(dtype):
    """FLOP/s of a large matrix product: what the device can do."""
    n, times = (8192, 30) if device.type == "cuda" else (2048, 5)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
