"""Sample pictures from a checkpoint: the base, or the base with a LoRA.

    python sample.py                        # the toy base, a prompt of each task
    python sample.py --lora out/distill/lora --prompt "two red circles and one blue square" --num-images 8
    python sample.py --model stabilityai/stable-diffusion-3.5-medium --lora out/distill/lora --prompt "a fox"
    torchrun --nproc_per_node=8 sample.py --model stabilityai/stable-diffusion-3.5-medium --prompts many.txt

The sampler is deterministic (noise 0), as the diffusers pipeline's; with --noise-level it is the flow-SDE.
Each batch is written at once, and after an interruption the same command goes on.
"""

import argparse
import os
import re

from PIL import Image
from tqdm import tqdm

# isort: split
from flow_sde import generators  # mathematics  # noqa: I001
from flow_sde import load_model, quantizer, sampling_of  # model
from flow_sde import TOY_DIR, StopSignal, check, claim_folder, die, end_processes, fingerprint  # run
from flow_sde import first_line, load_prompts, parse_args, parse_specs, read_json, save_grid, say
from flow_sde import start_processes, write, write_json
from rewards import encoded, pil, read_picture

TOY = dict(model=f"{TOY_DIR}/base", resolution=32, dtype="float32", guidance=1.0)
TOY |= dict(num_steps=10, batch_size=32)
TOY_PROMPTS = [
    "two red circles and one blue square",
    'a yellow sign saying "HAT"',
    "a red house and two pines on snow at night",
]

# -- flags ---------------------------------------------------------------------------------------------------
parser = argparse.ArgumentParser(description=__doc__)
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id; without it, the toy and its settings")
add("--lora", help="a LoRA: PEFT's, diffusers' or another program's (README: files it takes)")
add("--prompt", nargs="+", metavar="TEXT", help="prompts")
add("--prompts", nargs="+", metavar="[TASK=]FILE", help="more prompts; with TASK=, only the task's lines")
add("--num-images", type=int, default=4, help="pictures per prompt")
add("--out", default="out/samples", help="folder for the PNGs, grid.png and samples.json")
add("--overwrite", action="store_true", help="replace other pictures in --out")
add("--merge", metavar="DIR", help="also write a stand-alone pipeline with the LoRA in its weights")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, help="pixels")
add("--num-steps", type=int, default=40, help="sampling steps (paper: 40); else a few-step student's own")
add("--guidance", type=float, help="classifier-free guidance (paper: 4.5)")
add("--sde", choices=["flow", "cps"], default="flow", help="the sampler, if --noise-level is not 0")
add("--noise-level", type=float, default=0.0, help="0: deterministic")
add = parser.add_argument_group("running").add_argument
add("--batch-size", type=int, default=4, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the networks; the VAE's is float32")
add("--quantize", choices=["int8", "nf4"], help="of large frozen weights: 1 or 0.56 bytes each, less exact")
add("--shard", action="store_true", help="spread what is frozen over the processes (FSDP): slower")
add("--no-t5", action="store_true", help="leave out SD3's largest text encoder (worse on long prompts)")
add("--max-sequence-length", type=int, help="text tokens (Flow-GRPO and Flow-OPD: 128)")
add("--offload-text-encoders", action="store_true", help="keep them in CPU memory while not encoding")
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
    is_utf8 = not re.search("[\ud800-\udfff]", text)  # what Python makes of other bytes in a command line
    check(is_utf8, f"--prompt {ascii(text)}: not UTF-8")
check(texts or "model" not in parser.given, "nothing to draw: give --prompt TEXT or --prompts FILE")
texts = texts or TOY_PROMPTS
if args.merge:
    check(not os.path.exists(args.merge), f"--merge {args.merge}: that exists already")
    complete = args.lora and not args.no_t5
    check(complete, f"--merge {args.merge}: a complete pipeline, so it needs --lora and no --no-t5")
if args.lora:
    for name, value in sampling_of(args.lora).items():
        if name not in parser.given and getattr(args, name) != value:
            setattr(args, name, value)
            say(f"--{name.replace('_', '-')} {value}, as {args.lora} says (sampling.json)")
accelerator = start_processes()
rank, world = accelerator.process_index, accelerator.num_processes
claim_folder(args.out, accelerator)


def is_whole(file):
    """Whether one of our PNGs exists and its checksums are right."""
    try:
        with Image.open(file) as picture:
            picture.verify()
        return True
    except Exception:  # a broken file can raise anything
        return False


# -- what exists already -------------------------------------------------------------------------------------
jobs = [(text, k) for text in texts for k in range(args.num_images)]
files = [os.path.join(args.out, f"{i:05d}.png") for i in range(len(jobs))]
settings = {"model": fingerprint(args.model), "LoRA": args.lora and fingerprint(args.lora), "prompts": texts}
# No picture depends on these
free = {"out", "overwrite", "merge", "batch_size", "offload_text_encoders", "shard"}
free |= {"model", "lora", "prompt", "prompts"}  # these by content
settings |= {name: value for name, value in vars(args).items() if name not in free}
settings["quantize"] = quantizer(args.quantize)
about, before, others = os.path.join(args.out, "samples.json"), {}, []
if os.path.exists(about):
    before = read_json(about).get("settings", {})
if before != settings:
    others = [file for file in os.listdir(args.out) if re.fullmatch(r"\d{5,}\.png", file)]
changed = ", ".join(name for name in settings if before.get(name) != settings[name])
problem = f"other pictures are there (not the same {changed}); --overwrite replaces them"
check(args.overwrite or not others, f"--out {args.out}: {problem}, or give another --out")
batches = []  # this process's, of those with a picture missing
for start in range(0, len(jobs), world * args.batch_size):
    everyones = range(start, min(start + world * args.batch_size, len(jobs)))
    batch = everyones[rank * args.batch_size :][: args.batch_size]
    if others or not all(is_whole(files[i]) for i in (everyones if args.shard else batch)):
        batches.append(batch)

# -- sample --------------------------------------------------------------------------------------------------
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
stop, adapter = StopSignal(), "lora" if args.lora else "base"
for batch in tqdm(batches, unit="batch", disable=rank != 0):
    if stop.told(accelerator.device, args.shard):
        break
    prompts, gens = [jobs[i][0] for i in batch], generators(args.seed, 0, batch)
    sampling = args.num_steps, args.resolution, adapter, args.guidance, args.noise_level, args.sde
    for i, picture in zip(batch, pil(model.generate(prompts, gens, *sampling))):
        write(files[i], encoded(picture))
if stop.arrived(accelerator.device):
    end_processes(accelerator, f"stopped; the same command goes on with what is in {args.out}")
accelerator.wait_for_everyone()
if rank == 0:
    rows = {}  # of the grid: one picture of each prompt
    for k in range(min(8, args.num_images)):
        rows[f"{k}"] = [read_picture(files[i * args.num_images + k]) for i in range(min(16, len(texts)))]
    save_grid(os.path.join(args.out, "grid.png"), rows, texts[:16])
    if args.merge:
        try:
            model.save_pipeline(args.merge, "lora")
        except Exception as error:
            if not isinstance(error, OSError) and "(os error" not in str(error):  # what Rust libraries raise
                raise
            die(f"--merge {args.merge}: could not be written ({first_line(error)}). The same command goes on")
        print(f"stand-alone pipeline: {args.merge}")
    print(f"{len(jobs)} pictures, grid.png and samples.json in {args.out}")
end_processes(accelerator)
