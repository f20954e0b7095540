"""Tiny random pipelines of every family, in the hub's folder layout, made offline: the families' own classes
and settings, small sizes. No weight that is zero at first stays so: every path must matter."""

import json
import os
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIGNS = [chr(c) for c in range(33, 127)]
HEADS = dict(attention_head_dim=16, num_attention_heads=2)  # of a transformer
TEXT = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# -- text encoders with their tokenizers -------------------------------------------------------------------


def clip(kind, width, pad="<|endoftext|>"):
    pieces = [*SIGNS, *(sign + "</w>" for sign in SIGNS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    ends = dict(bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=1)
    size = dict(hidden_size=width, projection_dim=width, intermediate_size=48)
    config = CLIPTextConfig(vocab_size=len(vocab), num_hidden_layers=2, num_attention_heads=4, **size, **ends)
    return kind(config), CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def t5(width):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((sign, -4.0) for sign in SIGNS)]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def chat_tokenizer():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    ends = dict(pad_token=special[0], eos_token=special[2], extra_special_tokens=[special[1]])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **ends)
    tokenizer.chat_template, tokenizer.padding_side = CHAT, "right"
    return tokenizer


def qwen3(kind, layers, words):
    size = dict(num_hidden_layers=layers, head_dim=8, vocab_size=words, max_position_embeddings=1024)
    return kind(Qwen3Config(**TEXT, **size, tie_word_embeddings=True))


# -- the other parts ---------------------------------------------------------------------------------------


def vae(kind, **settings):
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    blocks = dict(block_out_channels=(8, 8, 8, 8), down_block_types=down, up_block_types=up)
    blocks |= dict(layers_per_block=1, norm_num_groups=4, sample_size=64)
    made = kind(**blocks, use_quant_conv=False, use_post_quant_conv=False, **settings)
    made.decoder.conv_out.weight.data *= 10  # pictures with some contrast
    return made


def euler(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


def dynamic(**settings):
    return euler(use_dynamic_shifting=True, base_image_seq_len=256, base_shift=0.5, **settings)


# -- the families ------------------------------------------------------------------------------------------


def sd3(heads=2, head_dim=16, layers=2):
    encoder, tokenizer = clip(CLIPTextModelWithProjection, 24)
    encoder_2, tokenizer_2 = clip(CLIPTextModelWithProjection, 40, pad="!")
    encoder_3, tokenizer_3 = t5(64)
    size = dict(num_layers=layers, attention_head_dim=head_dim, num_attention_heads=heads)
    size |= dict(joint_attention_dim=64, caption_projection_dim=heads * head_dim, pooled_projection_dim=64)
    size |= dict(sample_size=64, patch_size=2, in_channels=16, out_channels=16, pos_embed_max_size=64)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**size, dual_attention_layers=(0,), qk_norm="rms_norm"),
        scheduler=euler(shift=3.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    )


def flux(dev=True):
    (clip_encoder, clip_tokenizer), (encoder, tokenizer) = clip(CLIPTextModel, 32), t5(32)
    size = dict(**HEADS, patch_size=1, in_channels=64, num_layers=1, num_single_layers=1)
    size |= dict(joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8])
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**size, guidance_embeds=dev),
        scheduler=dynamic(shift=3.0, max_shift=1.15, max_image_seq_len=4096) if dev else euler(shift=1.0),
        text_encoder=clip_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    )


def schnell():
    return flux(dev=False)


def flux2_parts(dev):
    size = dict(**HEADS, patch_size=1, in_channels=32, num_layers=1, num_single_layers=1)
    size |= dict(joint_attention_dim=48, axes_dims_rope=[4, 4, 4, 4])
    decoder = vae(AutoencoderKLFlux2, latent_channels=8)
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2)
    scheduler = dynamic(shift=3.0, max_shift=1.15, max_image_seq_len=4096)
    transformer = Flux2Transformer2DModel(**size, guidance_embeds=dev)
    return dict(transformer=transformer, vae=decoder, scheduler=scheduler)


def klein():
    words = chat_tokenizer()
    encoder = qwen3(Qwen3ForCausalLM, 28, len(words))  # as deep as the layers that the pipeline reads
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=words, **flux2_parts(dev=False))


def flux2():
    """With a tokenizer in place of the hub's PixtralProcessor, which needs torchvision."""
    words = chat_tokenizer()
    text = dict(model_type="mistral", **TEXT, num_hidden_layers=31, head_dim=8, vocab_size=len(words))
    vision = dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, head_dim=8, image_size=28, patch_size=14)
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(text_encoder=encoder, tokenizer=words, **flux2_parts(dev=True))


