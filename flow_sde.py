"""What every stage of Flow-OPD (arXiv 2605.08063) shares, in the order one learns it: (1) the mathematics of
the flow-SDE, on plain tensors; (2) the model: one frozen pipeline of diffusers with any number of LoRA
adapters, its families, and LoRA files; (3) what a run needs: flags, prompts, processes, a folder of its own.

Conventions, stated once. t in [0, 1] is the scheduler's sigma: x_t = (1-t) x_0 + t eps, and the model
predicts v = eps - x_0. Sampling runs from t = 1 down to 0; one step goes from t to t_next < t, and
dt = t - t_next. A transition is a Gaussian with a mean and one number `std`, and std ALWAYS includes
sqrt(dt). Log-probabilities and KLs are averaged over the latent's dimensions ("nats per dimension",
Flow-GRPO's convention: a clip range of 1e-4 means nothing without it). t, t_next and std are Python floats:
all samples of a batch are at the same step, and no formula waits for a GPU.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import errno
import glob
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
import zlib
from collections import namedtuple
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
LOCKS = []  # the locks of the folders this process writes, held until it ends
HOW_TO_GO_ON = "the same command goes on"  # after an interruption; catch_full knows of --resume
for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional packages are not this program's
    os.environ.setdefault(library + "_VERBOSITY", "error")

# ============================================================================================================
# 1. The mathematics of the flow-SDE
# ============================================================================================================


def transition(x, v, t, t_next, noise_level, sde="flow"):
    """The Gaussian that one sampling step draws from. x, v: (B, ...) -> mean (B, ...), std float.

    ode   mean = x - v dt                                                         std = 0
    flow  mean = x - [v + s^2/(2t) (x + (1-t) v)] dt,  s = a sqrt(t / (1-t))      std = s sqrt(dt)
          Flow-GRPO, arXiv 2505.05470; eq. 5 of the paper; a is the noise level. At t = 1, s is taken with
          1 - t_next.
    cps   mean = (1-t') (x - t v) + sqrt(t'^2 - std^2) (x + (1-t) v)              std = t' sin(a pi/2)
          Coefficients-preserving sampling, arXiv 2509.05952; t' is t_next."""
    dt = t - t_next
    if sde == "ode" or noise_level == 0:
        return x - v * dt, 0.0
    if sde == "flow":
        s = noise_level * math.sqrt(t / (1 - t if t < 1 else 1 - t_next))
        return x - (v + s * s / (2 * t) * (x + (1 - t) * v)) * dt, s * math.sqrt(dt)
    if sde == "cps":
        std = t_next * math.sin(noise_level * math.pi / 2)
        return (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - std**2) * (x + (1 - t) * v), std
    raise ValueError(f"sde must be flow, cps or ode, not {sde!r}")


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over dimensions. x_next, mean: (B, ...) -> (B,)."""
    if std == 0:
        raise ValueError("a step without noise has no log-probability")
    z = (x_next - mean) / std
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def kl(mean, mean_teacher, std):
    """KL(N(mean, std^2) || N(mean_teacher, std^2)) = ||mean - mean_teacher||^2 / (2 std^2), averaged over
    dimensions: (B, ...) -> (B,).

    For the flow-SDE at t < 1 this is w(t) ||v - v_teacher||^2 with w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2:
    distillation on the student's own states is a weighted regression of velocities."""
    return (mean - mean_teacher).square().flatten(1).mean(1) / (2 * std**2)


WEIGHTINGS = ("uniform", "kl", "kl-dt", "dt2")


def step_weights(steps, noise_level, sde, weighting):
    """What each step's KL counts in the loss: {t: factor}, for steps [(t, t_next), ...]. A step's KL is w(t)
    times its velocity distance d = mean (v - v_teacher)^2.

    kl       w(t) d: the KL itself, the paper's loss
    uniform  the mean of all steps' w(t), times d: steps weigh alike, and the loss stays as large as the KL
    kl-dt    dt w(t) d: what the released code of Flow-OPD descends, since its std leaves dt out
    dt2      dt^2/2 d: the distance of two deterministic steps (DiffusionOPD, arXiv 2605.15055)"""
    w = {}
    for t, t_next in steps:
        mean, std = transition(0.0, 1.0, t, t_next, noise_level, sde)  # of a distance of 1
        w[t] = mean**2 / (2 * std**2)
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
    """log pi(x_next) - log pi_old(x_next) + ||mean - mean_old||^2 / (2 std^2), averaged over dimensions: all
    (B, ...) -> (B,).

    On what the old policy draws a log-ratio has a negative mean, the more the policy has drifted, so a clip
    range would cut one side only; with that mean taken off (GRPO-Guard, arXiv 2510.22319) it is
    (x_next - mean_old)(mean - mean_old) / std^2."""
    return ((x_next - mean_old) * (mean - mean_old)).flatten(1).mean(1) / std**2


def clipped_surrogate(log_ratio, advantage, clip_range):
    """PPO's loss, -min(ratio A, clip(ratio) A), with ratio = exp(log pi_new - log pi_old). (B,) -> (B,)."""
    assert log_ratio.shape == advantage.shape, "one number per sample each"
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def update_average(ema, params, decay, update):
    """The exponential moving average of the parameters after updates 1 ... n = `update`: p_k weighs
    d^(n-k) / (1 + d + ... + d^(n-1)), with d = decay^(1/8) (the paper: 0.9 once in 8 updates). These sum to
    1 from the first update on: where the run started has no weight, and there is no warm-up."""
    d = decay ** (1 / 8)
    for average, p in zip(ema, params, strict=True):
        average.lerp_(p.detach(), (1 - d) / (1 - d**update))


def learnt(sigmas):
    """A schedule without its last step, if that starts below t = 0.05. There the noise that the model should
    predict is all but invisible: teachers differ most, their KL would outweigh all other steps together, and
    the picture hardly moves. SD3's last step starts at 0.009; FLUX.1's, of ten, at 0.17 to 0.26."""
    return sigmas[:-1] if sigmas[-2] < 0.05 else sigmas


Step = namedtuple("Step", "x v t t_next x_next log_prob")


def rollout(velocity, x, sigmas, noise_levels, sde, draw):
    """Sample a trajectory, one transition at a time. Yields Step(x, v, t, t_next, x_next, log_prob).

    velocity(x, t) -> v; noise_levels: one number, or one per step; draw() -> noise like x. The states are
    data (no gradient flows through the sampling), but v carries whatever graph `velocity` builds, so the
    caller may back-propagate a step's loss before it asks for the next. Without noise log_prob is None."""
    if not isinstance(noise_levels, (list, tuple)):
        noise_levels = [noise_levels] * (len(sigmas) - 1)
    for t, t_next, noise_level in zip(sigmas[:-1], sigmas[1:], noise_levels, strict=True):
        v = velocity(x, t)
        mean, std = transition(x, v.detach(), t, t_next, noise_level, sde)
        x_next = mean + std * draw() if std > 0 else mean
        yield Step(x, v, t, t_next, x_next, log_prob(x_next, mean, std) if std > 0 else None)
        x = x_next


def generators(seed, step, indices):
    """A random generator per sample, a pure function of (seed, step, index in the batch of all processes)."""
    words = [np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(word >> 1)) for word in words]


def randn(gens, shape, device):
    """Noise of shape (len(gens), *shape), float32, one sample from each generator."""
    return to_device(torch.stack([torch.randn(shape, generator=g) for g in gens]), device)


def to_device(values, device):
    """Numbers as a tensor on the device. For CUDA from pinned memory: the CPU does not wait for the GPU."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


# ============================================================================================================
# 2. The model: one frozen base, everything else is an adapter on it
# ============================================================================================================


class LoRALinear(torch.nn.Linear):
    """A frozen linear layer with named LoRAs, W x + alpha/r B A x; every row of a batch x (rows, ..., in) may
    have another.

    `asked`, one object for all layers of a network, says whose. Without `rows`, all are answered by the
    adapter `name` from its float32 weights, which may be in training, or by W alone where it has none. With
    `rows`, (rows, r) indices, every sample gathers its A and B from two stacks, where all frozen adapters lie
    below one another in W's data type: one graph of torch.compile serves all mixes of adapters."""

    def forward(self, x):
        name, rows = self.asked.name, self.asked.rows
        if rows is None:
            flat = x.flatten(0, -2)
            y = F.linear(flat, self.weight, self.bias)
            if name in self.lora_A:
                A, B = self.lora_A[name].to(y.dtype), self.lora_B[name].to(y.dtype)
                y = y.addmm_(F.linear(flat.to(y.dtype), A), B.T, alpha=self.scaling[name])
            return y.unflatten(0, x.shape[:-1])
        y = F.linear(x, self.weight, self.bias)
        A = F.embedding(rows, self.stack_A).to(y.dtype)  # (rows, r, in)
        B = F.embedding(rows, self.stack_B).to(y.dtype)  # (rows, r, out)
        inner = torch.bmm(x.to(y.dtype).unsqueeze(1).flatten(1, -2), A.mT)
        y.view(len(x), -1, y.shape[-1]).baddbmm_(inner, B)
        return y

    @torch.no_grad()
    def stack(self, ranks):
        """Copy the adapters {name: rank} below one another, after a row of zeros; zeros too for one that this
        layer does not have. B's scale, alpha/r, is in the copy."""
        first, total = 1, 1 + sum(ranks.values())
        self.stack_A = self.weight.new_zeros(total, self.in_features)
        self.stack_B = self.weight.new_zeros(total, self.out_features)
        for name, rank in ranks.items():
            if name in self.lora_A:
                rows = slice(first, first + len(self.lora_A[name]))
                self.stack_A[rows] = self.lora_A[name]
                self.stack_B[rows] = self.scaling[name] * self.lora_B[name].T
            first += rank


class RMSNorm(torch.nn.Module):
    """An RMS norm in one kernel instead of diffusers' seven."""

    def forward(self, x):
        return F.rms_norm(x, self.dim, self.weight, self.eps)


# What a transformer's config says of the inputs it takes.
INPUTS = ["in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size"]
INPUTS += ["guidance_embeds", "cap_feat_dim", "caption_channels"]


class Asked:
    """Whom the layers of a network answer as; see LoRALinear."""

    name = rows = None


