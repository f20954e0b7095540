"""Every family of models, on tiny random pipelines, against the stock pipelines of diffusers."""

import functools
import json
import os
import shutil

import pytest
import tiny
import torch
from conftest import lora_of, read_log, refused, run
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from flow_sde import (
    FAMILIES,
    flag_defaults,
    generators,
    learnt,
    linear_layers,
    randn,
    rollout,
    save_lora,
    take_rows,
)

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

    pictures = pipe(
        prompt=list(PROMPTS),
        latents=x,
        num_inference_steps=steps,
        height=size,
        width=size,
        output_type="pt",
        callback_on_step_end=keep,
        **options,
    ).images
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
    pairs = zip(
        ours(model, steps, size, guidance), stock(name, folder, noise(model, size), steps, size, guidance)
    )
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_the_stock_pipelines(name, folder):
    """And are not, if any of the five answers is wrong."""
    place, guidance = folder(name), GUIDANCE[name]
    model = load(place)
    for size, steps, g in ((64, 4, guidance), (128, 3, guidance), (64, 3, 1.0)):
        assert distance(name, place, model, steps, size, g) < 1e-4, (size, steps, g)
    wrong = {
        "sign": dict(net=lambda *args: -type(model).net(model, *args)),
        "schedule": dict(even_grid=not model.even_grid),
        "picture": dict(to_vae=lambda latents: type(model).to_vae(model, 1.1 * latents)),
    }
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
            alone = model.velocity(x[i : i + 1], 0.6, take_rows(cond, [i]), names[i], scales[i])
            assert torch.allclose(mixed[i], alone[0], atol=1e-5), (
                names[i],
                (mixed[i] - alone[0]).abs().max(),
            )
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
    assert (
        (picture - theirs).abs().max() < 1e-4 < (picture - ours(model, 3, 64, guidance)[1]).abs().max() / 10
    )
    file = str(tmp_path / "comfy.safetensors")
    save_file(
        {
            f"diffusion_model.{n}.lora_{kind}.weight": p.contiguous()
            for n, ab in lora.items()
            for kind, p in zip("AB", ab)
        },
        file,
        {"lora_alpha": "8"},
    )
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
    run(
        "train_teacher.py",
        *quick,
        "--reward",
        "jpeg",
        "--prompts",
        task,
        "--eval-prompts",
        task,
        "--group-size",
        3,
        "--eval-num-steps",
        2,
        "--offload-text-encoders",
        "--out",
        tmp_path / "teacher",
    )
    teacher = ["--teachers", f"x={tmp_path}/teacher/lora"]
    run("cold_start.py", "merge", *model[:2], *teacher, "--out", tmp_path / "merge")
    run(
        "cold_start.py",
        "sft",
        *quick,
        *teacher,
        "--prompts",
        task,
        "--gradient-checkpointing",
        "--out",
        tmp_path / "sft",
    )
    distill = [
        "distill.py",
        *quick,
        *teacher,
        "--prompts",
        task,
        "--anchor",
        "base",
        "--eval-num-steps",
        2,
        "--gradient-checkpointing",
        "--out",
        tmp_path / "student",
    ]
    made = run(*distill)
    defaults, args = flag_defaults(base), json.load(open(tmp_path / "student/args.json"))
    assert args["guidance"] == defaults["guidance"] and args["dtype"] == defaults["dtype"]
    assert made["model"].transformer.dtype == getattr(torch, defaults["dtype"])
    assert (
        len(read_log(tmp_path / "student")) == 2
        and made["transitions"] == len(learnt(made["model"].sigmas(3, 64))) - 1
    )
    student = load_file(tmp_path / "student/lora/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "student/checkpoints/000002")
    run(*distill, "--resume", "auto")
    resumed = load_file(tmp_path / "student/lora/adapter_model.safetensors")
    assert all(torch.equal(student[key], resumed[key]) for key in student)
    draw = [
        "--prompt",
        "a cup",
        "--num-steps",
        2,
        "--num-images",
        1,
        "--dtype",
        "float32",
        "--resolution",
        64,
    ]
    run(
        "sample.py",
        "--model",
        base,
        *draw,
        "--lora",
        tmp_path / "student/lora",
        "--merge",
        tmp_path / "alone",
        "--out",
        tmp_path / "a",
    )
    run("sample.py", "--model", tmp_path / "alone", *draw, "--out", tmp_path / "b")
    run(
        "evaluate.py",
        *model,
        "--models",
        "base",
        f"student={tmp_path}/student/lora",
        f"full={tmp_path}/alone",
        "--prompts",
        task,
        "--reward",
        "jpeg",
        "--eval-num-steps",
        2,
        "--out",
        tmp_path / "table",
    )
    assert len(json.load(open(tmp_path / "table/results.json"))) == 3


def test_the_last_step_is_learnt_where_it_is_a_long_one(folder, tmp_path):
    """Whatever the sampler: what has no density is judged by the flow-SDE's. GRPO needs noise."""
    for name, size, start in (
        ("sd3", 512, 0.009),
        ("qwen", 1024, 0.02),
        ("sana", 1024, 0.009),
        ("flux", 512, 0.17),
        ("flux", 1024, 0.26),
        ("klein", 512, 0.45),
        ("klein", 1024, 0.52),
        ("schnell", 512, 0.1),
        ("zimage", 512, 0.25),
    ):
        sigmas = load(folder(name)).sigmas(10, size)
        assert sigmas[-2] == pytest.approx(start, abs=0.006), name
        assert learnt(sigmas) == (sigmas if start >= 0.05 else sigmas[:-1])
    save_lora(untrained(load(folder("flux"))), tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("a cup\n")
    task, quick = (
        f"x={tmp_path}/prompts.txt",
        ["--model", folder("flux"), "--resolution", 32, "--dtype", "float32"],
    )
    quick += [
        "--steps",
        1,
        "--num-steps",
        3,
        "--batch-size",
        2,
        "--eval-num-steps",
        1,
        "--overwrite",
        "--prompts",
    ]
    teacher = ["--teachers", f"x={tmp_path}/lora", "--out", tmp_path / "out"]
    seen = {}
    for sde in ("flow", "cps", "ode"):
        ns = run("distill.py", *quick, task, *teacher, "--sde", sde)
        seen[sde] = list(read_log(tmp_path / "out")[-1]["kl_by_sigma"].values())
        assert (
            len(seen[sde]) == 3 and all(value > 0 for value in seen[sde]) and ns["params"][1].abs().max() > 0
        )
        run(
            "cold_start.py",
            "sft",
            *[a for a in quick if a not in ("--eval-num-steps",)][:-3],
            "--overwrite",
            "--prompts",
            task,
            *teacher,
            "--sde",
            sde,
        )
    assert "would have no noise to learn from" in refused(
        "distill.py", *quick, task, *teacher, "--sde", "cps", "--objective", "ppo"
    )
    for sde, window, trained in (("flow", 0, 3), ("cps", 0, 2), ("flow", 1, 1)):
        ns = run(
            "train_teacher.py",
            *quick,
            task,
            "--reward",
            "jpeg",
            "--group-size",
            2,
            "--sde",
            sde,
            "--sde-window",
            window,
            "--out",
            tmp_path / "teacher",
        )
        assert len(ns["trajectory"]) == trained


def untrained(model):
    model.new_adapter("x", 4, 8)
    return {n: (A, torch.randn_like(B), alpha) for n, (A, B, alpha) in model.lora("x").items()}


def test_defaults_and_what_is_refused(folder, tmp_path, capsys):
    """By name, before anything is computed."""
    klein = shutil.copytree(folder("klein"), tmp_path / "klein")
    index = json.loads((klein / "model_index.json").read_text())
    (klein / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    distilled = dict(resolution=512, guidance=1.0, dtype="bfloat16", max_sequence_length=512)
    assert flag_defaults(str(klein)) == distilled
    assert flag_defaults(folder("schnell")) == distilled | dict(max_sequence_length=256)
    assert flag_defaults(folder("flux")) == distilled | dict(guidance=3.5)
    assert flag_defaults(folder("klein")) == flag_defaults(folder("qwen")) == distilled | dict(guidance=4.0)
    assert flag_defaults(folder("sana")) == dict(
        resolution=1024, guidance=4.5, dtype="bfloat16", max_sequence_length=300
    )
    lora = untrained(load(folder("zimage")))
    for layer in ("all_x_embedder.2-1", "cap_embedder.1"):
        size = linear_layers(load(folder("zimage")).transformer)[layer]
        save_lora(
            lora | {layer: (torch.ones(1, size.in_features), torch.ones(size.out_features, 1), 1)},
            tmp_path / layer,
        )
    draw = ["--prompt", "a cup", "--num-images", 1, "--num-steps", 1, "--out", tmp_path / "out"]
    for name, flags, message in (
        ("flux", ["--no-t5"], "--no-t5: "),
        ("qwen", ["--no-t5"], "has no T5 that it could do without"),
        ("schnell", ["--guidance", 3.5], "guidance 3.5: "),
        ("schnell", ["--guidance", 3.5], "was distilled to do without"),
        (str(klein), ["--guidance", 4], "was distilled to do without"),
        ("zimage", ["--lora", tmp_path / "all_x_embedder.2-1"], "it adapts all_x_embedder.2-1"),
        ("zimage", ["--lora", tmp_path / "cap_embedder.1"], "it adapts cap_embedder.1"),
        ("flux", ["--resolution", 72], "--resolution 72: this model draws multiples of 16"),
        ("sana", ["--resolution", 48], "draws multiples of 32"),
        ("flux", ["--max-sequence-length", 600], "the pipeline takes at most 512"),
        ("qwen", ["--max-sequence-length", 1100], "the pipeline takes at most 1024"),
    ):
        place = name if os.path.isdir(name) else folder(name)
        size = [] if "--resolution" in flags else ["--resolution", 32]
        assert message in refused("sample.py", "--model", place, *draw, *size, *flags)
    capsys.readouterr()
    run("sample.py", "--model", folder("flux"), *draw, "--resolution", 32)
    assert (
        "its defaults: --guidance 3.5, --dtype bfloat16, --max-sequence-length 512" in capsys.readouterr().out
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    said = refused("sample.py", "--model", tmp_path, *draw)
    assert "a WanPipeline; this program knows StableDiffusion3Pipeline, FluxPipeline" in said


def test_max_sequence_length_is_that_of_the_text(folder, capsys):
    for name in NAMES:
        model, text = load(folder(name), max_sequence_length=24), "a cup and " * 20
        assert model.encode([text])[0][0].shape[0] == (77 + 24 if name == "sd3" else 24), name
        model.note_long([text, "a cup"])
        assert "of 2 prompts 1 are longer than text_encoder reads" in capsys.readouterr().out


def test_layouts_of_the_original_network(folder, tmp_path):
    """FLUX.2's: one matrix for queries, keys and values."""
    A, B, file = torch.randn(4, 32), torch.randn(96, 4), str(tmp_path / "x.safetensors")
    single = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    width = linear_layers(load(folder("klein")).transformer)[single].out_features
    more = {"A": torch.randn(4, 32), "B": torch.randn(width, 4)}
    keys = {
        f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{kind}.weight": p
        for kind, p in (("A", A), ("B", B))
    }
    keys |= {f"diffusion_model.single_blocks.0.linear1.lora_{kind}.weight": p for kind, p in more.items()}
    save_file(keys, file)
    found = lora_of(file, folder("klein"))
    assert set(found) == {single, *(f"transformer_blocks.0.attn.to_{k}" for k in "qkv")}
    for k, rows in zip("qkv", B.split(32)):
        A2, B2, alpha = found[f"transformer_blocks.0.attn.to_{k}"]
        assert alpha == 4 and torch.allclose(B2 @ A2, rows @ A, atol=1e-5)
