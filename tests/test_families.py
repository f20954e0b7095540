"""Every family of models, on tiny random pipelines, against the stock pipelines of diffusers."""

import functools
import json
import os
import shutil
import types

import pytest
import tiny
import torch
from conftest import lora_of, read_log, refused, run
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from flow_sde import (FAMILIES, flag_defaults, generators, learnt, linear_layers, randn, rollout, save_lora,
                      take_rows)

GUIDANCE = dict(sd3=4.5, flux=3.5, schnell=1.0, klein=4.0, flux2=4.0, qwen=4.0, zimage=5.0, sana=4.5)
NAMES = list(GUIDANCE)
PROMPTS = ["a cup", "two cups and a dog", "a sign"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A family's pipeline, built when it is first asked for."""
    return functools.cache(functools.partial(tiny.build, folder=str(tmp_path_factory.mktemp("families"))))


def load(folder, **options):
    index = json.load(open(os.path.join(folder, "model_index.json")))
    return FAMILIES[index["_class_name"]](folder, **options)


def stock(name, folder, x, steps, size, guidance, lora=None):
    """The latents and pictures of diffusers' own pipeline, from the noise x."""
    pipe, kept = DiffusionPipeline.from_pretrained(folder), []
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance}
    if name == "qwen":
        options = {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(x)}
    elif name == "zimage":
        options = {"guidance_scale": guidance - 1}
    elif name == "sana":
        options["use_resolution_binning"] = False
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif name in ("klein", "flux2"):
        x = x.mT.unflatten(2, (size // 16, size // 16))
    if name == "schnell":
        options["max_sequence_length"] = 256
    if lora:
        pipe.load_lora_weights(lora)

    def keep(pipe, i, t, values):
        kept.append(values["latents"])
        return {}
    pictures = pipe(prompt=list(PROMPTS), latents=x, num_inference_steps=steps, height=size, width=size,
                    output_type="pt", callback_on_step_end=keep, **options).images
    return kept[-1], pictures


def noise(model, size):
    return randn(generators(0, 0, range(len(PROMPTS))), model.latent_shape(size), "cpu")


@torch.no_grad()
def ours(model, steps, size, guidance, adapter="base"):
    cond = model.encode(PROMPTS)
    velocity = lambda x, t: model.velocity(x, t, cond, adapter, guidance)
    for step in rollout(velocity, noise(model, size), model.sigmas(steps, size), 0.0, "flow", None):
        pass
    return step.x_next, model.decode(step.x_next)


def distance(name, folder, model, steps, size, guidance):
    """Of our latents and pictures from the stock pipeline's."""
    pairs = zip(ours(model, steps, size, guidance), stock(name, folder, noise(model, size), steps, size, guidance))
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_the_stock_pipelines(name, folder):
    """And are not, if any of the five answers is wrong."""
    place, guidance = folder(name), GUIDANCE[name]
    model = load(place)
    for size, steps, g in ((64, 4, guidance), (128, 3, guidance), (64, 3, 1.0)):
        assert distance(name, place, model, steps, size, g) < 1e-4, (size, steps, g)
    wrong = {"sign": dict(net=lambda *args: -type(model).net(model, *args)), "schedule": dict(even_grid=not model.even_grid),
             "picture": dict(to_vae=lambda latents: type(model).to_vae(model, 1.1 * latents))}
    if model.embedded:
        wrong["guidance"] = dict(net=lambda *args: type(model).net(model, *args[:-1], args[-1] + 1))
    elif model.guidable:
        wrong["null prompt"] = dict(null=model.encode([model.null_prompt if name == "sana" else "x"]))
        wrong["guidance"] = dict(guide=lambda v, v_uncond, g: v + g * (v - v_uncond))
    if name == "qwen":
        wrong["guidance"] = dict(guide=lambda v, v_uncond, g: v_uncond + g * (v - v_uncond))
    for what, changes in wrong.items():
        other = load(place)
        vars(other).update(changes)
        found = distance(name, place, other, 4, 64, guidance)
        print(name, what, f"{found:.1e}")
        assert found > 3e-3, (what, found)


def with_adapters(model, rank=4):
    """A student, in training, and a teacher on a model."""
    for seed, adapter in enumerate(("student", "teacher")):
        model.new_adapter(adapter, rank, 2 * rank, seed)
        gen = torch.Generator().manual_seed(seed)
        for (_, kind), p in model.weights(adapter).items():
            if kind == "B":
                p.data = 0.2 * torch.randn(p.shape, generator=gen)
    return model.train_adapter("student")


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_gradients(name, folder):
    """Samples of a batch with other adapters, guidances and prompts are what they are alone. The student's
    gradient is that of a network with its weights in place, whoever is asked before the backward pass, also
    under gradient checkpointing."""
    model = load(folder(name))
    params, cond, x = with_adapters(model), model.encode(PROMPTS), noise(model, 64)
    names, scales = ["student", "teacher", "base"], [GUIDANCE[name], 1.0, 2.0]
    if not model.guidable:
        scales = [1.0] * 3
    with torch.no_grad():
        mixed = model.velocity(x, 0.6, cond, names, scales)
        for i in range(3):
            alone = model.velocity(x[i:i + 1], 0.6, take_rows(cond, [i]), names[i], scales[i])
            assert torch.allclose(mixed[i], alone[0], atol=1e-5), (names[i], (mixed[i] - alone[0]).abs().max())
        other = model.velocity(x, 0.6, cond, "base", scales)
        assert (mixed - other)[:2].abs().amax(tuple(range(1, x.dim()))).min() > 1e-2
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        loss = model.velocity(x, 0.6, cond, "student", scales).square().sum()
        with torch.no_grad():
            model.velocity(x, 0.6, cond, ["teacher", "base", "teacher"], scales)
        grads.append(torch.autograd.grad(loss, params, allow_unused=True))
    plain, weights = load(folder(name)), model.weights("student")
    network, merged = plain.transformer, {}
    for (n, kind), A in weights.items():
        if kind == "A":
            merged[n + ".weight"] = linear_layers(network)[n].weight + 2 * weights[n, "B"] @ A
    plain.transformer = lambda *args, **kwargs: functional_call(network, merged, args, kwargs)
    plain.transformer.config = network.config
    loss = plain.velocity(x, 0.6, cond, "base", scales).square().sum()
    expected = torch.autograd.grad(loss, params, allow_unused=True)
    silent = [n for n, g in zip(weights, expected) if g is None or g.abs().max() == 0]
    assert len(silent) <= 4, silent  # the last block's words lead nowhere
    for found in grads:
        for n, a, b in zip(weights, found, expected):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, b.abs().max())), n


