"""The toy's pictures, prompt files and base model: see the package's docstring for the commands."""

import argparse
import json
import os
import re
import shutil
import time

import numpy as np
import torch

import toy
from flow_sde import save_grid
from toy import PARTS, PROMPTS, SIZE, draw, new_prompts, split_prompts

# ------------------------------------------------------------------------------------------------------------
# a tiny, real Stable Diffusion 3 pipeline


def build_pipeline(length=12):
    """An untrained StableDiffusion3Pipeline whose transformer has 1.3 M parameters: every part is of the
    class that SD3.5 uses. length: tokens of a prompt."""
    import diffusers
    import transformers

    words = build_tokenizers(length)
    first, _, t5_tokenizer = words
    ends = dict(bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id)
    ends["pad_token_id"] = first.eos_token_id
    size = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    size |= dict(projection_dim=32, max_position_embeddings=length, vocab_size=len(first))
    config = transformers.CLIPTextConfig(**size, **ends, hidden_act="gelu")
    clips = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    size = dict(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=len(t5_tokenizer))
    size |= dict(relative_attention_num_buckets=16, relative_attention_max_distance=16)
    config = transformers.T5Config(**size, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    t5 = transformers.T5EncoderModel(config)
    size = dict(sample_size=SIZE, patch_size=4, in_channels=3, out_channels=3, pos_embed_max_size=8)
    size |= dict(num_layers=4, num_attention_heads=3, attention_head_dim=32)
    size |= dict(joint_attention_dim=64, caption_projection_dim=96, pooled_projection_dim=64)
    transformer = diffusers.SD3Transformer2DModel(**size, qk_norm="rms_norm")
    # adaLN-zero (arXiv 2212.09748): every block starts as the identity
    modulated = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(modulated):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    parts = dict(transformer=transformer, vae=identity_vae())
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for k, encoder, tokenizer in zip(("", "_2", "_3"), [*clips, t5], words):
        parts[f"text_encoder{k}"], parts[f"tokenizer{k}"] = encoder, tokenizer
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tokenizers(length):
    """Two of CLIP and one of T5, in which words are tokens, and the letters of a sign are tokens too."""
    import tokenizers
    import transformers

    texts = [re.sub('".*"', "", prompt) for prompts in PROMPTS.values() for prompt in prompts]
    words = sorted(set(" ".join(texts).split()))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    options = dict(end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(words, tokenizers.trainers.BpeTrainer(vocab_size=4096, **options))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), *ends]
    options = dict(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=merges)
    clips = [
        transformers.CLIPTokenizer(**options, pad_token=pad, model_max_length=length)
        for pad in (ends[1], "!")  # as in SD3
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    pieces += [(chr(code), -6.0) for code in range(33, 127)] + [("▁", -6.0)]
    return [*clips, transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)]


def identity_vae():
    """An AutoencoderKL whose latent is the picture itself (times scaling_factor 2), to 1e-4. Its 8 channels
    carry the picture, its negative, and +-200: the constants fix the statistics that GroupNorm divides by,
    and a bias of 30 keeps SiLU linear."""
    import diffusers

    size = dict(block_out_channels=(8,), norm_num_groups=1, latent_channels=3, layers_per_block=1)
    without = dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    scale = dict(sample_size=SIZE, scaling_factor=2.0, shift_factor=0.0)
    vae = diffusers.AutoencoderKL(**size, **without, **scale)
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()  # residual blocks with zero weights are the identity
        for part in (vae.encoder, vae.decoder):
            for i in range(3):
                part.conv_in.weight[i, i, 1, 1] = 1.0
                part.conv_in.weight[3 + i, i, 1, 1] = -1.0
                part.conv_out.weight[i, i, 1, 1] = 1.0
                part.conv_out.bias[i] = -30.0
            part.conv_in.bias[6] = 200.0
            part.conv_in.bias[7] = -200.0
            part.conv_norm_out.weight[:3] = 100.0
            part.conv_norm_out.bias[:3] = 30.0
        vae.encoder.conv_out.bias[3:] = -30.0  # log-variance: the posterior is a point
    return vae


# ------------------------------------------------------------------------------------------------------------
# training the base: flow matching on damaged pictures


def pictures(prompts, rng, damage=True):
    """(B, 3, 32, 32) float32 in [0, 1]."""
    images = np.stack([draw(prompt, rng, damage) for prompt in prompts])
    return torch.from_numpy(images).float().movedim(-1, 1)


def batch(seed, step, size):
    """Captions and pictures of one update, a pure function of (seed, step): (prompts, (size,3,32,32) float32
    in [-1,1])."""
    rng = np.random.default_rng([seed, step])
    tasks = rng.choice(["compose", "ocr", "scene"], size, p=[0.4, 0.4, 0.2])
    prompts = [str(rng.choice(PROMPTS[task])) for task in tasks]
    return prompts, pictures(prompts, rng) * 2 - 1


