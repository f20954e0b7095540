"""The SD3 adapter against diffusers and peft, on the toy: SD3.5's classes, small sizes."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import BASE, lora_of, random_lora, read_json, refused, run, stock_pictures
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from flow_sde import (
    SD3,
    LoRA,
    by_task,
    fingerprint,
    generators,
    linear_layers,
    merge_loras,
    merge_ties,
    randn,
    save_lora,
    take_rows,
    update_average,
)

PROMPTS = [
    "two red circles and one blue square",
    'a yellow sign saying "HAT"',
    "a red house and two pines on snow at night",
]


@pytest.fixture(scope="module")
def model(loras):
    """The random teachers, anchor and student on one base, the student in training."""
    model = SD3(BASE)
    for name, folder in loras.items():
        model.load_adapter(name, folder)
    model.train_adapter("student")
    return model


def inputs(model, n=3):
    """A state x, its time t and the prompts of n samples."""
    x = torch.randn(n, *model.latent_shape(32), generator=torch.Generator().manual_seed(0))
    return x, 0.7, model.encode((PROMPTS * n)[:n])


def called(network, x, t, cond):
    """The velocity of a transformer as diffusers and peft have it."""
    time = torch.full((len(x),), t * 1000)
    with torch.no_grad():
        return network(x, cond[0], pooled_projections=cond[1], timestep=time, return_dict=False)[0]


def delta(lora, layer):
    """What a LoRA adds to a layer's weights, alpha/r B A."""
    A, B, alpha = lora[layer]
    return alpha / len(A) * B.double() @ A.double()


def close(grads, others, atol=1e-6, rtol=1e-5):
    return all(torch.allclose(a, b, rtol, atol) for a, b in zip(grads, others, strict=True))


# -- pictures ----------------------------------------------------------------------------------------------


def drawn(model, steps, guidance=1.0):
    return model.generate(PROMPTS, generators(0, 0, range(3)), steps, 32, guidance=guidance)


def drawn_by_diffusers(model, steps, guidance=1.0, scheduler=None):
    latents = randn(generators(0, 0, range(3)), model.latent_shape(32), "cpu")
    return stock_pictures(BASE, PROMPTS, latents, steps, guidance, scheduler=scheduler, length=12)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_the_pipelines(guidance):
    model = SD3(BASE)
    assert (drawn(model, 8, guidance) - drawn_by_diffusers(model, 8, guidance)).abs().max() < 1e-4


DYNAMIC = {"use_dynamic_shifting": True}
SCHEDULES = [
    {"shift": 1.5},
    DYNAMIC,
    DYNAMIC | {"time_shift_type": "linear", "base_image_seq_len": 16},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"shift_terminal": 0.1},
    {"num_train_timesteps": 500},
]


@pytest.mark.parametrize("change", SCHEDULES, ids=" ".join)
def test_the_scheduler_decides_the_schedule(change):
    model = SD3(BASE)
    before = drawn(model, 6)
    model.scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler.config, **change)
    theirs = drawn_by_diffusers(model, 6, scheduler=model.scheduler)
    ours = drawn(model, 6)
    assert (ours - theirs).abs().max() < 1e-4 and (ours - before).abs().max() > 1e-3


