"""What every stage of Flow-OPD (arXiv 2605.08063) shares. Section 1 is the mathematics of the flow-SDE sampler on plain
tensors. Section 2 is a thin adapter to Stable Diffusion 3: one frozen base, any number of LoRA adapters on it. Section 3 is
what a run reads and leaves behind: prompts, checkpoints, logs, pictures.

Conventions, stated once. t in [0, 1] is the scheduler's sigma: x_t = (1-t) x_0 + t eps, and the model predicts v = eps - x_0.
Sampling runs from t = 1 down to 0; one step goes from t to t_next < t, with dt = t - t_next. A transition is a Gaussian with a
mean and one number `std`, and std ALWAYS includes sqrt(dt). Log-probabilities and KLs are averaged over the latent's dimensions
("nats per dimension", Flow-GRPO's convention: a clip range of 1e-4 means nothing without it). t, t_next and std are Python
floats: all samples of a batch are at the same step, and no formula waits for a GPU.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # their notes on optional packages are not this program's output
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


# ======================================================================================================================
# 1. The flow-SDE
# ======================================================================================================================

def sigma_schedule(num_steps, shift=3.0, num_train_timesteps=1000):
    """The num_steps + 1 sigmas from 1 to 0 that diffusers' FlowMatchEulerDiscreteScheduler visits, as floats.

    The shift, s -> shift s / (1 + (shift - 1) s), is applied twice to all but the ends: the scheduler's smallest sigma is
    already shifted when the evenly spaced grid is laid, and the grid is shifted again."""
    warp = lambda s: shift * s / (1 + (shift - 1) * s)
    return [float(warp(s)) for s in np.linspace(1.0, warp(1 / num_train_timesteps), num_steps)] + [0.0]


def transition(x, v, t, t_next, noise_level, sde="flow"):
    """The Gaussian that one sampling step draws from. x, v: (B, ...) -> mean (B, ...), std float.

    ode   mean = x - v dt                                                                 std = 0
    flow  mean = x - [v + s^2/(2t) (x + (1-t) v)] dt,  s = a sqrt(t / (1-t))              std = s sqrt(dt)
          (Flow-GRPO, arXiv 2505.05470; eq. 5 of the paper; a is the noise level. At t = 1, s is taken with 1 - t_next.)
    cps   mean = (1-t') (x - t v) + sqrt(t'^2 - std^2) (x + (1-t) v)                      std = t' sin(a pi/2)
          (coefficients-preserving sampling, arXiv 2509.05952; t' is t_next)"""
    dt = t - t_next
    if sde == "ode" or noise_level == 0:
        return x - v * dt, 0.0
    if sde == "flow":
        s = noise_level * math.sqrt(t / (1 - t if t < 1 else 1 - t_next))
        return x - (v + s * s / (2 * t) * (x + (1 - t) * v)) * dt, s * math.sqrt(dt)
    if sde == "cps":
        std = t_next * math.sin(noise_level * math.pi / 2)
        return (1 - t_next) * (x - t * v) + math.sqrt(t_next ** 2 - std ** 2) * (x + (1 - t) * v), std
    raise ValueError(f"sde must be flow, cps or ode, not {sde!r}")


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over dimensions. x_next, mean: (B, ...) -> (B,). A deterministic step has none."""
    if std == 0:
        raise ValueError("a step without noise has no log-probability")
    z = (x_next - mean) / std
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def kl(mean, mean_teacher, std):
    """KL(N(mean, std^2) || N(mean_teacher, std^2)) = ||mean - mean_teacher||^2 / (2 std^2), averaged over dimensions -> (B,).

    For the flow-SDE at t < 1 this is w(t) ||v - v_teacher||^2 with w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2: distillation on the
    student's own states is a weighted regression of velocities."""
    return (mean - mean_teacher).square().flatten(1).mean(1) / (2 * std ** 2)


WEIGHTINGS = ("uniform", "kl", "kl-dt", "dt2")


def step_weights(steps, noise_level, sde, weighting):
    """What each step's KL counts in the loss: {t: factor}, for steps [(t, t_next), ...]. A step's KL is w(t) times its
    velocity distance d = mean (v - v_teacher)^2.

    kl       w(t) d: the KL itself, the paper's loss
    uniform  the mean of all steps' w(t), times d: steps weigh alike, and the loss as a whole stays as large as the KL
    kl-dt    dt w(t) d: what the released code of Flow-OPD descends, since its std leaves dt out
    dt2      dt^2/2 d: the distance of two deterministic steps (DiffusionOPD, arXiv 2605.15055)"""
    w = {}
    for t, t_next in steps:
        mean, std = transition(0.0, 1.0, t, t_next, noise_level, sde)  # of a distance of 1
        w[t] = mean ** 2 / (2 * std ** 2)
    if weighting == "kl":
        return dict.fromkeys(w, 1.0)
    if weighting == "uniform":
        return {t: sum(w.values()) / len(w) / wt for t, wt in w.items()}
    if weighting == "kl-dt":
        return {t: t - t_next for t, t_next in steps}
    if weighting == "dt2":
        return {t: (t - t_next) ** 2 / 2 / w[t] for t, t_next in steps}
    raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")


def centred_log_ratio(x_next, mean, mean_old, std):
    """log pi(x_next) - log pi_old(x_next) + ||mean - mean_old||^2 / (2 std^2), averaged over dimensions: all (B, ...) -> (B,).

    On what the old policy draws a log-ratio has a negative mean, the more the policy has drifted, so a clip range would cut
    one side only; with that mean taken off (GRPO-Guard, arXiv 2510.22319) it is (x_next - mean_old)(mean - mean_old) / std^2."""
    return ((x_next - mean_old) * (mean - mean_old)).flatten(1).mean(1) / std ** 2


def clipped_surrogate(log_ratio, advantage, clip_range):
    """PPO's loss, -min(ratio A, clip(ratio) A), with ratio = exp(log pi_new - log pi_old). All (B,) -> (B,)."""
    assert log_ratio.shape == advantage.shape, "one number per sample each"
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


Step = namedtuple("Step", "x v t t_next x_next log_prob")


def rollout(velocity, x, sigmas, noise_levels, sde, randn):
    """Sample a trajectory, one transition at a time. Yields Step(x, v, t, t_next, x_next, log_prob).

    velocity(x, t) -> v; noise_levels: one number, or one per step; randn() -> noise like x. The states are data (no gradient
    flows through the sampling), but v carries whatever graph `velocity` builds, so the caller may back-propagate a loss of the
    step before it asks for the next one. log_prob is None where the step has no noise."""
    if not isinstance(noise_levels, (list, tuple)):
        noise_levels = [noise_levels] * (len(sigmas) - 1)
    for t, t_next, noise_level in zip(sigmas[:-1], sigmas[1:], noise_levels, strict=True):
        v = velocity(x, t)
        mean, std = transition(x, v.detach(), t, t_next, noise_level, sde)
        x_next = mean + std * randn() if std > 0 else mean
        yield Step(x, v, t, t_next, x_next, log_prob(x_next, mean, std) if std > 0 else None)
        x = x_next


def generators(seed, step, indices):
    """One random generator per sample, a pure function of (seed, step, index in the global batch): what a sample draws
    depends neither on the batch it sits in nor on the number of processes."""
    seeds = [int(np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] >> 1) for i in indices]
    return [torch.Generator().manual_seed(s) for s in seeds]


