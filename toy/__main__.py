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
from toy import PROMPTS, SIZE, all_prompts, draw, new_prompts, split_prompts

# ----------------------------------------------------------------------------------------------------------------------
# a tiny, real Stable Diffusion 3 pipeline


def build_pipeline(length=12):
    """An untrained StableDiffusion3Pipeline of 1.3 M parameters: every part is of the class SD3.5 uses, loadable with from_pretrained."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    # Words are tokens; the letters of a sign are tokens too.
    words = sorted(
        {
            w
            for task in ("compose", "ocr", "scene")
            for p in all_prompts(task)
            for w in re.sub('".*"', "", p).split()
        }
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=4096, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {
        t: i
        for i, t in enumerate(
            dict.fromkeys(bytes_ + [b + "</w>" for b in bytes_] + ["".join(m) for m in merges] + ends)
        )
    }
    clip_tokenizers = [
        CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=length)
        for pad in (ends[1], "!")
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + w, -2.0) for w in words]
    pieces += [(chr(c), -6.0) for c in range(33, 127)] + [("▁", -6.0)]
    t5_tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)

    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=32,
                max_position_embeddings=length,
                hidden_act="gelu",
                bos_token_id=vocab[ends[0]],
                eos_token_id=vocab[ends[1]],
                pad_token_id=vocab[ends[1]],
            )
        )
        for _ in range(2)
    ]
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for (
        name,
        module,
    ) in transformer.named_modules():  # adaLN-zero (arXiv 2212.09748): every block starts as the identity
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=identity_vae(),
        text_encoder=clips[0],
        tokenizer=clip_tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def identity_vae():
    """An AutoencoderKL whose latent is the picture itself (times scaling_factor 2), to 1e-4. Its 8 channels carry the picture,
    its negative, and +-200: the constants fix the statistics that GroupNorm divides by, and a bias of 30 keeps SiLU linear."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=1,
        latent_channels=3,
        layers_per_block=1,
        sample_size=SIZE,
        scaling_factor=2.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()  # residual blocks with zero weights are the identity
        for part in (vae.encoder, vae.decoder):
            for i in range(3):
                part.conv_in.weight[i, i, 1, 1], part.conv_in.weight[3 + i, i, 1, 1] = 1.0, -1.0
                part.conv_out.weight[i, i, 1, 1], part.conv_out.bias[i] = 1.0, -30.0
            part.conv_in.bias[6], part.conv_in.bias[7] = 200.0, -200.0
            part.conv_norm_out.weight[:3], part.conv_norm_out.bias[:3] = 100.0, 30.0
        vae.encoder.conv_out.bias[3:] = -30.0  # log-variance: the posterior is a point
    return vae


# ----------------------------------------------------------------------------------------------------------------------
# training the base: flow matching on damaged pictures


def batch(seed, step, size):
    """Captions and pictures of one update, a pure function of (seed, step): (prompts, (size,3,32,32) float32 in [-1,1])."""
    rng = np.random.default_rng([seed, step])
    tasks = rng.choice(["compose", "ocr", "scene"], size, p=[0.4, 0.4, 0.2])
    prompts = [str(rng.choice(PROMPTS[t])) for t in tasks]
    images = np.stack([draw(p, rng) for p in prompts])
    return prompts, torch.from_numpy(images).float().movedim(-1, 1) * 2 - 1