@pytest.mark.parametrize("name", NAMES)
def test_lora_in_plain_diffusers_and_back(name, folder, tmp_path):
    """The student's alpha is twice its rank. Its files are read by the stock pipeline, and by us in the
    layout that ComfyUI and ai-toolkit write."""
    model, guidance = load(folder(name)), GUIDANCE[name]
    with_adapters(model)
    lora = model.lora("student")
    save_lora(lora, tmp_path / "lora")
    _, picture = ours(model, 3, 64, guidance, "student")
    _, theirs = stock(name, folder(name), noise(model, 64), 3, 64, guidance, lora=str(tmp_path / "lora"))
    assert (picture - theirs).abs().max() < 1e-4 < (picture - ours(model, 3, 64, guidance)[1]).abs().max() / 10
    file = str(tmp_path / "comfy.safetensors")
    save_file({f"diffusion_model.{n}.lora_{kind}.weight": p.contiguous() for n, ab in lora.items()
               for kind, p in zip("AB", ab)}, file, {"lora_alpha": "8"})
    for source in (file, tmp_path / "lora", tmp_path / "lora/pytorch_lora_weights.safetensors"):
        found = lora_of(source, folder(name))
        assert found.keys() == lora.keys()
        for n, (A, B, alpha) in found.items():
            assert torch.equal(A, lora[n][0]) and torch.equal(B, lora[n][1]) and alpha == 8


@pytest.mark.parametrize("name", NAMES)
def test_every_stage(name, folder, tmp_path):
    base, prompts = folder(name), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    model, task = ["--model", base, "--resolution", 64], f"x={prompts}"
    quick = [*model, "--steps", 2, "--num-steps", 3, "--batch-size", 2, "--rank", 4, "--save-every", 1]
    run("train_teacher.py", *quick, "--reward", "jpeg", "--prompts", task, "--eval-prompts", task, "--group-size", 3,
        "--eval-num-steps", 2, "--offload-text-encoders", "--out", tmp_path / "teacher")
    teacher = ["--teachers", f"x={tmp_path}/teacher/lora"]
    run("cold_start.py", "merge", *model[:2], *teacher, "--out", tmp_path / "merge")
    run("cold_start.py", "sft", *quick, *teacher, "--prompts", task, "--gradient-checkpointing",
        "--out", tmp_path / "sft")
    distill = ["distill.py", *quick, *teacher, "--prompts", task, "--anchor", "base", "--eval-num-steps", 2,
               "--gradient-checkpointing", "--out", tmp_path / "student"]
    made = run(*distill)
    defaults, args = flag_defaults(base), json.load(open(tmp_path / "student/args.json"))
    assert args["guidance"] == defaults["guidance"] and args["dtype"] == defaults["dtype"]
    assert made["model"].transformer.dtype == getattr(torch, defaults["dtype"])
    assert len(read_log(tmp_path / "student")) == 2 and made["transitions"] == len(learnt(made["model"].sigmas(3, 64))) - 1
    student = load_file(tmp_path / "student/lora/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "student/checkpoints/000002")
    run(*distill, "--resume", "auto")
    resumed = load_file(tmp_path / "student/lora/adapter_model.safetensors")
    assert all(torch.equal(student[key], resumed[key]) for key in student)
    draw = ["--prompt", "a cup", "--num-steps", 2, "--num-images", 1, "--dtype", "float32", "--resolution", 64]
    run("sample.py", "--model", base, *draw, "--lora", tmp_path / "student/lora", "--merge", tmp_path / "alone",
        "--out", tmp_path / "a")
    run("sample.py", "--model", tmp_path / "alone", *draw, "--out", tmp_path / "b")
    run("evaluate.py", *model, "--models", "base", f"student={tmp_path}/student/lora", f"full={tmp_path}/alone",
        "--prompts", task, "--reward", "jpeg", "--eval-num-steps", 2, "--out", tmp_path / "table")
    assert len(json.load(open(tmp_path / "table/results.json"))) == 3
