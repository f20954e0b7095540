"""What the stages of Flow-OPD (arXiv 2605.08063) share: (1) the mathematics of the flow-SDE; (2) the model:
one frozen diffusers pipeline with any number of LoRA adapters, and LoRA files; (3) what a run needs: flags,
prompts, processes, a folder with checkpoints.

Conventions, stated once. t in [0, 1] is the scheduler's sigma: x_t = (1-t) x_0 + t eps, and the model
predicts v = eps - x_0. Sampling runs from t = 1 down to 0; one step goes from t to t_next < t, and
dt = t - t_next. A transition is a Gaussian with a mean and one number `std`, and std ALWAYS includes
sqrt(dt). Log-probabilities and KLs are averaged over the latent's dimensions ("nats per dimension",
Flow-GRPO's convention: a clip range of 1e-4 means nothing without it). t, t_next and std are Python floats:
all samples of a batch are at the same step, and no formula waits for a GPU.
"""

import argparse
import collections
import copy
import datetime
import errno
import glob
import hashlib
import importlib
import importlib.metadata
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
import string
import sys
import textwrap
import threading
import time
import types
import warnings
import zipfile
from collections import namedtuple
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
TOY_DIR = os.path.relpath(os.path.join(HERE, "toy"))  # the embedded model's folder, from any working folder
for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional packages are not this program's
    os.environ.setdefault(library + "_VERBOSITY", "error")

# ============================================================================================================
# 1. The mathematics of the flow-SDE
# ============================================================================================================


def transition(x, v, t, t_next, noise_level, sde="flow"):
    """The Gaussian that one sampling step draws from. x, v: (B, ...) -> mean (B, ...), std float.

    ode   mean = x - v dt                                                         std = 0
    flow  mean = x - [v + s^2/(2t) (x + (1-t) v)] dt,  s = a sqrt(t / (1-t))      std = s sqrt(dt)
          Flow-GRPO, arXiv 2505.05470; eq. 5 of the paper; a is the noise level. At t = 1 the root has
          1 - t_next in the place of 1 - t.
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
    dimensions: (B, ...) -> (B,)."""
    return (mean - mean_teacher).square().flatten(1).mean(1) / (2 * std**2)


def kl_weight(t, t_next, noise_level, sde="flow"):
    """w(t), the KL of two transitions whose velocities differ by 1: the mean is linear in v, so the KL is
    w(t) mean (v - v_teacher)^2. For the flow-SDE at t < 1, w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2."""
    shift, std = transition(0.0, 1.0, t, t_next, noise_level, sde)  # of the mean, by a velocity of 1
    return shift**2 / (2 * std**2)


def velocity_distance(v, v_teacher):
    """mean (v - v_teacher)^2 over dimensions: (B, ...) -> (B,)."""
    return (v - v_teacher).square().flatten(1).mean(1)


def mean_velocity(velocity, x, t, t_next, substeps):
    """The constant velocity that takes x in one step to where `substeps` Euler steps of `velocity` end, to
    Phi(x): (x - Phi(x)) / (t - t_next), (B, ...). What a teacher does in several steps, as one of the
    student's; with one substep it is velocity(x, t)."""
    if substeps == 1:
        return velocity(x, t)
    times, end = np.linspace(t, t_next, substeps + 1).tolist(), x
    for s, s_next in itertools.pairwise(times):
        end = end - velocity(end, s) * (s - s_next)
    return (x - end) / (t - t_next)


WEIGHTINGS = ("uniform", "kl", "kl-dt", "dt2")


def step_weights(sigmas, noise_level, weighting):
    """What each step's velocity distance counts in the loss, {t: weight}, for the steps of a schedule.

    kl       w(t): the distance becomes the flow-SDE's KL, the paper's loss
    uniform  the mean of w(t) over all steps, so they count equally and the loss is as large as the KL
    kl-dt    dt w(t): what Flow-OPD's released code descends, since its std leaves dt out
    dt2      dt^2/2: the distance of two deterministic steps (DiffusionOPD, arXiv 2605.15055)"""
    dt = {t: t - t_next for t, t_next in itertools.pairwise(sigmas)}
    w = {t: kl_weight(t, t_next, noise_level) for t, t_next in itertools.pairwise(sigmas)}
    if weighting == "kl":
        return w
    if weighting == "uniform":
        return dict.fromkeys(w, sum(w.values()) / len(w))
    if weighting == "kl-dt":
        return {t: dt[t] * w[t] for t in w}
    if weighting == "dt2":
        return {t: dt[t] ** 2 / 2 for t in w}
    raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")


def centred_log_ratio(x_next, mean, mean_old, std):
    """log pi(x_next) - log pi_old(x_next) + ||mean - mean_old||^2 / (2 std^2), averaged over dimensions: all
    (B, ...) -> (B,).

    On what the old policy draws a log-ratio has a negative mean, the more the policy has drifted, so a clip
    range would cut one side only. Without that mean (GRPO-Guard, arXiv 2510.22319) it is
    (x_next - mean_old)(mean - mean_old) / std^2."""
    return ((x_next - mean_old) * (mean - mean_old)).flatten(1).mean(1) / std**2


def clipped_surrogate(log_ratio, advantage, clip_range):
    """PPO's loss, -min(ratio A, clip(ratio) A), with ratio = exp(log pi_new - log pi_old). (B,) -> (B,)."""
    assert log_ratio.shape == advantage.shape, "one number per sample each"
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def update_average(ema, params, decay, update):
    """The exponential moving average of the parameters after updates 1 ... n = `update`: p_k counts
    d^(n-k) / (1 + d + ... + d^(n-1)), with d = decay^(1/8) (the paper: 0.9 once in 8 updates). These sum to
    1 from the first update on: where the run started does not count, and there is no warm-up. An update that
    was skipped counts as one that changed nothing."""
    d = decay ** (1 / 8)
    for average, p in zip(ema, params, strict=True):
        average.lerp_(p.detach(), (1 - d) / (1 - d**update))


def training_sigmas(sigmas):
    """The schedule without its last step, if that starts below t = 0.05. There the noise is all but
    invisible: teachers differ most, their KL would outweigh all other steps together, and the picture hardly
    moves. SD3's last step starts at 0.009; FLUX.1's, of ten, at 0.17 to 0.26."""
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
    rows = [torch.randn(shape, generator=g) for g in gens]
    return to_device(torch.stack(rows) if rows else torch.empty(0, *shape), device)


def to_device(values, device):
    """Numbers as a tensor on the device. For CUDA from pinned memory: the CPU does not wait for the GPU."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


# ============================================================================================================
# 2. The model: one frozen base, everything else is an adapter on it
# ============================================================================================================


class LoRA:
    """A mixin over any linear class: the frozen layer's output plus alpha/r B A x of the adapter that the
    current forward applies, `applied.name`, if this layer has it. `loras` is {name: (A, B, alpha/r)}."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = super().forward(rows)
        if self.applied.name in self.loras:
            A, B, scale = self.loras[self.applied.name]
            inner = F.linear(rows.to(y.dtype), A.to(y.dtype))
            y = y.addmm_(inner, B.to(y.dtype).T, alpha=scale)
        return y.unflatten(0, x.shape[:-1])


class RMSNorm(torch.nn.Module):
    """An RMS norm in one kernel instead of diffusers' seven."""

    def forward(self, x):
        return F.rms_norm(x, self.dim, self.weight, self.eps)


def fuse_norms(network):
    """Make diffusers' RMS norms of a network these."""
    from diffusers.models import normalization

    for module in network.modules():
        if type(module) is normalization.RMSNorm and module.bias is None:
            module.__class__ = RMSNorm


# What a transformer's config says of the inputs it takes.
INPUTS = ["in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size"]
INPUTS += ["guidance_embeds", "cap_feat_dim", "caption_channels"]