EULER = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("FlowMatchHeunDiscreteScheduler", {}, "its scheduler is a FlowMatchHeunDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "its scheduler is a DPMSolverMultistep"),
        (EULER, {"stochastic_sampling": True}, "has stochastic_sampling"),
        (EULER, {"invert_sigmas": True}, "do not fall from 1 to 0"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(name, settings, message, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    index = read_json(base, "model_index.json") | {"scheduler": ["diffusers", name]}
    (base / "model_index.json").write_text(json.dumps(index))
    settings = {"_class_name": name, "shift": 3.0} | settings
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=message):
        SD3(str(base)).sigmas(4, 32)


# -- velocities: one adapter a forward -----------------------------------------------------------------------


def test_guidance(model):
    """v_uncond + g (v - v_uncond), in one forward."""
    x, t, cond = inputs(model)
    v, v_uncond = (model.velocity(x, t, c, "ocr") for c in (cond, take_rows(model.null, [0] * 3)))
    assert torch.allclose(model.velocity(x, t, cond, "ocr", 4.5), v_uncond + 4.5 * (v - v_uncond), atol=1e-4)


def test_every_task_of_a_batch_has_its_own_rows():
    """by_task gives each task's rows as a slice, empty if only others have it; take_rows takes slices and
    numbers alike."""
    batch, everyones = zip("aac", "123"), zip("aaaabbcc", "12345678")
    assert by_task(batch, everyones) == {"a": slice(0, 2), "b": slice(2, 2), "c": slice(2, 3)}
    cond = torch.arange(4), ["w", "x", "y", "z"]
    for rows in (slice(1, 3), [1, 2]):
        tensor, texts = take_rows(cond, rows)
        assert tensor.tolist() == [1, 2] and texts == ["x", "y"]


def test_teachers_between_forward_and_backward_do_not_cost_the_student_its_gradient(model):
    """Also under gradient checkpointing, where the forward runs again inside the backward."""
    x, t, cond = inputs(model)
    params, grads = model.train_adapter("student"), []
    for checkpointing, ask_teachers in ((False, False), (False, True), (True, True)):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        loss = model.velocity(x, t, cond, "student", 2.0).square().mean()
        if ask_teachers:
            with torch.no_grad():
                model.velocity(x, t, cond, "ocr", 2.0)
                model.velocity(x, t, cond, "base")
        grads.append(torch.autograd.grad(loss, params))
    model.transformer.disable_gradient_checkpointing()
    assert close(grads[0], grads[1]) and close(grads[0], grads[2])
    silent = [n for n, B in zip(model.lora("student"), grads[0][1::2]) if B.abs().max() == 0]
    assert silent == ["transformer_blocks.3.attn.add_q_proj"]  # the last block's text queries lead nowhere
    assert not any(p.requires_grad for p in model.adapters["ocr"])


@pytest.fixture(scope="module")
def varied():
    """(model, dense): adapters of any rank on any layers, some of which only some have, or whose input has no
    tokens (the modulation, (B, D)); a fine-tune "full"; and networks with their deltas in the weights."""
    model, gen = SD3(BASE), torch.Generator().manual_seed(0)
    targets = {"low": (2, ["0.norm1.linear", "1.attn.to_q"]), "high": (7, ["1.attn.to_q", "2.ff.net.2"])}
    targets["student"] = 3, ["0.norm1.linear", "2.attn.add_k_proj"]
    dense = {name: SD3(BASE) for name in (*targets, "base")}
    for name, (rank, layers) in targets.items():
        lora = {}
        for layer in ("transformer_blocks." + n for n in layers):
            weight = linear_layers(dense[name].transformer)[layer].weight
            A = torch.randn(rank, weight.shape[1], generator=gen) / 9
            B = torch.randn(len(weight), rank, generator=gen) / 9
            lora[layer] = A, B, 5.0
            weight += 5.0 / rank * B @ A
        model.add_adapter(name, lora)
    model.train_adapter("student")
    model.full["full"] = dense["high"].transformer
    dense["full"] = dense["high"]
    return model, dense


NAMES = {"low": 1.0, "student": 2.0, "high": 1.0, "base": 3.0, "full": 2.0}  # and their guidance


def test_every_adapter_is_the_network_with_its_deltas(varied):
    model, dense = varied
    x, t, cond = inputs(model, 2)
    for name, guidance in NAMES.items():
        v = model.velocity(x, t, cond, name, guidance)
        assert torch.allclose(v, dense[name].velocity(x, t, cond, guidance=guidance), atol=2e-5), name


def test_the_students_gradient(varied):
    """dA = alpha/r B' dW and dB = alpha/r dW A', also under gradient checkpointing."""
    model, dense = varied
    x, t, cond = inputs(model, 2)
    params, ramp = model.adapters["student"], torch.linspace(-1, 1, x.numel()).view_as(x)
    layers = linear_layers(dense["student"].transformer)
    weights = [layers[n].weight.requires_grad_() for n in model.lora("student")]
    alone = dense["student"].velocity(x, t, cond, guidance=2.0)
    deltas, expected = torch.autograd.grad((alone * ramp).sum(), weights), []
    for dW, A, B in zip(deltas, params[::2], params[1::2]):
        expected += [5 / 3 * B.T @ dW, 5 / 3 * dW @ A.T]
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        v = model.velocity(x, t, cond, "student", 2.0)
        with torch.no_grad():
            model.velocity(x, t, cond, "low")
        assert close(torch.autograd.grad((v * ramp).sum(), params), expected, 1e-3, 1e-3)
    model.transformer.disable_gradient_checkpointing()


def test_a_gradient_through_frozen_adapters(varied):
    """As a reward's, with respect to the state; the same under gradient checkpointing."""
    model, _ = varied
    x, t, cond = inputs(model, 2)
    x.requires_grad_()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.transformer.enable_gradient_checkpointing(model._checkpointed)
        v = model.velocity(x, t, cond, "high")
        with torch.no_grad():
            model.velocity(x, t, cond, "student")
        grads += torch.autograd.grad(v.square().sum(), x)
    model.transformer.disable_gradient_checkpointing()
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().max() > 0


def test_an_average_is_applied_as_it_is_now(model):
    x, t, cond = inputs(model)
    model.copy_adapter("ocr", "ema")
    assert torch.equal(model.velocity(x, t, cond, "ema"), model.velocity(x, t, cond, "ocr"))
    update_average(model.adapters["ema"], model.adapters["scene"], 0.5, 1)
    assert torch.equal(model.velocity(x, t, cond, "ema"), model.velocity(x, t, cond, "scene"))
    assert (model.velocity(x, t, cond, "scene") - model.velocity(x, t, cond, "ocr")).abs().max() > 1e-3


class Doubled(torch.nn.Linear):
    """A linear layer of another class, with its own forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_an_adapter_on_another_kind_of_linear_layer():
    model, layer = SD3(BASE), "transformer_blocks.1.attn.to_q"
    module = linear_layers(model.transformer)[layer]
    module.__class__ = Doubled
    A, B, x = torch.randn(2, 96), torch.randn(96, 2), torch.randn(3, 5, 96)
    expected = 2 * torch.nn.functional.linear(x, module.weight, module.bias)
    model.add_adapter("x", {layer: (A, B, 6)})
    assert isinstance(module, LoRA) and isinstance(module, Doubled)
    for name, delta in (("x", x @ A.T @ B.T * 3), ("base", 0)):
        model.applied.name = name
        assert torch.allclose(module(x), expected + delta, atol=1e-3)


def test_an_adapter_of_which_nothing_can_be_learnt_is_refused(loras, tmp_path, capsys):
    """Alpha 0 has no gradient; a LoRA whose B alone is zero has one, as an untrained LoRA."""
    lora = lora_of(loras["ocr"])
    save_lora({n: (A, B, 0) for n, (A, B, _) in lora.items()}, tmp_path / "mute")
    save_lora({n: (A, 0 * B, alpha) for n, (A, B, alpha) in lora.items()}, tmp_path / "new")
    model = SD3(BASE)
    for name in ("mute", "new"):
        model.load_adapter(name, str(tmp_path / name))
        assert "changes nothing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing can be learnt"):
        model.train_adapter("mute")
    assert len(model.train_adapter("new")) == 2 * len(lora)


def test_compiled_blocks_apply_the_adapter_of_the_moment(loras):
    """torch.compile, with and without gradient checkpointing; what cannot be compiled is an error. The first
    and the last block are one of each kind."""
    model = SD3(BASE)
    blocks = model.transformer.transformer_blocks
    model.transformer.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[-1]])
    for name in ("ocr", "student"):
        model.add_adapter(name, lora_of(loras[name]))
    params = model.train_adapter("student")
    x, t, cond = inputs(model, 4)

    def ask():
        with torch.no_grad():
            velocities = [model.velocity(x, t, cond, name) for name in ("ocr", "base", "ocr")]
        v = model.velocity(x, t, cond, "student")
        return *velocities, v, *torch.autograd.grad(v.square().sum(), params)

    plain = ask()
    try:
        model.compile(backend="eager")
        compiled = ask()
        model.transformer.enable_gradient_checkpointing(model._checkpointed)
        checkpointed = ask()
        with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="fullgraph=True"):
            model.velocity(x[:3], t, take_rows(cond, range(3)), "ocr")
    finally:
        torch._dynamo.reset()
    assert close(plain, compiled, 1e-4) and close(plain, checkpointed, 1e-4)
    ocr, base, again, student = plain[:4]
    assert torch.equal(ocr, again)
    assert min((a - b).abs().max() for a, b in ((ocr, base), (base, student), (student, ocr))) > 1e-3


# -- LoRAs: saved, merged, read ----------------------------------------------------------------------------


def test_a_saved_lora_is_the_same_for_us_peft_and_diffusers(model, tmp_path):
    save_lora(model.lora("ocr"), tmp_path)
    x, t, cond = inputs(model)
    ours = model.velocity(x, t, cond, "ocr")
    pipe = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.load_lora_weights(str(tmp_path))
    peft = PeftModel.from_pretrained(SD3(BASE).transformer, str(tmp_path))
    for theirs in (called(pipe.transformer, x, t, cond), called(peft, x, t, cond)):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        again = SD3(BASE)
        again.load_adapter("x", str(tmp_path / file))
        assert torch.allclose(again.velocity(x, t, cond, "x"), ours, atol=1e-6), file
    assert (ours - model.velocity(x, t, cond)).abs().max() > 1e-2


def test_programs_that_read_no_alpha_have_the_same_strength(tmp_path):
    """They take alpha = rank: in pytorch_lora_weights.safetensors alpha/rank is in B, whatever the rank."""
    gen = torch.Generator().manual_seed(0)
    sizes = {"transformer_blocks.0.attn.to_q": (2, 8), "transformer_blocks.1.attn.to_k": (5, -3)}
    lora = {
        n: (torch.randn(r, 96, generator=gen), torch.randn(96, r, generator=gen), a)
        for n, (r, a) in sizes.items()
    }
    save_lora(lora, tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for n in lora:
        A, B = (tensors[f"transformer.{n}.lora_{kind}.weight"].double() for kind in "AB")
        assert torch.allclose(B @ A, delta(lora, n), atol=1e-4)
    again = lora_of(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(torch.allclose(delta(again, n), delta(lora, n), atol=1e-4) for n in lora)
    pipe, model = StableDiffusion3Pipeline.from_pretrained(BASE), SD3(BASE)
    pipe.load_lora_weights(str(tmp_path))
    model.add_adapter("x", lora)
    x, t, cond = inputs(model)
    assert torch.allclose(model.velocity(x, t, cond, "x"), called(pipe.transformer, x, t, cond), atol=1e-3)


def test_merge_is_the_exact_weighted_sum_of_deltas():
    """Of factors of any rank and alphas of either sign."""
    gen = torch.Generator().manual_seed(0)
    a, b = (
        {"x": (torch.randn(rank, 9, generator=gen), torch.randn(7, rank, generator=gen), alpha)}
        for rank, alpha in ((4, 8), (2, -3))
    )
    merged = merge_loras([(a, 0.25), (b, 3.0)])
    expected = 0.25 * delta(a, "x") + 3 * delta(b, "x")
    assert len(merged["x"][0]) == 6 and torch.allclose(delta(merged, "x"), expected, atol=1e-5)


@pytest.mark.parametrize("method, density", [("ties", 0.5), ("dare_ties", 1.0)])  # DARE draws, below 1
def test_ties_is_pefts(method, density, tmp_path):
    """Of LoRAs of other ranks, alphas and layers."""
    settings = {
        "a": dict(r=4, lora_alpha=8, target_modules=["to_q", "to_k"]),
        "b": dict(r=2, lora_alpha=1, target_modules=["to_q"]),
        "c": dict(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v"]),
    }
    peft = None
    for seed, (name, its) in enumerate(settings.items()):
        folder = random_peft(tmp_path / name, seed, **its)
        if peft is None:
            peft = PeftModel.from_pretrained(SD3(BASE).transformer, folder, adapter_name=name)
        else:
            peft.load_adapter(folder, adapter_name=name)
    how = dict(adapter_name="ties", combination_type=f"{method}_svd", svd_rank=4, density=density)
    peft.add_weighted_adapter(list(settings), [1.0] * 3, **how)
    merged = merge_ties([lora_of(tmp_path / name) for name in settings], density, method)
    assert len(merged) == 3 * len(peft.base_model.model.transformer_blocks)
    for n in merged:
        layer = peft.base_model.model.get_submodule(n)
        A, B = layer.lora_A["ties"].weight, layer.lora_B["ties"].weight
        U, S, Vh = torch.linalg.svd(layer.scaling["ties"] * B.double() @ A.double())
        rank = len(merged[n][0])  # the largest of those that have the layer
        assert rank == (3 if n.endswith("to_v") else 4)
        assert torch.allclose(delta(merged, n), U[:, :rank] * S[:rank] @ Vh[:rank], atol=1e-4), n


def test_cold_start_merge(loras, tmp_path):
    """cat is exact; svd is the closest of its rank; factors averages A and B, and says how far off it is."""
    teachers = [f"a={loras['compose']},weight=3", f"b={loras['ocr']}"]
    for method, rank in (("cat", None), ("svd", 3), ("factors", None)):
        run("cold_start.py", "merge", method=method, rank=rank, teachers=teachers, out=tmp_path / method)
    a, b = lora_of(loras["compose"]), lora_of(loras["ocr"])
    cat, svd, mean = (lora_of(tmp_path / method / "lora") for method in ("cat", "svd", "factors"))
    off = size = 0.0
    for n in a:
        exact = 0.75 * delta(a, n) + 0.25 * delta(b, n)
        assert torch.allclose(delta(cat, n), exact, atol=1e-6) and len(svd[n][0]) == 3
        best = torch.linalg.svdvals(exact)[3:].norm().item()
        assert (delta(svd, n) - exact).norm().item() == pytest.approx(best, rel=1e-3)
        for ours, x, y in zip(mean[n][:2], a[n], b[n]):
            assert torch.allclose(ours, 0.75 * x + 0.25 * y, atol=1e-6)
        off += (delta(mean, n) - exact).square().sum().item()
        size += exact.square().sum().item()
    said = read_json(tmp_path, "factors/results.json")["relative_error"]
    assert said == pytest.approx((off / size) ** 0.5, rel=1e-3) and said > 0.1


def random_peft(folder, seed=0, **settings):
    """A random LoRA for the toy, made and saved by peft."""
    torch.manual_seed(seed)
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
    model, network = SD3(BASE), SD3(BASE).transformer
    model.load_adapter("x", random_peft(tmp_path, **settings))
    model.add_adapter("merged", merge_loras([(model.lora("x"), 1)]))
    x, t, cond = inputs(model)
    theirs = called(PeftModel.from_pretrained(network, str(tmp_path)), x, t, cond)
    assert (theirs - model.velocity(x, t, cond)).abs().max() > 1e-2
    for name in ("x", "merged"):
        assert torch.allclose(model.velocity(x, t, cond, name), theirs, atol=1e-5), name


WEIGHTS_TOO = ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")  # change the base's as well
SETTINGS = [({"init_lora_weights": kind}, f'"{kind}" changes the base too') for kind in WEIGHTS_TOO] + [
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


def test_a_loras_settings_that_mean_more_than_b_a_are_refused(tmp_path):
    folder, file = random_peft(tmp_path), tmp_path / "adapter_config.json"
    fine = json.loads(file.read_text())
    unsaid = {name: value for name, value in fine.items() if name != "target_modules"}
    texts = [(json.dumps(fine | change), message) for change, message in SETTINGS]
    texts += [(json.dumps(unsaid), "target_modules None"), ("{oops", "not JSON"), ("[]", "object")]
    for text, message in texts:
        file.write_text(text)
        with pytest.raises(SystemExit, match=re.escape(message)):
            lora_of(folder)
    text = json.dumps(fine | {"a_setting_of_tomorrow": None})
    file.write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert len(lora_of(folder)) == 8


LAYER = "transformer_blocks.2.attn.to_k"


def changed(key, value):
    """The LoRA's tensors with one of them another."""
    return lambda tensors: tensors | {f"base_model.model.{LAYER}.{key}.weight": value}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: tensors | {"base_model.model.nonsense.lora_A.weight": torch.ones(4, 96)},
            "nonsense",
        ),
        (
            lambda tensors: tensors | {"text_model.x": torch.zeros(1)},
            "1 keys belong to no LoRA of a linear layer in this model: text_model.x",
        ),
        (changed("lora_A", torch.ones(4, 5)), f"{LAYER} has A (4, 5) and B"),
        (changed("lora_A", torch.tensor(1.0)), f"{LAYER} has A () and B"),
        (lambda tensors: tensors | {f"base_model.model.{LAYER}.alpha": torch.ones(2)}, f"{LAYER}.alpha"),
        (changed("lora_A", torch.ones(4, 96) * math.nan), f"{LAYER} has values that are not finite"),
        (changed("lora_B", torch.ones(96, 4) + math.inf), f"{LAYER} has values that are not finite"),
        (without(LAYER), f"1 layers that its settings target have no weights: {LAYER}"),
        (without(LAYER + ".lora_B"), f"{LAYER} (only lora_A)"),
    ],
    ids=["unknown", "strange", "shape", "scalar", "alpha", "nan", "inf", "missing", "half"],
)
def test_weights_that_do_not_fit_are_refused_with_the_layer(change, message, tmp_path):
    folder = random_lora(tmp_path / "lora", 1)
    (tmp_path / "lora/pytorch_lora_weights.safetensors").unlink()
    file = tmp_path / "lora/adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    assert message in refused("sample.py", lora=folder, out=tmp_path / "out")


