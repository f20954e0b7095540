"""LoRA files as other programs write them: read exactly, or refused naming the key or the method.

The names are those of the programs' public code: kohya-ss/sd-scripts networks/lora_{sd3,flux}.py,
kohya-ss/musubi-tuner networks/lora_{flux_2,qwen_image,zimage}.py and convert_z_image_lora_to_comfy.py,
ostris/ai-toolkit toolkit/network_mixins.py, Nerogar/OneTrainer modules/util/convert_lora_util.py and
modules/model/*Model.py, bghira/SimpleTuner helpers/training/lora_format.py, Comfy-Org/ComfyUI comfy/lora.py
and comfy/utils.py, and XLabs' in sd-scripts networks/convert_flux_lora.py.
"""

import functools

import pytest
import tiny
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from flow_sde import family_of, linear_layers, pipeline_folder, read_lora
from layouts.original import names

# {family: {a layer in the authors' code: those of ours that it fuses, in the order of its rows}}
QKV, ADDED = [f"attn.to_{k}" for k in "qkv"], [f"attn.add_{k}_proj" for k in "qkv"]
FUSED = {
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.{n}" for n in QKV],
        "joint_blocks.0.x_block.attn2.qkv": [f"transformer_blocks.0.attn2.to_{k}" for k in "qkv"],
        "joint_blocks.1.context_block.attn.qkv": [f"transformer_blocks.1.{n}" for n in ADDED],
        "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
        "joint_blocks.0.context_block.adaLN_modulation.1": ["transformer_blocks.0.norm1_context.linear"],
        "joint_blocks.1.context_block.adaLN_modulation.1": ["transformer_blocks.1.norm1_context.linear"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    "flux": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.{n}" for n in QKV],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.{n}" for n in ADDED],
        "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        "single_blocks.0.linear1": [f"single_transformer_blocks.0.{n}" for n in [*QKV, "proj_mlp"]],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    "flux2": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.{n}" for n in QKV],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.{n}" for n in ADDED],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
        "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
        "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    },
    "zimage": {
        "layers.0.attention.qkv": [f"layers.0.attention.to_{k}" for k in "qkv"],
        "context_refiner.0.attention.out": ["context_refiner.0.attention.to_out.0"],
        "noise_refiner.0.feed_forward.w1": ["noise_refiner.0.feed_forward.w1"],
        "layers.0.adaLN_modulation.0": ["layers.0.adaLN_modulation.0"],
    },
}
SWAPPED = ("joint_blocks.1.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1")
XLABS = {
    "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.{n}" for n in QKV],
    "double_blocks.0.processor.qkv_lora2": [f"transformer_blocks.0.{n}" for n in ADDED],
    "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.{n}" for n in QKV],
    "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
}
SPLIT = {family: {n: [n] for ours in table.values() for n in ours} for family, table in FUSED.items()}
SPLIT["qwen"] = {n: [n] for n in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.txt_mod.1")}
SPLIT["sana"] = {n: [n] for n in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0")}


def spelt(n, A, B, alpha, front, flat=False, down="lora_A.weight", up="lora_B.weight"):
    """A layer's tensors as a program spells them."""
    front += n.replace(".", "_") if flat else n
    tensors = {f"{front}.{down}": A, f"{front}.{up}": B}
    return tensors | ({} if alpha is None else {f"{front}.alpha": torch.tensor(float(alpha))})


KOHYA = dict(down="lora_down.weight", up="lora_up.weight")
THEIRS = {  # {program: its spelling}, of the authors' names
    "kohya, musubi, OneTrainer": dict(front="lora_unet_", flat=True, **KOHYA),
    "ai-toolkit": dict(front="diffusion_model."),
    "ComfyUI, SimpleTuner, OneTrainer": dict(front="diffusion_model."),
    "OneTrainer, original": dict(front=""),
    "XLabs": dict(front="", down="down.weight", up="up.weight"),
}
OURS = {
    "ai-toolkit, diffusers": dict(front="transformer."),
    "ai-toolkit, newer": dict(front="diffusion_model."),
    "musubi": dict(front="lora_unet_", flat=True, **KOHYA),
    "OneTrainer, legacy": dict(front="lora_transformer_", flat=True, **KOHYA),
    "OneTrainer, dotted": dict(front="transformer.", **KOHYA),
    "SimpleTuner, lycoris": dict(front="lycoris_", flat=True, **KOHYA),
    "DiffSynth": dict(front="", down="lora_A.default.weight", up="lora_B.default.weight"),
}
NO_ALPHA = ("ai-toolkit", "ai-toolkit, diffusers", "ai-toolkit, newer", "DiffSynth", "XLabs")
CASES = [(family, program) for family in FUSED for program in THEIRS if program != "XLabs"]
CASES += [("flux", "XLabs"), *((family, program) for family in SPLIT for program in OURS)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A family's tiny model, built when it is first asked for."""

    @functools.cache
    def load(name):
        folder = tiny.build(name, str(tmp_path_factory.mktemp("layouts")))
        return family_of(pipeline_folder(folder)[1])(folder)

    return load


def halves(ours, rank):
    return torch.randn(rank, ours[0].in_features), torch.randn(sum(m.out_features for m in ours), rank)


def file_of(table, network, alpha, spelling, rank=3):
    """A file of a table's layers in a spelling, and {our layer: what it adds to the weight}, by hand."""
    torch.manual_seed(0)
    layers, tensors, deltas = linear_layers(network), {}, {}
    for n, ours in table.items():
        A, B = halves([layers[m] for m in ours], rank)
        tensors |= spelt(n, A, B, alpha, **spelling)
        delta = (rank if alpha is None else alpha) / rank * B @ A
        if n in SWAPPED:
            shift, scale = delta.chunk(2)
            delta = torch.cat([scale, shift])
        deltas |= dict(zip(ours, delta.split([layers[m].out_features for m in ours])))
    return tensors, deltas


def read(tensors, network, folder):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "x.safetensors")
    return read_lora(str(folder / "x.safetensors"), network)


@pytest.mark.parametrize("family, program", CASES)
def test_a_programs_file_adds_what_it_says(family, program, load, tmp_path):
    network, alpha = load(family).transformer, None if program in NO_ALPHA else 1.5
    table = SPLIT[family] if program in OURS else XLABS if program == "XLabs" else FUSED[family]
    tensors, deltas = file_of(table, network, alpha, (OURS | THEIRS)[program])
    found = read(tensors, network, tmp_path)
    assert set(found) == set(deltas)
    for n, (A, B, alpha) in found.items():
        assert torch.allclose(alpha / len(A) * B @ A, deltas[n], atol=1e-5), n


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_the_output_is_that_of_weights_with_the_deltas(family, load, tmp_path):
    model, layers = load(family), linear_layers(load(family).transformer)
    spelling = THEIRS["kohya, musubi, OneTrainer"]
    tensors, deltas = file_of(FUSED[family], model.transformer, 0.3, spelling)
    model.add_adapter("x", read(tensors, model.transformer, tmp_path))
    x, cond = torch.randn(model.latent_shape(32))[None], model.encode(["a cup"])
    base, found = (model.velocity(x, 0.7, cond, name) for name in ("base", "x"))
    for n, delta in deltas.items():
        layers[n].weight += delta
    expected = model.velocity(x, 0.7, cond, "base")
    for n, delta in deltas.items():
        layers[n].weight -= delta
    assert (found - base).abs().max() > 0.1
    assert torch.allclose(found, expected, atol=1e-4)


WHOLE = {  # networks as wide as diffusers' converter of whole checkpoints expects
    "sd3": SD3Transformer2DModel,
    "flux": functools.partial(FluxTransformer2DModel, num_single_layers=1, guidance_embeds=True),
    "flux2": functools.partial(Flux2Transformer2DModel, num_single_layers=1),
    "z_image": ZImageTransformer2DModel,
}
SIZES = dict(sd3=dict(num_layers=2, dual_attention_layers=(0,)), z_image=dict(n_layers=1))


class Checkpoint(dict):
    """A checkpoint that has what is asked for."""

    def pop(self, key, default=None):
        return super().pop(key, torch.zeros(1))


@pytest.mark.parametrize("family", WHOLE)
def test_rows_go_where_diffusers_puts_those_of_a_checkpoint(family, tmp_path):
    """Every layer that a table names: B's rows go the way of a weight's in diffusers' own conversion."""
    with torch.device("meta"):
        network = WHOLE[family](**SIZES.get(family, dict(num_layers=1)))
    network.__class__ = type("FSDP" + type(network).__name__, (type(network),), {})  # as --shard does
    layers, theirs = linear_layers(network), names(network)
    theirs = {name: ours for name, ours in theirs.items() if "processor" not in name}  # XLabs' are above
    fused = {n for ours in theirs.values() for n in ours}
    tensors, checkpoint = {}, Checkpoint()
    for name, ours in (theirs | {n: [n] for n in layers if n not in fused}).items():
        A, B = halves([layers[n] for n in ours], 1)
        tensors |= spelt(name, A, B, None, front="diffusion_model.")
        checkpoint |= {f"{name}.weight": B, f"{name}.bias": 0 * B[:, 0]}
    convert = getattr(single_file_utils, f"convert_{family}_transformer_checkpoint_to_diffusers")
    converted, found = convert(checkpoint), read(tensors, network, tmp_path)
    assert set(found) == set(layers)
    assert all(torch.equal(found[n][1], converted[f"{n}.weight"]) for n in layers)


FUSED_KEY = "lora_unet_joint_blocks_0_x_block_attn_qkv."
OUR_KEY = "transformer.transformer_blocks.0.attn.to_q."
OTHER_KEY = "lora_unet_joint_blocks_0_x_block_mlp_fc2."  # of a layer that the file does not adapt
ENCODERS = "1 keys are for text encoders, .*"
UNKNOWN = "1 keys belong to no LoRA of a linear layer in this model"


@pytest.mark.parametrize(
    "key, message",
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", ENCODERS + ": lora_te1_text_model"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", ENCODERS + ": text_encoder_2"),
        ("text_encoders.clip_l.transformer.text_model.x.lora_B.weight", ENCODERS + ": text_encoders.clip_l"),
        (FUSED_KEY + "lokr_w1", "LoKr; only plain LoRAs are read: " + FUSED_KEY + "lokr_w1"),
        (FUSED_KEY + "hada_w1_a", "LoHa; .*hada_w1_a"),
        (FUSED_KEY + "oft_blocks", "OFT; .*oft_blocks"),
        (FUSED_KEY + "dora_scale", "DoRA; .*dora_scale"),
        (OUR_KEY + "lora_magnitude_vector", "DoRA; .*magnitude"),
        (FUSED_KEY + "lora_mid.weight", UNKNOWN + ": lora_unet.*lora_mid"),
        (FUSED_KEY + "diff_b", UNKNOWN + ": lora_unet.*diff_b"),
        ("bundle_emb.sks.clip_l", UNKNOWN + ": bundle_emb"),
        ("lora_unet_x_embedder_proj.lora_down.weight", UNKNOWN + ": lora_unet_x_embedder_proj"),
        (FUSED_KEY.replace("_0_", "_9_") + "alpha", UNKNOWN + ": lora_unet_joint_blocks_9"),
        (OUR_KEY + "lora_A.weight", UNKNOWN + ": transformer.*to_q.lora_A"),  # these two are in qkv as well
        (OUR_KEY + "alpha", UNKNOWN + ": transformer.*to_q.alpha"),
        (OTHER_KEY + "lora_up.weight", r"ff.net.2 \(only lora_B\)"),
        (OTHER_KEY + "alpha", r"ff.net.2 \(only alpha\)"),
        (FUSED_KEY + "lora_up.weight", r"to_q has A \(3, 32\) and B \(1,\) for a weight of \(32, 32\)"),
    ],
)
def test_what_would_be_left_out_is_refused(key, message, load, tmp_path):
    network = load("sd3").transformer
    tensors, _ = file_of(FUSED["sd3"], network, 1.5, THEIRS["kohya, musubi, OneTrainer"])
    with pytest.raises(SystemExit, match=message):
        read(tensors | {key: torch.zeros(1)}, network, tmp_path)


def test_text_encoders_keys_can_be_left_out(load, tmp_path):
    network = load("sd3").transformer
    tensors, _ = file_of(FUSED["sd3"], network, 1.5, THEIRS["kohya, musubi, OneTrainer"])
    without = read(tensors, network, tmp_path)
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    save_file(tensors | {key: torch.zeros(1)}, tmp_path / "with_text.safetensors")
    found = read_lora(f"{tmp_path}/with_text.safetensors,text=0", network)
    assert found.keys() == without.keys() and all(torch.equal(found[n][1], without[n][1]) for n in found)
