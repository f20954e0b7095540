"""The SD3 adapter against diffusers and peft, on the toy pipeline: the classes are those of SD3.5, only the sizes are small."""

import json
import os

import pytest
import torch
from conftest import ROOT, TASKS, random_lora, refused, run

from flow_sde import SD3, generators, merge_loras, randn, read_lora, save_lora, truncate_lora

BASE = os.path.join(ROOT, "toy/base")
PROMPTS = ["two red circles and one blue square", 'a yellow sign saying "HAT"', "a red house and two pines on snow at night"]


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
    theirs = pipe(PROMPTS, negative_prompt=[""] * 3, latents=latents, num_inference_steps=8, guidance_scale=guidance, height=32, width=32,
                  max_sequence_length=12, output_type="pt").images
    ours = model.generate(PROMPTS, generators(0, 0, range(3)), 8, 32, guidance=guidance)
    assert (ours - theirs).abs().max() < 1e-4


def test_mixed_batch_equals_one_adapter_at_a_time(model):
    x, t, cond = inputs(model, 4)
    names = ["ocr", "base", "compose", "student"]
    mixed = model.velocity(x, t, cond, names, [1.0, 4.0, 2.0, 1.0])
    for i, (name, g) in enumerate(zip(names, [1.0, 4.0, 2.0, 1.0])):
        alone = model.velocity(x[i:i + 1], t, tuple(c[i:i + 1] for c in cond), name, g)
        assert torch.allclose(mixed[i:i + 1], alone, atol=2e-5), (name, (mixed[i:i + 1] - alone).abs().max())
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
        (model.pipe.transformer.enable_gradient_checkpointing if checkpointing else model.pipe.transformer.disable_gradient_checkpointing)()
        loss = model.velocity(x, t, cond, "student", 2.0).square().mean()
        if ask_teacher:
            with torch.no_grad():
                model.velocity(x, t, cond, list(TASKS), 2.0), model.velocity(x, t, cond, "base")
        grads.append(torch.autograd.grad(loss, params))
    model.pipe.transformer.disable_gradient_checkpointing()
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], other))
    silent = [n for n, g in zip(model.weights("student"), grads[0]) if g.abs().max() == 0]
    assert all(n.endswith("3.attn.add_q_proj") for n, _ in silent)  # the last block's text queries lead nowhere, in any SD3
    assert not any(p.requires_grad for p in model.weights("ocr").values())