class Model:
    """A diffusers text-to-image pipeline: one frozen transformer with named LoRA adapters. A forward applies
    one of them. A teacher that is a full fine-tune, not a LoRA, is a network of its own in `full`.

    A family of models is a subclass, SD3 below and the others in families/. It says what is its own: what its
    network takes (`net`, of encode_prompt's results those in `takes`, and `null_prompt`), its latents' layout
    (`packed`), its schedule (`even_grid`, `mu`), its guidance (`guide`), what its VAE takes (`to_vae`).

    dtype is the frozen networks', and what LoRAs are computed in; trained weights, latents, guidance and SDE
    are float32. use_t5=False leaves out SD3's largest text encoder (its tokens are zeros, as in diffusers);
    offload keeps the text encoders in CPU memory except while they encode. max_sequence_length is the text's,
    in tokens; CLIP always reads its own 77. quantize ("int8" or "nf4") is how the frozen networks' large
    weights are stored; LoRAs and what is computed stay as they are. shard gives each process a part of the
    networks: then all processes must ask the same network at the same time, if need be with no rows."""

    defaults = dict(resolution=512, guidance=4.0, dtype="bfloat16", max_sequence_length=512)  # of the flags
    distilled_defaults = dict(guidance=1.0)  # of models whose guidance was distilled into them
    takes = (0,)
    null_prompt, null_options = "", {}  # the unconditional prompt, and encode_prompt's options for it
    optional = ()  # parts of the pipeline that --no-t5 leaves out
    ahead = 20  # updates whose prompts are encoded at once with --offload-text-encoders
    most_tokens = 512
    packed = False  # latents are (tokens, 4 C), not (C, h, w): a token has 2 x 2 of the VAE's
    even_grid = True  # the schedule is shifted from 1, 1 - 1/n, ..., 1/n, not from the scheduler's own grid
    attention = "attn"  # the modules whose projections an untrained LoRA adapts

    def __init__(
        self,
        model,
        dtype=torch.float32,
        device="cpu",
        use_t5=True,
        offload=False,
        gradient_checkpointing=False,
        max_sequence_length=None,
        quantize=None,
        shard=False,
    ):
        max_sequence_length = max_sequence_length or defaults_of(model)["max_sequence_length"]
        wrong = f"--max-sequence-length {max_sequence_length}: the pipeline takes at most {self.most_tokens}"
        check(max_sequence_length <= self.most_tokens, wrong)
        check(use_t5 or self.optional, f"--no-t5: {model} has no T5 that it could do without")
        left_out = () if use_t5 else self.optional
        self.pipe = load_pipeline(model, dtype, device, left_out, offload, quantize, shard)
        self.transformer = self.pipe.transformer
        self.device, self.dtype, self.offload = device, dtype, offload
        self.quantize, self.shard = quantize, shard
        self.sources = {"base": model}  # {name: where it was loaded from}
        self.applied = types.SimpleNamespace(name="base")  # the adapter of the current forward
        self.adapters = {}  # {name: [A, B, A, B, ...]}
        self.full = {}  # {name: network}; teachers on one checkpoint share it
        self.networks = {}  # {its folder: a network of self.full}
        self.waiting = {}  # {update: what its prompts were encoded to}
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(self._checkpointed)
        longest = [t.model_max_length for _, encoder, t in text_parts(self.pipe) if not is_clip(encoder)]
        self.max_length = min([max_sequence_length, *longest])
        self.scheduler = self.euler_scheduler()
        config = self.transformer.config
        self.embedded = config.get("guidance_embeds", False)  # the network takes guidance as an input
        self.guidable = self.embedded or not self.distilled(self.pipe.config, config)
        self.patch = 2 if self.packed else config.get("patch_size", 2)
        self.unit = self.patch * self.pipe.vae_scale_factor  # pixels along a side of a token
        # What a pipeline tells its encode_prompt, whose own defaults are others.
        known = inspect.signature(self.pipe.encode_prompt).parameters
        told = {name: p.default for name, p in inspect.signature(type(self.pipe).__call__).parameters.items()}
        told |= dict(device=device, max_sequence_length=self.max_length, do_classifier_free_guidance=False)
        self.text_options = {name: told[name] for name in known if name in told and name != "prompt"}
        self.null = self.encode([self.null_prompt], **self.null_options)

    # -- what a family may override --------------------------------------------------------------------------

    @classmethod
    def distilled(cls, index, config):
        """Whether guidance was distilled into it, from model_index.json and the transformer's config.json."""
        return False

    @classmethod
    def flag_defaults(cls, index, config):
        """The defaults of flags that are not given, from the same files."""
        return cls.defaults | (cls.distilled_defaults if cls.distilled(index, config) else {})

    def guide(self, v, v_uncond, g):
        """Classifier-free guidance. v, v_uncond: (B, ...) -> (B, ...)."""
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

    # -- sampling --------------------------------------------------------------------------------------------

    def sigmas(self, num_steps, resolution):
        """The num_steps + 1 sigmas from 1 to 0, floats, that the scheduler visits for a square picture."""
        grid = {"num_inference_steps": num_steps}
        if self.even_grid:
            grid = {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
        tokens = (resolution // self.unit) ** 2
        self.scheduler.set_timesteps(**grid, mu=self.mu(tokens, num_steps))
        sigmas = self.scheduler.sigmas.tolist()
        falling = all(t > t_next for t, t_next in itertools.pairwise(sigmas))
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

    def encode(self, prompts, **options):
        """B strings -> what `net` takes of them, each B rows: tensors, e.g. embeds (B, L, D) and pooled
        (B, P), or lists. A prompt that occurs twice is encoded once."""
        self._move_encoders(self.device)
        conds = self._encode(prompts, **options)
        self._move_encoders("cpu")
        return conds

    def encode_update(self, batch, step, pick):
        """What `encode` returns for the prompts of an update's (task, row) pairs. With
        --offload-text-encoders those of the next updates, pick(step)[1], are encoded too while the encoders
        are there, and wait in CPU memory."""
        if not self.offload:
            return self.encode([row["prompt"] for _, row in batch])
        if step not in self.waiting:
            self._move_encoders(self.device)
            for k in range(step, step + self.ahead):
                self.waiting[k] = placed(self._encode([row["prompt"] for _, row in pick(k)[1]]), "cpu")
            self._move_encoders("cpu")
        return placed(self.waiting.pop(step), self.device)

    @torch.no_grad()
    def _encode(self, prompts, **options):
        unique, parts = list(dict.fromkeys(prompts)), []
        batches = [unique[i : i + 16] for i in range(0, len(unique), 16)]
        if self.shard:  # all processes ask the encoders equally often
            batches += [[""]] * (most(len(batches), self.device) - len(batches))
        for batch in batches:
            found = self.pipe.encode_prompt(batch, **self.text_options | options)
            parts.append([self._as_read(found[k], found[0]) for k in self.takes])
        conds = [join_rows(*kind) for kind in zip(*parts)]
        return take_rows(conds, [unique.index(p) for p in prompts])

    def _move_encoders(self, device):
        """With --offload-text-encoders they are on the GPU only while they encode; where both do not fit, the
        transformers are in CPU memory meanwhile."""
        if not self.offload:
            return
        encoders = [encoder for _, encoder, _ in text_parts(self.pipe)]
        networks = {self.transformer, *self.full.values()}
        if device != "cpu" and free_memory(device) < 1.1 * sum(map(size_of, encoders)):
            for network in networks:
                network.to("cpu")
        for encoder in encoders:
            encoder.to(device)
        if device == "cpu":
            for network in networks:
                network.to(self.device)

    def _as_read(self, found, embeds):
        """A result of encode_prompt in the network's data type. No mask means that all tokens count."""
        if found is None:
            return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        floating = isinstance(found, torch.Tensor) and found.is_floating_point()
        return found.to(self.dtype) if floating else found

    def velocity(self, x, t, cond, adapter="base", guidance=1.0):
        """v(x_t, t | cond) of one adapter (or "base", or a full fine-tune), (B, ...) float32, guided: in most
        families v_uncond + g (v_cond - v_uncond), both halves in one forward. g = 1 is a single, unguided
        forward; a network that takes g as an input (`embedded`) gets it. Without rows (B = 0) a process only
        takes part in the forward of a sharded network."""
        assert adapter == "base" or adapter in self.adapters or adapter in self.full, adapter
        if guidance != 1 and not self.guidable and adapter not in self.full:
            die(f"guidance {guidance:g}: guidance was distilled into {self.sources['base']}; give 1")
        if len(x) == 0:
            if self.shard:
                one = x.new_zeros(1, *x.shape[1:])
                x = self.velocity(one, t, self.null, adapter, guidance)
            return x[:0].float()
        network = self.full.get(adapter, self.transformer)
        self.applied.name = adapter
        x = x.to(self.dtype)
        if self.embedded:
            return self.net(network, x, t, *cond, filled(x, guidance)).float()
        if guidance == 1:
            return self.net(network, x, t, *cond).float()
        null = take_rows(self.null, [0] * len(x))
        both = [join_rows(*kind) for kind in zip(cond, null)]
        v_cond, v_uncond = self.net(network, torch.cat([x, x]), t, *both).float().chunk(2)
        return self.guide(v_cond, v_uncond, guidance)

    def _checkpointed(self, block, *inputs):
        """Gradient checkpointing: the backward recomputes a block with the adapter of its forward, whatever
        was applied since."""
        name = self.applied.name

        def run(*inputs):
            self.applied.name = name
            return block(*inputs)

        options = dict(use_reentrant=False, preserve_rng_state=False)  # no dropout: nothing is drawn
        return torch.utils.checkpoint.checkpoint(run, *inputs, **options)

    def compile(self, **options):
        """torch.compile with its options for the blocks of all networks, or an error. A graph serves all
        blocks of a kind; another adapter or another number of rows is another graph."""
        torch._dynamo.config.cache_size_limit = 256
        for network in {self.transformer, *self.full.values()}:
            for block in blocks_of(network):
                block.compile(fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def decode(self, latents, name=None):
        """latents (B, ...) -> pictures (B, 3, H, W), float32 in [0, 1]; a million pixels at a time, to bound
        the memory. A picture that is not finite becomes NaN, never black; given the name of the adapter that
        drew it, it ends the program."""
        latents = self.to_vae(latents.float())
        at_once = max(1, 2**20 // (latents[0, 0].numel() * self.pipe.vae_scale_factor**2))
        pictures = torch.cat([self.pipe.vae.decode(z).sample for z in latents.split(at_once)]).div(2).add(0.5)
        pictures = pictures.reshape(len(latents), 3, *pictures.shape[-2:])  # also a video of one frame
        finite = pictures.isfinite().flatten(1).all(1)
        if name and not finite.all():
            dtype = str(self.dtype).removeprefix("torch.")
            reason = f"its weights are broken, or too large for --dtype {dtype}"
            die(f"{name} ({self.sources[name]}) draws a picture that is not finite: {reason}")
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
        pipeline's. A picture that is not finite ends the program; without `strict` it is returned as NaN.
        Without prompts a process only takes part in the forwards of sharded networks."""
        nothing = torch.zeros(0, 3, resolution, resolution, device=self.device)
        if not prompts and not self.shard:
            return nothing
        draw = partial(randn, gens, self.latent_shape(resolution), self.device)
        velocity = partial(self.velocity, cond=self.encode(prompts), adapter=adapter, guidance=guidance)
        sigmas = self.sigmas(num_steps, resolution)
        *_, last = rollout(velocity, draw(), sigmas, noise_level, sde, draw)
        return self.decode(last.x_next, adapter if strict else None) if prompts else nothing

    @torch.no_grad()
    def save_pipeline(self, folder, name):
        """A stand-alone pipeline: the base loaded anew, dense and on the CPU, with an adapter merged in."""
        pipe = load_pipeline(self.sources["base"], self.dtype)
        layers = linear_layers(pipe.transformer)
        for n, (A, B, alpha) in self.lora(name).items():
            layers[n].weight += (alpha / len(A) * B @ A).cpu()
        pipe.vae.to(self.dtype)
        folder = folder.rstrip("/")
        pipe.save_pretrained(folder + ".new")
        os.rename(folder + ".new", folder)

    # -- adapters ------------------------------------------------------------------------------------------

    def load_teacher(self, name, path):
        """LoRAs, as load_adapter; or a full fine-tune, a pipeline or transformer by folder or hub id; or
        CHECKPOINT+LORA, LoRAs on one."""
        first, folder = path if os.path.exists(path) else path.partition("+")[0], None
        if os.path.exists(first) or HUB_PATH.fullmatch(first):
            folder = transformer_folder(locate(first))
        if not folder:
            return self.load_adapter(name, path, self.dtype)
        loras = path[len(first) + 1 :]
        self.full[name] = self.networks.get(folder) or self._load_full(first, folder)
        self.networks[folder], self.sources[name] = self.full[name], path
        if loras:
            self.add_adapter(name, read_lora(loras, self.full[name]), path, self.dtype, self.full[name])

    def _load_full(self, path, folder):
        """A transformer of its own, which must take what this model's takes."""
        library, ours = self.pipe.config["transformer"]
        found = read_json(os.path.join(folder, "config.json"))["_class_name"]
        check(found == ours, f"{path}: a {found}; this model's transformer is a {ours}")
        kind, place = getattr(importlib.import_module(library), ours), "cpu" if self.shard else self.device
        network = load_network(kind, folder, self.dtype, place, self.quantize)
        for key in INPUTS:
            its, ours = network.config.get(key), self.transformer.config.get(key)
            check(its == ours, f"{path}: it does not fit this model: {key} is {its}, the model's {ours}")
        size = size_of(network) / 1e9
        where = "on all devices together" if self.shard else "on every device"
        say(f"note: {path} is a full fine-tune, a transformer of its own: {size:.1f} GB more {where}")
        if self.shard:
            shard_network(network, self.device)
        return network

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

    def load_adapter(self, name, path, dtype=torch.float32):
        """A LoRA, or several as one: see read_lora."""
        self.add_adapter(name, read_lora(path, self.transformer), path, dtype)

    def add_adapter(self, name, lora, source="in training", dtype=torch.float32, network=None):
        """A frozen adapter from {module: (A (r, in), B (out, r), alpha)}: it adds alpha/r B A to a weight of
        the base, or of another network."""
        assert name not in self.adapters, f"there is an adapter {name} already"
        layers = linear_layers(network or self.transformer)
        self.adapters[name], self.sources[name] = [], source
        for n in filter(lora.__contains__, layers):  # in the network's order, the same for all adapters
            layer, (A, B, alpha) = layers[n], lora[n]
            if not isinstance(layer, LoRA):
                kind = type(layer)
                layer.__class__ = type("LoRA" + kind.__name__, (LoRA, kind), {})
                layer.applied, layer.loras = self.applied, {}
            A, B = (weight.detach().to(self.device, dtype, copy=True) for weight in (A, B))
            layer.loras[name] = A, B, alpha / len(A)
            self.adapters[name] += [A, B]

    def lora(self, name):
        """An adapter as {module: (A, B, alpha)}; the inverse of add_adapter."""
        found = {}
        for n, layer in linear_layers(self.transformer).items():
            if isinstance(layer, LoRA) and name in layer.loras:
                A, B, scale = layer.loras[name]
                found[n] = A.detach(), B.detach(), scale * len(A)
        return found

    def copy_adapter(self, source, name):
        """A frozen copy of an adapter under another name."""
        self.add_adapter(name, self.lora(source), f"from {source}")

    def train_adapter(self, name):
        """Make this adapter the only one with gradients; returns its parameters (float32)."""
        source = f"{name} ({self.sources[name]})"
        loras = self.lora(name).values()
        learns = any(alpha and (A.any() or B.any()) for A, B, alpha in loras)
        check(learns, f"{source}: nothing can be learnt from it: its alpha is 0, or its weights are")
        for other, params in self.adapters.items():
            for p in params:
                p.requires_grad_(other == name)
        return self.adapters[name]


def filled(x, value):
    """full((B,), value) on the device of x (B, ...)."""
    return torch.full((len(x),), value, device=x.device)


class SD3(Model):
    """Stable Diffusion 3.x. Its LoRAs adapt no `attn2`, the second attention of 3.5-Medium's first blocks."""

    defaults = Model.defaults | dict(guidance=4.5, dtype="float16", max_sequence_length=256)
    takes, even_grid, optional = (0, 2), False, ("text_encoder_3", "tokenizer_3")

    def net(self, network, x, t, embeds, pooled):
        time = filled(x, t * self.scheduler.config.num_train_timesteps)
        return network(x, embeds, pooled, time, return_dict=False)[0]


FAMILIES = {  # {diffusers pipeline: its Model}; all but SD3 are in families/, module.class
    "StableDiffusion3Pipeline": "flow_sde.SD3",
    "FluxPipeline": "families.flux.Flux",
    "Flux2KleinPipeline": "families.flux.Flux2",
    "Flux2Pipeline": "families.flux.Flux2",
    "QwenImagePipeline": "families.qwenimage.QwenImage",
    "ZImagePipeline": "families.zimage.ZImage",
    "SanaPipeline": "families.sana.Sana",
}


def family_of(pipeline):
    """The Model of a diffusers pipeline's class."""
    module, _, name = FAMILIES[pipeline.__name__].rpartition(".")
    return getattr(importlib.import_module(module), name)


def quantizer(how):
    """A --quantize with the version of its package, for what tells runs apart."""
    return f"nf4 (bitsandbytes {importlib.metadata.version('bitsandbytes')})" if how == "nf4" else how


def load_model(args, device):
    """The Model that a script's flags describe, of the family that the pipeline belongs to."""
    if args.quantize == "nf4":
        from memory.quantize import try_nf4

        try:
            try_nf4(device)
        except Exception as error:
            die(f"--quantize nf4: bitsandbytes cannot do it on {device} ({first_line(error)})")
    family = family_of(pipeline_folder(args.model, only=())[1])
    checkpointing = getattr(args, "gradient_checkpointing", False)
    options = (not args.no_t5, args.offload_text_encoders, checkpointing)
    options += (args.max_sequence_length, args.quantize, args.shard)
    alone = args.shard and not torch.distributed.is_initialized()
    check(not alone, "--shard: there is one process; start several, torchrun --nproc_per_node=8 ...")
    model = family(args.model, getattr(torch, args.dtype), device, *options)
    model.latent_shape(args.resolution)
    for name in ("num_steps", "eval_num_steps"):  # what the schedule cannot do is refused now
        if hasattr(args, name):
            model.sigmas(getattr(args, name), args.resolution)
    return model


def defaults_of(model):
    """The defaults of Model.defaults' flags for a folder or hub id."""
    folder, pipeline, _ = pipeline_folder(model, only=["transformer/config.json"])
    index, config = (os.path.join(folder, name) for name in ("model_index.json", "transformer/config.json"))
    return family_of(pipeline).flag_defaults(read_json(index), read_json(config))


def join_rows(first, *others):
    """Concatenate rows of prompts: lists stay lists, tensors are padded with zeros to the longest."""
    if isinstance(first, list):
        return sum(others, first)
    if all(part.shape[1:] == first.shape[1:] for part in others):
        return torch.cat([first, *others])
    rows = [row for part in (first, *others) for row in part]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def take_rows(cond, rows):
    """Some rows of what `encode` returned: a slice, or a list of their numbers."""
    taken = []
    for c in cond:
        if isinstance(rows, slice):
            taken.append(c[rows])
        elif isinstance(c, list):
            taken.append([c[i] for i in rows])
        else:
            taken.append(c[to_device(torch.tensor(rows, dtype=torch.long), c.device)])
    return tuple(taken)


def size_of(network):
    """Bytes of its weights on this process's device."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in network.parameters())


def free_memory(device):
    """Bytes that are free on a GPU."""
    if torch.device(device).type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def placed(cond, device):
    """What `encode` returned, on that device."""
    found = []
    for c in cond:
        found.append([row.to(device) for row in c] if isinstance(c, list) else c.to(device))
    return tuple(found)


def by_task(batch, everyones):
    """{task: slice of its rows} of a batch of (task, row) pairs in the order of their tasks. everyones: all
    processes' batches in one, in that order too. A task that only others have has no rows here; but all
    processes ask its teacher, if the network is sharded."""
    counts, found, start = collections.Counter(task for task, _ in batch), {}, 0
    for task in dict.fromkeys(task for task, _ in everyones):
        found[task] = slice(start, start + counts[task])
        start += counts[task]
    return found


def text_parts(pipe):
    """[(name, text encoder, its tokenizer)] of a pipeline."""
    parts = []
    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            found = pipe.components[name.replace("text_encoder", "tokenizer")]
            parts.append((name, encoder, getattr(found, "tokenizer", found)))  # FLUX.2-dev has a processor
    return parts


def is_clip(encoder):
    return encoder.config.model_type.startswith("clip")  # "clip_text_model"


def load_pipeline(model, dtype, device="cpu", left_out=(), offload=False, quantize=None, shard=False):
    """A diffusers pipeline from its folder or hub id, every network of it loaded and checked by load_network,
    the VAE in float32. left_out: parts to do without; offload keeps the text encoders in CPU memory. quantize
    and shard are for the transformer and for large text encoders."""
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
            how = (torch.float32, device) if part == "vae" else (dtype, "cpu" if shard else device, quantize)
            parts[part] = load_network(network, os.path.join(folder, part), *how)
            if offload and part.startswith("text_encoder"):
                parts[part].to("cpu")
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
    if shard:
        shard_network(pipe.transformer, device)
        for _, encoder, _ in () if offload else text_parts(pipe):
            if is_large(encoder):
                shard_network(encoder, device)
            else:
                encoder.to(device)
    return pipe


LARGE_ENCODER = 10**9  # parameters, from which on --quantize and --shard take a text encoder too


def is_large(encoder):
    return encoder.num_parameters() >= LARGE_ENCODER


def blocks_of(network):
    """The blocks that a network is a stack of."""
    return [block for block in network.modules() if type(block).__name__ in network._no_split_modules]


def shard_network(network, device):
    """Leave a part of each weight on this process's device; a block borrows the others' parts while it is at
    work (FSDP). The LoRAs' weights are no parameters of the network, so they stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* a view")  # nobody writes to it
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*blocks_of(network), network):
        fully_shard(module, mesh=mesh)


def load_network(kind, folder, dtype, device, how=None):
    """A frozen network of a diffusers or transformers class. Every weight comes from the folder's files, fits
    and is finite, or it is refused: the libraries initialise what is missing, and drop what is too much.
    how: "int8" or "nf4", to quantize its blocks on the way to the device, except in a small text encoder."""

    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    kinds = {kept_as for file in files for kept_as in read_header(file)[0].values()}
    plain = kinds <= {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
    quantized = not plain or read_json(os.path.join(folder, "config.json")).get("quantization_config")
    instead = "give the dense one (float32, bfloat16 or float16), with --quantize int8 or nf4"
    check(not quantized, f"{folder}: a quantized network; {instead}")
    options = dict(torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    is_encoder = kind.__module__.startswith("transformers")
    if is_encoder:
        options["ignore_mismatched_sizes"] = True  # `info` tells of them; diffusers raises
    try:
        network, info = kind.from_pretrained(folder, **options)
    except Exception as error:
        die(f"{folder}: cannot be loaded: {first_line(error)}")
    found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    found["of another shape"] = [key for key, *_ in info["mismatched_keys"]]
    wrong = [f"{what} are {listing(sorted(keys))}" for what, keys in found.items() if keys]
    check(
        not wrong, f"{folder}: not the weights of a {kind.__name__} with this config.json; {'; '.join(wrong)}"
    )
    network.requires_grad_(False).eval()
    for key, weight in network.state_dict().items():
        if weight.is_floating_point() and not torch.stack(weight.to(device).aminmax()).isfinite().all():
            die(f"{folder}: {key} has values that are not finite (as {str(dtype).removeprefix('torch.')})")
    if how and (not is_encoder or is_large(network)):
        from memory.quantize import quantize

        for block in blocks_of(network):
            for layer in block.modules():
                if type(layer) is torch.nn.Linear:  # one at a time: the device never holds the dense network
                    quantize(layer.to(device), how)
    fuse_norms(network)
    return network.to(device)


# -- LoRA files --------------------------------------------------------------------------------------------

PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


def linear_layers(network):
    """{module name: its linear layer}."""
    return {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def skeleton(model):
    """What a LoRA must fit: a pipeline's transformer, on the meta device."""
    import diffusers

    folder, _, index = pipeline_folder(model, only=["transformer/config.json"])
    with torch.device("meta"):
        kind = getattr(diffusers, index["transformer"][1])
        return kind.from_config(read_json(os.path.join(folder, "transformer", "config.json")))


def lora_parts(spec):
    """LORA[,scale=S][,text=0][+LORA...] -> [(LORA, {"scale": S, "text": 0 or 1})]; none for the word base, no
    LoRA. text=0 leaves out what the file has for text encoders."""
    if spec == "base":
        return []
    plain = dict(scale=1.0, text=1.0)
    if os.path.exists(spec):
        return [(spec, plain)]
    return [split_options("LoRA", part, **plain) for part in spec.split("+")]


def read_lora(spec, network):
    """The sum of the LoRAs in spec (see lora_parts), each times its scale, as one: see read_lora_file."""
    from layouts.lora import read_lora_file

    parts = []
    for path, options in lora_parts(spec):
        parts.append((read_lora_file(path, network, options["text"]), options["scale"]))
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else merge_loras(parts)


def save_lora(lora, folder, args=None):
    """Write {module: (A, B, alpha)} in both layouts: PEFT's (adapter_config.json, adapter_model.safetensors),
    and the one that `pipe.load_lora_weights(folder)` reads (pytorch_lora_weights.safetensors). There
    alpha/r is folded into B: a program that reads no alpha assumes alpha = rank, so all agree. args: flags of
    the run that trained it, for what sampling_of reads."""
    from peft import LoraConfig
    from safetensors.torch import save

    rank, alpha = next((len(A), alpha) for A, _, alpha in lora.values())  # the first layer's
    ranks = {n: len(A) for n, (A, _, _) in lora.items() if len(A) != rank}
    alphas = {n: its_alpha for n, (_, _, its_alpha) in lora.items() if its_alpha != alpha}
    config = LoraConfig(r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas).to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(lora), "peft_type": "LORA"}
    config = json.loads(json.dumps(config, default=str))
    peft_tensors, tensors = {}, {}
    for n, (A, B, its_alpha) in lora.items():
        A, B = A.detach().cpu().contiguous(), B.detach().cpu().contiguous()
        peft_tensors |= {f"base_model.model.{n}.lora_A.weight": A, f"base_model.model.{n}.lora_B.weight": B}
        scaled = B * (its_alpha / len(A))
        tensors |= {f"transformer.{n}.lora_A.weight": A, f"transformer.{n}.lora_B.weight": scaled}
    final = os.path.realpath(folder)
    folder = final + ".new"  # written beside, then renamed
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write(os.path.join(folder, PEFT_FILE), save(peft_tensors, {"format": "pt"}))
    folded = config | {"lora_alpha": rank, "alpha_pattern": ranks}
    folded = json.dumps({f"transformer.{key}": value for key, value in folded.items()}, sort_keys=True)
    metadata = {"format": "pt", "lora_adapter_metadata": folded}
    write(os.path.join(folder, DIFFUSERS_FILE), save(tensors, metadata))
    if args:
        few = {"num_steps": args.num_steps} if getattr(args, "teacher_substeps", 1) > 1 else {}
        write_json(os.path.join(folder, "sampling.json"), few | {"guidance": args.guidance})
    replace_folder(folder, final)


def sampling_of(spec):
    """The sampling settings stored beside a LoRA, {"num_steps": 4, "guidance": 1.0}: its guidance, and a
    few-step student's steps. {} without a sampling.json, and for several LoRAs."""
    places = [locate(path) for path, _ in lora_parts(spec)]
    if len(places) != 1:
        return {}
    folder = places[0] if os.path.isdir(places[0]) else os.path.dirname(places[0])
    file = os.path.join(folder, "sampling.json")
    found = read_json(file) if os.path.exists(file) else {}
    steps, guidance = found.get("num_steps", 1), found.get("guidance", 1)
    fits = isinstance(steps, int) and isinstance(guidance, (int, float)) and steps > 0 and guidance >= 0
    check(fits, f"{file}: num_steps must be a whole number above 0, and guidance a number")
    return {name: found[name] for name in ("num_steps", "guidance") if name in found}


def merge_loras(parts):
    """The exact weighted sum of LoRAs' weight deltas, sum_k w_k (alpha_k / r_k) B_k A_k, as one LoRA whose
    rank is the sum of theirs. parts: [({module: (A, B, alpha)}, weight), ...] -> {module: (A, B, alpha)}."""
    merged = {}
    for n in dict.fromkeys(n for lora, _ in parts for n in lora):
        As, Bs = [], []
        for lora, weight in parts:
            if n in lora:
                A, B, alpha = lora[n]
                factor = weight * alpha / len(A)
                root = abs(factor) ** 0.5
                As.append(A * root)
                Bs.append(B * math.copysign(root, factor))  # alpha may be negative
        merged[n] = torch.cat(As), torch.cat(Bs, dim=1), sum(map(len, As))
    return merged


def merge_ties(loras, density, method="ties"):
    """TIES (arXiv 2306.01708) of LoRAs' weight deltas, as peft's add_weighted_adapter with "ties_svd" and
    weights 1: keep the largest `density` of each delta, give every entry the sign of the deltas' sum, average
    those that have it, and take the best LoRA of the largest rank among them. method "dare_ties": keep random
    ones, divided by the density (arXiv 2311.03099), and sum."""
    from peft.utils import merge_utils

    torch.manual_seed(0)
    merged, combine = {}, getattr(merge_utils, method)
    for n in dict.fromkeys(n for lora in loras for n in lora):
        its = [lora[n] for lora in loras if n in lora]
        deltas = [alpha / len(A) * B @ A for A, B, alpha in its]
        weights = torch.ones(len(its), device=deltas[0].device)
        U, S, Vh = torch.linalg.svd(combine(deltas, weights, density))
        rank = max(len(A) for A, _, _ in its)
        root = S[:rank].sqrt()
        merged[n] = root[:, None] * Vh[:rank], U[:, :rank] * root, rank
    return merged


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
        wanted = [file, "adapter_config.json", "sampling.json"]
    else:
        folder = inside
        wanted = ["adapter_config.json", PEFT_FILE, DIFFUSERS_FILE, "sampling.json"]  # of a LoRA
        wanted += ["config.json", "diffusion_pytorch_model*", "transformer/*"]  # of a transformer, a pipeline
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


REVISIONS = {}  # {hub repository: commit, pinned at first download}


def fetch(repo, patterns):
    """A hub repository's files, downloaded once."""
    from huggingface_hub import constants, snapshot_download

    options = dict(allow_patterns=patterns, local_files_only=constants.HF_HUB_OFFLINE)
    try:
        folder = snapshot_download(repo, revision=REVISIONS.get(repo), **options)
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
        die(f"{file}: not a whole safetensors file, or a Git LFS pointer ({first_line(error)})")


# ============================================================================================================
# 3. What a run needs: flags, prompts, processes, a folder with checkpoints
# ============================================================================================================


def say(message):
    """A line for the user, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def die(message):
    """One clear line for a user's mistake, and exit status 1."""
    raise SystemExit(f"{os.path.basename(sys.argv[0])}: {message}")


def check(holds, message):
    """Exit with one clear line unless this holds."""
    if not holds:
        die(message)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(names, most=4):
    """The first few of a list, for a message, and how many there are."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def masked(text):
    """A text without the user and password of the addresses in it."""
    return re.sub(r"(https?://)[^/\s@]*@", r"\1***@", text)


# -- flags -------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help: the script's docstring, and the defaults of flags that have one."""

    def _get_help_string(self, action):
        if action.dest in Model.defaults:
            return f"{action.help} (default: the model's)"
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Unbroken:
    """An output stream whose reader may leave (`| head -1`): the run goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def parse_args(parser, toy):
    """Parse the command line. Without --model, the defaults are `toy`: the embedded model with settings that
    fit it; what neither gives is the default of the model's family. parser.given: the flags typed."""
    sys.excepthook = explain_full
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may have no plus-minus sign
    sys.stdout = Unbroken(sys.stdout)
    parser.formatter_class, parser.usage = Help, "%(prog)s [flags]"
    parser.convert_arg_line_to_args = str.splitlines  # of a @FILE of arguments: an empty line is none
    settings = " ".join(f"{name.replace('_', '-')}={value}" for name, value in toy.items())
    parser.epilog = textwrap.fill(f"Without --model, other defaults: {settings}", 110)
    nothing = argparse.Namespace(**{action.dest: None for action in parser._actions})
    typed = vars(parser.parse_known_args(namespace=nothing)[0])
    parser.given = {name for name, value in typed.items() if value is not None}
    if "model" not in parser.given:
        parser.set_defaults(**toy)
    args = parser.parse_args()
    open_flags = [name for name in Model.defaults if getattr(args, name, "") is None]
    if open_flags:
        defaults = defaults_of(args.model)
        for name in open_flags:
            setattr(args, name, defaults[name])
        if "model" in parser.given:
            say("defaults of the model: " + ", ".join(f"{name}={defaults[name]}" for name in open_flags))
    check_flags(parser._actions, args)
    return args


def check_flags(actions, args):
    """What several scripts refuse. Counts are at least 1, other numbers at least 0, and all finite."""
    for action in actions:
        values = getattr(args, action.dest, None)
        if action.type not in (int, float) or values is None:
            continue
        least = 1 if action.type is int and action.dest not in ("seed", "sde_window", "label_steps") else 0
        for value in values if isinstance(values, list) else [values]:
            fits = least <= value < 2**63
            check(fits, f"{action.option_strings[0]} {value}: must be a number of at least {least}")
    given = types.SimpleNamespace(**{"num_steps": 2, "noise_level": 1, "ema": 0, "sde": None} | vars(args))
    check(given.ema < 1, f"--ema {given.ema}: must be below 1")
    if hasattr(args, "steps"):
        check(given.num_steps >= 2, f"--num-steps {given.num_steps}: must be at least 2 to train")
        check(given.noise_level > 0, "--noise-level 0: must be positive to train (without noise: --sde ode)")
    if given.sde == "cps":
        check(given.noise_level <= 1, f"--noise-level {given.noise_level}: with --sde cps at most 1")
    if getattr(args, "init", None) not in (None, "none", "merge"):
        for path, _ in lora_parts(args.init):
            locate(path)
    if getattr(args, "quantize", None) == "nf4":
        check(importlib.util.find_spec("bitsandbytes"), "--quantize nf4: pip install bitsandbytes")
        check(not args.shard, "--shard: bitsandbytes cannot shard nf4; give --quantize int8, or neither")
    if getattr(args, "shard", False):
        compiled = getattr(args, "compile", False)
        check(not compiled, "--shard with --compile: FSDP's hooks break the graphs; leave one out")
    if getattr(args, "track", None):
        check(importlib.util.find_spec(args.track), f"--track {args.track}: pip install {args.track}")


def refuse_given(parser, flags, reason):
    """Exit if one of these flags was typed, since it would do nothing."""
    for flag in flags:
        check(flag not in parser.given, f"--{flag.replace('_', '-')}: {reason}")


def is_full(error):
    """Whether it says that a GPU's memory is full: Apple's is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def explain_full(kind, error, trace):
    """An excepthook: a full disk or a full GPU is no bug, so it gets one line too."""
    if is_full(error):
        frugal = "a smaller --micro-batch-size, --batch-size or --eval-batch-size, --gradient-checkpointing"
        message = f"the GPU's memory is full; {frugal} or --offload-text-encoders need less of it"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        lost = f"{error.strerror}: {error.filename or 'a file of this run'} could not be written"
        message = f"{lost}; what was saved before is whole. Make room, then continue (--resume auto)"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)


def split_options(flag, spec, **options):
    """ "value,key=1.5" -> (value, {**options, key: 1.5}); the value may have commas of its own, and a LoRA's
    options may stand behind these."""
    value, found, behind = spec, dict(options), r"((?:,(?:scale|text)=[^,]*)*)"
    pattern = rf"(.*),({'|'.join(options)})=([^,]*){behind}"
    while options and (match := re.fullmatch(pattern, value, re.DOTALL)):
        value, key, number, rest = match.groups()
        value += rest
        form = r"\d+\.?\d*|\.\d+" if key != "scale" else r"-?(\d+\.?\d*|\.\d+)"
        check(re.fullmatch(form, number), f"{flag} {spec}: {key} must be a number")
        found[key] = float(number)
    return value, found


def parse_specs(flag, specs, **options):
    """["name=value,key=1.5", ...] -> {name: {"value": value, **options}}."""
    found = {}
    form = "NAME=VALUE" + "".join(f"[,{key}=NUMBER]" for key in options)
    for spec in specs or []:
        value, fields = split_options(flag, spec, **options)
        name, _, value = value.partition("=")
        fits = value and re.fullmatch(r"[A-Za-z][\w-]*", name)
        check(fits, f"{flag} {spec}: expected {form}, NAME of letters, digits, - and _")
        check(name not in found, f"{flag}: {name} is given twice")
        check(fields.get("weight", 1) > 0, f"{flag} {spec}: weight 0; leave it out instead")
        found[name] = {"value": value, **fields}
    return found


TAKEN = ("base", "student", "start", "ema", "anchor", "none", "sum", "ties", "dare_ties")


def parse_tasks(args, **options):
    """--teachers and --prompts, which must name the same tasks: ({task: {"value": LORA, **options}}, {task:
    file})."""
    given = args.teachers and args.prompts
    check(given, "--model needs --teachers TASK=LORA and --prompts TASK=FILE with it")
    teachers = parse_specs("--teachers", args.teachers, **options)
    files = parse_specs("--prompts", args.prompts)
    for task in teachers:
        check(task not in TAKEN, f"--teachers {task}: that name is taken")
    only = sorted(teachers.keys() ^ files.keys())
    check(not only, f"--teachers and --prompts: every task needs both; only one names {listing(only)}")
    return teachers, {task: files[task]["value"] for task in teachers}


def check_turns(args, flag, shares):
    """With --schedule alternate a weight is a number of rollouts."""
    whole = args.schedule != "alternate" or all(share % 1 == 0 for share in shares.values())
    check(whole, f"--schedule alternate: weights of {flag} are numbers of rollouts, so they must be whole")


# -- prompts -----------------------------------------------------------------------------------------------

CONTENTS = {}  # {prompt file: hash of what was read}: a pipe can be read only once


def load_prompts(task, path):
    """One task's prompts, [{"prompt": str, ...}], from a UTF-8 file: .txt, one a line, or .jsonl, an object a
    line, whose other fields are for the reward, as in GenEval's metadata. Rows whose "task" is another are
    skipped, unless task is None."""
    kind = os.path.splitext(path)[1].lower()
    check(kind not in (".json", ".csv", ".tsv", ".gz"), f"{path}: a {kind} file; prompts are .txt or .jsonl")
    try:
        data = pathlib.Path(path).read_bytes()
        lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    except FileNotFoundError:
        die(f"{path}: no such file")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        die(f"{path}: line {line} is not UTF-8; convert it")
    except OSError as error:
        die(f"{path}: cannot be read ({error.strerror})")
    CONTENTS[path] = hashlib.sha256(data).hexdigest()[:12]
    check(b"\0" not in data, f"{path}: not a text in UTF-8 (it has NUL bytes)")
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, row = f"{path}: line {number}", {"prompt": line.strip()}
        if kind == ".jsonl":
            row = json_object(line, place)
        prompt = row.get("prompt")
        check(isinstance(prompt, str) and prompt.strip(), f'{place} has no "prompt"')
        half = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
        check(not half, f"{place} holds half a character (a lone surrogate, \\ud800 to \\udfff)")
        if task is None or row.get("task", task) == task:
            prompts.append(row)
    check(prompts, f"{path}: no prompts in it" + (f' for the task "{task}"' if task else ""))
    return prompts


def pick_prompts(prompts, shares, seed, step, count, schedule="mixed"):
    """The global batch of one update: `count` pairs (task, row) in the order of the tasks, a pure function of
    (seed, step). mixed: tasks in proportion to their shares by systematic sampling, so that every batch is as
    balanced as it can be. alternate: all of one task, each in turn for as many updates as its share says."""
    rng = np.random.default_rng([seed, step])
    tasks = list(prompts)
    if schedule == "alternate":
        turns = [task for task in tasks for _ in range(int(shares[task]))]
        shares = {task: float(task == turns[step % len(turns)]) for task in tasks}
    edges = np.cumsum([shares[task] for task in tasks]) / sum(shares[task] for task in tasks)
    places = (np.arange(count) + rng.random()) / count
    slots = np.searchsorted(edges, places, side="right").clip(max=len(tasks) - 1)
    picked = [tasks[slot] for slot in slots]
    return [(task, prompts[task][rng.integers(len(prompts[task]))]) for task in picked]


# -- processes ---------------------------------------------------------------------------------------------


def start_processes(track=None, out=None):
    """accelerate's Accelerator: device, process group, trackers. Without a GPU it must be told to join
    torchrun's CPU processes: left to itself, every one of them would take itself for the only one."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    alone = "WORLD_SIZE" in os.environ and "RANK" not in os.environ
    check(not alone, "WORLD_SIZE is set and RANK is not: unset it, or start the processes with torchrun")
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # torchrun sees the dead at once
    cpu = not (torch.cuda.is_available() or torch.xpu.is_available()) and "WORLD_SIZE" in os.environ
    options = dict(kwargs_handlers=[patience], cpu=cpu, log_with=track, project_dir=out)
    return Accelerator(mixed_precision="no", **options)


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
            die(f"{this}, so it ends too: {reason} ({first_line(error)[:160]})")
    return tensor


def most(number, device):
    """The largest of all processes' numbers."""
    tensor = torch.tensor(number, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.item()


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
    and leave, in seconds. A second one, not at once (torchrun passes on what a terminal sends), ends it; so
    does the first where there is nothing to save."""

    def __init__(self, nothing_to_save=False):
        self.name, self.since, self.failure, self.at_once = None, 0.0, None, nothing_to_save
        self.agreed = False  # whether all processes know
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.at_once or self.name and time.monotonic() > self.since + 5:
            die("interrupted")
        self.name, self.since = signal.Signals(number).name, self.since or time.monotonic()

    def fail(self, message):
        """Leave in the same way, but with exit status 1, because something failed here."""
        self.name, self.since, self.failure = "failure", time.monotonic(), message

    def arrived(self, device):
        """Whether any process was told to stop: the same answer on all, so none waits for one that left."""
        if not self.agreed:
            told = reduce_sum(torch.tensor(float(self.name is not None), device=device)).item()
            self.agreed = told > 0
        if self.agreed:
            self.name = self.name or "another process's"
        return self.agreed

    def told(self, device, shard):
        """Whether this process was told to stop: asks no other, so it costs nothing. With --shard whether any
        was, since none can go on without the others."""
        return self.arrived(device) if shard else self.name is not None

    def disarm(self):
        """From here on Ctrl-C ends the program at once."""
        self.name, self.since = "SIGINT", -math.inf


# -- a run and its folder ----------------------------------------------------------------------------------


class Run:
    """A training run: its processes, and its folder with log.jsonl, args.json and checkpoints/. Scripts make
    one, `begin` it when the model is loaded, and `report`, `save` and `end` it."""

    def __init__(self, args, out=None):
        self.args, self.out, self.step, self.skipped = args, out or args.out, 0, 0
        self.accelerator = start_processes(None if args.dry_run else args.track, self.out)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        if not args.dry_run:
            claim_folder(self.out, self.accelerator, args.resume, args.init)

    def begin(self, model, adapter, optimizer, files, settings, pictures=0):
        """The step to continue from, 0 in a new run. Trained are the adapter and its average, "ema". files,
        by content, and settings make the run what it is. From here on Ctrl-C and SIGTERM ask to stop.
        pictures: how many the run will draw, for --dry-run."""
        self.model, self.adapter, self.optimizer = model, adapter, optimizer
        if self.args.dry_run:
            self.stop, self.records, self.pictures = StopSignal(nothing_to_save=True), [], pictures
            return 0
        self.identity = run_identity(self.args, self.world, files) | settings
        start = self.resume()
        if self.rank == 0:
            self.log = self.open_log(start)
            from memory.dry_run import held

            say(f"memory of {held(model, optimizer)}; what a forward saves comes on top")
        if self.args.track:
            flags = {name: masked(str(value)) for name, value in vars(self.args).items()}
            self.accelerator.init_trackers("flow-opd", flags, {"wandb": {"dir": self.out}})
        self.stop = StopSignal()
        if start == 0:
            self.save(0)  # from here on --resume auto continues
        return start

    def interrupted(self):
        """Whether this process is to leave the loop it is in; `stopping` then asks all."""
        return self.stop.told(self.device, self.args.shard)

    def stopping(self):
        """Whether any process was told to stop, the same answer on all: all give up the rollout in hand."""
        return self.stop.arrived(self.device)

    def report(self, record):
        """A line of log.jsonl, and of the tracker; numbers that are not finite are null, and `skipped` counts
        the updates skipped in a row."""
        record = json.loads(json.dumps(record), parse_constant=lambda name: None)  # NaN, Infinity: null
        if self.args.dry_run:
            from memory import dry_run

            self.records.append(record)
            if len(self.records) == min(dry_run.UPDATES, self.args.steps):
                dry_run.page(self, self.pictures)
                self.end("")
                raise SystemExit
            return
        self.step = record["step"]
        if self.skipped:
            record["skipped"] = self.skipped
        if self.args.track:
            numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=record["step"])
        if self.rank == 0:
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()

    def draw(self, name, draw, *args):
        """One process calls draw(PATH, *args), for NAME.png in the run's folder; the tracker gets it too."""
        if self.rank != 0 or self.args.dry_run:
            return
        path = os.path.join(self.out, name + ".png")
        draw(path, *args)
        if self.args.track and os.path.exists(path):  # before the first update there are no curves
            pixels = np.array(Image.open(path).convert("RGB"))[None]
            layout = {"dataformats": "NHWC"} if self.args.track == "tensorboard" else {}
            for tracker in self.accelerator.trackers:
                tracker.log_images({name: pixels}, self.step, **layout)

    def count_skipped(self, culprit):
        """An update whose gradient is not finite was skipped (see descend), as happens in float16; three in a
        row end the run. All processes call it, since their gradients are the same. culprit: what is not
        finite."""
        self.skipped += 1
        say(f"note: an update was skipped: {culprit} is not finite")
        advice = "try another --dtype, a smaller --lr, or a smaller --micro-batch-size with --resume auto"
        reason = f"{culprit} is not finite, three times in a row"
        check(self.skipped < 3, f"{reason}; checkpoints in {self.out} are as they were: {advice}")

    def now(self):
        """What is trained, as it is now: a copy."""
        names = (self.adapter, "ema")
        weights = {name: [p.detach().clone() for p in self.model.adapters[name]] for name in names}
        return {"weights": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    @torch.no_grad()
    def back_to(self, state):
        """What is trained, as it was at a now()."""
        for name, weights in state["weights"].items():
            for p, saved in zip(self.model.adapters[name], weights, strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, step):
        """checkpoints/STEP: the LoRA people can use (the average) and the state a run resumes from."""
        if self.rank != 0 or self.args.dry_run:
            return
        root = os.path.join(self.out, "checkpoints")
        temporary = os.path.join(root, ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        save_lora(self.model.lora("ema"), os.path.join(temporary, "lora"), self.args)
        data = io.BytesIO()
        torch.save({"step": step, "identity": self.identity} | self.now(), data)
        write(os.path.join(temporary, "state.pt"), data.getbuffer())
        replace_folder(temporary, os.path.join(root, f"{step:06d}"))
        steps = saved_steps(self.out)
        later = [saved for saved in steps if int(saved) > step]  # of a run that went further before
        for old in later + [saved for saved in steps if int(saved) <= step][: -self.args.keep]:
            shutil.rmtree(os.path.join(root, old), ignore_errors=True)  # someone may read it

    def end(self, message):
        if self.rank == 0:
            print(message)
        end_processes(self.accelerator, self.stop.failure)

    def resume(self):
        """Load the checkpoint of --resume; its step. The first process decides which: of the run's own
        checkpoints the last whole one. A checkpoint of another run is refused with every difference."""
        resume = self.args.resume
        if not resume:
            return 0
        folders = [resume]
        if resume == "auto":
            root = os.path.join(self.out, "checkpoints")
            folders = [os.path.join(root, step) for step in reversed(saved_steps(self.out))]
        chosen, state = -1, {"step": 0}
        if self.rank == 0 and folders:
            chosen, state = first_whole(folders, resume)
        first = torch.tensor([chosen, state["step"]], device=self.device) * (self.rank == 0)
        chosen, step = reduce_sum(first).tolist()  # the first process's
        if chosen < 0:
            return 0
        if self.rank != 0:
            _, state = first_whole(folders[chosen : chosen + 1], resume)
        seen = reduce_sum(torch.tensor(state["step"], device=self.device)).item()
        shared = "the processes find different checkpoints; their machines must share the folder"
        check(seen == step * self.world, f"--resume {resume}: {shared}")
        theirs, ours = state["identity"], self.identity
        changed = [name for name in sorted(ours.keys() | theirs.keys()) if theirs.get(name) != ours.get(name)]
        differences = "; ".join(f"{n} was {theirs.get(n)!r}, now {ours.get(n)!r}" for n in changed)
        check(not changed, f"--resume {resume}: {folders[chosen]} is of another run: {differences}")
        steps = self.args.steps
        check(step <= steps, f"--steps {steps}: {folders[chosen]} has made {step} already")
        self.back_to(state)
        return step

    def open_log(self, start):
        """log.jsonl. A resumed run forgets what was logged after its checkpoint (whose validation is made
        again)."""
        log, kept = os.path.join(self.out, "log.jsonl"), []
        for row in read_log(self.out) if start else []:
            if row["step"] < start or row["step"] == start and "seconds" in row:
                kept.append(json.dumps(row) + "\n")
        write(log, "".join(kept))
        if not start:
            pathlib.Path(self.out, "results.json").unlink(missing_ok=True)
        write(os.path.join(self.out, "args.json"), masked(json.dumps(vars(self.args), indent=1)) + "\n")
        return open(log, "a")  # noqa: SIM115 - for as long as the run lives


def write_card(folder, args, teachers, prompts, rank, table):
    """README.md beside a distilled LoRA, a model card for the hub, from assets/card.md; with the run's grid.
    table: Markdown, if there is one."""
    rows, total = [], sum(teacher["weight"] for teacher in teachers.values())
    examples = {task: rows_of[0]["prompt"].replace("|", r"\|") for task, rows_of in prompts.items()}
    for task, teacher in teachers.items():
        cells = [
            task,
            card_name(teacher["value"]),
            f"{teacher['guidance']:g}",
            f"{teacher['weight'] / total:.0%}",
        ]
        rows.append("| " + " | ".join([*cells, examples[task]]) + " |")
    values = dict(base=card_name(args.model), title=os.path.basename(os.path.realpath(args.out)))
    values |= dict(teachers="\n".join(rows), results=f"\n{table}\n" if table else "", rank=rank)
    values |= dict(guidance=f"{args.guidance:g}", num_steps=args.eval_num_steps, batch=args.batch_size)
    values |= dict(resolution=args.resolution, steps=args.steps, lr=f"{args.lr:g}", seed=args.seed)
    values |= dict(prompt=json.dumps(next(iter(prompts.values()))[0]["prompt"], ensure_ascii=False))
    template = pathlib.Path(HERE, "assets/card.md").read_text(encoding="utf-8")
    write(os.path.join(folder, "README.md"), string.Template(template).substitute(values))
    grid = os.path.join(args.out, "samples.png")
    if os.path.exists(grid):
        shutil.copy(grid, folder)


def card_name(spec):
    """LoRAs, or a model, for a stranger: of local paths only the last name; hub ids as they are."""
    names = []
    for path, options in lora_parts(spec):
        name = os.path.basename(os.path.realpath(path)) if os.path.exists(path) else path
        names.append(name if options["scale"] == 1 else f"{options['scale']:g} x {name}")
    return " + ".join(names) or spec


def run_identity(args, processes, files):
    """What makes a resumed run the same: flags, if they matter, and the content of its files {what: path}."""
    free = {"steps", "out", "resume", "track", "save_every", "keep", "compile", "dry_run"}
    free |= {"eval_every", "eval_num_steps", "eval_batch_size", "reward", "reward_option", "compare"}
    free |= {"micro_batch_size", "offload_text_encoders", "gradient_checkpointing", "shard"}
    free |= {"model", "prompts", "eval_prompts", "teachers", "anchor", "init"}  # these by content
    free |= {"batch_size"}  # by its sum: fewer processes with more prompts each are the same run
    flags = {name: value for name, value in vars(args).items() if name not in free}
    flags["quantize"] = quantizer(args.quantize)
    contents = {what: path and fingerprint(path) for what, path in files.items()}
    return flags | contents | {"--batch-size x processes": args.batch_size * processes}


def first_whole(folders, resume):
    """(its index, its state) of the first checkpoint that is whole."""
    for index, folder in enumerate(folders):
        file = os.path.join(folder, "state.pt")
        try:
            with zipfile.ZipFile(file) as archive:  # PyTorch reads it without looking at the checksums
                broken = archive.testzip()
            if broken is None:
                return index, torch.load(file, weights_only=True, map_location="cpu")
            problem = f"not a whole checkpoint ({broken} has changed on the disk)"
        except (FileNotFoundError, NotADirectoryError):
            problem = "no checkpoint there (state.pt is missing)"
        except Exception as error:
            problem = f"not a whole checkpoint ({first_line(error)})"
        if resume == "auto":
            say(f"note: {folder}: {problem}")
    die(f"--resume {resume}: {problem if folders else 'no checkpoint there'}")


def saved_steps(out):
    """The checkpoints in a run's folder, their names in order."""
    files = glob.glob(os.path.join(glob.escape(os.path.join(out, "checkpoints")), "*", "state.pt"))
    names = [os.path.basename(os.path.dirname(file)) for file in files]
    return sorted(filter(str.isdecimal, names), key=int)


def read_log(out):
    """The rows of a run's log.jsonl; a line that is no row of it (cut off, or changed) is skipped."""
    file, rows = pathlib.Path(out, "log.jsonl"), []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def claim_folder(out, accelerator=None, resume="auto", init=None):
    """Make a folder this run's own for as long as it lives, before anything is computed: refused if another
    process is at work in it, if it cannot be written, or if an earlier run left its checkpoints or its LoRA
    there and this one does not continue it."""
    inside = init and os.path.realpath(init).startswith(os.path.realpath(out) + os.sep)
    check(not inside, f"--init {init}: lies in --out {out}, which this run writes; give another --out")
    if accelerator is None or accelerator.is_main_process:
        lock_folder(out)
        steps = [step for step in saved_steps(out) if int(step) > 0]  # a run that made nothing may go
        last = os.path.join(out, "checkpoints", steps[-1]) if steps else os.path.join(out, "lora")
        continues = resume == "auto" or resume and os.path.realpath(resume) == os.path.realpath(last)
        ways = "--resume auto continues it; else delete the folder, or give another --out"
        check(continues or not os.path.exists(last), f"--out {out}: an earlier run left {last}; {ways}")
    if accelerator is not None:
        accelerator.wait_for_everyone()


LOCKS = []  # of the folders this process writes, held until it ends


def lock_folder(out):
    """Take a folder's lock, which falls with this process, however it ends."""
    from filelock import FileLock, Timeout

    try:
        os.makedirs(out, exist_ok=True)
        LOCKS.append(FileLock(os.path.join(out, ".lock"), is_singleton=True))
        LOCKS[-1].acquire(timeout=0)
    except Timeout:
        die(f"--out {out}: another process is at work there; wait for it, or give another --out")
    except (NotImplementedError, OSError) as error:
        no_locks = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        if isinstance(error, OSError) and error.errno not in no_locks:
            die(f"--out {out}: cannot be written ({error.strerror})")
        say(f"note: the file system of {out} has no locks, so see to it that no two runs write there")


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
    """The object in a JSON file."""
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
    """What a path holds: of a hub id its revision, of a file or folder a hash; a word is itself. A LoRA file
    counts with the adapter_config.json beside it."""
    if path in CONTENTS:
        return CONTENTS[path]
    parts = lora_parts(path)
    if [part for part, _ in parts] != [path]:
        return " + ".join(f"{fingerprint(part)} {options}" for part, options in parts) or path
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
    files, beside = [path], os.path.join(os.path.dirname(path), "adapter_config.json")
    if os.path.isdir(path):
        inside = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
        about = (".md", ".png", "sampling.json")  # no weights
        files = sorted(file for file in filter(os.path.isfile, inside) if not file.endswith(about))
    elif path.endswith(".safetensors") and os.path.exists(beside):
        files.append(beside)
    hashes = "".join(f"{os.path.relpath(file, path)} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:12]


def file_hash(file):
    """SHA-256 of a file's size and content; of one above 64 MB, of 64 pieces of a MB, evenly spread."""
    size, digest = os.path.getsize(file), hashlib.sha256()
    digest.update(str(size).encode())
    with open(file, "rb") as f:
        for piece in range(64):
            if size > 2**26:
                f.seek(piece * (size - 2**20) // 63)
            digest.update(f.read(2**20))
    return digest.hexdigest()


# -- pictures ----------------------------------------------------------------------------------------------


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_curves(path):
    """Curves of the log.jsonl beside `path`: a panel per quantity; "kl/ocr" is the line "ocr" of "kl"."""
    rows, panels, plt = read_log(os.path.dirname(path)), {}, pyplot()
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in ("step", "seconds", "waiting", "memory_gb", "kl_by_sigma"):
            panels.setdefault(key.split("/")[0], []).append(key)
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 2.8), squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), label=key.partition("/")[2] or title, marker=".", markersize=3)
        axis.set(title=title, xlabel="rollouts")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        if title in ("kl", "distance"):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_rows(run, rows, prompts):
    """The pictures of a grid, {label: (N, 3, H, W)}. rows: {label: [(adapter, guidance) of each of the N
    prompts]}; the same prompts and noise in every row. The processes share the drawing. None if one was told
    to stop."""
    args, jobs = run.args, [(who, i) for row in rows.values() for i, who in enumerate(row)]
    pictures = torch.zeros(len(jobs), 3, args.resolution, args.resolution, device=run.device)
    for adapter, guidance in dict.fromkeys(who for who, _ in jobs):
        its = [j for j, (who, _) in enumerate(jobs) if who == (adapter, guidance)]
        mine, rounds = its[run.rank :: run.world], math.ceil(len(its) / run.world / args.eval_batch_size)
        for start in range(0, rounds * args.eval_batch_size, args.eval_batch_size):
            if run.interrupted():
                break
            batch = mine[start : start + args.eval_batch_size]
            numbers = [jobs[j][1] for j in batch]
            texts, gens = [prompts[i] for i in numbers], generators(args.seed, 1, numbers)
            drawn = run.model.generate(texts, gens, args.eval_num_steps, args.resolution, adapter, guidance)
            pictures[batch] = drawn
    if run.stopping():
        return None
    return dict(zip(rows, reduce_sum(pictures).cpu().split(len(prompts))))


def save_grid(path, rows, captions):
    """A picture grid: rows {label: N pictures (3, H, W)}, the same N captions over every column."""
    plt, n = pyplot(), len(captions)
    pixels = next(iter(rows.values()))[0].shape[-1]
    side = min(2.56, max(1.0, pixels / 100))  # of a picture, in inches
    width, height = 1.1 + n * side, 0.5 + len(rows) * side
    figure, axes = plt.subplots(len(rows), n, figsize=(width, height), squeeze=False)
    edges = dict(left=1.05 / width, right=1 - 0.02 / width, bottom=0.02 / height, top=1 - 0.46 / height)
    figure.subplots_adjust(**edges, wspace=0.04, hspace=0.04)
    for axis, caption in zip(axes[0], captions):
        axis.set_title("\n".join(textwrap.wrap(caption, int(17 * side))[:3]), fontsize=7, pad=3)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(textwrap.fill(label, 16), fontsize=8, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if image.isfinite().all():
                axis.imshow(image.movedim(0, -1).cpu().numpy(), interpolation="nearest")
            else:
                axis.set_title("not finite", y=0.4, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
