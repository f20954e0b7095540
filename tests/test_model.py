"""The SD3 adapter against diffusers and peft, on the toy pipeline: the classes are those of SD3.5, only the sizes are small."""

import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, TASKS, lora_of, random_lora, refused, run

from flow_sde import (
    SD3,
    generators,
    linear_layers,
    merge_loras,
    randn,
    save_lora,
    truncate_lora,
    update_average,
)

BASE = os.path.join(ROOT, "toy/base")
PROMPTS = [
    "two red circles and one blue square",
    'a yellow sign saying "HAT"',
    "a red house and two pines on snow at night",
]


@pytest.fixture(scope="module")
def model(loras):
    model = SD3(BASE)
    for name, folder in loras.items():
        model.load_adapter(name, folder)
    model.train_adapter("student")
    return model


def inputs(model, n=3, seed=0):
    x = torch.randn(n, *model.latent_shape(32), generator=torch.Generator().manual_seed(seed))
    return x, 0.7, model.encode((PROMPTS * n)[:n])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sample_is_the_pipelines(guidance):
    from diffusers import StableDiffusion3Pipeline

    model, pipe = SD3(BASE), StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    latents = randn(generators(0, 0, range(3)), model.latent_shape(32), "cpu")
    theirs = pipe(
        PROMPTS,
        negative_prompt=[""] * 3,
        latents=latents,
        num_inference_steps=8,
        guidance_scale=guidance,
        height=32,
        width=32,
        max_sequence_length=12,
        output_type="pt",
    ).images
    ours = model.generate(PROMPTS, generators(0, 0, range(3)), 8, 32, guidance=guidance)
    assert (ours - theirs).abs().max() < 1e-4


def test_mixed_batch_equals_one_adapter_at_a_time(model):
    x, t, cond = inputs(model, 4)
    names = ["ocr", "base", "compose", "student"]
    mixed = model.velocity(x, t, cond, names, [1.0, 4.0, 2.0, 1.0])
    for i, (name, g) in enumerate(zip(names, [1.0, 4.0, 2.0, 1.0])):
        alone = model.velocity(x[i : i + 1], t, tuple(c[i : i + 1] for c in cond), name, g)
        assert torch.allclose(mixed[i : i + 1], alone, atol=2e-5), (
            name,
            (mixed[i : i + 1] - alone).abs().max(),
        )
    assert (mixed[0] - model.velocity(x, t, cond, "scene")[0]).abs().max() > 1e-3
    assert torch.allclose(model.velocity(x, t, cond, "base"), SD3(BASE).velocity(x, t, cond), atol=1e-6)


def test_guidance_is_the_formula(model):
    x, t, cond = inputs(model)
    null = tuple(c.expand(3, *c.shape[1:]) for c in model.null)
    v, v_uncond = model.velocity(x, t, cond, "ocr"), model.velocity(x, t, null, "ocr")
    assert torch.allclose(model.velocity(x, t, cond, "ocr", 4.5), v_uncond + 4.5 * (v - v_uncond), atol=1e-4)


def test_teachers_between_forward_and_backward_do_not_cost_the_student_its_gradient(model):
    """Also under gradient checkpointing, where the forward runs again inside the backward."""
    x, t, cond = inputs(model)
    params, grads = model.train_adapter("student"), []
    for checkpointing, ask_teacher in ((False, False), (False, True), (True, True)):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        loss = model.velocity(x, t, cond, "student", 2.0).square().mean()
        if ask_teacher:
            with torch.no_grad():
                model.velocity(x, t, cond, list(TASKS), 2.0), model.velocity(x, t, cond, "base")
        grads.append(torch.autograd.grad(loss, params))
    model.pipe.transformer.disable_gradient_checkpointing()
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], other))
    silent = [n for n, g in zip(model.weights("student"), grads[0]) if g.abs().max() == 0]
    assert all(
        n.endswith("3.attn.add_q_proj") for n, _ in silent
    )  # the last block's text queries lead nowhere, in any SD3
    assert not any(p.requires_grad for p in model.weights("ocr").values())