class Model:
    """A text-to-image pipeline of diffusers with named LoRA adapters on one frozen transformer, each asked
    for by name, per sample. A teacher that is no LoRA but a whole transformer of its own stands beside the
    base in `full`.

    A family of models is a subclass below, which says what is its own: what its network takes (`net`, of
    encode_prompt's results those in `takes`, and `null_prompt`), how its latents lie (`packed`), its
    schedule (`even_grid`, `mu`), its guidance (`guide`) and what its VAE takes (`to_vae`).

    dtype is the frozen networks', and what LoRAs are computed in; trained weights, latents, guidance and SDE
    are float32. use_t5=False leaves out the largest text encoder of SD3 (its tokens are zeros, as in
    diffusers); offload keeps the text encoders in the CPU's memory but while they encode.
    max_sequence_length is that of the text, in tokens; CLIP always reads its own 77."""

    defaults = dict(resolution=512, guidance=4.0, dtype="bfloat16", max_sequence_length=512)  # of the flags
    distilled_defaults = dict(guidance=1.0)  # of models that were distilled, and are not to be guided
    takes = (0,)
    null_prompt, null_options = "", {}  # the unconditional prompt, and what else encode_prompt is told for it
    optional = ()  # parts of the pipeline that --no-t5 leaves out
    most_tokens = 512
    packed = False  # latents are (tokens, 4 C), not (C, h, w): a token has 2 x 2 of the VAE's
    even_grid = True  # the schedule is shifted from 1, 1 - 1/n, ..., 1/n, not from the scheduler's own grid
    attention = "attn"  # what the modules are called whose projections an untrained LoRA adapts
    token_layers = ()  # whose input is all samples' tokens in one row, so that samples cannot differ there

    def __init__(
        self,
        model,
        dtype=torch.float32,
        device="cpu",
        use_t5=True,
        offload=False,
        gradient_checkpointing=False,
        max_sequence_length=None,
    ):
        max_sequence_length = max_sequence_length or defaults_of(model)["max_sequence_length"]
        wrong = f"--max-sequence-length {max_sequence_length}: the pipeline takes at most {self.most_tokens}"
        check(max_sequence_length <= self.most_tokens, wrong)
        check(use_t5 or self.optional, f"--no-t5: {model} has no T5 that it could do without")
        self.pipe = load_pipeline(model, dtype, device, () if use_t5 else self.optional, offload)
        self.transformer = self.pipe.transformer
        self.device, self.dtype, self.full, self.offload = device, dtype, {}, offload
        self.sources = {"base": model}  # what each name was loaded from
        self.asked, self.trained = Asked(), None
        self.adapters = {}  # {name: [A, B, A, B, ...]}, in the order of weights(name)
        self.stacked = {}  # {frozen adapter: how often its weights had been written when they were stacked}
        self.text_encoders = [encoder for _, encoder, _ in text_parts(self.pipe)]
        if torch.device(device).type == "cuda":
            for tensor in self._offloaded():
                tensor.data = tensor.data.pin_memory()
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(self._checkpointed)
        longest = [t.model_max_length for _, encoder, t in text_parts(self.pipe) if not is_clip(encoder)]
        self.max_length = min([max_sequence_length, *longest])
        self.scheduler = self.euler_scheduler()
        config = self.transformer.config
        self.embedded = config.get("guidance_embeds", False)  # guidance is a number that the network reads
        self.guidable = self.embedded or not self.distilled(self.pipe.config, config)
        self.patch = 2 if self.packed else config.get("patch_size", 2)
        self.unit = self.patch * self.pipe.vae_scale_factor  # pixels along a side of a token
        # What a pipeline tells its encode_prompt, whose own defaults are others.
        known = inspect.signature(self.pipe.encode_prompt).parameters
        told = {name: p.default for name, p in inspect.signature(type(self.pipe).__call__).parameters.items()}
        told |= dict(device=device, max_sequence_length=self.max_length, do_classifier_free_guidance=False)
        self.text_options = {name: told[name] for name in known if name in told and name != "prompt"}
        self.null = self.encode([self.null_prompt], **self.null_options)

    # -- what a family may say otherwise ---------------------------------------------------------------------

    @classmethod
    def distilled(cls, index, config):
        """Whether guidance was distilled into it, from model_index.json and the transformer's config.json."""
        return False

    @classmethod
    def flag_defaults(cls, index, config):
        """What flags are where they are not given, from the same files."""
        return cls.defaults | (cls.distilled_defaults if cls.distilled(index, config) else {})

    def guide(self, v, v_uncond, g):
        """Classifier-free guidance. v, v_uncond: (B, ...); g: a number, or (B, 1, ...) -> (B, ...)."""
        return v_uncond + g * (v - v_uncond)

    def mu(self, tokens, num_steps):
        """The shift of the schedule for so many tokens (FLUX.2: and steps), if it shifts dynamically."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(tokens, *(self.scheduler.config[name] for name in names))

    def euler_scheduler(self):
        kind, ours = type(self.pipe.scheduler).__name__, "FlowMatchEulerDiscreteScheduler"
        its = f"--model {self.sources['base']}: its scheduler"
        check(kind == ours, f"{its} is a {kind}; this program samples as {ours} does")
        noisy = self.pipe.scheduler.config.stochastic_sampling
        check(not noisy, f"{its} has stochastic_sampling; here --noise-level makes noise")
        return self.pipe.scheduler

    def to_vae(self, latents):
        """Latents (B, ...) -> what the VAE decodes, (B, C, h, w)."""
        config = self.pipe.vae.config
        return self.unpack(latents) / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def unpack(self, latents):
        if not self.packed:
            return latents
        side = math.isqrt(latents.shape[1]) * self.unit
        return self.pipe._unpack_latents(latents, side, side, self.pipe.vae_scale_factor)

    # -- asking it -------------------------------------------------------------------------------------------

    def sigmas(self, num_steps, resolution):
        """The num_steps + 1 sigmas from 1 to 0, floats, that the scheduler visits for a square picture."""
        grid = {"num_inference_steps": num_steps}
        if self.even_grid:
            grid = {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
        tokens = (resolution // self.unit) ** 2
        self.scheduler.set_timesteps(**grid, mu=self.mu(tokens, num_steps))
        sigmas = self.scheduler.sigmas.tolist()
        falling = all(t > t_next for t, t_next in zip(sigmas, sigmas[1:]))
        fits = abs(sigmas[0] - 1) < 1e-6 and sigmas[-1] == 0 and falling
        found = f"the sigmas of the model's scheduler do not fall from 1 to 0: {listing(sigmas)}"
        check(fits, f"{num_steps} sampling steps: {found}")
        return [1.0, *sigmas[1:]]

    def latent_shape(self, resolution):
        """(C, h, w) of a square picture, or (tokens, 4 C) if packed; what cannot be drawn is refused."""
        config, (side, rest) = self.transformer.config, divmod(resolution, self.unit)
        most = config.get("pos_embed_max_size")
        if rest or side <= 0 or most and side > most:
            limit = f" up to {most * self.unit}" if most else ""
            die(f"--resolution {resolution}: this model draws multiples of {self.unit}{limit}")
        if self.packed:
            return side**2, config.in_channels
        return config.in_channels, side * self.patch, side * self.patch

    def note_long(self, prompts):
        """Say how many of these texts are longer than the text encoders read."""
        texts, long = set(prompts), []
        for part, encoder, tokenizer in text_parts(self.pipe):
            most = tokenizer.model_max_length if is_clip(encoder) else self.max_length
            may = [text for text in texts if len(text.encode()) + 2 > most]  # a token has a byte at least
            count = sum(len(ids) > most for ids in tokenizer(may).input_ids) if may else 0
            if count:
                long.append(f"{count} are longer than {part} reads ({most} tokens)")
        if long:
            say(f"note: of {len(texts)} prompts {', '.join(long)}; the rest of them is not seen there")

    @torch.no_grad()
    def encode(self, prompts, **options):
        """list of B strings -> what `net` takes of them, each B rows: tensors, e.g. embeds (B, L, D) and
        pooled (B, P), or lists. A prompt that stands there twice is encoded once."""
        unique = list(dict.fromkeys(prompts))
        tensors = self._offloaded()
        resting = [t.data for t in tensors]
        parts = []
        try:
            for t in tensors:
                t.data = to_device(t.data, self.device)
            for i in range(0, len(unique), 16):
                found = self.pipe.encode_prompt(unique[i : i + 16], **self.text_options | options)
                parts.append([self._as_read(found[k], found[0]) for k in self.takes])
        finally:
            for t, data in zip(tensors, resting):  # nothing is copied back: the weights have not changed
                t.data = data
        rows = [unique.index(p) for p in prompts]
        return take_rows([join_rows(*kind) for kind in zip(*parts)], rows)

    def _as_read(self, found, embeds):
        """A result of encode_prompt in the network's data type. No mask means that all tokens count."""
        if found is None:
            return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        floating = isinstance(found, torch.Tensor) and found.is_floating_point()
        return found.to(self.dtype) if floating else found

    def _offloaded(self):
        """What rests in the CPU's memory (pinned, if there is CUDA) while nothing is encoded."""
        encoders = self.text_encoders if self.offload else []
        return [tensor for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers())]

    def velocity(self, x, t, cond, adapter="base", guidance=1.0):
        """v(x_t, t | cond) in float32, guided: in most families by v = v_uncond + g (v_cond - v_uncond).

        adapter: a name, or one name per sample; "base" is the bare model. guidance: a number, or one per
        sample. Conditional and unconditional halves run in one forward, and a sample whose guidance is 1 has
        no unconditional half. None has where guidance is `embedded`."""
        names = [adapter] * len(x) if isinstance(adapter, str) else list(adapter)
        scales = [float(guidance)] * len(x) if isinstance(guidance, (int, float)) else list(guidance)
        assert len(names) == len(scales) == len(x) == len(cond[0]), "one of each per sample"
        guided = [i for i, g in enumerate(scales) if g != 1]
        if guided and not self.guidable:
            die(f"guidance {scales[guided[0]]:g}: {self.sources['base']} was distilled to do without; give 1")
        if self.embedded:
            cond = (*cond, to_device(scales, x.device))
        if self.embedded or not guided:
            return self._forward(x.to(self.dtype), t, cond, names).float()
        index = to_device(guided, x.device)
        both = [join_rows(*kind) for kind in zip(cond, take_rows(self.null, [0] * len(guided)))]
        x_in, asked = torch.cat([x, x[index]]), names + [names[i] for i in guided]
        v = self._forward(x_in.to(self.dtype), t, both, asked).float()
        v_cond, v_uncond = v[: len(x)], v[len(x) :]
        if len(guided) == len(x) and len(set(scales)) == 1:
            return self.guide(v_cond, v_uncond, scales[0])
        g = to_device([scales[i] for i in guided], x.device).view(-1, *[1] * (x.dim() - 1))
        return v_cond.index_copy(0, index, self.guide(v_cond[index], v_uncond, g))

    def _forward(self, x, t, cond, names):
        """The network of every sample's name at (x, t). The base and all frozen adapters share a forward; the
        adapter in training and every full fine-tune have one of their own."""
        assert set(names) <= {"base", *self.full, *self.adapters}, names
        apart = next((n for n in names if n in self.full or n == self.trained), None)
        if apart and set(names) != {apart}:
            v = torch.zeros_like(x)
            for together in (True, False):
                rows = [i for i, n in enumerate(names) if (n == apart) == together]
                index = to_device(rows, x.device)
                part = self._forward(x[index], t, take_rows(cond, rows), [names[i] for i in rows])
                v = v.index_copy(0, index, part)
            return v
        with self._asking(apart, None if set(names) <= {"base", apart} else self._rows(names)):
            return self.net(self.full.get(apart, self.transformer), x, t, *cond)

    @contextlib.contextmanager
    def _asking(self, name, rows):
        before = self.asked.name, self.asked.rows
        self.asked.name, self.asked.rows = name, rows
        try:
            yield
        finally:
            self.asked.name, self.asked.rows = before

    def _checkpointed(self, block, *inputs):
        """Gradient checkpointing: a block that the backward computes again asks whom the forward asked."""
        name, rows = self.asked.name, self.asked.rows

        def run(*inputs):
            with self._asking(name, rows):
                return block(*inputs)

        options = dict(use_reentrant=False, preserve_rng_state=False)  # no dropout: nothing is drawn
        return torch.utils.checkpoint.checkpoint(run, *inputs, **options)

    def _rows(self, names):
        """Which rows of the layers' stacks are each sample's adapter, (B, largest rank among them); row 0 is
        zero. The stacks are made anew when weights that are asked have been written since (PyTorch counts
        writes, though on CUDA not those of torch._foreach_*), as the moving average's are."""
        writes = {n: sum(p._version for p in self.adapters[n]) for n in set(names) - {"base"}}
        if not writes.items() <= self.stacked.items():
            frozen = [n for n in self.adapters if n != self.trained]
            self.ranks = {n: max(len(A) for A in self.adapters[n][::2]) for n in frozen}
            self.stacked = {n: sum(p._version for p in self.adapters[n]) for n in frozen}
            for layer in self.transformer.modules():
                if isinstance(layer, LoRALinear):
                    layer.stack(self.ranks)
        first = dict(zip(self.ranks, itertools.accumulate(self.ranks.values(), initial=1)))
        most = max(self.ranks[n] for n in writes)
        rows = torch.zeros(len(names), most, dtype=torch.long)
        for i, n in enumerate(names):
            if n != "base":
                rows[i, : self.ranks[n]] = torch.arange(first[n], first[n] + self.ranks[n])
        return to_device(rows, self.device)

    def compile(self, **options):
        """torch.compile with its options for the blocks of all networks, or an error. A graph serves all
        blocks of a kind and all mixes of frozen adapters; every other number of rows is another graph."""
        torch._dynamo.config.recompile_limit = 256
        for network in (self.transformer, *self.full.values()):
            for block in network.modules():
                if type(block).__name__ in network._no_split_modules:
                    block.compile(fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def decode(self, latents, names=None):
        """latents (B, ...) -> pictures (B, 3, H, W), float32 in [0, 1]; a million pixels at a time, to bound
        the memory. A picture that is not finite is all NaN, never black; where the names of those who drew
        are given, one or one per sample, it ends the program with its own."""
        latents = self.to_vae(latents.float())
        at_once = max(1, 2**20 // (latents[0, 0].numel() * self.pipe.vae_scale_factor**2))
        pictures = torch.cat([self.pipe.vae.decode(z).sample for z in latents.split(at_once)]).div(2).add(0.5)
        pictures = pictures.reshape(len(latents), 3, *pictures.shape[-2:])  # also a video of one frame
        finite = pictures.isfinite().flatten(1).all(1)
        if names is not None and not finite.all():
            name = names if isinstance(names, str) else names[finite.tolist().index(False)]
            who = f"{name} ({self.sources[name]})"
            reason = (
                f"its weights are broken, or too large for --dtype {str(self.dtype).removeprefix('torch.')}"
            )
            die(f"{who} draws a picture that is not finite: {reason}")
        return torch.where(finite.view(-1, 1, 1, 1), pictures.clamp(0, 1), math.nan)

    @torch.no_grad()
    def generate(
        self,
        prompts,
        gens,
        num_steps,
        resolution,
        adapter="base",
        guidance=1.0,
        noise_level=0.0,
        sde="flow",
        strict=True,
    ):
        """Pictures (B, 3, H, W) in [0, 1]; noise_level 0 is the deterministic sampler, equal to the diffusers
        pipeline's. A picture that is not finite ends the program; without `strict` it is returned as NaN."""
        draw = partial(randn, gens, self.latent_shape(resolution), self.device)
        velocity = partial(self.velocity, cond=self.encode(prompts), adapter=adapter, guidance=guidance)
        sigmas = self.sigmas(num_steps, resolution)
        *_, last = rollout(velocity, draw(), sigmas, noise_level, sde, draw)
        return self.decode(last.x_next, adapter if strict else None)

    @torch.no_grad()
    def save_pipeline(self, folder, name):
        """A stand-alone pipeline with an adapter in its weights. The model is of no use after it."""
        for layer in self.transformer.modules():
            if isinstance(layer, LoRALinear):
                if name in layer.lora_A:
                    layer.weight += layer.scaling[name] * layer.lora_B[name] @ layer.lora_A[name]
                del layer.lora_A, layer.lora_B
                layer.__class__ = torch.nn.Linear
        self.pipe.vae.to(self.dtype)
        folder = folder.rstrip("/")
        self.pipe.save_pretrained(folder + ".new")
        os.rename(folder + ".new", folder)

    # -- adapters ------------------------------------------------------------------------------------------

    def load_teacher(self, name, path):
        """A LoRA, as load_adapter; or a full fine-tune: a pipeline or transformer, by folder or hub id."""
        folder = transformer_folder(locate(path))
        if not folder:
            return self.load_adapter(name, path)
        kind, found = type(self.transformer), read_json(os.path.join(folder, "config.json"))["_class_name"]
        check(found == kind.__name__, f"{path}: a {found}; this model's transformer is a {kind.__name__}")
        network = load_network(kind, folder, self.dtype, self.device)
        for key in INPUTS:
            its, ours = network.config.get(key), self.transformer.config.get(key)
            check(its == ours, f"{path}: it does not fit this model: {key} is {its}, the model's {ours}")
        size = sum(p.nbytes for p in network.parameters()) / 1e9
        say(f"note: {name} is a full fine-tune, a transformer of its own: {size:.1f} GB more on every device")
        self.full[name], self.sources[name] = network, path

    def new_adapter(self, name, rank, alpha, seed=0):
        """An untrained LoRA on the attention's projections: A Gaussian, B zero, so it starts as the base."""
        torch.manual_seed(seed)
        lora, targets = {}, rf".*\.{self.attention}\.(to_\w+|to_out\.0|add_[qkv]_proj)"
        for n, layer in linear_layers(self.transformer).items():
            if re.fullmatch(targets, n):
                A = torch.nn.Linear(layer.in_features, rank, bias=False).weight
                B = torch.nn.Linear(rank, layer.out_features, bias=False).weight  # drawn as peft draws it
                lora[n] = torch.nn.init.normal_(A, std=1 / rank), torch.zeros_like(B), alpha
        self.add_adapter(name, lora)

    def load_adapter(self, name, path):
        """A LoRA from a PEFT folder, a diffusers LoRA file or its folder, or a hub id; see read_lora."""
        lora = read_lora(path, self.pipe.transformer, type(self.pipe))
        mixed = [n for n in lora if n.startswith(self.token_layers)]
        reason = "where the tokens of all samples are one row, so that they could not have different adapters"
        check(not mixed, f"{path}: it adapts {listing(mixed)}, {reason}")
        self.add_adapter(name, lora, path)

    def add_adapter(self, name, lora, source="in training"):
        """A frozen adapter, alpha/r B A more for a weight, from {module: (A (r, in), B (out, r), alpha)}."""
        assert name not in self.adapters, f"there is an adapter {name} already"
        if hasattr(torch.nn.ParameterDict(), name):
            die(f"{name}: PyTorch uses that name itself; call the task or model something else")
        layers = linear_layers(self.transformer)
        for n, (A, B, alpha) in lora.items():
            layer = layers[n]
            if not isinstance(layer, LoRALinear):
                layer.__class__, layer.asked, layer.scaling = LoRALinear, self.asked, {}
                layer.lora_A, layer.lora_B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
            for weights, new in ((layer.lora_A, A), (layer.lora_B, B)):
                new = new.detach().to(self.device, torch.float32, copy=True)
                weights[name] = torch.nn.Parameter(new, requires_grad=False)
            layer.scaling[name] = alpha / len(A)
        self.adapters[name], self.sources[name] = list(self.weights(name).values()), source

    def lora(self, name):
        """An adapter as {module: (A, B, alpha)}; the inverse of add_adapter."""
        found = {}
        for n, layer in linear_layers(self.transformer).items():
            if isinstance(layer, LoRALinear) and name in layer.lora_A:
                A, B = layer.lora_A[name].detach(), layer.lora_B[name].detach()
                found[n] = A, B, layer.scaling[name] * len(A)
        return found

    def copy_adapter(self, source, name):
        """A frozen twin of an adapter under another name."""
        self.add_adapter(name, self.lora(source), f"from {source}")

    def train_adapter(self, name):
        """Make this adapter the only one with gradients; returns its parameters (float32)."""
        self.trained = name
        for other, params in self.adapters.items():
            for p in params:
                p.requires_grad_(other == name)
        return self.adapters[name]

    def weights(self, name):
        """{(module, "A" or "B"): parameter} of an adapter."""
        form, parameters = re.compile(rf"(.+)\.lora_([AB])\.{name}"), self.transformer.named_parameters()
        return {match.groups(): p for key, p in parameters if (match := form.fullmatch(key))}


def filled(x, value):
    """(B,) of one number, beside the samples x (B, ...)."""
    return torch.full((len(x),), value, device=x.device)


class SD3(Model):
    """Stable Diffusion 3.x. Its LoRAs adapt no `attn2`, the second attention of 3.5-Medium's first blocks."""

    defaults = Model.defaults | dict(guidance=4.5, dtype="float16", max_sequence_length=256)
    takes, even_grid, optional = (0, 2), False, ("text_encoder_3", "tokenizer_3")

    def net(self, network, x, t, embeds, pooled):
        time = filled(x, t * self.scheduler.config.num_train_timesteps)
        return network(x, embeds, pooled, time, return_dict=False)[0]


class Flux(Model):
    """FLUX.1: dev reads its guidance as a number, schnell has none."""

    defaults = Model.defaults | dict(guidance=3.5)
    distilled_defaults = dict(guidance=1.0, max_sequence_length=256)
    takes, packed = (0, 1), True

    @classmethod
    def distilled(cls, index, config):
        return not config.get("guidance_embeds")

    def net(self, network, x, t, embeds, pooled, guidance=None):
        n = torch.arange(math.isqrt(x.shape[1]), device=x.device)
        places = torch.cartesian_prod(n[:1], n, n)  # of the picture's tokens; those of the words are all 0
        words = places.new_zeros(embeds.shape[1], 3)
        return network(x, embeds, pooled, filled(x, t), places, words, guidance, return_dict=False)[0]


class Flux2(Model):
    """FLUX.2: klein's base is guided, klein itself was distilled; dev reads its guidance as a number."""

    packed = True

    @classmethod
    def distilled(cls, index, config):
        return index.get("is_distilled", False)

    def net(self, network, x, t, embeds, guidance=None):
        n, words = (torch.arange(k, device=x.device) for k in (math.isqrt(x.shape[1]), embeds.shape[1]))
        zero = n[:1]
        places, words = torch.cartesian_prod(zero, n, n, zero), torch.cartesian_prod(zero, zero, zero, words)
        return network(x, embeds, filled(x, t), places, words, guidance, return_dict=False)[0]

    def mu(self, tokens, num_steps):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, num_steps)

    def to_vae(self, latents):
        side, norm = math.isqrt(latents.shape[1]), self.pipe.vae.bn
        std = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        latents = (latents * std + norm.running_mean).mT.unflatten(2, (side, side))
        return self.pipe._unpatchify_latents(latents)


class QwenImage(Model):
    """Qwen-Image: after guidance, every token gets the length back that it had without."""

    takes, null_prompt, packed, most_tokens = (0, 1), " ", True, 1024

    def net(self, network, x, t, embeds, mask):
        side, more = math.isqrt(x.shape[1]), -embeds.shape[1] % 32  # few lengths, for torch.compile
        embeds, mask = F.pad(embeds, (0, 0, 0, more)), F.pad(mask, (0, more))
        return network(x, embeds, mask, filled(x, t), [[(1, side, side)]] * len(x), return_dict=False)[0]

    def guide(self, v, v_uncond, g):
        guided = super().guide(v, v_uncond, g)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def to_vae(self, latents):
        config = self.pipe.vae.config
        mean, std = latents.new_tensor([config.latents_mean, config.latents_std]).view(2, -1, 1, 1, 1)
        return self.unpack(latents) * std + mean  # (B, C, 1, h, w), a video of one frame


class ZImage(Model):
    """Z-Image: takes lists, of texts of any length, counts t from the other end and returns -v. Turbo is not
    to be guided, which its files do not say; the base is. The pipeline's guidance_scale is one less."""

    defaults = Model.defaults | dict(guidance=1.0)
    attention, token_layers = "attention", ("all_x_embedder.", "cap_embedder.")

    def net(self, network, x, t, embeds):
        time = (1000 - filled(x, 1000 * t)) / 1000  # rounded as the pipeline does
        v = network(list(x.unsqueeze(2)), time, embeds, return_dict=False)[0]
        return -torch.stack(v).squeeze(2)


class Sana(Model):
    """SANA. A prompt is read after an instruction, the null prompt without. Euler's steps, not its DPM's."""

    defaults = Model.defaults | dict(resolution="its own", guidance=4.5, max_sequence_length=300)
    takes, even_grid, null_options = (0, 1), False, dict(complex_human_instruction=None)
    attention = "attn[12]"

    @classmethod
    def flag_defaults(cls, index, config):
        return cls.defaults | dict(resolution=32 * config["sample_size"])

    def euler_scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.pipe.scheduler.config
        if config.get("prediction_type") != "flow_prediction":
            return super().euler_scheduler()
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=config.flow_shift)

    def net(self, network, x, t, embeds, mask):
        time = filled(x, t * self.scheduler.config.num_train_timesteps * network.config.timestep_scale)
        return network(x, embeds, time, encoder_attention_mask=mask, return_dict=False)[0]


