"""--dry-run: what a run will take, measured on its first updates. Nothing is written."""

import math
import statistics
import sys
import time

import torch

from flow_sde import generators, pyplot, randn, say, size_of, text_parts

UPDATES = 3  # that are made: the first warms up, the others are timed


def page(run, pictures):
    """Print what the first updates tell (run.records). pictures: how many the whole run draws for its tables,
    validations and grids."""
    args, records, where = run.args, run.records, "a GPU" if run.device.type == "cuda" else "the process"
    lines = ["-- dry run: nothing was written --"]
    if "eval_batch_size" in args:  # grids take memory too; the first forward warms up
        pyplot()
        seconds_a_picture(run, 1)
    peak, throughout = peak_memory(run.device), held(run.model, run.optimizer)
    lines.append(f"memory of {where}: {peak / 1e9:.2f} GB at its peak; throughout: {throughout}")
    seconds = [record["seconds"] for record in records]
    usual = statistics.median(seconds[1:] or seconds)
    if args.offload_text_encoders:  # the first encodes for the next ones too
        usual += max(0, seconds[0] - usual) / run.model.ahead
    whole = duration(usual * args.steps)
    lines.append(f"time: {usual:.2f} s for each of --steps {args.steps}: {whole}")
    if "waiting" in records[0]:
        waiting = statistics.median(record["waiting"] for record in records)
        lines.append(f"rewards: {waiting:.2f} s of an update are spent waiting for their scores")
    if pictures:
        each = seconds_a_picture(run, args.eval_num_steps)
        more = f"{pictures} for validations and tables: {duration(each * pictures / run.world)}"
        lines.append(f"pictures: {each:.2f} s each in {args.eval_num_steps} steps, {more}")
    parameters = sum(p.numel() for p in run.model.adapters[run.adapter])
    checkpoint = 4 * parameters * 6  # the LoRA in two layouts; it, its average and AdamW's two moments
    total = checkpoint * min(args.keep, 1 + math.ceil(args.steps / args.save_every)) + 8 * parameters
    lines.append(f"disk: {checkpoint / 1e6:.1f} MB a checkpoint, {total / 1e6:.1f} MB in the end")
    kls = []
    for name, value in records[0].items():
        if name.startswith("kl/"):
            kls.append(f"{name[3:]} {'not finite' if value is None else f'{value:.1e}'}")
    if kls:
        lines.append(f"KL to each teacher at the start: {', '.join(kls)}")
    for name in without_effect(run):
        lines.append(f"note: {name} draws as the base does. Is it the right file?")
    lines += [f"try {advice}" for advice in advices(run, peak)]
    say("\n".join(lines))


def held(model, optimizer):
    """What is on this process's device throughout, in words."""
    parts = {"transformer": sum(map(size_of, {model.transformer, *model.full.values()}))}
    parts["VAE"] = size_of(model.pipe.vae)
    parts["text encoders"] = sum(size_of(encoder) for _, encoder, _ in text_parts(model.pipe))
    if model.offload:
        parts["text encoders"] = 0
    parts["LoRAs"] = sum(p.nbytes for params in model.adapters.values() for p in params)
    trained = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    parts["gradient and optimizer"] = 3 * trained  # with AdamW's two moments
    return ", ".join(f"{part} {size / 1e9:.2g} GB" for part, size in parts.items() if size)


def duration(seconds):
    """In words."""
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def peak_memory(device):
    """In bytes: what PyTorch took of a GPU; else of the process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_a_picture(run, num_steps):
    """Of a full batch, as grids and tables are drawn."""
    args, began = run.args, time.perf_counter()
    how = num_steps, args.resolution, "base", args.guidance
    run.model.generate(
        ["a picture"] * args.eval_batch_size, generators(0, 0, range(args.eval_batch_size)), *how
    )
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / args.eval_batch_size


@torch.no_grad()
def without_effect(run):
    """Teachers and anchors that change nothing: at a noisy state they answer as the base does, bit by bit."""
    model, found = run.model, []
    x = randn(generators(0, 0, [0]), model.latent_shape(run.args.resolution), run.device)
    inputs = x, 0.9, model.encode([""])
    base = model.velocity(*inputs, "base", run.args.guidance)
    for name in model.adapters | model.full:
        source = model.sources[name]
        loaded = source not in ("base", "in training") and not source.startswith("from ")
        if loaded and torch.equal(model.velocity(*inputs, name, run.args.guidance), base):
            found.append(f"{name} ({source})")
    return found


def advices(run, peak):
    """Flags that are not given and would save memory or time."""
    args, model = run.args, run.model
    if run.device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(run.device).total_memory
    if not args.compile and not args.shard:
        yield "--compile: 1.2 to 1.4 times faster, after some minutes"
    if peak < total / 2:
        yield f"a larger --micro-batch-size than {args.micro_batch_size}: half of the memory is free"
    if peak > 0.9 * total:
        yield "less memory: a smaller --micro-batch-size, --gradient-checkpointing, --quantize int8"
    encoders = sum(size_of(encoder) for _, encoder, _ in text_parts(model.pipe))
    if not args.offload_text_encoders and encoders > 0.1 * total:
        yield f"--offload-text-encoders: {encoders / 1e9:.1f} GB less"
