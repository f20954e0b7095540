"""What fits: the memory of distill.py on the published models, counted without a download or a GPU.

The transformers are built at their published sizes on PyTorch's meta device, which holds no numbers; a
forward of the student is made, and what it saves for the backward is added up. Text encoders' sizes are their
makers'. Counted besides: LoRAs of rank 32 (in 16 bits three teachers, an anchor and the start; in float32 the
student and its average), gradient and optimizer, the VAE, and 1 GB for the CUDA context and passing tensors.
All in bfloat16, one sample at a time (--micro-batch-size 1), which guidance makes two rows."""

import itertools
import math
import types

import diffusers
import torch
import torch.nn.functional as F

from flow_sde import blocks_of, family_of, fuse_norms

CLIP_L, CLIP_G, T5 = 0.123, 0.695, 4.762  # billions of parameters
SD35 = dict(qk_norm="rms_norm", in_channels=16, joint_attention_dim=4096, pooled_projection_dim=2048)
SD35_MEDIUM = SD35 | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
SD35_MEDIUM |= dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
SD35_LARGE = SD35 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)

# {model: (pipeline, transformer, settings other than its class's, pixels of a picture's side, pixels of a
# latent's, billions of parameters of each text encoder, shapes of an encoded prompt)}
PUBLISHED = {
    "SD3.5-Medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35_MEDIUM)
    + (512, 8, [CLIP_L, CLIP_G, T5], [(333, 4096), (2048,)]),
    "SD3.5-Large": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35_LARGE)
    + (512, 8, [CLIP_L, CLIP_G, T5], [(333, 4096), (2048,)]),
    "FLUX.1-dev": ("FluxPipeline", "FluxTransformer2DModel", dict(guidance_embeds=True))
    + (512, 8, [CLIP_L, T5], [(512, 4096), (768,)]),
    "FLUX.2-klein-base-4B": (
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        KLEIN | dict(guidance_embeds=False),
    )
    + (512, 8, [4.022], [(512, 7680)]),
    "FLUX.2-dev": ("Flux2Pipeline", "Flux2Transformer2DModel", {}, 512, 8, [24.011], [(512, 15360)]),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", {})
    + (512, 8, [8.292], [(512, 3584), (512,)]),
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", {}, 512, 8, [4.022], [(512, 2560)]),
    "SANA-1.6B": ("SanaPipeline", "SanaTransformer2DModel", {}, 1024, 32, [2.614], [(300, 2304), (300,)]),
}
BYTES = {None: 2, "int8": 1, "nf4": 0.5625}  # of a weight
CARDS = [(24, 1), (40, 1), (80, 1), (24, 8), (40, 8), (80, 8)]  # GB, how many
# Short names of the flags, and their price: how much slower, roughly, so that the cheapest that fits is shown
FLAGS = {
    "offload": ("O", 0.1),
    "checkpointing": ("C", 1),
    "int8": ("int8", 2),
    "nf4": ("nf4", 3),
    "shard": ("S", 6),
}


class Fused(torch.autograd.Function):
    """What a fused kernel on a GPU saves: its inputs, its output (attention), a number for every row."""

    @staticmethod
    def forward(ctx, with_output, x, *others):
        out = torch.empty_like(x)
        rows = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, *others, rows, *[out] * with_output)
        return out


def attention(query, key, value, *args, **options):
    return Fused.apply(True, query, key, value)


def rms_norm(x, dim, weight, eps):
    return Fused.apply(False, x)


