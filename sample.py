"""Pictures from any checkpoint: the base, or the base with a LoRA.

    python sample.py                        # the toy base, a prompt of each task
    python sample.py --lora out/distill/lora --prompt "two red circles and one blue square" --num-images 8
    python sample.py --model stabilityai/stable-diffusion-3.5-medium --lora out/distill/lora --prompt "a fox"
    torchrun --nproc_per_node=8 sample.py --model stabilityai/stable-diffusion-3.5-medium --prompts many.txt

The sampler is the deterministic one (noise 0), the same as the diffusers pipeline's; --noise-level makes it
the flow-SDE. Every batch is written when it is made, and the same command goes on where it was stopped.
"""

import argparse
import os
import re

from tqdm import tqdm

from flow_sde import (
    StopSignal,
    check,
    claim_folder,
    end_processes,
    fingerprint,
    generators,
    load_model,
    load_prompts,
    locate,
    parse_args,
    parse_specs,
    read_json,
    save_grid,
    start_processes,
    write,
    write_json,
)
from rewards import encoded, pil, read_picture

TOY = dict(model="toy/base", resolution=32, dtype="float32", guidance=1.0, num_steps=10, batch_size=32)
EXAMPLES = [
    "two red circles and one blue square",
    'a yellow sign saying "HAT"',
    "a red house and two pines on snow at night",
]  # of the toy

# -- flags ---------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__)
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id; leave it out for the toy and its settings")
add("--lora", help="a LoRA in PEFT or diffusers layout")
add("--prompt", nargs="+", metavar="TEXT", help="what to draw")
add("--prompts", nargs="+", metavar="[TASK=]FILE", help="more prompts; of TASK=FILE only the task's lines")
add("--num-images", type=int, default=4, help="pictures per prompt")
add("--out", default="out/samples", help="folder for the PNGs, grid.png and samples.json")
add("--overwrite", action="store_true", help="replace other pictures in --out")
add("--merge", metavar="DIR", help="also write a stand-alone pipeline with the LoRA in its weights")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add("--sde", choices=["flow", "cps"], default="flow", help="the sampler, if --noise-level is not 0")
add("--noise-level", type=float, default=0.0, help="0: deterministic")
add = parser.add_argument_group("running").add_argument
add("--batch-size", type=int, default=4, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the networks; the VAE's is float32")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (long prompts suffer)")
add("--max-sequence-length", type=int, help="tokens read of a prompt (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="in the CPU's memory but while they encode")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

# -- checks, before anything slow ----------------------------------------------------------------------------
texts = list(args.prompt or ())
for spec in args.prompts or ():
    if os.path.isfile(spec) or "=" not in spec:
        rows = load_prompts(None, spec)
    else:
        [(task, file)] = parse_specs("--prompts", [spec]).items()
        rows = load_prompts(task, file["value"])
    texts += [row["prompt"] for row in rows]
for text in texts:
    whole = not re.search("[\ud800-\udfff]", text)  # what a shell passes on that is not UTF-8
    check(whole, f"--prompt {ascii(text)}: not UTF-8")
check(texts or "model" not in parser.given, "nothing to draw: give --prompt TEXT or --prompts FILE")
texts = texts or EXAMPLES
if args.merge:
    check(not os.path.exists(args.merge), f"--merge {args.merge}: that exists already")
    whole = args.lora and not args.no_t5
    check(whole, f"--merge {args.merge}: needs --lora, and no --no-t5: it is a whole pipeline")
if args.lora:
    locate(args.lora)
accelerator = start_processes()
rank, world = accelerator.process_index, accelerator.num_processes
claim_folder(args.out, accelerator)

# -- what is there already -----------------------------------------------------------------------------------
jobs = [(text, k) for text in texts for k in range(args.num_images)]
files = [os.path.join(args.out, f"{i:05d}.png") for i in range(len(jobs))]
settings = {"model": fingerprint(args.model), "LoRA": args.lora and fingerprint(args.lora), "prompts": texts}
for name in (
    "num_images",
    "resolution",
    "num_steps",
    "guidance",
    "sde",
    "noise_level",
    "dtype",
    "no_t5",
    "max_sequence_length",
    "seed",
):
    settings[name] = getattr(args, name)
about, before, others = os.path.join(args.out, "samples.json"), {}, []
if os.path.exists(about):
    before = read_json(about).get("settings", {})
if before != settings:
    others = [file for file in os.listdir(args.out) if re.fullmatch(r"\d{5,}\.png", file)]
changed = ", ".join(name for name in settings if before.get(name) != settings[name])
check(
    args.overwrite or not others,
    f"--out {args.out}: other pictures are there (not the same {changed}); --overwrite replaces them, or "
    "give another --out",
)
batches = []  # this process's, of those that are not whole
for start in range(rank * args.batch_size, len(jobs), world * args.batch_size):
    batch = range(start, min(start + args.batch_size, len(jobs)))
    if others or not all(os.path.exists(files[i]) for i in batch):
        batches.append(batch)

# -- draw ----------------------------------------------------------------------------------------------------
if batches or args.merge:
    model = load_model(args, accelerator.device)
    if args.lora:
        model.load_adapter("lora", args.lora)
accelerator.wait_for_everyone()  # all have read what is there, and nothing was refused, before anyone writes
if rank == 0:
    for file in others:
        os.remove(os.path.join(args.out, file))
    pictures = []
    for file, (text, k) in zip(files, jobs):
        pictures.append({"file": os.path.basename(file), "prompt": text, "index": k})
    write_json(about, {"args": vars(args), "settings": settings, "pictures": pictures})
accelerator.wait_for_everyone()
stop = StopSignal()
for batch in tqdm(batches, unit="batch", disable=rank != 0):
    if stop.name:
        break
    prompts, gens = [jobs[i][0] for i in batch], generators(args.seed, 0, batch)
    how = (args.num_steps, args.resolution, "lora" if args.lora else "base", args.guidance)
    drawn = model.generate(prompts, gens, *how, args.noise_level, args.sde)
    for i, picture in zip(batch, pil(drawn)):
        write(files[i], encoded(picture))
if stop.arrived(accelerator.device):
    end_processes(accelerator, f"stopped; the same command goes on from what lies in {args.out}")
accelerator.wait_for_everyone()
if rank == 0:
    shown = {}
    for k in range(min(8, args.num_images)):  # a row for each; one column a prompt
        shown[f"{k}"] = [read_picture(files[i * args.num_images + k]) for i in range(min(16, len(texts)))]
    save_grid(os.path.join(args.out, "grid.png"), shown, texts[:16])
    if args.merge:
        model.save_pipeline(args.merge, "lora")
        print(f"stand-alone pipeline: {args.merge}")
    print(f"{len(jobs)} pictures, grid.png and samples.json in {args.out}")
end_processes(accelerator)
