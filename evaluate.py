"""What came of it: rows are checkpoints, columns are rewards, every model on the same held-out prompts from the same noise.

    python evaluate.py                                                     # the toy's base and teachers on its test prompts
    python evaluate.py --models base opd=out/distill/lora sft=out/sft/lora
    torchrun --nproc_per_node=8 evaluate.py --model stabilityai/stable-diffusion-3.5-medium \\
        --models base opd=out/distill/lora --prompts jpeg=prompts.txt --reward jpeg

Writes results.json, results.md and samples.png. Ranks share the pictures; the table does not depend on how many there are.
"""

import argparse
import os

import torch
from tqdm import tqdm

from flow_sde import SD3, die, draw_rows, end_processes, load_prompts, parse_args, parse_specs, save_grid, start_processes, write_json
from rewards import evaluate, markdown, parse_rewards, rewards_of

TASKS = ("compose", "ocr", "scene")
TOY = dict(model="toy/base", models=["base"] + [f"{t}=toy/teachers/{t}" for t in (*TASKS, "quality")],
           prompts=[f"{t}=toy/prompts/{t}_test.txt" for t in TASKS], reward=[f"toy.{t}" for t in (*TASKS, "quality")],
           resolution=32, dtype="float32", guidance=1.0, eval_num_steps=10, eval_batch_size=128)

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
add = parser.add_argument_group("what").add_argument
add("--model", help="diffusers folder or hub id of the base; without it, the embedded toy with settings that fit it")
add("--models", nargs="+", metavar="NAME=LORA[,guidance=G]", default=["base"], help="the rows, LoRAs or full fine-tunes; `base` is the bare model")
add("--prompts", nargs="+", metavar="TASK=FILE", help="held-out prompts (.txt or .jsonl)")
add("--reward", nargs="+", metavar="NAME", help="the columns; one called like a task scores that task's prompts only")
add("--out", default="out/evaluate", help="folder for results.json, results.md and samples.png")
add = parser.add_argument_group("sampling").add_argument
add("--resolution", type=int, default=512, help="pixels")
add("--guidance", type=float, default=4.5, help="classifier-free guidance (paper: 4.5)")
add("--eval-num-steps", type=int, default=40, help="sampling steps (paper: 40)")
add("--eval-batch-size", type=int, default=8, help="pictures per forward")
add("--dtype", choices=["float32", "bfloat16", "float16"], default="float16", help="of the frozen networks; what is trained is float32")
add("--no-t5", action="store_true", help="leave out the T5 text encoder, the largest network of SD3.5-M (long prompts suffer)")
add("--offload-text-encoders", action="store_true", help="keep them in the CPU's memory but while they encode")
add("--seed", type=int, default=0, help="of the noise")
args = parse_args(parser, TOY)

if not args.prompts or not args.reward:
    die("--model needs --prompts TASK=FILE and --reward NAME with it")
rewards = parse_rewards(args.reward)
prompts = {task: load_prompts(task, s["value"]) for task, s in parse_specs("--prompts", args.prompts).items()}
if idle := [t for t in prompts if not rewards_of(t, rewards, prompts)]:
    die(f"--prompts {', '.join(idle)}: no reward scores this task; --reward has {', '.join(rewards)}")
if any(m.startswith("base=") for m in args.models):
    die("--models base=...: `base` is the bare model; call the LoRA something else")
specs = parse_specs("--models", [m for m in args.models if m != "base"], guidance=args.guidance)
names = (["base"] if "base" in args.models else []) + list(specs)
accelerator = start_processes()
rank, world = accelerator.process_index, accelerator.num_processes
model = SD3(args.model, getattr(torch, args.dtype), accelerator.device, not args.no_t5, args.offload_text_encoders)
model.latent_shape(args.resolution)
for name, spec in specs.items():
    model.load_teacher(name, spec["value"])
guidance = {name: specs[name]["guidance"] if name in specs else args.guidance for name in names}

with tqdm(total=len(names) * -(-sum(map(len, prompts.values())) // world), disable=rank != 0, unit="picture", mininterval=1) as bar:
    results = [{"model": name} | evaluate(model, name, prompts, rewards, args, rank, world, guidance[name], progress=bar.update) for name in names]
texts = [row["prompt"] for rows in prompts.values() for row in rows[:max(2, 12 // len(prompts))]]
grid = draw_rows(model, {name: (name, guidance[name]) for name in names}, texts, args, rank, world)
if rank == 0:
    os.makedirs(args.out, exist_ok=True)
    write_json(os.path.join(args.out, "results.json"), results)
    open(os.path.join(args.out, "results.md"), "w").write(markdown(results) + "\n")
    save_grid(os.path.join(args.out, "samples.png"), grid, texts)
    print(markdown(results))
    print(f"done: {args.out}/results.json (also results.md, samples.png)")
end_processes(accelerator)