def bare_model(name):
    """(a Model of a published size without numbers, text encoders or VAE, with a student to train; the shape
    of its latents)."""
    pipeline, kind, settings, pixels, unit, _, shapes = PUBLISHED[name]
    family = family_of(getattr(diffusers, pipeline))
    model = object.__new__(family)
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**settings).to(torch.bfloat16).requires_grad_(False).eval()
        model.null = [torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in shapes]
    fuse_norms(network)
    model.transformer, model.device, model.dtype = network, torch.device("meta"), torch.bfloat16
    model.applied, model.adapters, model.sources = types.SimpleNamespace(name="base"), {}, {}
    model.full, model.shard, model.guidable = {}, False, True
    model.embedded = bool(network.config.get("guidance_embeds"))
    model.scheduler = types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=1000))
    if pipeline == "ZImagePipeline":
        model.null = [list(model.null[0])]  # it takes lists
    with torch.device("meta"):
        model.new_adapter("student", 32, 64)
    for p in model.adapters["student"]:
        p.requires_grad_()
    side, channels = pixels // unit, network.config.in_channels
    return model, ((side // 2) ** 2, channels) if family.packed else (channels, side, side)


def saved_bytes(model, shape):
    """What the student's forward of one sample saves for the backward: (without, with
    --gradient-checkpointing, which saves the inputs of all blocks and recomputes one)."""
    weights = {p.untyped_storage()._cdata for p in model.transformer.parameters()}
    kept, inputs, began, of_blocks = {}, [], [], []

    def total():
        return sum(storage.nbytes() for storage in kept.values())

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def enter(block, args, kwargs):
        began.append(total())
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        inputs.append(sum(x.nbytes for x in given[:2]))  # tokens of picture and text; the rest is small

    def leave(block, args, output):
        of_blocks.append(total() - began[-1])

    hooks = [
        block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks_of(model.transformer)
    ]
    hooks += [block.register_forward_hook(leave) for block in blocks_of(model.transformer)]
    stock = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.velocity(torch.zeros(1, *shape, device="meta"), 0.5, model.null, "student", guidance=4.0)
    finally:
        F.scaled_dot_product_attention, F.rms_norm = stock
        for hook in hooks:
            hook.remove()
    return total(), total() - sum(of_blocks) + sum(inputs) + max(of_blocks)


def count(name):
    """A model's figures: billions of numbers, and GB that a sample saves."""
    model, shape = bare_model(name)
    in_blocks = 0
    for block in blocks_of(model.transformer):
        for layer in block.modules():
            in_blocks += layer.weight.numel() if isinstance(layer, torch.nn.Linear) else 0
    return {
        "in_blocks": in_blocks / 1e9,  # what --quantize takes
        "elsewhere": sum(p.numel() for p in model.transformer.parameters()) / 1e9 - in_blocks / 1e9,
        "encoders": PUBLISHED[name][5],
        "lora": sum(p.numel() for p in model.adapters["student"]) / 1e9,
        "saved": [n / 1e9 for n in saved_bytes(model, shape)],
    }


def memory(counted, flags=(), cards=1, samples=1):
    """GB on each card: {part: GB}."""
    how = next((flag for flag in flags if flag in BYTES), None)
    parts = cards if "shard" in flags else 1
    encoders = sum(n * (BYTES[how] / parts if n >= 1 else 2) for n in counted["encoders"])
    return {
        "transformer": (counted["in_blocks"] * BYTES[how] + counted["elsewhere"] * 2) / parts,
        "text encoders": 0 if "offload" in flags else encoders,
        "LoRAs": counted["lora"] * (5 * 2 + 2 * 4),
        "gradient, optimizer": counted["lora"] * (2 + 2) * 4,  # the gradient twice while it is reduced
        "saved": samples * counted["saved"]["checkpointing" in flags],
        "VAE, context": 0.3 + 1,
    }


def cheapest(counted, size, cards):
    """(short names of the flags that make it fit and cost the least, GB), or None."""
    found = []
    for n in range(len(FLAGS)):
        for flags in itertools.combinations(FLAGS, n):
            together = {"int8", "nf4"} <= {*flags} or {"shard", "nf4"} <= {*flags}
            if together or "shard" in flags and (cards == 1 or "offload" in flags):
                continue
            parts = memory(counted, flags, cards)
            if "offload" in flags:  # while they encode, the encoders are there and the transformer may be not
                encoding = memory(counted, [f for f in flags if f != "offload"], cards)
                encoding |= {"transformer": 0, "saved": 0}
                parts = max(parts, encoding, key=lambda parts: sum(parts.values()))
            if sum(parts.values()) < 0.97 * size:
                price = sum(FLAGS[flag][1] for flag in flags)
                found.append((price, " ".join(FLAGS[flag][0] for flag in flags), sum(parts.values())))
    return min(found)[1:] if found else None


def table():
    """(Markdown, the figures)."""
    names = "".join(f" {cards} x {size} GB |" for size, cards in CARDS)
    lines = [f"| model | weights | saved (C) |{names}", "|---" * (3 + len(CARDS)) + "|"]
    figures = {}
    for name in PUBLISHED:
        counted = figures[name] = count(name)
        weights = 2 * (counted["in_blocks"] + counted["elsewhere"])
        cells = [name, f"{weights:.1f} + {2 * sum(counted['encoders']):.1f}"]
        cells += ["{:.1f} ({:.1f})".format(*counted["saved"])]
        for size, cards in CARDS:
            fits = cheapest(counted, size, cards)
            cells.append(f"{fits[0] or 'as it is'}: {math.ceil(fits[1])}" if fits else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), figures
