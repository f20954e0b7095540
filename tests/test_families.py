"""Every family of models, on tiny random pipelines, against the stock pipelines of diffusers."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import lora_of, random_b, read_json, read_log, refused, run
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from test_distill import off, two_pass
from torch.func import functional_call

from flow_sde import (
    defaults_of,
    family_of,
    generators,
    linear_layers,
    pipeline_folder,
    randn,
    rollout,
    save_lora,
    training_sigmas,
)

GUIDANCE = dict(sd3=4.5, flux=3.5, schnell=1.0, klein=4.0, flux2=4.0, qwen=4.0, zimage=5.0, sana=4.5)
NAMES = list(GUIDANCE)
PROMPTS = ["a cup", "two cups and a dog", "a sign"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A family's pipeline, built when it is first asked for."""
    return functools.cache(functools.partial(tiny.build, folder=str(tmp_path_factory.mktemp("families"))))


def load(folder, **options):
    return family_of(pipeline_folder(folder)[1])(folder, **options)


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

    size = dict(height=size, width=size, num_inference_steps=steps, output_type="pt")
    pictures = pipe(prompt=list(PROMPTS), latents=x, callback_on_step_end=keep, **size, **options).images
    return kept[-1], pictures


def noise(model, size):
    return randn(generators(0, 0, range(len(PROMPTS))), model.latent_shape(size), "cpu")


@torch.no_grad()
def ours(model, steps, size, guidance, adapter="base"):
    """Our latents and pictures, from the same noise."""
    cond = model.encode(PROMPTS)

    def velocity(x, t):
        return model.velocity(x, t, cond, adapter, guidance)

    *_, last = rollout(velocity, noise(model, size), model.sigmas(steps, size), 0.0, "flow", None)
    return last.x_next, model.decode(last.x_next)


