import json
import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers share two cores (pytest -n 2); read when torch is imported
import runpy
import signal
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
TASKS = ("compose", "ocr", "scene")


def run(script, *argv):
    """Run a script of the project in this process; returns its globals. A user's error arrives as SystemExit with its one line."""
    old = sys.argv, os.getcwd(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = [os.path.join(ROOT, script), *map(str, argv)]
    os.chdir(ROOT)
    try:
        return runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        import flow_sde

        for lock in flow_sde.LOCKS:
            lock.release(force=True)  # as the end of a process does
        sys.argv = old[0]
        os.chdir(old[1])
        signal.signal(signal.SIGINT, old[2][0]), signal.signal(signal.SIGTERM, old[2][1])


def refused(script, *argv):
    """The one line with which a script refuses its input."""
    with pytest.raises(SystemExit) as caught:
        run(script, *argv)
    message = str(caught.value.code)
    assert "\n" not in message and message.startswith(script), message
    return message


def sigma_schedule(num_steps, shift=3.0):
    """The num_steps + 1 sigmas that diffusers' scheduler visits, as floats."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.tolist()


def lora_of(path, base=os.path.join(ROOT, "toy/base")):
    """A LoRA for that base as {module: (A, B, alpha)}."""
    from flow_sde import read_lora, skeleton

    return read_lora(str(path), *skeleton(str(base)))


def random_lora(folder, seed, rank=4, alpha=8, size=0.2):
    """A LoRA for the toy with random weights, saved in `folder`."""
    from flow_sde import SD3, save_lora

    model = SD3(os.path.join(ROOT, "toy/base"))
    model.new_adapter("x", rank, alpha, seed)
    gen = torch.Generator().manual_seed(seed)
    save_lora(
        {
            n: (A, torch.randn(B.shape, generator=gen) * size / rank, al)
            for n, (A, B, al) in model.lora("x").items()
        },
        folder,
    )
    return str(folder)


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """Three random teachers, an anchor and a student: {name: folder}."""
    root = tmp_path_factory.mktemp("loras")
    return {
        name: random_lora(root / name, seed) for seed, name in enumerate((*TASKS, "anchor", "student"), 1)
    }


def few(prompts, n, folder):
    """The first n prompts of each toy task's split in files of their own: ["task=file", ...]."""
    specs = []
    for task in TASKS:
        path = os.path.join(folder, f"{task}_{prompts}.txt")
        with open(path, "w") as f:
            f.writelines(open(os.path.join(ROOT, f"toy/prompts/{task}_{prompts}.txt")).readlines()[:n])
        specs.append(f"{task}={path}")
    return specs


def table(folder):
    """Flags of distill.py for a small table at the end."""
    return dict(
        eval_prompts=few("test", 3, str(folder)), reward=[f"toy.{name}" for name in (*TASKS, "quality")]
    )


def distill(loras, out, **changes):
    """Run distill.py for a few quick updates on the random teachers, without a table; keyword arguments
    change its flags (None: not given)."""
    flags = {
        "teachers": [f"{t}={loras[t]}" for t in TASKS],
        "init": loras["student"],
        "anchor": loras["anchor"],
        "batch_size": 6,
        "micro_batch_size": 6,
        "num_steps": 4,
        "steps": 1,
        "save_every": 100,
        "eval_every": 100,
        "eval_num_steps": 2,
        "eval_prompts": [],
        "reward": [],
        "out": out,
    } | changes
    argv = []
    for flag, value in flags.items():
        if value is not None:
            argv += ["--" + flag.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    return run("distill.py", *argv)


def read_log(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


def hub_pipeline(folder, heads=2, head_dim=16, layers=3, dtype=torch.float16):
    """A random StableDiffusion3Pipeline in the folder layout of the hub's SD3.5-Medium: its classes and configuration keys (dual attention in
    the first blocks, RMS norm of queries and keys, a 16-channel VAE that shrinks 8 times), half-precision weights, CLIP tokenizers
    as vocab.json and merges.txt, T5 in shards. Only the sizes are small."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(0)
    width, signs, ends = (
        heads * head_dim,
        [chr(c) for c in range(33, 127)],
        ["<|startoftext|>", "<|endoftext|>"],
    )
    vocab = {t: i for i, t in enumerate([*signs, *(s + "</w>" for s in signs), *ends])}
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=size,
                intermediate_size=2 * size,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=size,
                bos_token_id=vocab[ends[0]],
                eos_token_id=vocab[ends[1]],
                pad_token_id=1,
            )
        )
        for size in (24, 40)
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((s, -4.0) for s in signs)]
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    tokenizers = [
        CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77) for pad in (ends[1], "!")
    ]
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.decoder.conv_out.weight.data *= 10  # pictures with some contrast
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512),
    )
    pipe.to(dtype).save_pretrained(folder)
    t5.to(dtype).save_pretrained(os.path.join(folder, "text_encoder_3"), max_shard_size="60KB")
    os.remove(os.path.join(folder, "text_encoder_3/model.safetensors"))
    for i in ("", "_2"):
        place = os.path.join(folder, "tokenizer" + i)
        os.remove(os.path.join(place, "tokenizer.json"))
        with open(os.path.join(place, "vocab.json"), "w") as f:
            json.dump(vocab, f)
        with open(os.path.join(place, "merges.txt"), "w") as f:
            f.write("#version: 0.2\n")
    return str(folder)


def hub_teacher(base, folder, seed, layout="peft", rank=32, alpha=64):
    """A random teacher of a hub_pipeline in one of the layouts people share: PEFT's, written by peft; diffusers', written by diffusers; or a
    full fine-tune, a whole transformer."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    if layout == "full":
        for p in transformer.parameters():
            p.data += 0.02 * torch.randn_like(p)
        transformer.half().save_pretrained(folder)
        return str(folder)
    projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=["attn." + p for p in projections],
    )
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
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=config.to_dict(),
        )
    return str(folder)


def clip_tokenizer(folder):
    """CLIP's tokenizer, with printable characters for a vocabulary."""
    from transformers import CLIPTokenizer

    signs, ends = [chr(c) for c in range(33, 127)], ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate([*signs, *(s + "</w>" for s in signs), *ends])},
        merges=[],
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def small_clip(folder, **text):
    """A random CLIPModel with its tokenizer in a folder, 28 x 28 pixels."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = len(clip_tokenizer(folder))
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=1,
                max_position_embeddings=77,
                **text,
            ),
            vision_config=dict(
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                **text,
            ),
            projection_dim=24,
            initializer_factor=4.0,
        )
    ).save_pretrained(folder)
    return str(folder)