FAMILIES = {
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2,
    "Flux2Pipeline": Flux2,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
    "SanaPipeline": Sana,
}


def load_model(args, device):
    """The Model that a script's flags describe, of the family that the pipeline belongs to."""
    family = FAMILIES[pipeline_folder(args.model, only=())[1].__name__]
    checkpointing = getattr(args, "gradient_checkpointing", False)
    options = (not args.no_t5, args.offload_text_encoders, checkpointing, args.max_sequence_length)
    model = family(args.model, getattr(torch, args.dtype), device, *options)
    model.latent_shape(args.resolution)
    for name in ("num_steps", "eval_num_steps"):  # what cannot be is refused now, not when it is due
        if hasattr(args, name):
            model.sigmas(getattr(args, name), args.resolution)
    return model


def defaults_of(model):
    """What the flags of Model.defaults are for a folder or hub id where they are not given."""
    folder, pipeline, _ = pipeline_folder(model, only=["transformer/config.json"])
    index, config = (os.path.join(folder, name) for name in ("model_index.json", "transformer/config.json"))
    return FAMILIES[pipeline.__name__].flag_defaults(read_json(index), read_json(config))


def join_rows(first, *others):
    """Rows of prompts below one another: lists stay lists, tensors are padded with zeros to the longest."""
    if isinstance(first, list):
        return sum(others, first)
    if all(part.shape[1:] == first.shape[1:] for part in others):
        return torch.cat([first, *others])
    rows = [row for part in (first, *others) for row in part]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def take_rows(cond, rows):
    """Those rows of what `encode` returned, by their numbers."""
    taken = ([c[i] for i in rows] if isinstance(c, list) else c[to_device(rows, c.device)] for c in cond)
    return tuple(taken)