def apart(one, other):
    """The largest difference of two (latents, pictures)."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_the_stock_pipelines(name, folder):
    """Of two sizes and without guidance."""
    model, guidance = load(folder(name)), GUIDANCE[name]
    for size, steps, g in ((64, 3, guidance), (96, 2, guidance), (32, 2, 1.0)):
        theirs = stock(name, folder(name), noise(model, size), steps, size, g)
        assert apart(ours(model, steps, size, g), theirs) < 1e-4, (size, steps, g)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_not_the_stock_pipelines_if_an_answer_is_wrong(name, folder):
    """Any of the five that a family gives."""
    model, guidance = load(folder(name)), GUIDANCE[name]
    family, theirs = type(model), stock(name, folder(name), noise(model, 64), 3, 64, guidance)
    wrong = {
        "sign": dict(net=lambda *args: -family.net(model, *args)),
        "schedule": dict(even_grid=not model.even_grid),
        "picture": dict(to_vae=lambda latents: family.to_vae(model, 1.1 * latents)),
    }
    if model.embedded:
        wrong["guidance"] = dict(net=lambda *args: family.net(model, *args[:-1], args[-1] + 1))
    elif model.guidable:
        wrong["null prompt"] = dict(null=model.encode([model.null_prompt if name == "sana" else "x"]))
        wrong["guidance"] = dict(guide=lambda v, v_uncond, g: v + g * (v - v_uncond))
    if name == "qwen":
        wrong["guidance"] = dict(guide=lambda v, v_uncond, g: v_uncond + g * (v - v_uncond))
    for what, answers in wrong.items():
        right = {key: vars(model)[key] for key in answers if key in vars(model)}
        vars(model).update(answers)
        found = apart(ours(model, 3, 64, guidance), theirs)
        for key in answers:
            del vars(model)[key]
        vars(model).update(right)
        assert found > 3e-3, (what, found)


def with_adapters(model, rank=4):
    """The parameters of a student, in training, beside a teacher."""
    for seed, name in enumerate(("student", "teacher")):
        model.new_adapter("drawn_" + name, rank, 2 * rank, seed)
        model.add_adapter(name, random_b(model.lora("drawn_" + name), seed, 0.2))
    return model.train_adapter("student")


def guidance_of(name, model):
    return GUIDANCE[name] if model.guidable else 1.0


@pytest.mark.parametrize("name", NAMES)
def test_distillation_is_two_pass(name, folder, tmp_path, gradients, numbers_only):
    """The gradient of distill.py's micro-batches, of several tasks (one's teacher a full fine-tune), with
    prompts of other lengths beside each other and two steps of the teachers' in one of the student's, is that
    of samples that are walked one by one."""
    model, gen = load(folder(name)), torch.Generator().manual_seed(0)
    with_adapters(model)
    for adapter in ("student", "teacher"):
        save_lora(model.lora(adapter), tmp_path / adapter)
    network = load(folder(name)).transformer
    for p in network.parameters():
        p += 0.02 * torch.randn(p.shape, generator=gen)
    network.save_pretrained(tmp_path / "full")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    guidance = guidance_of(name, model)
    teachers = [f"a={tmp_path}/teacher,guidance={(1 + guidance) / 2}", f"b={tmp_path}/full"]
    flags = dict(teachers=teachers, prompts=[f"{task}={tmp_path}/prompts.txt" for task in "ab"])
    flags |= dict(model=folder(name), guidance=guidance, init=tmp_path / "student", anchor="base", lr=0)
    flags |= dict(resolution=32, dtype="float32", num_steps=3, steps=1, batch_size=4, micro_batch_size=3)
    flags |= dict(gradient_checkpointing=True, teacher_substeps=2, max_sequence_length=64)
    ns = run("distill.py", **flags, eval_num_steps=2, out=tmp_path / "out")
    ns["model"].transformer.disable_gradient_checkpointing()
    swapped = two_pass(ns, {"a": "b", "b": "a"}.get, substeps=2)
    assert off(gradients[0], two_pass(ns, substeps=2)) < 1e-4 < 1e-2 < off(gradients[0], swapped)


@pytest.mark.parametrize("name", NAMES)
def test_the_students_gradient(name, folder):
    """Is that of a network with its weights in place, whoever is asked before the backward pass, also under
    gradient checkpointing."""
    model = load(folder(name))
    params, cond, x = with_adapters(model), model.encode(PROMPTS), noise(model, 32)
    guidance, grads = guidance_of(name, model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        loss = model.velocity(x, 0.6, cond, "student", guidance).square().sum()
        with torch.no_grad():
            model.velocity(x, 0.6, cond, "teacher", guidance)
        grads.append(torch.autograd.grad(loss, params, allow_unused=True))
    plain, layers, merged = load(folder(name)), list(model.lora("student")), {}
    network = plain.transformer
    for layer, A, B in zip(layers, params[::2], params[1::2], strict=True):
        merged[layer + ".weight"] = linear_layers(network)[layer].weight + 2 * B @ A
    plain.transformer = lambda *args, **kwargs: functional_call(network, merged, args, kwargs)
    plain.transformer.config = network.config
    loss = plain.velocity(x, 0.6, cond, "base", guidance).square().sum()
    expected = torch.autograd.grad(loss, params, allow_unused=True)
    names = [f"{layer} {kind}" for layer in layers for kind in "AB"]
    silent = [n for n, g in zip(names, expected) if g is None or g.abs().max() == 0]
    assert len(silent) <= 4, silent  # the last block's words lead nowhere
    for found in grads:
        for n, a, b in zip(names, found, expected, strict=True):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * max(1, b.abs().max())), n


@pytest.mark.parametrize("name", NAMES)
def test_lora_in_plain_diffusers_and_back(name, folder, tmp_path):
    """The student's alpha is twice its rank. Its files are read by the stock pipeline, and by us in the
    layout that ComfyUI and ai-toolkit write."""
    model, guidance = load(folder(name)), GUIDANCE[name]
    with_adapters(model)
    lora, layout = model.lora("student"), {}
    save_lora(lora, tmp_path / "lora")
    _, picture = ours(model, 2, 64, guidance, "student")
    _, theirs = stock(name, folder(name), noise(model, 64), 2, 64, guidance, str(tmp_path / "lora"))
    _, base = ours(model, 2, 64, guidance)
    assert (picture - theirs).abs().max() < 1e-4 < (picture - base).abs().max() / 10
    for n, (A, B, _) in lora.items():
        layout[f"diffusion_model.{n}.lora_A.weight"] = A.contiguous()
        layout[f"diffusion_model.{n}.lora_B.weight"] = B.contiguous()
    file = tmp_path / "comfy.safetensors"
    save_file(layout, file, {"lora_alpha": "8"})
    for source in (file, tmp_path / "lora", tmp_path / "lora/pytorch_lora_weights.safetensors"):
        found = lora_of(source, folder(name))
        assert found.keys() == lora.keys()
        for n, (A, B, alpha) in found.items():
            assert torch.equal(A, lora[n][0]) and torch.allclose(B * alpha, lora[n][1] * 8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage(name, folder, tmp_path, numbers_only):
    """Teacher, merge, SFT, distillation, pictures, a stand-alone pipeline, which draws the same, a table."""
    base, prompts = folder(name), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]) + "\n")
    model, task = dict(model=base, resolution=32, max_sequence_length=64), f"x={prompts}"
    quick = model | dict(num_steps=2, batch_size=2, rank=4, save_every=1, prompts=task)
    judged = dict(reward="jpeg", eval_prompts=task, eval_num_steps=2, offload_text_encoders=True)
    run("train_teacher.py", **quick, **judged, steps=1, group_size=2, out=tmp_path / "teacher")
    teacher = dict(teachers=f"x={tmp_path}/teacher/lora")
    run("cold_start.py", "merge", model=base, **teacher, out=tmp_path / "merge")
    quick |= teacher | dict(gradient_checkpointing=True)
    run("cold_start.py", "sft", **quick, steps=1, out=tmp_path / "sft")
    student = tmp_path / "student"
    made = run("distill.py", **quick, anchor="base", eval_num_steps=2, steps=1, out=student)
    defaults, args = defaults_of(base), read_json(student, "args.json")
    assert args["guidance"] == defaults["guidance"] and args["dtype"] == defaults["dtype"]
    assert made["model"].transformer.dtype == getattr(torch, defaults["dtype"])
    assert len(read_log(student)) == 1 and made["sigmas"] == training_sigmas(made["model"].sigmas(2, 32))
    draw = dict(prompt="a cup", num_steps=2, num_images=1, dtype="float32", resolution=32)
    draw |= dict(max_sequence_length=64)
    alone, pictures = tmp_path / "alone", []
    run("sample.py", model=base, **draw, lora=student / "lora", merge=alone, out=tmp_path / "a")
    run("sample.py", model=alone, **draw, out=tmp_path / "b")
    for out in "ab":
        [file] = set(Path(tmp_path, out).glob("**/*.png")) - {tmp_path / out / "grid.png"}
        pictures.append(np.asarray(Image.open(file), dtype=int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2 < np.ptp(pictures[0])
    models = ["base", f"student={student}/lora", f"full={alone}"]
    table = dict(prompts=task, reward="jpeg", eval_num_steps=2, out=tmp_path / "table")
    run("evaluate.py", **model, models=models, **table)
    assert len(read_json(tmp_path, "table/results.json")) == 3


LAST_STEPS = [
    ("sd3", 512, 0.009),
    ("qwen", 1024, 0.02),
    ("sana", 1024, 0.009),
    ("flux", 512, 0.17),
    ("flux", 1024, 0.26),
    ("klein", 512, 0.45),
    ("klein", 1024, 0.52),
    ("schnell", 512, 0.1),
    ("zimage", 512, 0.25),
]


@pytest.mark.parametrize("name, size, start", LAST_STEPS)
def test_the_last_step_is_learnt_where_it_is_a_long_one(name, size, start, folder):
    sigmas = load(folder(name)).sigmas(10, size)
    assert sigmas[-2] == pytest.approx(start, abs=0.006)
    assert training_sigmas(sigmas) == (sigmas if start >= 0.05 else sigmas[:-1])


def test_a_last_step_without_density(folder, tmp_path, numbers_only):
    """Whatever the sampler, it is learnt: judged by the flow-SDE's. GRPO needs noise."""
    save_lora(untrained(load(folder("flux"))), tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("a cup\n")
    quick = dict(model=folder("flux"), resolution=32, dtype="float32", prompts=f"x={tmp_path}/prompts.txt")
    quick |= dict(steps=1, num_steps=3, batch_size=2)
    learn = quick | dict(teachers=f"x={tmp_path}/lora")
    for sde in ("flow", "cps", "ode"):
        ns = run("distill.py", **learn, eval_num_steps=1, sde=sde, out=tmp_path / sde)
        seen = list(read_log(tmp_path / sde)[-1]["kl_by_sigma"].values())
        assert len(seen) == 3 and min(seen) > 0 and ns["params"][1].abs().max() > 0
        run("cold_start.py", "sft", **learn, sde=sde, out=tmp_path / f"sft {sde}")
    said = refused("distill.py", **learn, eval_num_steps=1, sde="cps", objective="ppo")
    assert "needs the noise of --sde flow" in said
    judged = dict(reward="jpeg", group_size=2, eval_num_steps=1)
    for sde, window, trained in (("flow", 0, 3), ("cps", 0, 2), ("flow", 1, 1)):
        own = dict(sde=sde, sde_window=window, out=tmp_path / f"teacher {sde} {window}")
        ns = run("train_teacher.py", **quick, **judged, **own)
        assert len(ns["trajectory"]) == trained


def untrained(model):
    model.new_adapter("x", 4, 8)
    return random_b(model.lora("x"))


def test_defaults(folder, tmp_path, capsys):
    """Of the flags, by family, and said where a script starts."""
    klein = shutil.copytree(folder("klein"), tmp_path / "klein")
    index = read_json(klein, "model_index.json") | {"is_distilled": True}
    (klein / "model_index.json").write_text(json.dumps(index))
    distilled = dict(resolution=512, guidance=1.0, dtype="bfloat16", max_sequence_length=512)
    assert defaults_of(str(klein)) == distilled
    assert defaults_of(folder("schnell")) == distilled | dict(max_sequence_length=256)
    assert defaults_of(folder("flux")) == distilled | dict(guidance=3.5)
    assert defaults_of(folder("klein")) == defaults_of(folder("qwen")) == distilled | dict(guidance=4.0)
    sana = dict(resolution=1024, guidance=4.5, max_sequence_length=300)
    assert defaults_of(folder("sana")) == distilled | sana
    draw = dict(prompt="a cup", num_images=1, num_steps=1, resolution=32)
    run("sample.py", model=folder("flux"), **draw, out=tmp_path / "out")
    assert "guidance=3.5, dtype=bfloat16, max_sequence_length=512" in capsys.readouterr().out
    said = refused("sample.py", model=klein, **draw, guidance=4, out=tmp_path / "klein out")
    assert "guidance was distilled into" in said
    model, dense = load(str(klein)), load(folder("klein"))
    model.load_teacher("dense", folder("klein"))  # a teacher that it was distilled from can be guided
    state = noise(dense, 32)[:1], 0.6, dense.encode(["a cup"])
    assert torch.equal(model.velocity(*state, "dense", 4.0), dense.velocity(*state, "base", 4.0))


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("flux", dict(no_t5=True), "--no-t5: "),
        ("qwen", dict(no_t5=True), "has no T5 that it could do without"),
        ("schnell", dict(guidance=3.5), "guidance 3.5: "),
        ("schnell", dict(guidance=3.5), "guidance was distilled into"),
        ("flux", dict(resolution=72), "--resolution 72: this model draws multiples of 16"),
        ("sana", dict(resolution=48), "draws multiples of 32"),
        ("flux", dict(max_sequence_length=600), "the pipeline takes at most 512"),
        ("qwen", dict(max_sequence_length=1100), "the pipeline takes at most 1024"),
    ],
)
def test_what_a_family_cannot_do_is_refused(name, flags, message, folder, tmp_path):
    """By name, before anything is computed."""
    draw = dict(prompt="a cup", num_images=1, num_steps=1, resolution=32) | flags
    assert message in refused("sample.py", model=folder(name), **draw, out=tmp_path / "out")