def randn(gens, shape, device):
    """Noise of shape (len(gens), *shape), float32, one sample from each generator."""
    return to_device(torch.stack([torch.randn(shape, generator=g) for g in gens]), device)


def to_device(values, device):
    """Numbers as a tensor on the device, sent from pinned memory: the CPU does not wait for what the GPU has yet to do."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else values


# ======================================================================================================================
# 2. Stable Diffusion 3: one frozen base, everything else is an adapter on it
# ======================================================================================================================

# The attention projections that Flow-GRPO's and Flow-OPD's LoRAs adapt (not attn2, the second attention of SD3.5-M's first blocks).
TARGETS = ["attn." + p for p in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]


class SD3:
    """A Stable Diffusion 3 pipeline with named LoRA adapters on one frozen transformer, each asked for by name, per sample. `routes` says who
    answers which rows of a batch; when nothing is asked it names the adapter that is trained, which is whom gradient checkpointing
    finds when it computes a block again. (With peft's switches, another adapter between a forward and its backward costs the student
    its gradient without an error.) A teacher that is no LoRA but a whole transformer of its own stands beside the base in `full`.

    dtype is the frozen networks', and what frozen LoRAs are computed in; the trained LoRA, latents, guidance and the SDE are float32.
    use_t5=False leaves out the largest text encoder (its tokens are zeros, as in diffusers); offload keeps the text encoders in the
    CPU's memory but while they encode. max_sequence_length is T5's, in tokens."""

    def __init__(self, model, dtype=torch.float32, device="cpu", use_t5=True, offload=False, gradient_checkpointing=False,
                 max_sequence_length=256):
        import warnings
        from diffusers import StableDiffusion3Pipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # `dtype` is silently ignored by diffusers 0.37
        if max_sequence_length > 512:
            die(f"--max-sequence-length {max_sequence_length}: the pipeline takes at most 512")
        has_t5 = check_model(model).get("text_encoder_3", [None])[0] is not None
        try:
            self.pipe = StableDiffusion3Pipeline.from_pretrained(
                model, torch_dtype=dtype, **({} if use_t5 and has_t5 else {"text_encoder_3": None, "tokenizer_3": None}))
        except (OSError, ValueError) as error:
            die(f"--model {model}: cannot be loaded: {str(error).splitlines()[0]}")
        self.transformer = self.pipe.transformer
        self.device, self.dtype, self.full, self.offload = device, dtype, {}, offload
        self.peft, self.routes = None, []  # the transformer in its PeftModel, once there is an adapter; [(adapter, rows)]
        torch.backends.cuda.matmul.allow_tf32 |= dtype != torch.float32  # the trained LoRA's inputs are of half precision anyway
        self.text_encoders = [e for e in (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3) if e is not None]
        for module in (self.transformer, self.pipe.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
            if not (offload and module in self.text_encoders):
                module.to(device)
        self.pipe.vae.to(torch.float32)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        t5 = self.pipe.tokenizer_3
        self.max_length = max_sequence_length if t5 is None else min(max_sequence_length, t5.model_max_length)
        self.shift = self.pipe.scheduler.config.shift
        self.null = self.encode([""])

    def latent_shape(self, resolution):
        """(C, h, w) of a square picture; a resolution the model cannot draw is refused."""
        side, rest = divmod(resolution, self.pipe.vae_scale_factor)
        config = self.transformer.config
        unit, most = self.pipe.vae_scale_factor * config.patch_size, config.pos_embed_max_size * config.patch_size
        if rest or side % config.patch_size or not 0 < side <= most:
            die(f"--resolution {resolution}: this model draws multiples of {unit} up to {most * self.pipe.vae_scale_factor}")
        return config.in_channels, side, side

    @torch.no_grad()
    def encode(self, prompts):
        """list of B strings -> (embeds (B, L, D), pooled (B, P)); a prompt that stands there twice is encoded once."""
        unique = list(dict.fromkeys(prompts))
        tensors = [t for e in self.text_encoders for t in (*e.parameters(), *e.buffers())] if self.offload else []
        resting = [t.data for t in tensors]
        for t in tensors:
            t.data = t.data.to(self.device)
        parts = []
        for i in range(0, len(unique), 16):
            texts = unique[i:i + 16]
            embeds, _, pooled, _ = self.pipe.encode_prompt(texts, texts, texts, device=self.device, do_classifier_free_guidance=False,
                                                           max_sequence_length=self.max_length)
            parts.append((embeds.to(self.dtype), pooled.to(self.dtype)))
        for t, data in zip(tensors, resting):  # nothing is copied back: the weights have not changed
            t.data = data
        rows = [unique.index(p) for p in prompts]
        return tuple(torch.cat(kind)[rows] for kind in zip(*parts))

    def velocity(self, x, t, cond, adapter="base", guidance=1.0):
        """v(x_t, t | cond) in float32, with classifier-free guidance v = v_uncond + g (v_cond - v_uncond).

        adapter: a name, or one name per sample; "base" is the bare model. guidance: a number, or one per sample. Conditional
        and unconditional halves run in one forward, and a sample whose guidance is 1 has no unconditional half."""
        names = [adapter] * len(x) if isinstance(adapter, str) else list(adapter)
        scales = [float(guidance)] * len(x) if isinstance(guidance, (int, float)) else list(guidance)
        assert len(names) == len(scales) == len(x) == len(cond[0]), "one adapter, one guidance and one prompt per sample"
        guided = [i for i, g in enumerate(scales) if g != 1]
        embeds, pooled, x_in = *cond, x
        if guided:
            embeds = torch.cat([embeds, self.null[0].expand(len(guided), -1, -1)])
            pooled = torch.cat([pooled, self.null[1].expand(len(guided), -1)])
            x_in = torch.cat([x, x[guided]])
            names += [names[i] for i in guided]
        v = self._forward(x_in.to(self.dtype), t, embeds, pooled, names).float()
        if not guided:
            return v
        v_cond, v_uncond = v[:len(x)], v[len(x):]
        if len(guided) == len(x) and len(set(scales)) == 1:
            return v_uncond + scales[0] * (v_cond - v_uncond)
        g, index = to_device([scales[i] for i in guided], x.device).view(-1, 1, 1, 1), to_device(guided, x.device)
        return v_cond.index_copy(0, index, v_uncond + g * (v_cond[index] - v_uncond))

    def _forward(self, x, t, embeds, pooled, names):
        """The network of every sample's name at (x, t). The adapters of a batch share a forward, each with one slice of the rows."""
        alone = next((n for n in names if n in self.full), None)
        if alone and set(names) != {alone}:  # one network at a time
            v = torch.empty_like(x)
            for rows in ([i for i, n in enumerate(names) if n == alone], [i for i, n in enumerate(names) if n != alone]):
                v[rows] = self._forward(x[rows], t, embeds[rows], pooled[rows], [names[i] for i in rows])
            return v
        assert set(names) <= {"base", *self.full, *(self.peft.peft_config if self.peft else ())}, names
        counts = Counter(names)
        order = sorted(range(len(names)), key=lambda i: list(counts).index(names[i]))
        ends = itertools.accumulate(counts.values())
        routes = [(n, slice(end - counts[n], end)) for n, end in zip(counts, ends) if n != "base" and n != alone]
        if sorted_here := order != list(range(len(names))):
            index = to_device(order, x.device)
            x, embeds, pooled = x[index], embeds[index], pooled[index]
        before, self.routes = self.routes, routes
        try:
            v = self.full.get(alone, self.transformer)(
                hidden_states=x, timestep=torch.full((len(x),), t * 1000, device=x.device), encoder_hidden_states=embeds,
                pooled_projections=pooled, return_dict=False)[0]
        finally:
            self.routes = before
        return v[index.argsort()] if sorted_here else v

    def _lora_forward(self, layer, x):
        """A linear layer's W x + alpha/r B A x, every row with its own adapter's A and B."""
        y = layer.base_layer(x)
        for name, rows in self.routes:
            if name in layer.lora_A:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                dtype = A.dtype if A.requires_grad else x.dtype
                whole = rows == slice(0, len(x)) or rows is None
                few = F.linear((x if whole else x[rows]).to(dtype), A.to(dtype)) * layer.scaling[name]
                delta = F.linear(few, B.to(dtype)).to(y.dtype)
                if whole:
                    y = y + delta
                else:
                    y[rows] += delta
        return y

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1]; a million pixels at a time, to bound the memory."""
        config = self.pipe.vae.config
        latents = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        at_once = max(1, 2 ** 20 // (latents[0, 0].numel() * self.pipe.vae_scale_factor ** 2))
        return torch.cat([self.pipe.vae.decode(z).sample for z in latents.split(at_once)]).div(2).add(0.5).clamp(0, 1)

    @torch.no_grad()
    def generate(self, prompts, gens, num_steps, resolution, adapter="base", guidance=1.0, noise_level=0.0, sde="flow"):
        """Pictures (B, 3, H, W) in [0, 1]; noise_level 0 is the deterministic sampler, equal to the diffusers pipeline's."""
        shape, cond = self.latent_shape(resolution), self.encode(prompts)
        draw = lambda: randn(gens, shape, self.device)
        velocity = lambda x, t: self.velocity(x, t, cond, adapter, guidance)
        for step in rollout(velocity, draw(), sigma_schedule(num_steps, self.shift), noise_level, sde, draw):
            pass
        return self.decode(step.x_next)

    def save_pipeline(self, folder, name):
        """A stand-alone diffusers pipeline with an adapter merged into its weights. The model is of no use after it."""
        if self.peft is not None:
            self.pipe.transformer = self.peft.merge_and_unload(adapter_names=[name])
        self.pipe.vae.to(self.dtype)
        folder = folder.rstrip("/")
        self.pipe.save_pretrained(folder + ".new")
        os.rename(folder + ".new", folder)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_teacher(self, name, path):
        """A LoRA, as load_adapter; or a full fine-tune: the folder or hub id of a pipeline or of its transformer."""
        folder = transformer_folder(locate(path))
        if not folder:
            return self.load_adapter(name, path)
        from diffusers import SD3Transformer2DModel
        try:
            network = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=self.dtype)
        except (OSError, ValueError) as error:
            die(f"{path}: its transformer cannot be loaded: {str(error).splitlines()[0]}")
        ours, theirs = self.transformer.config, network.config
        if odd := [f"{k} is {theirs[k]}, the model's {ours[k]}" for k in ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim",
                                                                          "pos_embed_max_size") if theirs[k] != ours[k]]:
            die(f"{path}: a transformer that does not fit this model: {listing(odd)}")
        self.full[name] = network.to(self.device).requires_grad_(False).eval()

    def new_adapter(self, name, rank, alpha, seed=0):
        """An untrained LoRA on the eight attention projections: A Gaussian, B zero, so it starts as the base."""
        from peft import LoraConfig
        modules = [n for n, _ in self.pipe.transformer.named_modules() if n.endswith(tuple("." + s for s in TARGETS))]
        torch.manual_seed(seed)
        self._attach(name, LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=modules))

    def load_adapter(self, name, path):
        """A LoRA from a PEFT folder, a diffusers LoRA file or its folder, or a hub id. Every key must fit; what does not is named."""
        lora, config = read_lora(path)
        if config:
            wanted = config["target_modules"]
            matches = lambda n: re.fullmatch(wanted, n) if isinstance(wanted, str) else any(n == w or n.endswith("." + w) for w in wanted)
            missing = [n for n, m in self._linears().items() if matches(n) and n not in lora]
            if missing:
                die(f"{path}: its adapter_config.json targets {len(missing)} layers for which it has no weights: {listing(missing)}")
        layers = self._linears()
        unknown = [n for n in lora if n not in layers]
        if unknown:
            die(f"{path}: {len(unknown)} of its layers are not in this model: {listing(unknown)}")
        misfits = [f"{n} is {(b.shape[0], a.shape[1])}, the model's {tuple(layers[n].weight.shape)}"
                   for n, (a, b, _) in lora.items() if (b.shape[0], a.shape[1]) != tuple(layers[n].weight.shape)]
        if misfits:
            die(f"{path}: LoRA shapes do not fit this model: {listing(misfits)}")
        self.add_adapter(name, lora)

    def add_adapter(self, name, lora):
        """An adapter from {module: (A (r, in), B (out, r), alpha)}, which adds alpha/r B A to the module's weight."""
        self._attach(name, lora_config(lora))
        with torch.no_grad():
            for (n, kind), p in self.weights(name).items():
                p.copy_(lora[n][0 if kind == "A" else 1])

    def lora(self, name):
        """An adapter as {module: (A, B, alpha)}; the inverse of add_adapter."""
        weights, layers = self.weights(name), dict(self.pipe.transformer.named_modules())
        return {n: (p.detach(), weights[n, "B"].detach(), layers[n].scaling[name] * len(p)) for (n, kind), p in weights.items() if kind == "A"}

    def copy_adapter(self, source, name):
        """A frozen twin of an adapter under another name."""
        import copy
        self._attach(name, copy.deepcopy(self.peft.peft_config[source]))
        with torch.no_grad():
            for p, q in zip(self.weights(name).values(), self.weights(source).values(), strict=True):
                p.copy_(q)

    def train_adapter(self, name):
        """Make this adapter the active one and the only one with gradients; returns its parameters (float32)."""
        self.peft.requires_grad_(False)
        self.routes = [(name, None)]
        return [p.requires_grad_(True) for p in self.weights(name).values()]

    def weights(self, name):
        """{(module, "A" or "B"): parameter} of an adapter."""
        found = {}
        for key, p in self.pipe.transformer.named_parameters():
            if m := re.fullmatch(rf"(.+)\.lora_([AB])\.{name}\.weight", key):
                found[m[1], m[2]] = p
        return found

    def _linears(self):
        """{module name as in the bare model: its linear layer}."""
        return {n.removesuffix(".base_layer"): m for n, m in self.pipe.transformer.named_modules()
                if isinstance(m, torch.nn.Linear) and ".lora_" not in n}

    def _attach(self, name, config):
        from peft import PeftModel
        if hasattr(torch.nn.ModuleDict(), name):
            die(f"{name}: PyTorch uses that name itself; call the task or model something else")
        if self.peft is None:
            self.peft = PeftModel(self.pipe.transformer, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        for p in self.weights(name).values():
            p.data = p.data.float()
            p.requires_grad_(False)
        for layer in self.pipe.transformer.modules():
            if hasattr(layer, "lora_A"):  # peft keeps the weights, but its forward for several adapters waits for the GPU in every layer
                layer.forward = functools.partial(self._lora_forward, layer)
        self.peft.eval()


def read_lora(path):
    """A LoRA as {module: (A (r, in), B (out, r), alpha)} float32, and its adapter_config.json ({} for the diffusers layout)."""
    from safetensors import safe_open
    folder = locate(path)
    if transformer_folder(folder):
        die(f"{path}: a full fine-tune; here only a LoRA will do")
    if os.path.isdir(folder):
        names = [f for f in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors") if os.path.exists(os.path.join(folder, f))]
        if not names:
            die(f"{path}: neither adapter_model.safetensors (PEFT) nor pytorch_lora_weights.safetensors (diffusers) is in it")
        file = os.path.join(folder, names[0])
    else:
        file = folder
    try:
        with safe_open(file, "pt") as f:
            tensors, header = {k: f.get_tensor(k).float() for k in f.keys()}, f.metadata() or {}
    except Exception as error:
        die(f"{file}: not a readable safetensors file ({error})")
    config_file = os.path.join(os.path.dirname(file), "adapter_config.json")
    is_peft = any(k.startswith("base_model.model.") for k in tensors)
    config = json.load(open(config_file)) if is_peft and os.path.exists(config_file) else {}
    if is_peft and not config:
        die(f"{path}: a PEFT LoRA without its adapter_config.json")
    meta = config or {k.removeprefix("transformer."): v for k, v in json.loads(header.get("lora_adapter_metadata", "{}")).items()}
    parts, alphas, strange = {}, {}, []
    for key, tensor in tensors.items():
        plain = re.sub(r"^(transformer\.)?(base_model\.model\.)?", "", key)
        if m := re.fullmatch(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up)(\.default)?\.weight", plain):
            parts.setdefault(m[1], {})["A" if m[2] in ("lora_A", "lora.down") else "B"] = tensor
        elif plain.endswith(".alpha"):
            alphas[plain.removesuffix(".alpha")] = tensor.item()
        else:
            strange.append(key)
    strange += [f"{n} (only lora_{'/'.join(p)})" for n, p in parts.items() if len(p) != 2]
    if strange or not parts or meta.get("use_dora"):
        die(f"{path}: not a plain LoRA of SD3's transformer; unexpected: {listing(strange or sorted(tensors))}")
    lora = {}
    for n, p in parts.items():
        rank = p["A"].shape[0]
        pattern = next((v for k, v in (meta.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", n)), None)  # peft's rule
        alpha = alphas.get(n, pattern if pattern is not None else meta.get("lora_alpha", rank))
        lora[n] = p["A"], p["B"], alpha * math.sqrt(rank) if meta.get("use_rslora") else alpha
    return lora, config


def save_lora(lora, folder):
    """Write {module: (A, B, alpha)} in both layouts: PEFT's (adapter_config.json, adapter_model.safetensors), and the one that
    `pipe.load_lora_weights(folder)` reads (pytorch_lora_weights.safetensors), with the alpha in its metadata: without it diffusers
    takes alpha = rank, and the picture is another one."""
    from safetensors.torch import save
    final, folder = str(folder).rstrip("/"), str(folder).rstrip("/") + ".new"  # written beside, then renamed
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    config = lora_config(lora).to_dict() | {"inference_mode": True, "target_modules": sorted(lora), "peft_type": "LORA"}
    config = json.loads(json.dumps(config, default=str))
    tensors = {f"{n}.lora_{kind}.weight": p.detach().cpu().contiguous() for n, ab in lora.items() for kind, p in zip("AB", ab)}
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write(os.path.join(folder, "adapter_model.safetensors"), save({"base_model.model." + k: v for k, v in tensors.items()}, {"format": "pt"}))
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer." + k: v for k, v in config.items()}, sort_keys=True)}
    write(os.path.join(folder, "pytorch_lora_weights.safetensors"), save({"transformer." + k: v for k, v in tensors.items()}, metadata))
    replace_folder(folder, final)


def lora_config(lora):
    """peft's LoraConfig for {module: (A, B, alpha)}: the first layer's rank and alpha, and patterns for those that differ."""
    from peft import LoraConfig
    rank, alpha = next((len(A), alpha) for A, _, alpha in lora.values())
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(lora),
                      rank_pattern={n: len(A) for n, (A, _, _) in lora.items() if len(A) != rank},
                      alpha_pattern={n: al for n, (_, _, al) in lora.items() if al != alpha})


def merge_loras(parts):
    """The exact weighted average of LoRAs' weight deltas, sum_k w_k (alpha_k / r_k) B_k A_k with the weights scaled to sum to 1, as
    one LoRA whose rank is the sum of theirs. parts: [({module: (A, B, alpha)}, weight), ...] -> {module: (A, B, alpha)}.

    Averaging the A's and the B's instead is not that: it keeps 1/K^2 of each product and adds cross terms."""
    total, merged = sum(w for _, w in parts), {}
    for n in dict.fromkeys(n for lora, _ in parts for n in lora):
        terms = [(*lora[n][:2], (w / total * lora[n][2] / len(lora[n][0])) ** 0.5) for lora, w in parts if n in lora]
        A, B = torch.cat([a * c for a, _, c in terms]), torch.cat([b * c for _, b, c in terms], dim=1)
        merged[n] = A, B, len(A)
    return merged


def truncate_lora(lora, rank):
    """The best approximation of every module's delta at a lower rank (SVD), in the same form."""
    out = {}
    for n, (A, B, alpha) in lora.items():
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)  # B A = Qb (Rb Ra^T) Qa^T
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T * (alpha / len(A)))
        root = S[:rank].sqrt()
        out[n] = (root[:, None] * (Vh[:rank] @ Qa.T)).float(), (Qb @ U[:, :rank] * root).float(), min(rank, len(S))
    return out


def locate(path):
    """Where a LoRA or a fine-tuned transformer lies on this disk: a path stays what it is; what the hub has, OWNER/REPOSITORY or a folder or
    a .safetensors file in it, OWNER/REPOSITORY/PATH, is downloaded once."""
    if os.path.exists(path):
        return path
    if not (m := re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)/?", path)) or path.startswith("."):
        die(f"{path}: no such LoRA folder or file")
    repo, inside = m[1], m[2].strip("/")
    folder, file = os.path.split(inside) if inside.endswith(".safetensors") else (inside, "")
    wanted = [file, "adapter_config.json"] if file else [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",  # a LoRA
        "config.json", "diffusion_pytorch_model*", "transformer/*"]  # a transformer, alone or of a pipeline
    found = os.path.join(fetch(repo, [os.path.join(folder, name) for name in wanted]), inside)
    if not os.path.exists(found):
        die(f"{path}: {repo} is on the hub, but has no {inside}")
    return found.rstrip("/")


def transformer_folder(folder):
    """The folder of an SD3 transformer's weights, if `folder` is one or is a pipeline; else None."""
    for place in (folder, os.path.join(folder, "transformer")):
        config = os.path.join(place, "config.json")
        if os.path.isfile(config) and json.load(open(config)).get("_class_name") == "SD3Transformer2DModel":
            return place


def fetch(repo, patterns):
    """A hub repository's files, downloaded once; a clear end where it cannot be had."""
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(repo, allow_patterns=patterns)
    except Exception as error:
        die(f"{repo}: neither a local path nor to be had from the hub ({type(error).__name__}: {str(error).splitlines()[0]})")


def check_model(model):
    """The model_index.json of a folder or hub id, which must be a pipeline of Stable Diffusion 3."""
    if os.path.isdir(model) and not os.path.exists(os.path.join(model, "model_index.json")):
        die(f"--model {model}: not a diffusers pipeline folder (no model_index.json in it)")
    if not os.path.isdir(model):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or os.path.exists(model):
            die(f"--model {model}: no such folder")
        model = fetch(model, ["model_index.json"])
    index = json.load(open(os.path.join(model, "model_index.json")))
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        die(f"--model {model}: a {index.get('_class_name')}; this program needs a StableDiffusion3Pipeline")
    return index


# ======================================================================================================================
# 3. What a run reads and leaves behind
# ======================================================================================================================

def die(message):
    """One clear line for a user's mistake, and exit status 1."""
    raise SystemExit(f"{os.path.basename(sys.argv[0])}: {message}")


def report(kind, error, trace):
    """sys.excepthook: a full disk is no bug, so it gets one line too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"{os.path.basename(sys.argv[0])}: {error.strerror}: {error.filename or 'a file of this run'} could not be written; what was "
              "saved before is whole. Make room, then go on with --resume auto", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def listing(names, most=4):
    return ", ".join(map(str, list(names)[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def parse_args(parser, toy):
    """Parse the command line. Without --model, the defaults are `toy`: the embedded model with settings that fit it."""
    sys.excepthook = report
    parser.formatter_class, parser.usage = Help, "%(prog)s [flags]"
    parser.epilog = "Without --model, other defaults: " + ", ".join(
        f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in toy.items() if k != "model")
    if parser.parse_known_args()[0].model is None:
        here = "" if os.getcwd() == HERE else HERE + "/"
        place = lambda v: re.sub("(^|=)toy/", rf"\1{here}toy/", v) if isinstance(v, str) else [place(x) for x in v] if isinstance(v, list) else v
        parser.set_defaults(**{k: place(v) for k, v in toy.items()})
    args = parser.parse_args()
    for action in parser._actions:
        values, least = getattr(args, action.dest, None), 1 if action.type is int and action.dest not in ("seed", "sde_window", "label_steps") else 0
        for value in values if isinstance(values, list) else [values]:
            if action.type in (int, float) and value is not None and not value >= least:
                die(f"{action.option_strings[0]} {value}: must be at least {least}")
    if not getattr(args, "ema", 0) < 1:
        die(f"--ema {args.ema}: must be below 1")
    if getattr(args, "track", None) and not importlib.util.find_spec(args.track):
        die(f"--track {args.track}: pip install {args.track}")
    return args


class Help(argparse.HelpFormatter):
    """--help on a wide screen, one line a flag where it fits, defaults shown where there are any."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=128)

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help + ("" if silent else " (default: %(default)s)")

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "PATH")

    def _format_args(self, action, metavar):
        return f"{action.metavar or metavar} ..." if action.nargs in ("+", "*") else super()._format_args(action, metavar)


def parse_specs(flag, specs, **options):
    """["name=value,key=1.5", ...] -> {name: {"value": value, **options}}; a wrong one is refused with the flag's name."""
    out = {}
    for spec in specs or []:
        name, eq, rest = spec.partition("=")
        value, *extras = rest.split(",")
        fields = dict(options, value=value)
        for extra in extras:
            key, _, number = extra.partition("=")
            if key not in options or not re.fullmatch(r"\d+\.?\d*|\.\d+", number):
                die(f"{flag} {spec}: expected NAME=VALUE{''.join(f'[,{k}=NUMBER]' for k in options)}")
            fields[key] = float(number)
        if not eq or not value or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            die(f"{flag} {spec}: expected NAME=VALUE, NAME of letters, digits, - and _")
        if name in out:
            die(f"{flag}: {name} is given twice")
        out[name] = fields
    if out and "weight" in options and not sum(s["weight"] for s in out.values()):
        die(f"{flag}: all weights are 0")
    return out


def load_prompts(name, path):
    """One task's prompts: [{"prompt": str, ...}]. A .txt file has one prompt a line; a .jsonl file one object a line with a
    "prompt" and whatever its reward reads (GenEval's metadata files are of this kind). Lines whose "task" is another are skipped."""
    if not os.path.isfile(path):
        die(f"--prompts {name}={path}: no such file")
    rows = []
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.endswith((".jsonl", ".json")):
            try:
                row = json.loads(line)
            except ValueError as error:
                die(f"--prompts {name}={path}: line {number} is not JSON ({error})")
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                die(f'--prompts {name}={path}: line {number} has no "prompt"')
        if row.get("task", name) == name:
            rows.append(row)
    if not rows:
        die(f"--prompts {name}={path}: no prompts in it" + (f' with "task": "{name}"' if path.endswith(".jsonl") else ""))
    return rows


def pick_prompts(prompts, weights, seed, step, count, schedule="mixed"):
    """The global batch of one update: `count` pairs (task, row), a pure function of (seed, step). mixed: tasks in proportion to
    their weights by systematic sampling, so that every batch is as balanced as it can be. alternate: all of one task, each in
    turn for as many updates as its weight says."""
    rng = np.random.default_rng([seed, step])
    tasks = list(prompts)
    if schedule == "alternate":
        turns = [task for task in tasks for _ in range(int(weights[task]))]
        weights = {task: float(task == turns[step % len(turns)]) for task in tasks}
    edges = np.cumsum([weights[t] for t in tasks]) / sum(weights[t] for t in tasks)
    slots = np.searchsorted(edges, (np.arange(count) + rng.random()) / count, side="right").clip(max=len(tasks) - 1)
    return [(tasks[s], prompts[tasks[s]][rng.integers(len(prompts[tasks[s]]))]) for s in slots]


def start_processes(track=None, out=None):
    """accelerate's Accelerator: device, process group, trackers. Without a GPU it must be told to join torchrun's CPU processes: left to
    itself, every one of them would take itself for the only one."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # for one another; one that dies is noticed by torchrun at once
    return Accelerator(kwargs_handlers=[patience], cpu=not torch.cuda.is_available() and "WORLD_SIZE" in os.environ, log_with=track, project_dir=out)


def end_processes(accelerator, failure=None):
    """Leave together; with `failure`, this process says what failed and exits with 1. gloo's threads sometimes abort a process whose
    interpreter is shutting down, and so do threads that still score pictures: then that is skipped."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1 or any(t.name.startswith("reward ") for t in threading.enumerate()):
        if failure:
            print(f"{os.path.basename(sys.argv[0])}: {failure}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1 if failure else 0)
    if failure:
        die(failure)


def reduce_gradients(params, count):
    """Sum the gradients over all processes in one reduction, and divide by `count`, the number of samples x steps x dimensions.
    Losses are summed over all three before backward and divided only here, in float32: the gradient of a mean over 65,536
    dimensions would round to zero in half precision. A parameter that this process had no use for has a gradient of zero."""
    flat = reduce_sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]))
    for p, g in zip(params, (flat / count).split([p.numel() for p in params])):
        p.grad = g.view_as(p)


