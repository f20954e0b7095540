"""Pictures from any checkpoint: the base, or the base with a LoRA.

    python sample.py                                                                      # the toy base, a prompt of each task
    python sample.py --lora out/distill/lora --prompt "two red circles and one blue square" --num-images 8
    python sample.py --model stabilityai/stable-diffusion-3.5-medium --lora out/distill/lora --prompt "a red fox"

The sampler is the deterministic one (noise 0), the same as the diffusers pipeline's; --noise-level makes it the flow-SDE.
"""

import argparse
import os

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from flow_sde import SD3, die, generators, load_prompts, parse_args, save_grid, write_json

TOY = dict(model="toy/base", resolution=32, dtype="float32", guidance=1.0, num_steps=10, batch_size=32, prompt=[
    "two red circles and one blue square", 'a yellow sign saying "HAT"', "a red house and two pines on snow at night"])

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id; without it, the embedded toy with settings that fit it")
add("--lora", help="a LoRA in PEFT or diffusers layout")
add("--prompt", nargs="+", metavar="TEXT", help="what to draw")
add("--prompts", metavar="FILE", help="more prompts (.txt or .jsonl)")
add("--num-images", type=int, default=4, help="pictures per prompt")
add("--out", default="out/samples", help="folder for the PNGs, grid.png and samples.json")
add("--merge", metavar="DIR", help="also write a stand-alone diffusers pipeline with the LoRA merged into its weights")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, default=512, help="pixels")
add("--num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--guidance", type=float, default=4.5, help="classifier-free guidance (paper: 4.5)")
add("--sde", choices=["flow", "cps"], default="flow", help="the sampler, if --noise-level is not 0")
add("--noise-level", type=float, default=0.0, help="0: deterministic")
add("--batch-size", type=int, default=4, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], default="float16", help="of the networks (the VAE runs in float32)")
add("--no-t5", action="store_true", help="leave out the T5 text encoder, the largest network of SD3.5-M (long prompts suffer)")
add("--max-sequence-length", type=int, default=256, help="tokens that T5 reads of a prompt (the model's card: 256; Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="keep them in the CPU's memory but while they encode")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

texts = (args.prompt or []) + ([row["prompt"] for row in load_prompts("prompts", args.prompts)] if args.prompts else [])
if not texts:
    die("nothing to draw: give --prompt TEXT or --prompts FILE")
if args.merge and (not args.lora or args.no_t5 or os.path.exists(args.merge)):
    die(f"--merge {args.merge}: " + ("that exists already" if os.path.exists(args.merge) else "needs --lora, and no --no-t5: it is a whole pipeline"))
model = SD3(args.model, getattr(torch, args.dtype), PartialState().device, not args.no_t5, args.offload_text_encoders, max_sequence_length=args.max_sequence_length)
model.latent_shape(args.resolution)
if args.lora:
    model.load_adapter("lora", args.lora)

jobs = [(text, k) for text in texts for k in range(args.num_images)]
images = []
for i in tqdm(range(0, len(jobs), args.batch_size), unit="batch"):
    part = jobs[i:i + args.batch_size]
    images.append(model.generate([text for text, _ in part], generators(args.seed, 0, range(i, i + len(part))), args.num_steps, args.resolution,
                                 "lora" if args.lora else "base", args.guidance, args.noise_level, args.sde).cpu())
images = torch.cat(images)
os.makedirs(args.out, exist_ok=True)
files = [f"{i:05d}.png" for i in range(len(jobs))]
for file, image in zip(files, images):
    Image.fromarray((image.movedim(0, -1).numpy() * 255).round().astype("uint8")).save(os.path.join(args.out, file))
pictures = [{"file": file, "prompt": text, "index": k} for file, (text, k) in zip(files, jobs)]
write_json(os.path.join(args.out, "samples.json"), {"args": vars(args), "pictures": pictures})
columns = images.unflatten(0, (len(texts), args.num_images))[:16]  # one column a prompt
save_grid(os.path.join(args.out, "grid.png"), {f"{k}": columns[:, k] for k in range(min(8, args.num_images))}, texts[:16])
if args.merge:
    model.save_pipeline(args.merge, "lora")
    print(f"stand-alone pipeline: {args.merge}")
print(f"{len(jobs)} pictures, grid.png and samples.json in {args.out}")