def test_adapters_of_any_rank_on_any_layers():
    """Also on layers whose input has no tokens (the modulation, (B, D)), and on layers that only some
    adapters have: each row is the network with its adapter's delta added to the weights, and so is the
    gradient of the adapter in training, also under gradient checkpointing, with a full fine-tune and frozen
    adapters in the same batch."""
    model, gen = SD3(BASE), torch.Generator().manual_seed(0)
    targets = {
        "low": (2, ["0.norm1.linear", "1.attn.to_q"]),
        "high": (7, ["1.attn.to_q", "2.ff.net.2"]),
        "student": (3, ["0.norm1.linear", "2.attn.add_k_proj"]),
    }
    dense = {name: SD3(BASE) for name in (*targets, "base")}
    for name, (rank, modules) in targets.items():
        lora = {}
        for n in modules:
            weight = linear_layers(model.transformer)["transformer_blocks." + n].weight
            A = torch.randn(rank, weight.shape[1], generator=gen) / 9
            B = torch.randn(len(weight), rank, generator=gen) / 9
            lora["transformer_blocks." + n] = A, B, 5.0
            linear_layers(dense[name].transformer)["transformer_blocks." + n].weight += 5.0 / rank * B @ A
        model.add_adapter(name, lora)
    params = model.train_adapter("student")
    model.full["full"] = dense["high"].transformer
    x, t, cond = inputs(model, 5)
    names, guidance = ["low", "student", "high", "base", "full"], [1.0, 2.0, 1.0, 3.0, 2.0]

    def gradients(v):
        return torch.autograd.grad((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum(), params)

    v = model.velocity(x, t, cond, names, guidance)
    for i, (name, g) in enumerate(zip(["low", "student", "high", "base", "high"], guidance)):
        expected = dense[name].velocity(x[i : i + 1], t, [c[i : i + 1] for c in cond], guidance=g)
        assert torch.allclose(v[i : i + 1], expected, atol=2e-5), name
    exact = gradients(v)
    layers = linear_layers(dense["student"].transformer)
    weights = [layers[n].weight.requires_grad_() for n in model.lora("student")]
    alone = dense["student"].velocity(x[1:2], t, [c[1:2] for c in cond], guidance=2.0)
    loss = (alone * torch.linspace(-1, 1, v.numel()).view_as(v)[1:2]).sum()
    for i, dW in enumerate(torch.autograd.grad(loss, weights)):
        (A, B), (dA, dB) = params[2 * i : 2 * i + 2], exact[2 * i : 2 * i + 2]
        assert torch.allclose(dA, 5 / 3 * B.T @ dW, rtol=1e-4, atol=1e-5)
        assert torch.allclose(dB, 5 / 3 * dW @ A.T, rtol=1e-4, atol=1e-5)
    model.transformer.enable_gradient_checkpointing(model._checkpointed)
    v = model.velocity(x, t, cond, names, guidance)
    with torch.no_grad():
        model.velocity(x, t, cond, "low")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(v), exact))
    # a frozen adapter in whose graph something else is: a reward's gradient with respect to the state
    for checkpointing in (True, False):
        x = x.detach().requires_grad_()
        v = model.velocity(x, t, cond, ["low", "high"] * 2 + ["base"])
        with torch.no_grad():
            model.velocity(x, t, cond, "student")
        found = torch.autograd.grad(v.square().sum(), x)[0]
        before = found if checkpointing else before
        model.transformer.disable_gradient_checkpointing()
    assert torch.allclose(found, before, atol=1e-5) and found.abs().max() > 0


def test_frozen_adapters_are_asked_as_they_are_now(model):
    """The copies that a batch gathers from are made anew when the weights have been written, as the moving
    average's are."""
    x, t, cond = inputs(model)
    asked = lambda name: model.velocity(x, t, cond, [name, "scene", "base"])
    model.copy_adapter("ocr", "ema")
    assert torch.equal(asked("ema"), asked("ocr"))
    update_average(model.adapters["ema"], model.adapters["scene"], 0.5, 1)
    assert torch.equal(asked("ema"), asked("scene"))
    assert (asked("scene") - asked("ocr"))[0].abs().max() > 1e-3