def reduce_sum(tensor):
    """The sum of a tensor over all processes, in place; the tensor lies on the process's device."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:
            die(f"process {torch.distributed.get_rank()} could not reach the others of this job, so it ends too: one has died, or this GPU is out of "
                f"memory. The last checkpoint is whole, go on with --resume auto ({str(error).splitlines()[0][:160]})")
    return tensor


def update_average(ema, params, decay, update):
    """The exponential moving average of the parameters after updates 1 ... n = `update`: p_k weighs d^(n-k) / (1 + d + ... + d^(n-1)),
    with d = decay^(1/8) (the paper: 0.9 once in 8 updates). The weights sum to 1 from the first update on, so where the run
    started has none, and there is no warm-up to choose."""
    d = decay ** (1 / 8)
    torch._foreach_lerp_(ema, [p.detach() for p in params], (1 - d) / (1 - d ** update))


def write(path, data):
    """Bytes or text to a file: beside it, onto the disk, then renamed, so that the file is the old or the new one whatever happens."""
    with open(path + ".tmp", "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path, data):
    write(path, json.dumps(data, indent=1, default=str) + "\n")


def replace_folder(new, final):
    """Rename a finished folder to its place; what was there goes only then."""
    shutil.rmtree(final + ".old", ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, final + ".old")
    os.rename(new, final)
    shutil.rmtree(final + ".old", ignore_errors=True)


def fingerprint(path):
    """A short hash of what a path holds: a file's bytes, or the names and sizes and small files of a folder."""
    if not os.path.exists(path):
        return path  # a hub id
    digest = hashlib.sha256()
    for file in [path] if os.path.isfile(path) else sorted(os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs):
        digest.update(os.path.relpath(file, path).encode() + str(os.path.getsize(file)).encode())
        if os.path.getsize(file) < 2 ** 28:
            digest.update(open(file, "rb").read())
    return digest.hexdigest()[:12]