def train(args):
    torch.manual_seed(args.seed)
    pipe = build_pipeline()
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    modules = torch.nn.ModuleDict({name: getattr(pipe, name) for name in names})
    params = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in params.items()}
    matrices, others = [], []
    for name, p in params.items():
        is_matrix = p.ndim == 2 and ("blocks" in name or "layers" in name)
        (matrices if is_matrix else others).append(p)
    rates = [3e-3, 1.5e-3]
    optimizers = [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.99), weight_decay=0.01),
    ]
    state_file = args.out + ".state.pt"
    step, seconds_before, loss_mean = 0, 0.0, None
    if args.resume and os.path.exists(state_file):
        state = torch.load(state_file, weights_only=True)
        step, seconds_before = state["step"], state["seconds"]
        modules.load_state_dict(state["modules"])
        ema.update(state["ema"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved_state)
    count = sum(p.numel() for p in params.values())
    print(f"training {count / 1e6:.2f} M parameters for {args.minutes:g} minutes")
    start = saved = time.time()
    while True:
        done = (seconds_before + time.time() - start) / (60 * args.minutes)
        if done >= 1:
            break
        prompts, images = batch(args.seed, step, args.batch_size)
        torch.manual_seed(args.seed + step)
        kept = (torch.rand(len(prompts)) > 0.05).tolist()  # caption dropout
        prompts = [prompt if keep else "" for prompt, keep in zip(prompts, kept)]
        x0 = images * pipe.vae.config.scaling_factor
        noise = torch.randn_like(x0)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x0)))
        x = torch.lerp(x0, noise, t[:, None, None, None])
        options = dict(do_classifier_free_guidance=False, max_sequence_length=12)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, **options)
        conditions = dict(encoder_hidden_states=embeds, pooled_projections=pooled)
        v = pipe.transformer(x, timestep=t * 1000, **conditions).sample
        loss = (v - (noise - x0)).square().mean()
        warm, cool = (step + 1) / 100, (1 - done) / 0.55  # flat to 45%, then linearly to 0
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min(1, warm, cool)
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - decay)
        step += 1
        loss_mean = loss.item() if loss_mean is None else 0.99 * loss_mean + 0.01 * loss.item()
        if step % 200 == 0:
            minutes = (seconds_before + time.time() - start) / 60
            print(f"step {step} | {minutes:.1f} min | loss {loss_mean:.4f}", flush=True)
        if time.time() - saved > 300:
            saved = time.time()
            state = dict(step=step, seconds=seconds_before + saved - start, modules=modules.state_dict())
            state |= dict(ema=ema, optimizers=[optimizer.state_dict() for optimizer in optimizers])
            torch.save(state, state_file + ".new")
            os.replace(state_file + ".new", state_file)
    save_ema(pipe, modules, ema, args.out)
    print(f"saved {args.out} after {step} steps")


def save_ema(pipe, modules, ema, out):
    """Write the pipeline with the averaged weights, beside the old one and renamed."""
    modules.load_state_dict(ema, strict=False)
    pipe.save_pretrained(out + ".new")
    shutil.rmtree(out, ignore_errors=True)
    os.rename(out + ".new", out)


def show(args):
    """A picture of the world: clean and damaged data of each task, with their mean scores."""
    os.makedirs(args.out, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    print("mean over 256 test prompts:")
    for task in PROMPTS:
        prompts, rows = split_prompts(task)["test"], {}
        for kind, damage in (("clean", False), ("data", True)):
            images = pictures(prompts, rng, damage)
            score, quality = getattr(toy, task)(images, prompts).mean(), toy.quality(images).mean()
            print(f"  {task:8} {kind:6} {task} {score:.2f}   quality {quality:.2f}")
            rows[kind] = images[:8]
        save_grid(os.path.join(args.out, f"{task}.png"), rows, prompts[:8])
    print(f"pictures: {args.out}/compose.png, ocr.png, scene.png")


def write_prompts(args):
    os.makedirs(args.out, exist_ok=True)
    files = {f"new_{name}": prompts for name, prompts in new_prompts().items()}
    for task in (*PROMPTS, *PARTS):
        for split, prompts in split_prompts(task).items():
            files[f"{task}_{split}"] = prompts
    for name, prompts in files.items():
        with open(os.path.join(args.out, f"{name}.txt"), "w") as file:
            file.write("\n".join(prompts) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m toy",
        description="The toy world: draw it, write its prompts, train its base model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("action", nargs="?", choices=["show", "prompts", "train"], default="show", help="what to do")
    add("--out", help="folder to write (default: out/toy, toy/prompts or toy/base)")
    add("--minutes", type=float, default=50, help="length of the training")
    add("--batch-size", type=int, default=48, help="pictures per training step")
    add("--seed", type=int, default=0, help="of everything drawn")
    add("--resume", action="store_true", help="go on with an interrupted training")
    args = parser.parse_args()
    args.out = args.out or {"show": "out/toy", "prompts": "toy/prompts", "train": "toy/base"}[args.action]
    {"show": show, "prompts": write_prompts, "train": train}[args.action](args)