def text_parts(pipe):
    """[(name, text encoder, its tokenizer)] of a pipeline."""
    parts = []
    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            found = pipe.components[name.replace("text_encoder", "tokenizer")]
            parts.append((name, encoder, getattr(found, "tokenizer", found)))  # FLUX.2-dev has a processor
    return parts


def is_clip(encoder):
    return type(encoder).__name__.startswith("CLIP")


def what_fits(model, most, shape, guidance):
    """How many of `most` samples go through the network at once: 16, or half as many, or half of that, until
    a step of a rollout, labelled and learnt, fits into every process's GPU. guidance: the student's."""
    params, text = model.adapters[model.trained], "a " * model.max_length

    def learn(size):
        later = [torch.empty_like(p) for p in params for _ in range(4)]  # noqa: F841 - held, as AdamW will
        x = torch.zeros(size, *shape, device=model.device)
        cond = model.encode([text] * size)  # as long as it can be
        v = model.velocity(x, 0.5, cond, model.trained, guidance)
        with torch.no_grad():
            model.velocity(x, 0.5, cond, "base", 2.0 if model.guidable else 1.0)
        v.sum().backward()

    size = min(most, 16)
    while torch.device(model.device).type != "cpu":
        failed = 0.0
        try:
            learn(size)
        except RuntimeError as error:
            if size == 1 or not is_full(error):
                raise
            failed = 1.0
        for p in params:
            p.grad = None
        torch.cuda.empty_cache()
        if not reduce_sum(torch.tensor(failed, device=model.device)).item():
            break
        size //= 2
    return size


