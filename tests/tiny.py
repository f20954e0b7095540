"""Tiny random pipelines of every family, in the hub's folder layout, made offline: the families' own classes
and settings, small sizes. No weight that is zero at first stays so: every path must matter."""

import os

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
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip(kind, width):
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate([*SIGNS, *(s + "</w>" for s in SIGNS), *ends])}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=vocab[ends[0]],
        eos_token_id=vocab[ends[1]],
        pad_token_id=1,
    )
    return kind(config), CLIPTokenizer(vocab=vocab, merges=[], pad_token=ends[1], model_max_length=77)


def t5(width):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((s, -4.0) for s in SIGNS)]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def chat_tokenizer():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {t: i for i, t in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template, tokenizer.padding_side = CHAT, "right"
    return tokenizer


def qwen3(kind, layers, words):
    return kind(
        Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            head_dim=8,
            **HEADS,
            vocab_size=words,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def vae(kind, **settings):
    blocks = dict(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    made = kind(**blocks | settings)
    made.decoder.conv_out.weight.data *= 10  # pictures with some contrast
    return made


def euler(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


def dynamic(**settings):
    return euler(use_dynamic_shifting=True, base_image_seq_len=256, **settings)


def sd3():
    (clip1, words1), (clip2, words2) = (clip(CLIPTextModelWithProjection, width) for width in (24, 40))
    encoder, words3 = t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=euler(shift=3.0),
        text_encoder=clip1,
        tokenizer=words1,
        text_encoder_2=clip2,
        tokenizer_2=words2,
        text_encoder_3=encoder,
        tokenizer_3=words3,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    )


def flux(dev=True):
    (clip1, words1), (encoder, words2) = clip(CLIPTextModel, 32), t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=dev,
    )
    scheduler = dynamic(shift=3.0, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096)
    return FluxPipeline(
        transformer=transformer,
        scheduler=scheduler if dev else euler(shift=1.0),
        text_encoder=clip1,
        tokenizer=words1,
        text_encoder_2=encoder,
        tokenizer_2=words2,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    )


def schnell():
    return flux(dev=False)


def flux2_parts(width, dev):
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=dev,
    )
    decoder = vae(AutoencoderKLFlux2, latent_channels=8)
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2)
    scheduler = dynamic(shift=3.0, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096)
    return dict(transformer=transformer, vae=decoder, scheduler=scheduler)


def klein():
    words = chat_tokenizer()
    return Flux2KleinPipeline(
        text_encoder=qwen3(Qwen3ForCausalLM, 28, len(words)), tokenizer=words, **flux2_parts(48, dev=False)
    )


def flux2():
    """With a tokenizer in place of the hub's PixtralProcessor, which needs torchvision."""
    words = chat_tokenizer()
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=dict(
                model_type="mistral",
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=31,
                head_dim=8,
                **HEADS,
                vocab_size=len(words),
            ),
            vision_config=dict(
                model_type="pixtral",
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                head_dim=8,
                image_size=28,
                patch_size=14,
            ),
        )
    )
    return Flux2Pipeline(text_encoder=encoder, tokenizer=words, **flux2_parts(48, dev=True))


def qwen():
    words = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                **HEADS,
                vocab_size=len(words),
                rope_theta=1e6,
                rope_scaling=dict(mrope_section=[1, 1, 2], rope_type="default", type="default"),
            ),
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16
            ),
            hidden_size=16,
            vocab_size=len(words),
        )
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(16)],
        latents_std=[1 + 0.1 * i for i in range(16)],
    )
    scheduler = dynamic(shift=1.0, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return QwenImagePipeline(
        transformer=transformer, vae=decoder, text_encoder=encoder, tokenizer=words, scheduler=scheduler
    )


def zimage():
    words = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=euler(shift=3.0),
        text_encoder=qwen3(Qwen3Model, 3, len(words)),
        tokenizer=words,
        vae=vae(AutoencoderKL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
    )


def sana():
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *SIGNS, "\n"]
    words = GemmaTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[])
    encoder = Gemma2Model(
        Gemma2Config(
            head_dim=8,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            **HEADS,
            vocab_size=len(words),
            attn_implementation="eager",
        )
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=32,
    )
    blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    decoder = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=[1] * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return SanaPipeline(
        transformer=transformer, vae=decoder, text_encoder=encoder, tokenizer=words, scheduler=scheduler
    )


PIPELINES = dict(
    sd3=sd3, flux=flux, schnell=schnell, klein=klein, flux2=flux2, qwen=qwen, zimage=zimage, sana=sana
)


def build(name, folder):
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    pipe.save_pretrained(os.path.join(folder, name))
    return os.path.join(folder, name)