def test_an_adapter_where_all_samples_tokens_are_one_row(folder):
    """Z-Image's embedders see the tokens of all samples in one row; one adapter applies to all of them."""
    model, layers = load(folder("zimage")), ("all_x_embedder.2-1", "cap_embedder.1")
    sizes = {n: linear_layers(model.transformer)[n] for n in layers}
    gen = torch.Generator().manual_seed(0)
    lora = {}
    for n, layer in sizes.items():
        A, B = (
            torch.randn(size, generator=gen) for size in ((1, layer.in_features), (layer.out_features, 1))
        )
        lora[n] = A, B, 1
    model.add_adapter("x", lora)
    cond, x = model.encode(PROMPTS), noise(model, 32)
    with torch.no_grad():
        found, base = (model.velocity(x, 0.6, cond, name) for name in ("x", "base"))
        for n, (A, B, _) in lora.items():
            sizes[n].weight += B @ A
        expected = model.velocity(x, 0.6, cond)
    assert torch.allclose(found, expected, atol=1e-4) and (found - base).abs().max() > 1e-2


def test_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    said = refused("sample.py", model=tmp_path, prompt="x", out=tmp_path / "out")
    assert "a WanPipeline; this program knows StableDiffusion3Pipeline, FluxPipeline" in said


@pytest.mark.parametrize("name", NAMES)
def test_max_sequence_length_is_that_of_the_text(name, folder):
    model, text = load(folder(name), max_sequence_length=24), "a cup and " * 20
    assert model.encode([text])[0][0].shape[0] == (77 + 24 if name == "sd3" else 24)


def test_layouts_of_the_original_network(folder, tmp_path):
    """FLUX.2's: one matrix for queries, keys and values."""
    single = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    width = linear_layers(load(folder("klein")).transformer)[single].out_features
    A, B = torch.randn(4, 32), torch.randn(96, 4)
    double, linear = "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"
    keys = {f"{double}.lora_A.weight": A, f"{double}.lora_B.weight": B}
    keys |= {f"{linear}.lora_A.weight": torch.randn(4, 32), f"{linear}.lora_B.weight": torch.randn(width, 4)}
    save_file(keys, tmp_path / "x.safetensors")
    found = lora_of(tmp_path / "x.safetensors", folder("klein"))
    assert set(found) == {single, *(f"transformer_blocks.0.attn.to_{k}" for k in "qkv")}
    for k, rows in zip("qkv", B.split(32)):
        A2, B2, alpha = found[f"transformer_blocks.0.attn.to_{k}"]
        assert alpha == 4 and torch.allclose(B2 @ A2, rows @ A, atol=1e-5)