def load_pipeline(model, dtype, device="cpu", left_out=(), offload=False):
    """A diffusers pipeline from its folder or hub id, every network of it loaded and checked by load_network,
    the VAE in float32. left_out: parts to do without; offload keeps the text encoders in the CPU's memory."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # diffusers 0.37 ignores `dtype`
    folder, kind, index = pipeline_folder(model, left_out)
    parts = {part: None for part, names in index.items() if part in left_out or names == [None, None]}
    for part, (library, name) in index.items():
        module = {"diffusers": diffusers, "transformers": transformers}.get(library)
        network = getattr(module, name or "", None)
        if part not in parts and isinstance(network, type) and issubclass(network, torch.nn.Module):
            place = "cpu" if offload and part.startswith("text_encoder") else device
            precision = torch.float32 if part == "vae" else dtype
            parts[part] = load_network(network, os.path.join(folder, part), precision, place)
    try:
        pipe = kind.from_pretrained(folder, torch_dtype=dtype, **parts)
    except Exception as error:
        die(f"--model {model}: cannot be loaded: {first_line(error)}")
    for part, encoder, tokenizer in text_parts(pipe):
        known = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) < 0.9 * known:  # transformers makes an empty one of a folder without vocabulary
            part = f"--model {model}: {part.replace('text_encoder', 'tokenizer')}"
            has = f"it has {len(tokenizer)} words, and its text encoder knows {known}"
            die(f"{part} has no whole vocabulary: {has}")
    return pipe


def load_network(kind, folder, dtype, device):
    """A frozen network of a diffusers or transformers class. Every weight comes from the folder's files, fits
    and is finite, or it is refused: the libraries draw what is missing, and drop what is too much."""
    import diffusers

    quantised = "a quantised network; give one in float32, bfloat16 or float16, which --dtype converts"
    if read_json(os.path.join(folder, "config.json")).get("quantization_config"):
        die(f"{folder}: {quantised}")
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        for key, kept_as in read_header(file)[0].items():
            if kept_as not in ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"):
                die(f"{file}: {key} is {kept_as}: {quantised}")
    options = dict(torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    if kind.__module__.startswith("transformers"):
        options["ignore_mismatched_sizes"] = True  # `info` tells of them; diffusers raises
    try:
        network, info = kind.from_pretrained(folder, **options)
    except Exception as error:
        die(f"{folder}: cannot be loaded: {first_line(error)}")
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    misshapen = sorted(key for key, *_ in info["mismatched_keys"])
    fronts = {e.removesuffix(m) if e.endswith(m) else "" for m, e in zip(missing, extra)}
    if len(missing) == len(extra) and len(fronts) == 1 and fronts != {""}:
        die(f"{folder}: its keys begin with {fronts.pop()!r}, those of a wrapper; save the network within it")
    found = {"missing": missing, "unexpected": extra, "of another shape": misshapen}
    wrong = [f"{what} are {listing(keys)}" for what, keys in found.items() if keys]
    if wrong:
        die(f"{folder}: not the weights of a {kind.__name__} with this config.json; {'; '.join(wrong)}")
    network.requires_grad_(False).eval().to(device)
    for module in network.modules():
        if type(module) is diffusers.models.normalization.RMSNorm and module.bias is None:
            module.__class__ = RMSNorm
    for key, weight in network.state_dict().items():
        if weight.is_floating_point() and not torch.stack(weight.aminmax()).isfinite().all():
            die(f"{folder}: {key} has values that are not finite (as {str(dtype).removeprefix('torch.')})")
    return network


# -- LoRA files --------------------------------------------------------------------------------------------


def linear_layers(network):
    """{module name: its linear layer}."""
    return {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def skeleton(model):
    """What a LoRA must fit: a pipeline's transformer, on the meta device, and the pipeline's class."""
    import diffusers

    folder, pipeline, index = pipeline_folder(model, only=["transformer/config.json"])
    with torch.device("meta"):
        kind = getattr(diffusers, index["transformer"][1])
        return kind.from_config(read_json(os.path.join(folder, "transformer", "config.json"))), pipeline


PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


def read_lora(path, network, pipeline):
    """A LoRA for `network`, the transformer of a diffusers pipeline of class `pipeline`, as {module: (A (r,
    in), B (out, r), alpha)}, float32 on the CPU. Either it is just what its files say, alpha/r B A more for
    the weight of each module, or the program ends with what is wrong."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from safetensors.torch import load_file

    file = locate(path)
    check(not transformer_folder(file), f"{path}: a full fine-tune; here only a LoRA will do")
    if os.path.isdir(file):
        both = [os.path.join(file, name) for name in (PEFT_FILE, DIFFUSERS_FILE)]
        found = [name for name in both if os.path.exists(name)]
        advice = f"; did you mean {path}/lora?" if os.path.isdir(os.path.join(file, "lora")) else ""
        check(found, f"{path}: neither {PEFT_FILE} (PEFT) nor {DIFFUSERS_FILE} (diffusers) is in it{advice}")
        file = found[0]
    header, tensors, layers = read_header(file)[1], load_file(file), linear_layers(network)
    config, default_alpha = lora_settings(file, header, tensors)
    parts, alphas, strange = lora_parts(tensors, layers)
    if strange and not any("dora" in key or "magnitude" in key for key in strange):  # which it would drop
        with contextlib.suppress(Exception):  # it knows some layouts of other programs, and fails on the rest
            parts, alphas, strange = lora_parts(pipeline.lora_state_dict(dict(tensors)), layers)
    if strange or not parts:
        advice = ""
        if any(re.match(r"lora_|diffusion_model\.|.*joint_blocks", key) for key in strange):
            advice = (
                ". OneTrainer's convert_model.py makes diffusers' layout of kohya's and ComfyUI's "
                "(--training-method LORA --output-model-format DIFFUSERS_LORA)"
            )
        what = f"{len(strange)} keys belong to no LoRA of a linear layer in this model"
        die(f"{path}: {what}: {listing(strange)}{advice}")
    lora, wrong, assumed = {}, [], False
    for n, (A, B) in parts.items():
        shape = tuple(layers[n].weight.shape)
        if A.ndim != 2 or B.ndim != 2 or (len(B), A.shape[1]) != shape or not 0 < len(A) == B.shape[1]:
            wrong.append(f"{n} has A {tuple(A.shape)} and B {tuple(B.shape)} for a weight of {shape}")
            continue
        rank, alpha, expected = len(A), default_alpha, len(A)
        if config:
            alpha = by_pattern(config.alpha_pattern, n, config.lora_alpha)
            expected = by_pattern(config.rank_pattern, n, config.r)
        alpha = alphas.get(n, alpha)
        if alpha is None:
            alpha, assumed = rank, True
        if rank != expected:
            wrong.append(f"{n} has rank {rank}, in its settings {expected}")
        if not A.isfinite().all() or not B.isfinite().all() or not math.isfinite(alpha):
            wrong.append(f"{n} has values that are not finite")
        if config and config.use_rslora:
            alpha *= math.sqrt(rank)
        lora[n] = A, B, alpha
    missing = [n for n in layers if config and n not in parts and check_target_module_exists(config, n)]
    if missing:
        wrong.append(f"{len(missing)} layers that its settings target have no weights: {listing(missing)}")
    check(not wrong, f"{path}: {listing(wrong)}")
    if assumed and not any(key.endswith(".alpha") for key in tensors):  # what diffusers converts has it in B
        say(f"note: {path} says nothing of its alpha; taken to be its rank, as diffusers does")
    return lora


def by_pattern(patterns, name, default):
    """What peft's rank_pattern or alpha_pattern says of a module."""
    from peft.utils.other import get_pattern_key

    return (patterns or {}).get(get_pattern_key(patterns or (), name), default)


def lora_settings(file, header, keys):
    """A LoRA file's LoraConfig or None, and its header's alpha or None; more than alpha/r B A is refused."""
    from peft import LoraConfig, PeftConfig

    is_peft = any(key.startswith("base_model.model.") for key in keys) or os.path.basename(file) == PEFT_FILE
    source = file
    if "lora_adapter_metadata" in header:  # diffusers'
        config = json_object(header["lora_adapter_metadata"], file)
    elif is_peft:
        source = os.path.join(os.path.dirname(file), "adapter_config.json")
        check(os.path.exists(source), f"{file}: a PEFT LoRA without its adapter_config.json")
        config = read_json(source)
    else:
        for key in ("lora_alpha", "alpha", "ss_network_alpha"):
            with contextlib.suppress(KeyError, ValueError):
                return None, float(header[key])
        return None, None
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    start = config.get("init_lora_weights", True)
    if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
        reason = "changes the base too, so this LoRA is no difference to the base given"
        way = "peft's save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        die(f'{source}: "init_lora_weights": "{start}" {reason}; {way}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that only a newer peft has: see below
            settings = PeftConfig.from_peft_type(**{"peft_type": "LORA"} | config)
        plain = isinstance(settings, LoraConfig) and isinstance(settings.r, int) and settings.target_modules
        plain = plain and isinstance(settings.lora_alpha, (int, float))
    except Exception as error:
        die(f"{source}: not the settings of a LoRA ({first_line(error)})")
    seen = ", ".join(f"{k} {config.get(k)!r}" for k in ("peft_type", "r", "lora_alpha", "target_modules"))
    check(plain, f"{source}: not the settings of a plain LoRA: {seen}")
    more = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    more |= {"use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config"}  # not marked by peft 0.18
    more |= {"layer_replication", "modules_to_save", "target_parameters", "trainable_token_indices"}
    more = sorted(key for key in config if config[key] and (key in more or not hasattr(settings, key)))
    check(not more, f"{source}: more than a plain LoRA: it sets {listing(more)}")
    return settings, None


LORA_KEY = re.compile(  # PEFT's and diffusers' names, and those of programs that write a module's dots as _
    r"(?:transformer\.|diffusion_model\.|lora_transformer_|lora_unet_|lycoris_)?(?:base_model\.model\.)?(.+?)"
    r"\.(?:(lora_A|lora_down|lora\.down)|(lora_B|lora_up|lora\.up)|alpha)(?:\.default)?(?:\.weight)?"
)


def lora_parts(tensors, layers):
    """({module: (A, B)}, {module: alpha}, [what belongs to neither]) of a LoRA file's tensors."""
    with_underscores = {n.replace(".", "_"): n for n in layers}
    halves, alphas, strange = {}, {}, []
    for key, tensor in tensors.items():
        name, down, up = LORA_KEY.fullmatch(key).groups() if LORA_KEY.fullmatch(key) else (None, None, None)
        n = with_underscores.get(name, name)
        kind = "A" if down else "B" if up else "alpha"
        if n not in layers or kind in halves.get(n, ()) or kind == "alpha" and tensor.numel() != 1:
            strange.append(key)
        elif kind == "alpha":
            alphas[n] = tensor.item()
        else:
            halves.setdefault(n, {})[kind] = tensor.float()
    strange += [f"{n} (only lora_{'/'.join(half)})" for n, half in halves.items() if len(half) == 1]
    strange += [f"{n} (only alpha)" for n in alphas if n not in halves]
    return {n: (half["A"], half["B"]) for n, half in halves.items() if len(half) == 2}, alphas, strange


def save_lora(lora, folder):
    """Write {module: (A, B, alpha)} in both layouts: PEFT's (adapter_config.json, adapter_model.safetensors),
    and the one that `pipe.load_lora_weights(folder)` reads (pytorch_lora_weights.safetensors), with the alpha
    in its metadata: without it diffusers takes alpha = rank, and the picture is another one."""
    from peft import LoraConfig
    from safetensors.torch import save

    rank, alpha = next((len(A), alpha) for A, _, alpha in lora.values())  # the first layer's
    ranks = {n: len(A) for n, (A, _, _) in lora.items() if len(A) != rank}
    alphas = {n: its_alpha for n, (_, _, its_alpha) in lora.items() if its_alpha != alpha}
    config = LoraConfig(r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas).to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(lora), "peft_type": "LORA"}
    config = json.loads(json.dumps(config, default=str))
    tensors = {}
    for n, (A, B, _) in lora.items():
        tensors[f"{n}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"{n}.lora_B.weight"] = B.detach().cpu().contiguous()
    final = os.path.realpath(folder)
    folder = final + ".new"  # written beside, then renamed
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    peft_tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    write(os.path.join(folder, PEFT_FILE), save(peft_tensors, {"format": "pt"}))
    its_config = json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)
    its_tensors = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": its_config}
    write(os.path.join(folder, DIFFUSERS_FILE), save(its_tensors, metadata))
    replace_folder(folder, final)


def merge_loras(parts):
    """The exact weighted average of LoRAs' weight deltas, sum_k w_k (alpha_k / r_k) B_k A_k with the weights
    scaled to sum to 1, as one LoRA whose rank is the sum of theirs. parts: [({module: (A, B, alpha)},
    weight), ...] -> {module: (A, B, alpha)}."""
    total, merged = sum(weight for _, weight in parts), {}
    for n in dict.fromkeys(n for lora, _ in parts for n in lora):
        As, Bs = [], []
        for lora, weight in parts:
            if n in lora:
                A, B, alpha = lora[n]
                factor = weight / total * alpha / len(A)
                root = abs(factor) ** 0.5
                As.append(A * root)
                Bs.append(B * math.copysign(root, factor))  # alpha may be negative
        merged[n] = torch.cat(As), torch.cat(Bs, dim=1), sum(map(len, As))
    return merged


def truncate_lora(lora, rank):
    """The best approximation of every module's delta at a lower rank (SVD), in the same form."""
    found = {}
    for n, (A, B, alpha) in lora.items():
        Qb, Rb = torch.linalg.qr(B.double())
        Qa, Ra = torch.linalg.qr(A.double().T)  # B A = Qb (Rb Ra^T) Qa^T
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T * (alpha / len(A)))
        root = S[:rank].sqrt()
        found[n] = (root[:, None] * (Vh[:rank] @ Qa.T)).float(), (Qb @ U[:, :rank] * root).float(), len(root)
    return found