def run_identity(args, processes, files, *free):
    """What makes a run the same run when it is resumed: its flags, except those that only say how long, where and how often, and the
    content of its files {what: path}."""
    free = {*free, "steps", "out", "resume", "track", "save_every", "keep", "eval_every", "eval_num_steps", "eval_batch_size", "micro_batch_size",
            "offload_text_encoders", "gradient_checkpointing", "model", "prompts", "eval_prompts", "teachers", "anchor", "init",  # these by content
            "batch_size"}  # by its sum: fewer processes with more prompts each are the same run
    return {k: v for k, v in vars(args).items() if k not in free} | {k: v and fingerprint(v) for k, v in files.items()} | {
        "--batch-size x processes": args.batch_size * processes}


def save_checkpoint(out, step, model, name, optimizer, identity, keep):
    """checkpoints/STEP: the LoRA people can use (the average, adapter "ema") and the state a run resumes from; written beside and renamed."""
    root = os.path.join(out, "checkpoints")
    temporary, final = os.path.join(root, ".new"), os.path.join(root, f"{step:06d}")
    shutil.rmtree(temporary, ignore_errors=True)
    save_lora(model.lora("ema"), os.path.join(temporary, "lora"))
    weights = {a: {f"{n}.{kind}": p.detach().cpu() for (n, kind), p in model.weights(a).items()} for a in (name, "ema")}
    state = io.BytesIO()
    torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict(), "identity": identity}, state)
    write(os.path.join(temporary, "state.pt"), state.getbuffer())
    replace_folder(temporary, final)
    steps = sorted(d for d in os.listdir(root) if d.isdigit())
    for old in [d for d in steps if d > f"{step:06d}"] + [d for d in steps if d <= f"{step:06d}"][:-keep]:
        shutil.rmtree(os.path.join(root, old))