def test_a_lora_that_is_not_there_is_refused(tmp_path):
    assert "no such LoRA" in refused("sample.py", lora=tmp_path / "nothing", out=tmp_path / "out")


ALPHAS = [
    ({"lora_alpha": "6"}, None, 6),
    ({"alpha": "6.5"}, None, 6.5),
    ({"ss_network_alpha": "2"}, None, 2),
    ({}, 3.0, 3),
    ({"ss_network_alpha": "None"}, None, 4),
    ({}, None, 4),
]


@pytest.mark.parametrize("header, beside, alpha", ALPHAS)
def test_alpha_where_files_have_it(header, beside, alpha, loras, tmp_path, capsys):
    """In the header under three names, beside each layer, or nowhere: then it is the rank, and that is
    said."""
    lora, tensors = lora_of(loras["ocr"]), {}
    for n, (A, B, _) in lora.items():
        tensors |= {f"transformer.{n}.lora_A.weight": A, f"transformer.{n}.lora_B.weight": B}
        if beside:
            tensors[f"transformer.{n}.alpha"] = torch.tensor(beside)
    save_file(tensors, tmp_path / "x.safetensors", header)
    found = lora_of(tmp_path / "x.safetensors")
    assert {a for *_, a in found.values()} == {alpha}
    assert all(torch.equal(found[n][0], lora[n][0]) for n in lora)
    assert ("does not give its alpha" in capsys.readouterr().out) == (alpha == 4)