# -- where things lie --------------------------------------------------------------------------------------

HUB_PATH = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)/?")  # OWNER/REPOSITORY, and what is in it


def locate(path):
    """Where a LoRA or a fine-tuned transformer lies on this disk: a path stays what it is; what the hub has,
    OWNER/REPOSITORY or a folder or a .safetensors file in it, OWNER/REPOSITORY/PATH, is downloaded once."""
    if os.path.exists(path):
        return path
    named = HUB_PATH.fullmatch(path)
    is_local = not named or os.path.isdir(os.path.dirname(path.rstrip("/")))
    check(not is_local, f"{path}: no such LoRA folder or file")
    repo, inside = named[1], named[2].strip("/")
    if inside.endswith(".safetensors"):
        folder, file = os.path.split(inside)
        wanted = [file, "adapter_config.json"]
    else:
        folder = inside
        wanted = ["adapter_config.json", PEFT_FILE, DIFFUSERS_FILE]  # of a LoRA, a transformer, a pipeline
        wanted += ["config.json", "diffusion_pytorch_model*", "transformer/*"]
    found = os.path.join(fetch(repo, [os.path.join(folder, name) for name in wanted]), inside)
    check(os.path.exists(found), f"{path}: {repo} is on the hub, but has no {inside}")
    return found.rstrip("/")


def transformer_folder(folder):
    """The folder of a diffusers transformer's weights, if `folder` is one or is a pipeline; else None."""
    for place in (folder, os.path.join(folder, "transformer")):
        config = os.path.join(place, "config.json")
        kind = read_json(config).get("_class_name") if os.path.isfile(config) else None
        if str(kind).endswith("Transformer2DModel"):
            return place


REVISIONS = {}  # of the hub's repositories, each as it was when this process first asked


def fetch(repo, patterns):
    """A hub repository's files, downloaded once; a clear end where it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, revision=REVISIONS.get(repo), allow_patterns=patterns)
    except Exception as error:
        kind = type(error).__name__
        die(f"{repo}: neither a local path nor to be had from the hub ({kind}: {first_line(error)})")
    REVISIONS[repo] = os.path.basename(folder)
    return folder


def pipeline_folder(model, left_out=(), only=None):
    """A pipeline's folder, its diffusers class, and its parts {name: [library, class]}. Of a hub id what
    diffusers needs is downloaded, but for the parts left out; or `only` these files."""
    import diffusers

    folder = model
    if not os.path.isdir(model):
        if os.path.exists(model) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            die(f"--model {model}: no such folder")
        folder = fetch(model, ["model_index.json", *(only or ())])
    if not os.path.exists(os.path.join(folder, "model_index.json")):
        die(f"--model {model}: not a diffusers pipeline folder (no model_index.json in it)")
    index = read_json(os.path.join(folder, "model_index.json"))
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None or kind.__name__ not in FAMILIES:
        die(f"--model {model}: a {index.get('_class_name')}; this program knows {', '.join(FAMILIES)}")
    if folder != model and only is None:
        try:
            options = dict(revision=REVISIONS[model], use_safetensors=True, **dict.fromkeys(left_out))
            folder = kind.download(model, **options)
        except Exception as error:
            die(f"--model {model}: not to be had from the hub ({first_line(error)})")
    return folder, kind, {part: names for part, names in index.items() if isinstance(names, list)}


def read_header(file):
    """({key: dtype}, {name: text}) of a safetensors file; one that is not whole is refused."""
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as f:
            return {key: f.get_slice(key).get_dtype() for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except Exception as error:
        with open(file, "rb") as f:
            pointer = f.read(40).startswith(b"version https://git-lfs")
        check(not pointer, f"{file}: only a Git LFS pointer; run git lfs pull where it was cloned")
        die(f"{file}: not a whole safetensors file ({first_line(error)})")


# ============================================================================================================
# 3. What a run needs: flags, prompts, processes, a folder of its own
# ============================================================================================================


def say(message):
    """A line for the user, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def die(message):
    """One clear line for a user's mistake, and exit status 1."""
    raise SystemExit(f"{os.path.basename(sys.argv[0])}: {message}")


def check(holds, message):
    """End the program with one clear line unless this holds."""
    if not holds:
        die(message)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(names, most=4):
    """The first few of a list, for a message, and how many there are."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# -- flags -------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help: the script's docstring, and every flag's default; some have one for each family of models."""

    def _get_help_string(self, action):
        if action.dest in Model.defaults:
            usual = Model.defaults[action.dest]
            families = {family.__name__: family.defaults[action.dest] for family in FAMILIES.values()}
            others = ", ".join(f"{name} {value}" for name, value in families.items() if value != usual)
            return f"{action.help} (default: {usual}, but {others})"
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parse_args(parser, toy):
    """Parse the command line. Without --model, the defaults are `toy`: the embedded model with settings that
    fit it; what neither says is the default of the model's family. parser.given: what was typed."""
    catch_full(parser._option_string_actions)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may have no plus-minus sign
    parser.formatter_class, parser.usage = Help, "%(prog)s [flags]"
    parser.epilog = textwrap.fill(f"Without --model, other defaults: {as_flags(toy)}", 110)
    nothing = argparse.Namespace(**{action.dest: None for action in parser._actions})
    typed = vars(parser.parse_known_args(namespace=nothing)[0])
    parser.given = {name for name, value in typed.items() if value is not None}
    if "model" not in parser.given:
        parser.set_defaults(**{name: from_anywhere(value) for name, value in toy.items()})
    args = parser.parse_args()
    open_flags = [name for name in Model.defaults if getattr(args, name, "") is None]
    if open_flags:
        defaults = defaults_of(args.model)
        for name in open_flags:
            setattr(args, name, defaults[name])
        if "model" in parser.given:
            say(f"{args.model}, its defaults: {as_flags({name: defaults[name] for name in open_flags})}")
    check_numbers(parser._actions, args)
    if getattr(args, "track", None):
        check(importlib.util.find_spec(args.track), f"--track {args.track}: pip install {args.track}")
    return args


def check_numbers(actions, args):
    """Refuse numbers that are too small: counts below 1, others below 0."""
    for action in actions:
        values = getattr(args, action.dest, None)
        if action.type not in (int, float) or values is None:
            continue
        least = 1 if action.type is int and action.dest not in ("seed", "sde_window", "label_steps") else 0
        for value in values if isinstance(values, list) else [values]:
            check(value >= least, f"{action.option_strings[0]} {value}: must be at least {least}")
    check(getattr(args, "ema", 0) < 1, f"--ema {getattr(args, 'ema', 0)}: must be below 1")
    if getattr(args, "sde", None) == "cps" and args.noise_level > 1:
        die(f"--noise-level {args.noise_level}: with --sde cps it is a share of the noise, at most 1")


def as_flags(defaults):
    """{"batch_size": 8} -> "--batch-size 8", for the eye; without the model."""
    flags = []
    for name, value in defaults.items():
        if name != "model":
            words = value if isinstance(value, list) else [value]
            flags.append(f"--{name.replace('_', '-')} {' '.join(map(str, words))}")
    return ", ".join(flags)


def from_anywhere(value):
    """A default of the toy with its files found from any working folder."""
    if isinstance(value, list):
        return [from_anywhere(v) for v in value]
    if not isinstance(value, str) or os.getcwd() == HERE:
        return value
    return re.sub("(^|=)toy/", lambda m: f"{m[1]}{HERE}/toy/", value)


def refuse_given(parser, flags, reason):
    """End the program if one of these flags was typed, since it would do nothing."""
    for flag in flags:
        check(flag not in parser.given, f"--{flag.replace('_', '-')}: {reason}")


def is_full(error):
    """Whether it says that a GPU's memory is full: Apple's is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def catch_full(known):
    """A full disk or a full GPU is no bug: it gets one line too. known: the script's flags."""
    global HOW_TO_GO_ON
    HOW_TO_GO_ON = "--resume auto goes on" if "--resume" in known else "the same command goes on"
    batch = "--micro-batch-size 1" if "--micro-batch-size" in known else "--batch-size 1"
    frugal = [batch, "--eval-batch-size 1", "--gradient-checkpointing", "--offload-text-encoders", "--no-t5"]
    advice = ", ".join(flag for flag in frugal if flag.split()[0] in known)

    def hook(kind, error, trace):
        if is_full(error):
            said = first_line(error)[:160]
            message = f"the GPU's memory is full; less of it is needed with {advice} ({said})"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            lost = f"{error.strerror}: {error.filename or 'a file of this run'} could not be written"
            message = f"{lost}; what was saved before is whole. Make room, then {HOW_TO_GO_ON}"
        else:
            return sys.__excepthook__(kind, error, trace)
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)

    sys.excepthook = hook


def split_options(flag, spec, **options):
    """ "value,key=1.5" -> (value, {**options, key: 1.5}); the value may have commas of its own."""
    value, found, pattern = spec, dict(options), rf"(.*),({'|'.join(options)})=([^,]*)"
    while options and (match := re.fullmatch(pattern, value, re.DOTALL)):
        value, key, number = match.groups()
        check(re.fullmatch(r"\d+\.?\d*|\.\d+", number), f"{flag} {spec}: {key} must be a number")
        found[key] = float(number)
    return value, found


def parse_specs(flag, specs, **options):
    """["name=value,key=1.5", ...] -> {name: {"value": value, **options}}; a wrong one is refused."""
    found = {}
    form = "NAME=VALUE" + "".join(f"[,{key}=NUMBER]" for key in options)
    for spec in specs or []:
        value, fields = split_options(flag, spec, **options)
        name, _, value = value.partition("=")
        fits = value and re.fullmatch(r"[A-Za-z][\w-]*", name)
        check(fits, f"{flag} {spec}: expected {form}, NAME of letters, digits, - and _")
        check(name not in found, f"{flag}: {name} is given twice")
        found[name] = {"value": value, **fields}
    if found and "weight" in options:
        check(any(spec["weight"] for spec in found.values()), f"{flag}: all weights are 0")
    return found


# -- prompts -----------------------------------------------------------------------------------------------


def load_prompts(task, path):
    """One task's prompts, [{"prompt": str, ...}], from a file: one a line; .jsonl, an object a line; .json,
    an array; .csv and .tsv with a header; any of them gzipped (.gz). What stands beside a prompt is for its
    reward, as in GenEval's metadata. Rows whose "task" is another are skipped, unless task is None."""
    prompts = []
    for place, row in read_rows(path):
        if isinstance(row, str):
            row = {"prompt": row}
        text = row.get("prompt") if isinstance(row, dict) else None
        check(isinstance(text, str) and text.strip(), f'{path}: {place} has no "prompt"')
        half = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
        check(not half, f"{path}: {place} holds half a character (a lone surrogate, \\ud800 to \\udfff)")
        if task is None or row.get("task", task) == task:
            prompts.append(row)
    check(prompts, f"{path}: no prompts in it" + (f' for the task "{task}"' if task else ""))
    return prompts