def resume_checkpoint(resume, out, model, name, optimizer, identity):
    """The step to go on from (0 without --resume). A checkpoint of another run is refused, and every difference is spelled out."""
    if not resume:
        return 0
    folder = resume
    if resume == "auto":
        root = os.path.join(out, "checkpoints")
        steps = sorted(d for d in os.listdir(root) if d.isdigit()) if os.path.isdir(root) else []
        found = reduce_sum(torch.tensor(float(bool(steps)), device=model.device)).item()
        if found == 0:
            return 0
        if found != (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1):
            die(f"--out {out}: some machines find checkpoints there and some do not; it must be a folder that all of them share")
        folder = os.path.join(root, steps[-1])
    file = os.path.join(folder, "state.pt")
    if not os.path.exists(file):
        die(f"--resume {resume}: no checkpoint there (state.pt is missing)")
    state = torch.load(file, weights_only=True, map_location="cpu")
    changed = [f"{k} was {state['identity'].get(k)!r}, now {identity.get(k)!r}" for k in sorted(identity.keys() | state["identity"].keys())
               if state["identity"].get(k) != identity.get(k)]
    if changed:
        die(f"--resume {resume}: {folder} is of another run: " + "; ".join(changed))
    with torch.no_grad():
        for adapter, tensors in state["weights"].items():
            for (n, kind), p in model.weights(adapter).items():
                p.copy_(tensors[f"{n}.{kind}"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def start_run(out, start, args):
    """The run's folder, made ready by the first process: returns the open log. A resumed run forgets what was logged after its
    checkpoint; a new one in a used folder moves the old checkpoints to checkpoints.previous."""
    os.makedirs(out, exist_ok=True)
    log, checkpoints = os.path.join(out, "log.jsonl"), os.path.join(out, "checkpoints")
    made = lambda row: row["step"] < start or row["step"] == start and "seconds" in row  # a validation of the checkpoint is made again
    write(log, "".join(line for line in open(log) if line.endswith("\n") and made(json.loads(line))) if start and os.path.exists(log) else "")
    if not start:
        if os.path.isdir(checkpoints):
            shutil.rmtree(checkpoints + ".previous", ignore_errors=True)
            os.rename(checkpoints, checkpoints + ".previous")
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, "results.json"))
    write_json(os.path.join(out, "args.json"), vars(args))
    return open(log, "a")


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to give up the update in hand, save what the updates before it made, and leave: in seconds,
    since a preempted machine waits no longer. A second one, not at once (torchrun passes on what a terminal sends too), ends it."""

    def __init__(self):
        self.name, self.since, self.failure = None, 0.0, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.name and time.monotonic() > self.since + 5:
            die("interrupted")
        self.name, self.since = signal.Signals(number).name, self.since or time.monotonic()

    def fail(self, message):
        """Leave in the same way, because something failed here: what was made before is saved, and the exit status is 1."""
        self.name, self.since, self.failure = "failure", time.monotonic(), message

    def arrived(self, device):
        """Whether any process was told to stop: the same answer on all of them, so none waits for one that left."""
        return reduce_sum(torch.tensor(float(self.name is not None), device=device)).item() > 0

    def disarm(self):
        """From here on Ctrl-C ends the program at once."""
        self.name, self.since = "SIGINT", -math.inf


def plot_curves(out):
    """curves.png from log.jsonl: one panel per quantity, updates along x; "kl/ocr" is the line "ocr" of the panel "kl"."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]
    groups = {}
    for key in dict.fromkeys(k for r in rows for k in r if k not in ("step", "seconds", "memory_gb", "kl_by_sigma")):
        groups.setdefault(key.split("/")[0], []).append(key)
    if not groups:
        return
    columns = min(3, len(groups))
    figure, axes = plt.subplots(-(-len(groups) // columns), columns, figsize=(4 * columns, 2.8 * -(-len(groups) // columns)), squeeze=False)
    for axis in axes.flat[len(groups):]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes.flat, groups.items()):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            axis.plot(*zip(*points), label=key.partition("/")[2] or None, marker="o" if len(points) < 20 else None, markersize=3)
        axis.set_title(title), axis.set_xlabel("update"), axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)
        if title.startswith("kl") and all(r.get(k, 1) > 0 for r in rows for k in keys):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(os.path.join(out, "curves.png"), dpi=90)
    plt.close(figure)


