"""--quantize: the large frozen weights in int8 or nf4, against the same networks in float32.

python -m pytest -s tests/test_quantize.py -k errors     # the table of experiments/README.md"""

import copy
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import BASE, ROOT, distill, equal, few, lora_of, refused, run, saved
from safetensors.torch import load_file
from test_families import PROMPTS, folder, guidance_of, load, noise, with_adapters  # noqa: F401

import flow_sde
from flow_sde import linear_layers, load_network, text_parts
from memory.quantize import Quantized, dense, quantize

installed = importlib.util.find_spec("bitsandbytes")
needs_package = pytest.mark.skipif(not installed, reason="pip install bitsandbytes")
NF4 = pytest.param("nf4", marks=needs_package)
both = pytest.mark.parametrize("how", ["int8", NF4])


# -- a layer -----------------------------------------------------------------------------------------------


def layer_of(how, dtype=torch.float32, rows=80, columns=96):
    """A linear layer with weights of many sizes, and the same quantized."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows).requires_grad_(False)
    layer.weight *= torch.logspace(-4, 0, rows)[:, None]
    layer.weight[3] = 0
    layer = layer.to(dtype)
    quantized = copy.deepcopy(layer)
    quantize(quantized, how)
    assert isinstance(quantized, Quantized)
    return layer, quantized


def dense_weight(layer):
    return dense(layer.packed, layer.scale, [layer.out_features, layer.in_features], layer.weight.dtype)


def test_int8_is_off_by_half_a_unit():
    layer, quantized = layer_of("int8")
    most = layer.weight.abs().amax(1, keepdim=True)
    assert ((dense_weight(quantized) - layer.weight).abs() <= most / 254 * 1.001).all()
    assert (
        sum(p.nbytes for p in quantized.parameters()) == 80 * 96 + 80 * 4 + 80 * 4
    )  # and scales, and biases


@needs_package
def test_nf4_is_the_nearest_of_sixteen_values():
    """Quantiles of a Gaussian (QLoRA, appendix E), times the largest of 64 weights."""
    from bitsandbytes.functional import get_4bit_type

    layer, quantized = layer_of("nf4")
    values = get_4bit_type("nf4", "cpu")
    blocks = layer.weight.reshape(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] - most[..., None] * values).abs().amin(2)
    found = (dense_weight(quantized).reshape(-1, 64) - blocks).abs()
    assert torch.allclose(found, nearest, atol=1e-6)
    assert sum(p.nbytes for p in quantized.parameters()) == 80 * 96 * (1 / 2 + 4 / 64) + 80 * 4


def keep_none(tensor):
    """For saved_tensors_hooks: no dense weight may stay for the backward."""
    assert not tensor.is_floating_point() or tensor.numel() < 80 * 96
    return tensor


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_that_of_its_dense_weight(how, dtype):
    """Forward and backward, in training and not, compiled and not. float16 takes what a dense layer takes."""
    torch._dynamo.reset()  # it counts what other tests compiled
    layer, quantized = layer_of(how, dtype)
    layer.weight.copy_(dense_weight(quantized))
    x = (200 * torch.randn(2, 5, 96)).to(dtype).requires_grad_()
    y = layer(x)
    [grad] = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    for call in (quantized.train(), quantized.eval(), compiled):
        with torch.autograd.graph.saved_tensors_hooks(keep_none, lambda tensor: tensor):
            found = call(x)
        assert torch.equal(found, y) and torch.equal(torch.autograd.grad(found.sum(), x)[0], grad)
        with torch.no_grad():
            assert torch.equal(call(x), y)
    assert quantized.weight.dtype == dtype  # transformers' T5 reads it


def test_what_does_not_fill_its_blocks_stays_dense():
    layer = torch.nn.Linear(9, 7)
    quantize(layer, "nf4")
    assert type(layer) is torch.nn.Linear and layer.weight.shape == (7, 9)


# -- networks ----------------------------------------------------------------------------------------------

BOUNDS = {"int8": (0.02, 0.02, 0.999), "nf4": (0.4, 0.35, 0.7)}  # of random networks
TOY_PROMPTS = [
    "two red circles and one blue square",
    'a yellow sign saying "HAT"',
    "a red house on snow at night",
]


def answers(model, x, prompts, guidance):
    """The student's velocity, the base's, mean (v - v_teacher)^2, and the student's gradient of it."""
    params, cond = model.adapters["student"], model.encode(prompts)
    v = model.velocity(x, 0.6, cond, "student", guidance)
    with torch.no_grad():
        base, v_teacher = (model.velocity(x, 0.6, cond, name, guidance) for name in ("base", "teacher"))
    distance = (v - v_teacher).square().mean()
    grads = torch.autograd.grad(distance, params, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]
    return v.detach(), base, distance.item(), torch.cat([g.flatten() for g in grads])


