"""The linear layers of a network by the names of its authors' code, which kohya's programs, ComfyUI,
OneTrainer and others write. A fused layer there is several here, in the order of its rows; every table was
checked against diffusers' conversion of whole checkpoints (tests/test_layouts.py)."""

QKV = "attn.to_q attn.to_k attn.to_v"
ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

SD3 = {
    "": {
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    "joint_blocks = transformer_blocks": {
        "x_block.attn.qkv": QKV,
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.qkv": ADDED,
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    },
}
BOTH_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BOTH_FLUX_ATTENTION = {
    "img_attn.qkv": QKV,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ADDED,
    "txt_attn.proj": "attn.to_add_out",
}
FLUX = {
    "": BOTH_FLUX
    | {
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    },
    "double_blocks = transformer_blocks": BOTH_FLUX_ATTENTION
    | {
        "img_mod.lin": "norm1.linear",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mod.lin": "norm1_context.linear",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "processor.qkv_lora1": QKV,  # these four, and the two below, are XLabs'
        "processor.proj_lora1": "attn.to_out.0",
        "processor.qkv_lora2": ADDED,
        "processor.proj_lora2": "attn.to_add_out",
    },
    "single_blocks = single_transformer_blocks": {
        "linear1": QKV + " proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "processor.qkv_lora": QKV,
        "processor.proj_lora": "proj_out",
    },
}
FLUX2 = {
    "": BOTH_FLUX
    | {
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    "double_blocks = transformer_blocks": BOTH_FLUX_ATTENTION
    | {
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    },
    "single_blocks = single_transformer_blocks": {
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out",
    },
}
ZIMAGE_ATTENTION = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
}
ZIMAGE = {
    "": {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    "layers = layers": ZIMAGE_ATTENTION,
    "noise_refiner = noise_refiner": ZIMAGE_ATTENTION,
    "context_refiner = context_refiner": ZIMAGE_ATTENTION,
}
TABLES = {  # Qwen-Image's names are diffusers'; of SANA nobody writes others
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ZImageTransformer2DModel": ZIMAGE,
}


def names(network):
    """{name of a linear layer in the authors' code: [its layers in `network`]}."""
    ours, found = dict(network.named_modules()), {}
    kinds = [kind.__name__ for kind in type(network).__mro__]  # --shard makes a class of its own of it
    tables = next((TABLES[kind] for kind in kinds if kind in TABLES), {})
    for blocks, table in tables.items():
        their_front, _, our_front = blocks.partition(" = ")
        fronts = [("", "")]
        if blocks:
            fronts = [(f"{their_front}.{i}.", f"{our_front}.{i}.") for i in range(len(ours[our_front]))]
        for their_block, our_block in fronts:
            for name, layers in table.items():
                layers = [our_block + n for n in layers.split()]
                if all(n in ours for n in layers):  # a last block, or a model without guidance, has fewer
                    found[their_block + name] = layers
    return found


def parts(B, layers, network):
    """A layer's B (out, r) in the authors' code as those of its layers in `network`."""
    from diffusers.models.normalization import AdaLayerNormContinuous

    sizes = [network.get_submodule(n).out_features for n in layers]
    if B.shape[:1] != (sum(sizes),):
        return [B] * len(layers)  # of another model: the reader names it
    if isinstance(network.get_submodule(layers[0].rpartition(".")[0]), AdaLayerNormContinuous):
        return [B.roll(len(B) // 2, 0)]  # theirs is (shift, scale), diffusers' (scale, shift)
    return B.split(sizes)