def draw_rows(model, rows, prompts, args, rank=0, world=1, stop=None):
    """The pictures of a grid, {label: (N, 3, H, W)}, from rows {label: (adapter, guidance)}: the same N prompts and noise in every
    row. The processes share the drawing, and all get all; None if one of them was told to stop."""
    jobs = [(i, adapter, guidance) for adapter, guidance in rows.values() for i in range(len(prompts))]
    pictures = torch.zeros(len(jobs), 3, args.resolution, args.resolution, device=model.device)
    mine = list(range(rank, len(jobs), world))
    for k in range(0, len(mine), args.eval_batch_size):
        if stop and stop.name:
            break
        part = mine[k:k + args.eval_batch_size]
        numbers, adapters, guidance = zip(*(jobs[j] for j in part))
        pictures[part] = model.generate([prompts[i] for i in numbers], generators(args.seed, 1, numbers), args.eval_num_steps, args.resolution,
                                        adapters, guidance)
    if stop and stop.arrived(model.device):
        return None
    return dict(zip(rows, reduce_sum(pictures).cpu().split(len(prompts))))


def save_grid(path, rows, captions, cell=96):
    """A picture grid: rows {label: N pictures (3, H, W)}, the same N captions over every column."""
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(11)
    side = max(cell, next(iter(rows.values()))[0].shape[-1])
    left, top, gap, n = 104, 44, 4, len(captions)
    canvas = Image.new("RGB", (left + n * (side + gap), top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, caption in enumerate(captions):
        words, lines = caption.split(), [""]
        for word in words:
            longer = (lines[-1] + " " + word).strip()
            lines = lines[:-1] + [longer] if pen.textlength(longer, font) <= side else lines + [word]
        pen.multiline_text((left + i * (side + gap), 2), "\n".join(lines[:3]), fill="black", font=font, spacing=1)
    for r, (label, images) in enumerate(rows.items()):
        pen.text((4, top + r * (side + gap) + side // 2 - 6), label, fill="black", font=font)
        for i, image in enumerate(images):
            pixels = (image.movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
            resample = Image.Resampling.NEAREST if side > pixels.shape[0] else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(pixels).resize((side, side), resample), (left + i * (side + gap), top + r * (side + gap)))
    canvas.save(path)