def test_a_lora_with_a_scale_and_several_as_one(loras, tmp_path):
    """LORA,scale=S+LORA: wherever a LoRA is given; the word base is none."""
    a, b = loras["ocr"], loras["scene"]
    found, one, other = lora_of(f"{a},scale=0.5+{b},scale=-1.5"), lora_of(a), lora_of(b)
    for n in found:
        assert torch.allclose(delta(found, n), 0.5 * delta(one, n) - 1.5 * delta(other, n), atol=1e-5), n
    names = {fingerprint(spec) for spec in (str(a), f"{a},scale=0.5", f"{a}+{b}", f"{b}+{a},scale=2")}
    assert len(names) == 4
    model, cond = SD3(BASE), None
    model.load_teacher("rest", "base")
    model.load_teacher("half", f"{a},scale=0.5")
    cond, x = model.encode(["a cup"]), torch.randn(1, *model.latent_shape(16))
    v = {name: model.velocity(x, 0.5, cond, name) for name in ("base", "rest", "half")}
    assert torch.equal(v["rest"], v["base"]) and not torch.equal(v["half"], v["base"])
    flags = dict(num_images=1, num_steps=1, resolution=16, prompt="a cup")
    run("sample.py", **flags, lora=f"{a}+{b}", out=tmp_path / "both")
    assert "no such LoRA" in refused("sample.py", **flags, lora=f"{a}+nothing", out=tmp_path / "x")
    assert "scale must be a number" in refused(
        "sample.py", **flags, lora=f"{a},scale=big", out=tmp_path / "x"
    )


def test_merges_are_scaled(loras, tmp_path):
    """The average times the number of LoRAs is their sum."""
    teachers = [f"{task}={loras[task]}" for task in ("ocr", "scene")]
    run("cold_start.py", "merge", teachers=teachers, scale=2, out=tmp_path / "sum")
    found, expected = lora_of(tmp_path / "sum/lora"), lora_of(f"{loras['ocr']}+{loras['scene']}")
    assert all(torch.allclose(delta(found, n), delta(expected, n), atol=1e-5) for n in expected)
    for method in ("ties", "dare_ties"):
        run("cold_start.py", "merge", teachers=teachers, method=method, density=0.5, out=tmp_path / method)
        merged = merge_ties([lora_of(loras[task]) for task in ("ocr", "scene")], 0.5, method)
        found = lora_of(tmp_path / method / "lora")
        assert all(torch.allclose(delta(found, n), delta(merged, n), atol=1e-5) for n in merged)
    assert "only for --method ties" in refused("cold_start.py", "merge", density=0.5, out=tmp_path / "x")