def test_a_saved_lora_is_the_same_for_us_peft_and_diffusers(loras, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel

    model = SD3(BASE)
    model.load_adapter("ocr", loras["ocr"])
    save_lora(model.lora("ocr"), tmp_path)
    x, t, cond = inputs(model)
    ours = model.velocity(x, t, cond, "ocr")
    call = lambda f: f(
        hidden_states=x,
        timestep=torch.full((3,), t * 1000),
        encoder_hidden_states=cond[0],
        pooled_projections=cond[1],
        return_dict=False,
    )[0]
    with torch.no_grad():
        pipe = StableDiffusion3Pipeline.from_pretrained(BASE)
        pipe.load_lora_weights(str(tmp_path))
        assert torch.allclose(call(pipe.transformer), ours, atol=1e-5)
        assert torch.allclose(
            call(PeftModel.from_pretrained(SD3(BASE).transformer, str(tmp_path))), ours, atol=1e-5
        )
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        again = SD3(BASE)
        again.load_adapter("x", str(tmp_path / file))
        assert torch.equal(again.velocity(x, t, cond, "x"), ours), file
    assert (ours - model.velocity(x, t, cond)).abs().max() > 1e-2


def test_merge_is_the_exact_weighted_sum_of_deltas(loras, tmp_path):
    delta = lambda lora, n: lora[n][2] / len(lora[n][0]) * lora[n][1].double() @ lora[n][0].double()
    run(
        "cold_start.py",
        "merge",
        "--method",
        "cat",
        "--out",
        tmp_path / "cat",
        "--teachers",
        f"a={loras['compose']},weight=3",
        f"b={loras['ocr']},weight=1",
    )
    a, b, merged = map(lora_of, (loras["compose"], loras["ocr"], tmp_path / "cat/lora"))
    for n in a:
        assert torch.allclose(delta(merged, n), 0.75 * delta(a, n) + 0.25 * delta(b, n), atol=1e-6)
    assert len(merged[n][0]) == 8
    # at full rank the SVD is exact; below it, nothing of that rank is closer
    exact, full, low = merge_loras([(a, 3), (b, 1)]), truncate_lora(merged, 8), truncate_lora(merged, 3)
    for n in a:
        assert torch.allclose(delta(full, n), delta(exact, n), atol=1e-6)
        best = torch.linalg.svdvals(delta(exact, n))[3:].norm()
        assert (delta(low, n) - delta(exact, n)).norm().item() == pytest.approx(best.item(), rel=1e-3)
    run(
        "cold_start.py",
        "merge",
        "--method",
        "svd",
        "--rank",
        "3",
        "--out",
        tmp_path / "svd",
        "--teachers",
        f"a={loras['compose']}",
        f"b={loras['ocr']}",
    )
    assert all(len(A) == 3 for A, _, _ in lora_of(tmp_path / "svd/lora").values())
    # the average of the factors, and how far that is from the average of the deltas
    run(
        "cold_start.py",
        "merge",
        "--method",
        "factors",
        "--out",
        tmp_path / "mean",
        "--teachers",
        f"a={loras['compose']},weight=3",
        f"b={loras['ocr']}",
    )
    mean = lora_of(tmp_path / "mean/lora")
    for n in a:
        assert (
            all(torch.allclose(mean[n][k], 0.75 * a[n][k] + 0.25 * b[n][k], atol=1e-6) for k in (0, 1))
            and mean[n][2] == a[n][2]
        )
    square = lambda difference: sum(difference(n).square().sum().item() for n in a)
    error = (square(lambda n: delta(mean, n) - delta(exact, n)) / square(lambda n: delta(exact, n))) ** 0.5
    assert (
        json.load(open(tmp_path / "mean/results.json"))["relative_error"] == pytest.approx(error, rel=1e-3)
        and error > 0.1
    )


def test_a_lora_that_does_not_fit_is_named(loras, tmp_path):
    lora = lora_of(loras["ocr"])
    first = next(iter(lora))
    bad = {
        "unknown": ({"nonsense" + n[12:]: v for n, v in lora.items()}, "model: base_model.model.nonsense"),
        "shape": (
            {n: (A[:, :5], B, al) if n == first else (A, B, al) for n, (A, B, al) in lora.items()},
            f"{first} has A (4, 5) and B",
        ),
    }
    for name, (weights, message) in bad.items():
        save_lora(weights, tmp_path / name)
        assert message in refused("sample.py", "--lora", tmp_path / name, "--out", tmp_path / "out")
    from safetensors.torch import load_file, save_file

    for name, change, message in (
        (
            "missing",
            lambda t: {k: v for k, v in t.items() if first not in k},
            "1 layers that its settings target have no weights: " + first,
        ),
        (
            "half",
            lambda t: {k: v for k, v in t.items() if first + ".lora_B" not in k},
            first + " (only lora_A)",
        ),
        (
            "strange",
            lambda t: t | {"text_model.x": torch.zeros(1)},
            "1 keys belong to no LoRA of a linear layer in this model: text_model.x",
        ),
    ):
        folder = random_lora(tmp_path / name, 1)
        os.remove(os.path.join(folder, "pytorch_lora_weights.safetensors"))
        file = os.path.join(folder, "adapter_model.safetensors")
        save_file(change(load_file(file)), file)
        assert message in refused("sample.py", "--lora", folder, "--out", tmp_path / "out")
    assert "no such LoRA" in refused("sample.py", "--lora", tmp_path / "nothing", "--out", tmp_path / "out")


def test_compiled_blocks_ask_the_adapters_of_the_moment(model):
    """torch.compile, which silently ignores peft's own routing: two graphs (of the last block and of all
    others) serve all mixes of frozen adapters, three the student with its gradient; every mix answers as it
    should, and none is computed uncompiled."""
    x, t, cond = inputs(model, 4)
    mixes = [["ocr", "base", "compose", "scene"], ["compose"] * 4, ["ocr", "ocr", "anchor", "scene"]]
    graphs = []

    def ask():
        with torch.no_grad():
            velocities = [model.velocity(x, t, cond, names) for names in mixes]
        v = model.velocity(x, t, cond, "student")
        return *velocities, v, *torch.autograd.grad(v.square().sum(), model.adapters["student"])

    plain = ask()
    try:
        model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        compiled = ask()
        assert len(graphs) == 5
        model.transformer.enable_gradient_checkpointing(model._checkpointed)
        again = ask()
        assert len(graphs) == 5
        with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="fullgraph=True"):
            model.velocity(x[:3], t, [c[:3] for c in cond], "scene")
    finally:
        model.transformer.disable_gradient_checkpointing()
        for block in model.transformer.transformer_blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    for a, b, c in zip(plain, compiled, again):
        assert torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)
    assert min((a - b).abs().max() for i, a in enumerate(plain[:4]) for b in plain[:i]) > 1e-3