def read_rows(path):
    """What a prompt file holds, [(where it stands, a text or an object)]."""
    text = read_text(path)
    kind = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if kind in (".csv", ".tsv"):
        return read_table(text, path, "\t" if kind == ".tsv" else ",")
    is_json = kind in (".json", ".jsonl")
    if is_json and text.lstrip().startswith("["):
        try:
            return [(f"entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            die(f"{path}: not JSON ({error})")
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        try:
            if line.strip():
                rows.append((f"line {number}", json.loads(line) if is_json else line.strip()))
        except ValueError as error:
            die(f"{path}: line {number} is not JSON ({error})")
    return rows


def read_table(text, path, delimiter):
    """The rows of a .csv or .tsv file, as read_rows has them; its column of prompts becomes "prompt"."""
    table, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        columns = table.fieldnames or []
        named = [name for name in columns if name.strip().lower() in ("prompt", "prompts")]
        seen = listing(columns, 9) or "none"
        check(len(named) == 1, f"{path}: its header must name one column prompt; it has {seen}")
        for row in table:
            place = f"line {table.line_num}"
            advice = f"quote what has a {delimiter!r}"
            check(None not in row, f"{path}: {place} has more columns than the header; {advice}")
            row["prompt"] = row.pop(named[0])
            rows.append((place, {name: value for name, value in row.items() if value is not None}))
    except csv.Error as error:
        die(f"{path}: line {table.reader.line_num}: {error}")
    return rows


def read_text(path):
    """A UTF-8 file's text, also gzipped; another encoding is refused by its name."""
    try:
        data = pathlib.Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        die(f"{path}: no such file")
    except (OSError, EOFError, zlib.error) as error:
        die(f"{path}: cannot be read ({first_line(error)})")
    except UnicodeDecodeError as error:
        seen = "UTF-16" if b"\0" in data else "cp1252"
        line = data.count(b"\n", 0, error.start) + 1
        die(f"{path}: line {line} is not UTF-8, it looks like {seen}; convert it: iconv -f {seen} -t UTF-8")
    check("\0" not in text, f"{path}: not UTF-8, it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    return text


def pick_prompts(prompts, weights, seed, step, count, schedule="mixed"):
    """The global batch of one update: `count` pairs (task, row), a pure function of (seed, step). mixed:
    tasks in proportion to their weights by systematic sampling, so that every batch is as balanced as it can
    be. alternate: all of one task, each in turn for as many updates as its weight says."""
    rng = np.random.default_rng([seed, step])
    tasks = list(prompts)
    if schedule == "alternate":
        turns = [task for task in tasks for _ in range(int(weights[task]))]
        weights = {task: float(task == turns[step % len(turns)]) for task in tasks}
    edges = np.cumsum([weights[task] for task in tasks]) / sum(weights[task] for task in tasks)
    places = (np.arange(count) + rng.random()) / count
    slots = np.searchsorted(edges, places, side="right").clip(max=len(tasks) - 1)
    picked = [tasks[slot] for slot in slots]
    return [(task, prompts[task][rng.integers(len(prompts[task]))]) for task in picked]


# -- processes ---------------------------------------------------------------------------------------------


def start_processes(track=None, out=None):
    """accelerate's Accelerator: device, process group, trackers. Without a GPU it must be told to join
    torchrun's CPU processes: left to itself, every one of them would take itself for the only one."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    for plugin in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP"):
        asked = os.environ.get("ACCELERATE_USE_" + plugin, "").lower() in ("1", "true")
        use = "use torchrun, or accelerate launch --multi_gpu"
        check(not asked, f"accelerate launch asks for {plugin}, which this program does without; {use}")
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # torchrun sees the dead at once
    cpu = not (torch.cuda.is_available() or torch.xpu.is_available()) and "WORLD_SIZE" in os.environ
    return Accelerator(kwargs_handlers=[patience], cpu=cpu, log_with=track, project_dir=out)


def end_processes(accelerator, failure=None):
    """Leave together; with `failure`, this process says what failed and exits with 1. gloo's threads
    sometimes abort an interpreter that shuts down, and so do threads that score: then that
    shutdown is skipped."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    scoring = any(thread.name.startswith("reward ") for thread in threading.enumerate())
    if accelerator.num_processes > 1 or scoring:
        if failure:
            print(f"{os.path.basename(sys.argv[0])}: {failure}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if failure else 0)
    check(not failure, failure)


def reduce_sum(tensor):
    """The sum of a tensor over all processes, in place; the tensor lies on the process's device."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:
            this = f"process {torch.distributed.get_rank()} could not reach the others of this job"
            reason = "one has died, or this GPU is out of memory. What was saved before is whole"
            die(f"{this}, so it ends too: {reason}, {HOW_TO_GO_ON} ({first_line(error)[:160]})")
    return tensor


MORE_FINITE = (  # said where training is not finite
    "try a smaller --lr or another --dtype; in float16 --resume auto with a smaller --micro-batch-size, of "
    "which a gradient is the sum, may do"
)


def descend(optimizer, params, count):
    """One optimizer step on the mean gradient of all processes; returns its norm before it is clipped to 1. A
    gradient that is not finite changes nothing.

    Losses are summed over samples, steps and dimensions before backward, and divided by `count`, how many
    that are, only here, in float32: the gradient of a mean over 65,536 dimensions would round to zero in
    half precision. A parameter that this process had no use for has a gradient of zero."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    mean = reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / count
    for p, gradient in zip(params, mean.split([p.numel() for p in params])):
        p.grad = gradient.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to give up the update in hand, save what the updates before it made,
    and leave, in seconds. A second one, not at once (torchrun passes on what a terminal sends), ends it."""

    def __init__(self):
        self.name, self.since, self.failure = None, 0.0, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.name and time.monotonic() > self.since + 5:
            die("interrupted")
        self.name, self.since = signal.Signals(number).name, self.since or time.monotonic()

    def fail(self, message):
        """Leave in the same way, but with exit status 1, because something failed here."""
        self.name, self.since, self.failure = "failure", time.monotonic(), message

    def arrived(self, device):
        """Whether any process was told to stop: the same answer on all, so none waits for one that left."""
        return reduce_sum(torch.tensor(float(self.name is not None), device=device)).item() > 0

    def disarm(self):
        """From here on Ctrl-C ends the program at once."""
        self.name, self.since = "SIGINT", -math.inf


# -- a run and its folder ----------------------------------------------------------------------------------


class Run:
    """A training run: its processes, and its folder with log.jsonl, args.json and checkpoints/. Scripts make
    one, `begin` it when the model stands, and `report`, `save` and `end` it."""

    def __init__(self, args, out=None):
        self.args, self.out = args, out or args.out
        self.accelerator = start_processes(args.track, self.out)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.init = claim_folder(self.out, self.accelerator, args.resume, args.overwrite, args.init)

    def begin(self, model, adapter, optimizer, files, settings):
        """The step to go on from, 0 in a new run. Trained are the adapter and its average, "ema". files, by
        content, and settings make the run what it is. From here on Ctrl-C and SIGTERM ask to stop."""
        self.model, self.adapter, self.optimizer = model, adapter, optimizer
        self.identity = run_identity(self.args, self.world, files) | settings
        start = self.resume()
        if self.rank == 0:
            self.log = self.open_log(start)
        if self.args.track:
            flags = {name: str(value) for name, value in vars(self.args).items()}
            self.accelerator.init_trackers("flow-opd", flags, {"wandb": {"dir": self.out}})
        self.stop = StopSignal()
        return start

    def stopping(self):
        return self.stop.arrived(self.device)

    def report(self, record):
        """A line of log.jsonl, and of the tracker."""
        if self.args.track:
            numbers = {name: value for name, value in record.items() if not isinstance(value, dict)}
            self.accelerator.log(numbers, step=record["step"])
        if self.rank == 0:
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()

    def now(self):
        """What is trained, as it is now: a copy."""
        weights = {}
        for adapter in (self.adapter, "ema"):
            parameters = self.model.weights(adapter).items()
            weights[adapter] = {f"{module}.{kind}": p.detach().clone() for (module, kind), p in parameters}
        return {"weights": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def back_to(self, state):
        """What is trained, as it was at a now()."""
        with torch.no_grad():
            for adapter, tensors in state["weights"].items():
                for (module, kind), p in self.model.weights(adapter).items():
                    p.copy_(tensors[f"{module}.{kind}"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, step):
        """checkpoints/STEP: the LoRA people can use (the average) and the state a run resumes from."""
        if self.rank != 0:
            return
        root = os.path.join(self.out, "checkpoints")
        temporary = os.path.join(root, ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        save_lora(self.model.lora("ema"), os.path.join(temporary, "lora"))
        data = io.BytesIO()
        torch.save({"step": step, "identity": self.identity} | self.now(), data)
        write(os.path.join(temporary, "state.pt"), data.getbuffer())
        replace_folder(temporary, os.path.join(root, f"{step:06d}"))
        steps = saved_steps(self.out)
        later = [saved for saved in steps if int(saved) > step]  # of a run that went further before
        for old in later + [saved for saved in steps if int(saved) <= step][: -self.args.keep]:
            shutil.rmtree(os.path.join(root, old), ignore_errors=True)  # someone may read it

    def end(self):
        end_processes(self.accelerator, self.stop.failure)

    def resume(self):
        """Load the checkpoint of --resume; its step. One of another run is refused, and every difference is
        spelled out; of the run's own checkpoints, one that cannot be read gives way to the one before it."""
        resume, folders = self.args.resume, [self.args.resume]
        if not resume:
            return 0
        if resume == "auto":
            steps = reversed(saved_steps(self.out))
            folders = [os.path.join(self.out, "checkpoints", step) for step in steps]
            found = reduce_sum(torch.tensor(float(bool(folders)), device=self.device)).item()
            if found == 0:
                return 0
            wrong = f"--out {self.out}: some machines find checkpoints there and some do not"
            check(found == self.world, f"{wrong}; it must be a folder that all of them share")
        folder, state = first_whole(folders, resume)
        theirs, ours = state["identity"], self.identity
        changed = [name for name in sorted(ours.keys() | theirs.keys()) if theirs.get(name) != ours.get(name)]
        differences = "; ".join(f"{n} was {theirs.get(n)!r}, now {ours.get(n)!r}" for n in changed)
        check(not changed, f"--resume {resume}: {folder} is of another run: {differences}")
        steps = self.args.steps
        check(state["step"] <= steps, f"--steps {steps}: {folder} has made {state['step']} already")
        self.back_to(state)
        return state["step"]

    def open_log(self, start):
        """log.jsonl. A resumed run forgets what was logged after its checkpoint (whose validation is made
        again); a new one deletes what --overwrite gives up."""
        log, kept = os.path.join(self.out, "log.jsonl"), []
        for row in read_log(self.out) if start else []:
            if row["step"] < start or row["step"] == start and "seconds" in row:
                kept.append(json.dumps(row) + "\n")
        write(log, "".join(kept))
        if self.args.overwrite:
            clear_folder(self.out)
        if not start:
            pathlib.Path(self.out, "results.json").unlink(missing_ok=True)
        write_json(os.path.join(self.out, "args.json"), vars(self.args))
        return open(log, "a")  # noqa: SIM115 - for as long as the run lives


def run_identity(args, processes, files):
    """What makes a resumed run the same: flags, if they matter, and the content of its files {what: path}."""
    free = {"steps", "out", "resume", "overwrite", "track", "save_every", "keep", "compile"}
    free |= {"eval_every", "eval_num_steps", "eval_batch_size", "reward", "reward_option"}
    free |= {"micro_batch_size", "offload_text_encoders", "gradient_checkpointing"}
    free |= {"model", "prompts", "eval_prompts", "teachers", "anchor", "init"}  # these by content
    free |= {"batch_size"}  # by its sum: fewer processes with more prompts each are the same run
    flags = {name: value for name, value in vars(args).items() if name not in free}
    contents = {what: path and fingerprint(path) for what, path in files.items()}
    return flags | contents | {"--batch-size x processes": args.batch_size * processes}


def first_whole(folders, resume):
    """(folder, state) of the first checkpoint that can be read."""
    for folder in folders:
        try:
            file = os.path.join(folder, "state.pt")
            return folder, torch.load(file, weights_only=True, map_location="cpu")
        except (FileNotFoundError, NotADirectoryError):
            problem = "no checkpoint there (state.pt is missing)"
        except Exception as error:
            problem = f"not a whole checkpoint ({first_line(error)})"
        if resume == "auto":
            say(f"note: {folder}: {problem}")
    die(f"--resume {resume}: {problem}")


def saved_steps(out):
    """The checkpoints in a run's folder, their names in order."""
    root = os.path.join(out, "checkpoints")
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(filter(str.isdecimal, names), key=int)


def read_log(out):
    """The rows of a run's log.jsonl; a last line that was cut off is none."""
    file = pathlib.Path(out, "log.jsonl")
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def claim_folder(out, accelerator=None, resume=None, overwrite=True, init=None):
    """Make a folder this run's own for as long as it lives, before anything is computed: one that another
    process is at work in, or that cannot be written, is refused. Unless it may overwrite, so is a run in
    whose folder an older one left checkpoints or a LoRA, but to go on from the last of them. Returns where
    `init` is to be read: a LoRA of the folder itself, in which the run will write, is kept beside."""
    lora, kept = os.path.join(out, "lora"), os.path.join(out, "init")
    path = pathlib.Path(os.path.realpath(init or "none"))
    own = [pathlib.Path(os.path.realpath(folder)) for folder in (lora, os.path.join(out, "checkpoints"))]
    inside = any(folder in (path, *path.parents) for folder in own)
    check(not (resume and overwrite), "--overwrite and --resume: give one of them")
    if accelerator is None or accelerator.is_main_process:
        lock_folder(out)
        steps, goes_on = saved_steps(out), False
        if resume and steps:
            last = os.path.join(out, "checkpoints", steps[-1])
            goes_on = resume == "auto" or os.path.realpath(resume) == os.path.realpath(last)
        if steps and not goes_on and not overwrite:
            ways = "--resume auto goes on from the last, --overwrite deletes what it made"
            die(f"--out {out}: an earlier run left checkpoints there; {ways}, or give another --out")
        if os.path.exists(lora) and not steps and not inside and not overwrite:
            die(f"--out {out}: there is a LoRA already; --overwrite deletes it, or give another --out")
        if inside and not goes_on:
            check(os.path.exists(init), f"--init {init}: no such LoRA folder or file")
            shutil.rmtree(kept + ".new", ignore_errors=True)
            shutil.copytree(init if os.path.isdir(init) else os.path.dirname(init), kept + ".new")
            replace_folder(kept + ".new", kept)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return kept if inside else init


def clear_folder(out):
    """Delete the LoRA and the checkpoints in a run's folder; links to their places stay."""
    for folder in ("lora", *(os.path.join("checkpoints", step) for step in saved_steps(out))):
        shutil.rmtree(os.path.realpath(os.path.join(out, folder)), ignore_errors=True)


def lock_folder(out):
    """Take a folder's lock, which falls with this process, however it ends."""
    from filelock import FileLock, Timeout

    try:
        os.makedirs(out, exist_ok=True)
        LOCKS.append(FileLock(os.path.join(out, ".lock"), is_singleton=True))
        LOCKS[-1].acquire(timeout=0)
    except Timeout:
        die(f"--out {out}: another process is at work there; wait for it, or give another --out")
    except NotImplementedError:
        say(f"note: the file system of {out} has no locks, so see to it that no two runs write there")
    except OSError as error:
        die(f"--out {out}: cannot be written ({error.strerror})")


# -- files -------------------------------------------------------------------------------------------------


def write(path, data):
    """Bytes or text to a file, which is the old or the new one whatever happens. A link is followed."""
    path = os.path.realpath(path)
    with open(path + ".tmp", "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_json(path, data):
    write(path, json.dumps(data, indent=1, default=str) + "\n")


def replace_folder(new, final):
    """Rename a finished folder to its place; what was there goes only then. A link is followed."""
    final = os.path.realpath(final)
    shutil.rmtree(final + ".old", ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, final + ".old")
    os.rename(new, final)
    shutil.rmtree(final + ".old", ignore_errors=True)


def read_json(file):
    """The object in a JSON file; what is not one ends the program with the file's name."""
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        die(f"{file}: cannot be read ({first_line(error)})")
    return json_object(text, file)


def json_object(text, file):
    try:
        found = json.loads(text)
    except ValueError as error:
        die(f"{file}: not JSON ({error})")
    check(isinstance(found, dict), f"{file}: not a JSON object")
    return found


def fingerprint(path):
    """What a path holds: of a hub id its revision, of a file or folder a hash; a word is itself."""
    found = path
    if not os.path.exists(path):
        named = HUB_PATH.fullmatch(path)
        if not named:
            return path
        found = fetch(named[1], []) + named[2]
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\](\w+)(.*)", os.path.abspath(found))
    if cached:  # of the hub, by name or by path
        repository, revision, inside = cached.groups()
        return f"{repository.replace('--', '/')}{inside}@{revision}"
    files = [path]
    if os.path.isdir(path):
        inside = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
        files = sorted(filter(os.path.isfile, inside))
    hashes = "".join(f"{os.path.relpath(file, path)} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:12]


def file_hash(file):
    """SHA-256 of a file. A large one's is remembered while its size and times of change are the same."""
    stat, note = os.stat(file), None
    if stat.st_size > 2**26:
        key = f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "flow-opd")
        note = os.path.join(cache, hashlib.sha256(key.encode()).hexdigest())
        with contextlib.suppress(OSError), open(note) as f:
            if remembered := f.read():  # empty while another process writes it
                return remembered
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
    if note:
        with contextlib.suppress(OSError):  # a home that cannot be written
            os.makedirs(cache, exist_ok=True)
            write(note, digest.hexdigest())
    return digest.hexdigest()


# -- pictures ----------------------------------------------------------------------------------------------


def plot_curves(out):
    """curves.png from log.jsonl: a panel per quantity; "kl/ocr" is the line "ocr" of the panel "kl"."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, panels = read_log(out), {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in ("step", "seconds", "memory_gb", "kl_by_sigma"):
            panels.setdefault(key.split("/")[0], []).append(key)
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.8 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            steps, values = zip(*[(row["step"], row[key]) for row in rows if key in row])
            marker = "o" if len(steps) < 20 else None
            axis.plot(steps, values, label=key.partition("/")[2] or None, marker=marker, markersize=3)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)
        if title.startswith("kl") and all(min(line.get_ydata()) > 0 for line in axis.lines):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(os.path.join(out, "curves.png"), dpi=90)
    plt.close(figure)


def draw_rows(run, rows, prompts):
    """The pictures of a grid, {label: (N, 3, H, W)}, from rows {label: (adapter, guidance)}: the same N
    prompts and noise in every row. The processes share the drawing. None if one was told to stop."""
    args, jobs = run.args, [(i, *row) for row in rows.values() for i in range(len(prompts))]
    pictures = torch.zeros(len(jobs), 3, args.resolution, args.resolution, device=run.device)
    mine = list(range(run.rank, len(jobs), run.world))
    for k in range(0, len(mine), args.eval_batch_size):
        if run.stop.name:
            break
        part = mine[k : k + args.eval_batch_size]
        numbers, adapters, guidances = zip(*(jobs[j] for j in part))
        texts, gens = [prompts[i] for i in numbers], generators(args.seed, 1, numbers)
        sampling = args.eval_num_steps, args.resolution, adapters, guidances
        pictures[part] = run.model.generate(texts, gens, *sampling)
    if run.stopping():
        return None
    return dict(zip(rows, reduce_sum(pictures).cpu().split(len(prompts))))


def save_grid(path, rows, captions):
    """A picture grid: rows {label: N pictures (3, H, W)}, the same N captions over every column."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    side = max(96, next(iter(rows.values()))[0].shape[-1])
    left, top, gap, n = 104, 44, 4, len(captions)
    canvas = Image.new("RGB", (left + n * (side + gap), top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, caption in enumerate(captions):
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            if pen.textlength(longer, font) <= side:
                lines[-1] = longer
            else:
                lines.append(word)
        text = "\n".join(lines[:3])
        pen.multiline_text((left + i * (side + gap), 2), text, fill="black", font=font, spacing=1)
    for r, (label, images) in enumerate(rows.items()):
        y = top + r * (side + gap)
        pen.text((4, y + side // 2 - 6), label, fill="black", font=font)
        for i, image in enumerate(images):
            corner = (left + i * (side + gap), y)
            if not image.isfinite().all():
                pen.text(corner, "not finite", fill="black", font=font)
                continue
            pixels = (image.movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
            resample = Image.Resampling.NEAREST if side > pixels.shape[0] else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(pixels).resize((side, side), resample), corner)
    canvas.save(path)