def off(found, exact):
    """The relative error."""
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", ["toy", "sd3", "flux", "flux2", "qwen", "zimage", "sana"])
def test_errors(name, folder):  # noqa: F811
    """Of the student's velocity, its distance to a teacher and its gradient; an adapter acts on what is
    quantized as on what is not."""
    base = BASE if name == "toy" else folder(name)
    model, exact = load(base), None
    kind, files = type(model.transformer), os.path.join(base, "transformer")
    for how in (None, *BOUNDS):
        if how == "nf4" and not installed:
            continue
        network = load_network(kind, files, torch.float32, "cpu", how)
        size = sum(p.nbytes for p in network.parameters()) / 1e3
        model.transformer, model.adapters = network, {}
        if name == "toy":
            for adapter, task in (("teacher", "compose"), ("student", "scene")):
                model.load_adapter(adapter, os.path.join(ROOT, "toy/teachers", task))
            model.train_adapter("student")
            found = answers(model, noise(model, 32), TOY_PROMPTS, 1.0)
        else:
            with_adapters(model)
            found = answers(model, noise(model, 32), PROMPTS, guidance_of(name, model))
        exact = exact or found
        v, v_base, distance, gradient = found
        ratio, cosine = distance / exact[2], torch.cosine_similarity(gradient, exact[3], 0).item()
        print(f"| {name}, {how} | {off(v, exact[0]):.4f} | {ratio:.3f} | {cosine:.4f} | {size:.0f} |")
        if how:
            most, most_ratio, least = BOUNDS[how]
            assert off(v, exact[0]) < most and abs(ratio - 1) < most_ratio and cosine > least, how
        acts = off(v, v_base) / off(exact[0], exact[1])
        assert abs(acts - 1) < 0.2 and off(v, v_base) > 0.05
        quantized = {id(layer) for layer in network.modules() if isinstance(layer, Quantized)}
        blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]
        layers = [layer for block in blocks for layer in linear_layers(block).values()]
        if how == "nf4":
            layers = [layer for layer in layers if layer.in_features * layer.out_features % 64 == 0]
        assert quantized == ({id(layer) for layer in layers} if how else set()), how


@both
def test_large_text_encoders(how, folder, monkeypatch):  # noqa: F811
    """And only these. T5 keeps a layer in float32 in a float16 network, and looks at its weight's type."""
    exact, dense = load(folder("sd3")), load(folder("sd3"), dtype=torch.float16, quantize=how)
    monkeypatch.setattr(flow_sde, "LARGE_ENCODER", 30_000)
    model = load(folder("sd3"), dtype=torch.float16, quantize=how, offload=True)
    sizes = []
    for found in (dense, model):
        layers = [linear_layers(encoder).values() for _, encoder, _ in text_parts(found.pipe)]
        sizes.append([any(isinstance(layer, Quantized) for layer in its) for its in layers])
    assert sizes == [[False, False, False], [False, True, True]]
    wo = model.pipe.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, Quantized) and wo.weight.dtype == torch.float32
    embeds = [found.encode(PROMPTS)[0].float() for found in (exact, dense, model)]
    assert off(embeds[1], embeds[0]) < 1e-3 < off(embeds[2], embeds[0]) < (0.02 if how == "int8" else 0.2)


def test_a_full_fine_tune(folder, tmp_path):  # noqa: F811
    """As a teacher, quantized too."""
    model = load(folder("sd3"), quantize="int8")
    x, cond = noise(model, 32), model.encode(PROMPTS)
    model.load_teacher("full", folder("sd3"))
    layers = linear_layers(model.full["full"]).values()
    assert any(isinstance(layer, Quantized) for layer in layers)
    with torch.no_grad():
        assert torch.equal(model.velocity(x, 0.6, cond, "full"), model.velocity(x, 0.6, cond, "base"))


# -- scripts -----------------------------------------------------------------------------------------------


@both
def test_a_run(how, loras, tmp_path, numbers_only, gradients):
    """Has the gradient of a dense one, saves the LoRA it has, goes on to the bit, and is no other run."""
    distill(loras, tmp_path / "dense")
    flags = dict(quantize=how, save_every=1, steps=2)
    model = distill(loras, tmp_path / "a", **flags)["model"]
    assert torch.cosine_similarity(*gradients[:2], 0) > (0.6 if how == "nf4" else 0.99)
    ours, found = model.lora("ema"), lora_of(tmp_path / "a/lora")
    for n, (A, B, alpha) in found.items():
        assert torch.equal(A, ours[n][0]) and torch.equal(B, ours[n][1]) and alpha == ours[n][2]
    shutil.rmtree(tmp_path / "a/checkpoints/000002")
    before = saved(tmp_path / "a")
    with pytest.raises(SystemExit) as caught:
        distill(loras, tmp_path / "a", **flags | dict(quantize=None), resume="auto")
    assert "of another run: quantize was " in str(caught.value) and how in str(caught.value)
    distill(loras, tmp_path / "a", **flags, resume="auto")
    assert equal(before, saved(tmp_path / "a"))


def test_pictures_and_a_merge(loras, tmp_path):
    """Pictures and tables know how their model was stored; a merge is that of the dense base."""
    flags = dict(lora=loras["ocr"], num_images=1, num_steps=1)
    run("sample.py", **flags, merge=tmp_path / "dense", out=tmp_path / "a")
    run("sample.py", **flags, quantize="int8", merge=tmp_path / "merged", out=tmp_path / "b")
    dense, merged = (load_file(file) for file in sorted(tmp_path.glob("*/transformer/*.safetensors")))
    assert equal(dense, merged)
    layer, base = "transformer_blocks.0.attn.to_q", load_file(*Path(BASE).glob("transformer/*.safetensors"))
    A, B, alpha = lora_of(loras["ocr"])[layer]
    assert torch.allclose(
        merged[layer + ".weight"], base[layer + ".weight"] + alpha / len(A) * B @ A, atol=1e-6
    )
    assert "not the same quantize" in refused("sample.py", **flags, out=tmp_path / "b")
    table = dict(tasks=few("val", 1, tmp_path), reward="jpeg", eval_num_steps=1, out=tmp_path / "table")
    run("evaluate.py", **table, quantize="int8")
    assert "quantize was 'int8', now None" in refused("evaluate.py", **table)


def test_a_package_that_is_missing_or_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("flow_sde.load_pipeline", None)  # nothing is loaded
    flags = dict(quantize="nf4", out=tmp_path / "out")
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install bitsandbytes" in refused("sample.py", **flags)
    module = types.ModuleType("bitsandbytes.functional")  # has no quantize_4bit
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    assert "--quantize nf4: bitsandbytes cannot do it on cpu" in refused("sample.py", **flags)