def train(args):
    torch.manual_seed(args.seed)
    pipe = build_pipeline()
    modules = torch.nn.ModuleDict(
        {k: getattr(pipe, k) for k in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
    )
    params = {k: p for k, p in modules.named_parameters() if p.requires_grad}
    ema = {k: p.detach().clone() for k, p in params.items()}
    matrix = lambda k, p: p.ndim == 2 and ("blocks" in k or "layers" in k)
    optimizers = [
        torch.optim.Muon(
            [p for k, p in params.items() if matrix(k, p)],
            lr=3e-3,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for k, p in params.items() if not matrix(k, p)],
            lr=1.5e-3,
            betas=(0.9, 0.99),
            weight_decay=0.01,
        ),
    ]
    rates, state_file, step, before, loss_mean = [3e-3, 1.5e-3], args.out + ".state.pt", 0, 0.0, None
    if args.resume and os.path.exists(state_file):
        state = torch.load(state_file, weights_only=True)
        step, before = state["step"], state["seconds"]
        modules.load_state_dict(state["modules"]), ema.update(state["ema"])
        for o, s in zip(optimizers, state["optimizers"]):
            o.load_state_dict(s)
    print(
        f"training {sum(map(torch.numel, params.values())) / 1e6:.2f} M parameters for {args.minutes:g} minutes"
    )
    start = saved = time.time()
    while (done := (before + time.time() - start) / (60 * args.minutes)) < 1:
        prompts, images = batch(args.seed, step, args.batch_size)
        torch.manual_seed(args.seed + step)
        prompts = [
            p if u > 0.05 else "" for p, u in zip(prompts, torch.rand(len(prompts)).tolist())
        ]  # caption dropout
        x0 = images * pipe.vae.config.scaling_factor
        noise = torch.randn_like(x0)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x0)))
        x = torch.lerp(x0, noise, t[:, None, None, None])
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=12
        )
        v = pipe.transformer(
            x, timestep=t * 1000, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
        loss = (v - (noise - x0)).square().mean()
        for o, rate in zip(optimizers, rates):
            o.param_groups[0]["lr"] = rate * min(
                1, (step + 1) / 100, (1 - done) / 0.55
            )  # flat to 45%, then linearly to 0
            o.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for o in optimizers:
            o.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.values()), list(params.values()), 1 - min(0.998, (step + 1) / (step + 10))
            )
        step += 1
        loss_mean = loss.item() if loss_mean is None else 0.99 * loss_mean + 0.01 * loss.item()
        if step % 200 == 0:
            print(
                f"step {step} | {(before + time.time() - start) / 60:.1f} min | loss {loss_mean:.4f}",
                flush=True,
            )
        if time.time() - saved > 300:
            saved = time.time()
            torch.save(
                {
                    "step": step,
                    "seconds": before + saved - start,
                    "modules": modules.state_dict(),
                    "ema": ema,
                    "optimizers": [o.state_dict() for o in optimizers],
                },
                state_file + ".new",
            )
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
    rng, rows = np.random.default_rng(args.seed), {}
    print("mean over 256 test prompts:")
    for task in PROMPTS:
        prompts = split_prompts(task)["test"]
        for kind, damage in (("clean", False), ("data", True)):
            images = (
                torch.from_numpy(np.stack([draw(p, rng, damage) for p in prompts])).float().movedim(-1, 1)
            )
            print(
                f"  {task:8} {kind:6} {task} {getattr(toy, task)(images, prompts).mean():.2f}   quality {toy.quality(images).mean():.2f}"
            )
            rows[f"{task} {kind}"] = images[:8]
    for task in PROMPTS:
        file = os.path.join(args.out, f"{task}.png")
        save_grid(
            file,
            {kind: rows[f"{task} {kind}"] for kind in ("clean", "data")},
            split_prompts(task)["test"][:8],
        )
    print(f"pictures: {args.out}/compose.png, ocr.png, scene.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m toy",
        description="The toy world: draw it, write its prompts, train its base model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "action", nargs="?", choices=["show", "prompts", "train"], default="show", help="what to do"
    )
    parser.add_argument("--out", help="folder to write (default: out/toy, toy/prompts or toy/base)")
    parser.add_argument("--minutes", type=float, default=50, help="length of the training")
    parser.add_argument("--batch-size", type=int, default=48, help="pictures per training step")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    args = parser.parse_args()
    args.out = args.out or {"show": "out/toy", "prompts": "toy/prompts", "train": "toy/base"}[args.action]
    if args.action == "train":
        train(args)
    elif args.action == "show":
        show(args)
    else:
        os.makedirs(args.out, exist_ok=True)
        for task in PROMPTS:
            for split, prompts in split_prompts(task).items():
                with open(os.path.join(args.out, f"{task}_{split}.txt"), "w") as f:
                    f.write("\n".join(prompts) + "\n")
        for name, prompts in new_prompts().items():
            with open(os.path.join(args.out, f"new_{name}.txt"), "w") as f:
                f.write("\n".join(prompts) + "\n")