def test_a_saved_lora_is_the_same_for_us_peft_and_diffusers(loras, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel
    model = SD3(BASE)
    model.load_adapter("ocr", loras["ocr"])
    save_lora(model.lora("ocr"), tmp_path)
    x, t, cond = inputs(model)
    ours = model.velocity(x, t, cond, "ocr")
    call = lambda f: f(hidden_states=x, timestep=torch.full((3,), t * 1000), encoder_hidden_states=cond[0], pooled_projections=cond[1], return_dict=False)[0]
    with torch.no_grad():
        pipe = StableDiffusion3Pipeline.from_pretrained(BASE)
        pipe.load_lora_weights(str(tmp_path))
        assert torch.allclose(call(pipe.transformer), ours, atol=1e-5)
        assert torch.allclose(call(PeftModel.from_pretrained(SD3(BASE).transformer, str(tmp_path))), ours, atol=1e-5)
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        again = SD3(BASE)
        again.load_adapter("x", str(tmp_path / file))
        assert torch.equal(again.velocity(x, t, cond, "x"), ours), file
    assert (ours - model.velocity(x, t, cond)).abs().max() > 1e-2


def test_merge_is_the_exact_weighted_sum_of_deltas(loras, tmp_path):
    delta = lambda lora, n: lora[n][2] / len(lora[n][0]) * lora[n][1].double() @ lora[n][0].double()
    run("cold_start.py", "merge", "--method", "cat", "--out", tmp_path / "cat", "--teachers", f"a={loras['compose']},weight=3", f"b={loras['ocr']},weight=1")
    a, b, merged = (read_lora(p)[0] for p in (loras["compose"], loras["ocr"], str(tmp_path / "cat/lora")))
    for n in a:
        assert torch.allclose(delta(merged, n), 0.75 * delta(a, n) + 0.25 * delta(b, n), atol=1e-6)
    assert len(merged[n][0]) == 8
    # at full rank the SVD is exact; below it, nothing of that rank is closer
    exact, full, low = merge_loras([(a, 3), (b, 1)]), truncate_lora(merged, 8), truncate_lora(merged, 3)
    for n in a:
        assert torch.allclose(delta(full, n), delta(exact, n), atol=1e-6)
        best = torch.linalg.svdvals(delta(exact, n))[3:].norm()
        assert (delta(low, n) - delta(exact, n)).norm().item() == pytest.approx(best.item(), rel=1e-3)
    run("cold_start.py", "merge", "--method", "svd", "--rank", "3", "--out", tmp_path / "svd", "--teachers", f"a={loras['compose']}", f"b={loras['ocr']}")
    assert all(len(A) == 3 for A, _, _ in read_lora(str(tmp_path / "svd/lora"))[0].values())
    # the average of the factors, and how far that is from the average of the deltas
    run("cold_start.py", "merge", "--method", "factors", "--out", tmp_path / "mean", "--teachers", f"a={loras['compose']},weight=3", f"b={loras['ocr']}")
    mean = read_lora(str(tmp_path / "mean/lora"))[0]
    for n in a:
        assert all(torch.allclose(mean[n][k], 0.75 * a[n][k] + 0.25 * b[n][k], atol=1e-6) for k in (0, 1)) and mean[n][2] == a[n][2]
    square = lambda difference: sum(difference(n).square().sum().item() for n in a)
    error = (square(lambda n: delta(mean, n) - delta(exact, n)) / square(lambda n: delta(exact, n))) ** 0.5
    assert json.load(open(tmp_path / "mean/results.json"))["relative_error"] == pytest.approx(error, rel=1e-3) and error > 0.1


def test_a_lora_that_does_not_fit_is_named(loras, tmp_path):
    lora, _ = read_lora(loras["ocr"])
    first = next(iter(lora))
    bad = {
        "unknown": ({"nonsense" + n[12:]: v for n, v in lora.items()}, "not in this model: nonsense"),
        "shape": ({n: (A[:, :5], B, al) if n == first else (A, B, al) for n, (A, B, al) in lora.items()}, "shapes do not fit this model: " + first),
    }
    for name, (weights, message) in bad.items():
        save_lora(weights, tmp_path / name)
        assert message in refused("sample.py", "--lora", tmp_path / name, "--out", tmp_path / "out")
    from safetensors.torch import load_file, save_file
    for name, change, message in (("missing", lambda t: {k: v for k, v in t.items() if first not in k}, "has no weights: " + first),
                                  ("half", lambda t: {k: v for k, v in t.items() if first + ".lora_B" not in k}, first + " (only lora_A)"),
                                  ("strange", lambda t: t | {"text_model.x": torch.zeros(1)}, "unexpected: text_model.x")):
        folder = random_lora(tmp_path / name, 1)
        os.remove(os.path.join(folder, "pytorch_lora_weights.safetensors"))
        file = os.path.join(folder, "adapter_model.safetensors")
        save_file(change(load_file(file)), file)
        assert message in refused("sample.py", "--lora", folder, "--out", tmp_path / "out")
    assert "no such LoRA" in refused("sample.py", "--lora", tmp_path / "nothing", "--out", tmp_path / "out")


def test_compiled_blocks_ask_the_adapters_of_the_moment(model):
    """torch.compile (peft's own routing is silently ignored by it): blocks traced under one routing answer under the next as they should."""
    x, t, cond = inputs(model, 4)
    asked = [["student"] * 4, ["ocr", "base", "compose", "student"], ["compose"] * 4, ["ocr", "ocr", "compose", "compose"], ["base"] * 4]
    with torch.no_grad():
        plain = [model.velocity(x, t, cond, names) for names in asked]
        for block in model.transformer.transformer_blocks:
            block.compile(backend="eager")
        try:
            for names, v in zip(asked, plain):
                assert torch.allclose(model.velocity(x, t, cond, names), v, atol=1e-4), names
        finally:
            for block in model.transformer.transformer_blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()
    assert min((a - b).abs().max() for i, a in enumerate(plain) for b in plain[:i]) > 1e-3