def qwen():
    words = chat_tokenizer()
    size = dict(**HEADS, patch_size=2, in_channels=64, out_channels=16, num_layers=2)
    transformer = QwenImageTransformer2DModel(**size, joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    rope = dict(mrope_section=[1, 1, 2], rope_type="default", type="default")
    text = dict(**TEXT, num_hidden_layers=2, vocab_size=len(words), rope_theta=1e6, rope_scaling=rope)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, hidden_size=16, vocab_size=len(words))
    size = dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    mean, std = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
    decoder = AutoencoderKLQwenImage(
        **size, temperal_downsample=[False, True, True], latents_mean=mean, latents_std=std
    )
    return QwenImagePipeline(
        transformer=transformer,
        vae=decoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=words,
        scheduler=dynamic(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
    )


def zimage():
    words = chat_tokenizer()
    size = dict(in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    size |= dict(cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64])
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**size),
        scheduler=euler(shift=3.0),
        text_encoder=qwen3(Qwen3Model, 3, len(words)),
        tokenizer=words,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    )


def sana():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *SIGNS, "\n"]
    words = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    text = TEXT | dict(hidden_size=8, head_dim=8, num_hidden_layers=2, vocab_size=len(words))
    size = dict(patch_size=1, in_channels=8, out_channels=8, num_layers=2, sample_size=32)
    size |= dict(num_attention_heads=2, attention_head_dim=8, caption_channels=8)
    size |= dict(num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16)
    coder = {}
    for half, layers in (("encoder", (1,) * 6), ("decoder", [1] * 6)):
        coder[f"{half}_block_types"] = ("ResBlock",) * 5 + ("EfficientViTBlock",)
        coder[f"{half}_block_out_channels"] = (8,) * 6
        coder[f"{half}_qkv_multiscales"] = ((),) * 5 + ((5,),)
        coder[f"{half}_layers_per_block"] = layers
    coder |= dict(in_channels=3, latent_channels=8, attention_head_dim=2, scaling_factor=0.41407)
    coder |= dict(downsample_block_type="conv", upsample_block_type="interpolate")
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(
        transformer=SanaTransformer2DModel(**size),
        vae=AutoencoderDC(**coder, decoder_norm_types="rms_norm", decoder_act_fns="silu"),
        text_encoder=Gemma2Model(Gemma2Config(**text, attn_implementation="eager")),
        tokenizer=words,
        scheduler=DPMSolverMultistepScheduler(**flow),
    )


FAMILIES = (sd3, flux, schnell, klein, flux2, qwen, zimage, sana)
PIPELINES = {family.__name__: family for family in FAMILIES}


def build(name, folder):
    """A family's pipeline in a folder of its name; returns its path."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    pipe.save_pretrained(os.path.join(folder, name))
    return os.path.join(folder, name)


# -- as people upload them: SD3.5-Medium and its teachers --------------------------------------------------


def hub_pipeline(folder, dtype=torch.float16, **size):
    """SD3 as the hub has 3.5-Medium: weights in half precision, CLIP's tokenizers as vocab.json and
    merges.txt, T5 in three shards."""
    torch.manual_seed(0)
    pipe = sd3(**size)
    pipe.to(dtype).save_pretrained(folder)
    encoder = Path(folder, "text_encoder_3")
    pipe.text_encoder_3.save_pretrained(encoder, max_shard_size="40KB")
    (encoder / "model.safetensors").unlink()
    for part in ("tokenizer", "tokenizer_2"):
        vocab = getattr(pipe, part).get_vocab()
        Path(folder, part, "tokenizer.json").unlink()
        Path(folder, part, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, part, "merges.txt").write_text("#version: 0.2\n")
    return str(folder)


def hub_teacher(base, folder, seed, layout="peft", rank=32, alpha=64):
    """A random teacher of a hub_pipeline in one of the layouts people share: PEFT's, written by peft;
    diffusers', written by diffusers; or a full fine-tune, a whole transformer."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    if layout == "full":
        for p in transformer.parameters():
            p.data += 0.02 * torch.randn_like(p)
        transformer.half().save_pretrained(folder)
        return str(folder)
    projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    layers = ["attn." + name for name in projections]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
    if layout == "peft":
        model = get_peft_model(transformer, config)
    else:
        transformer.add_adapter(config)
        model = transformer
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    if layout == "peft":
        model.save_pretrained(folder)
    else:
        lora = dict(transformer_lora_layers=get_peft_model_state_dict(model))
        lora["transformer_lora_adapter_metadata"] = config.to_dict()
        StableDiffusion3Pipeline.save_lora_weights(folder, **lora)
    return str(folder)