DYNAMIC = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    "change",
    [
        {"shift": 1.5},
        DYNAMIC,
        DYNAMIC | {"time_shift_type": "linear", "base_image_seq_len": 16},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 500},
    ],
    ids=lambda change: " ".join(change),
)
def test_the_scheduler_decides_the_schedule(change):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model, pipe = SD3(BASE), StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    before = model.generate(PROMPTS[:1], generators(0, 0, [0]), 6, 32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **change)
    model.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    latents = randn(generators(0, 0, [0]), model.latent_shape(32), "cpu")
    theirs = pipe(
        PROMPTS[:1],
        latents=latents,
        num_inference_steps=6,
        guidance_scale=1.0,
        height=32,
        width=32,
        max_sequence_length=12,
        output_type="pt",
    ).images
    ours = model.generate(PROMPTS[:1], generators(0, 0, [0]), 6, 32)
    assert (ours - theirs).abs().max() < 1e-4 and (ours - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("FlowMatchHeunDiscreteScheduler", {}, "its scheduler is a FlowMatchHeunDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "its scheduler is a DPMSolverMultistep"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "has stochastic_sampling"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "do not fall from 1 to 0"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(name, settings, message, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    index = json.load(open(tmp_path / "base/model_index.json")) | {"scheduler": ["diffusers", name]}
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    settings = {"_class_name": name, "shift": 3.0} | settings
    (tmp_path / "base/scheduler/scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=message):
        SD3(str(tmp_path / "base")).sigmas(4, 32)


def random_peft(folder, **settings):
    """A random LoRA for the toy, made and saved by peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]} | settings
    network = get_peft_model(SD3(BASE).transformer, LoraConfig(**settings))
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
        {"exclude_modules": r".*\.1\..*"},
        {"layers_to_transform": [1, 2], "layers_pattern": ["transformer_blocks"]},
        {"target_modules": r".*blocks\.[02]\.attn\.to_[qkv]"},
        {"use_rslora": True},
        {"rank_pattern": {"1.attn.to_q": 2, "to_k": 3}, "alpha_pattern": {r"transformer_blocks\.2\..*": 1}},
        {"init_lora_weights": "orthogonal"},
        {"lora_alpha": -8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_lora_is_what_peft_makes_of_it(settings, tmp_path):
    """Alone, and as the only part of a merge."""
    from peft import PeftModel

    model = SD3(BASE)
    model.load_adapter("x", random_peft(tmp_path, **settings))
    x, t, cond = inputs(model)
    peft = PeftModel.from_pretrained(SD3(BASE).transformer, str(tmp_path))
    with torch.no_grad():
        theirs = peft(
            hidden_states=x,
            timestep=torch.full((3,), t * 1000),
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
            return_dict=False,
        )[0]
        assert torch.allclose(model.velocity(x, t, cond, "x"), theirs, atol=1e-5)
        assert (theirs - model.velocity(x, t, cond)).abs().max() > 1e-2
        run("cold_start.py", "merge", "--teachers", f"x={tmp_path}", "--out", tmp_path / "merged")
        model.load_adapter("merged", str(tmp_path / "merged/lora"))
        assert torch.allclose(model.velocity(x, t, cond, "merged"), theirs, atol=1e-5)
    assert json.load(open(tmp_path / "merged/results.json"))["relative_error"] < 1e-6


def test_a_loras_settings_that_mean_more_than_b_a_are_refused(tmp_path):
    folder = random_peft(tmp_path / "lora")
    file = tmp_path / "lora/adapter_config.json"
    fine = json.loads(file.read_text())
    cases = [
        ({"init_lora_weights": kind}, f'"init_lora_weights": "{kind}" changes the base too')
        for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    ]
    cases += [
        ({"target_modules": None}, "target_modules None"),
        ({"use_dora": True}, "it sets use_dora"),
        ({"peft_type": "LOHA"}, "not the settings of a"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"alora_invocation_tokens": [1]}, "it sets alora_invocation_tokens"),
        ({"a_setting_of_tomorrow": 3}, "it sets a_setting_of_tomorrow"),
        ({"r": 8}, "in its settings 8"),
        ({"rank_pattern": {"to_k": 8}}, "attn.to_k has rank 4, in its settings 8"),
        ({"target_modules": ["to_q", "to_k", "to_v"]}, "4 layers that its settings target have no weights"),
    ]
    for change, message in cases:
        file.write_text(json.dumps(fine | change))
        with pytest.raises(SystemExit, match=re.escape(message)):
            lora_of(folder)
    del fine["target_modules"]
    for text, message in ((json.dumps(fine), "target_modules None"), ("{oops", "not JSON"), ("[]", "object")):
        file.write_text(text)
        with pytest.raises(SystemExit, match=message):
            lora_of(folder)
    fine |= {"target_modules": ["to_q", "to_k"], "a_setting_of_tomorrow": None}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(fine).encode())  # with a byte order mark
    assert len(lora_of(folder)) == 8


def test_alpha_where_files_have_it(loras, tmp_path, capsys):
    """In the header under three names, beside each layer, or nowhere: then it is the rank, and that is
    said."""
    from safetensors.torch import save_file

    lora, file = lora_of(loras["ocr"]), tmp_path / "x.safetensors"
    tensors = {f"transformer.{n}.lora_{k}.weight": w for n, ab in lora.items() for k, w in zip("AB", ab)}
    beside = {f"transformer.{n}.alpha": torch.tensor(3.0) for n in lora}
    for header, extra, alpha in (
        ({"lora_alpha": "6"}, {}, 6),
        ({"alpha": "6.5"}, {}, 6.5),
        ({"ss_network_alpha": "2"}, {}, 2),
        ({}, beside, 3),
        ({"ss_network_alpha": "None"}, {}, 4),
        ({}, {}, 4),
    ):
        save_file(tensors | extra, file, header)
        found = lora_of(file)
        assert {a for *_, a in found.values()} == {alpha}
        assert all(torch.equal(found[n][0], lora[n][0]) for n in lora)
        assert ("says nothing of its alpha" in capsys.readouterr().out) == (alpha == 4)


def test_layouts_of_other_programs(loras, tmp_path):
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from safetensors.torch import save_file

    from flow_sde import read_lora

    lora, file, down = lora_of(loras["ocr"]), tmp_path / "x.safetensors", {"A": "lora_down", "B": "lora_up"}
    onetrainer, comfy = {}, {}
    for n, (A, B, _) in lora.items():
        flat = "lora_transformer_" + n.replace(".", "_")
        onetrainer[f"{flat}.alpha"] = torch.tensor(2.0)
        for kind, weight in (("A", A), ("B", B)):
            onetrainer[f"{flat}.{down[kind]}.weight"] = weight
            comfy[f"diffusion_model.{n}.lora_{kind}.weight"] = weight
    for tensors, alpha in ((onetrainer, 2), (comfy, 4)):
        save_file(tensors, file)
        found = lora_of(file)
        for n, (A, B, _) in lora.items():
            assert torch.equal(found[n][0], A) and torch.equal(found[n][1], B) and found[n][2] == alpha
    # the original network's names, with fused projections, are not what diffusers converts for SD3
    for key in (
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A",
    ):
        save_file({key + ".weight": torch.zeros(4, 96)}, file)
        with pytest.raises(SystemExit, match="OneTrainer's convert_model.py"):
            lora_of(file)
    save_file(
        onetrainer | {"lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": torch.ones(96)}, file
    )
    with pytest.raises(SystemExit, match="dora_scale"):
        lora_of(file)
    # a family that it does convert: FLUX, in kohya's names with fused projections
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        )
    A, B, front = torch.randn(4, 32), torch.randn(96, 4), "lora_unet_double_blocks_0_img_attn_qkv."
    alpha = torch.tensor(2.0)
    save_file({front + "lora_down.weight": A, front + "lora_up.weight": B, front + "alpha": alpha}, file)
    found = read_lora(str(file), network, FluxPipeline)
    assert set(found) == {f"transformer_blocks.0.attn.to_{k}" for k in "qkv"}
    for k, rows in zip("qkv", B.split(32)):
        A2, B2, alpha = found[f"transformer_blocks.0.attn.to_{k}"]
        assert torch.allclose(alpha / 4 * B2 @ A2, 0.5 * rows @ A, atol=1e-5)


def test_values_that_are_not_finite_are_refused_with_the_layer(loras, tmp_path):
    lora, layer = lora_of(loras["ocr"]), "transformer_blocks.2.attn.to_k"
    A, B, alpha = lora[layer]
    for name, broken in (("nan", (A * math.nan, B, alpha)), ("inf", (A, B + math.inf, alpha))):
        save_lora(lora | {layer: broken}, tmp_path / name)
        said = refused("sample.py", "--lora", tmp_path / name, "--out", tmp_path / "out")
        assert f"{layer} has values that are not finite" in said


def test_a_negative_alpha_survives_the_merge(loras):
    delta = lambda lora, n: lora[n][2] / len(lora[n][0]) * lora[n][1].double() @ lora[n][0].double()
    a, b = lora_of(loras["compose"]), lora_of(loras["ocr"])
    b = {n: (A, B, -alpha) for n, (A, B, alpha) in b.items()}
    merged = merge_loras([(a, 1), (b, 3)])
    for n in a:
        assert torch.allclose(delta(merged, n), 0.25 * delta(a, n) + 0.75 * delta(b, n), atol=1e-6)
