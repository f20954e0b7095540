"""What the tests share: scripts run in this process or their own, small random LoRAs, prompts and runs."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; read when torch is imported
import multiprocessing
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
BASE = os.path.join(ROOT, "toy/base")
TASKS = ("compose", "ocr", "scene")


# -- scripts -----------------------------------------------------------------------------------------------


def words(*argv, **flags):
    """A command line. steps=3 is --steps 3, a list is several values, True the flag alone, None no flag."""
    line = list(map(str, argv))
    for name, value in flags.items():
        if value is None:
            continue
        line.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            line += map(str, value)
        elif value is not True:
            line.append(str(value))
    return line


def run(script, *argv, **flags):
    """Run a script of the project in this process; returns its globals. A user's error arrives as SystemExit
    with its one line."""
    import flow_sde

    arguments, folder, stdout = sys.argv, os.getcwd(), sys.stdout
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [os.path.join(ROOT, script), *words(*argv, **flags)]
    os.chdir(ROOT)
    try:
        return runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        for lock in flow_sde.LOCKS:
            lock.release(force=True)  # as the end of a process does
        sys.argv, sys.stdout = arguments, stdout
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(script, *argv, **flags):
    """The one line with which a script refuses its input."""
    with pytest.raises(SystemExit) as caught:
        run(script, *argv, **flags)
    message = str(caught.value.code)
    assert "\n" not in message and message.startswith(os.path.basename(script)), message
    return message


def command(script, *argv, processes=1, **flags):
    """The command line of a script as a process of its own, or as several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), script, *words(*argv, **flags)]


def finish(line, **options):
    """Run a command line to its end; the answer has returncode, stdout and stderr."""
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **options)


FORKSERVER = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 accelerate peft pytest"
FORKSERVER.set_forkserver_preload(SLOW_IMPORTS.split())  # which processes are spared


def begin(call, **environment):
    """A process of its own that does call()."""
    process = FORKSERVER.Process(target=do, args=(call, environment))
    process.start()
    return process


def do(call, environment):
    os.environ.update(environment)
    call()


def start(call, count=2):
    """So many processes that do call(), and know of each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    world |= dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    return [begin(call, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def together(call, count=2):
    """call() in so many processes, to its end; if one fails, all end."""
    processes = start(call, count)
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
    assert [process.exitcode for process in processes] == [0] * count


def write_end(call, folder):
    """call() in a process of its own; the line it ends with, if it does, goes to folder/RANK.txt."""
    try:
        call()
    except SystemExit as end:
        Path(folder, os.environ.get("RANK", "0") + ".txt").write_text(str(end.code))
    os._exit(0)


def distill(loras, out, **changes):
    """distill.py for one quick update with the random teachers and no table; other flags by keyword."""
    flags = dict(teachers=specs(loras), init=loras["student"], anchor=loras["anchor"], resolution=16)
    flags |= dict(
        prompts=few("train", 8, Path(loras["anchor"]).parent), batch_size=3, micro_batch_size=3, num_steps=4
    )
    flags |= dict(steps=1, save_every=100, eval_every=100, eval_num_steps=1)
    flags |= dict(compare=[], eval_prompts=[], reward=[])
    return run("distill.py", **flags | changes, out=out)


def sft(loras, out, **changes):
    """cold_start.py sft for one quick update, with the random teachers."""
    flags = dict(teachers=specs(loras), prompts=few("train", 8, Path(loras["anchor"]).parent), resolution=16)
    flags |= dict(batch_size=3, micro_batch_size=3, num_steps=3, steps=1)
    return run("cold_start.py", "sft", **flags | changes, out=out)


def teacher(out, **changes):
    """train_teacher.py for two quick updates."""
    prompts, held_out = few("train", 8, out.parent)[:1], few("val", 2, out.parent)[:1]
    flags = dict(reward="jpeg", prompts=prompts, eval_prompts=held_out, resolution=16, eval_num_steps=1)
    flags |= dict(batch_size=2, group_size=4, num_steps=4, sde_window=0, steps=2)
    return run("train_teacher.py", **flags | changes, out=out)


@pytest.fixture
def numbers_only(monkeypatch):
    """Runs draw no curves and no grids, half the time of a small one."""
    monkeypatch.setattr("flow_sde.plot_curves", lambda path: None)
    monkeypatch.setattr("flow_sde.draw_rows", lambda *args: None)


# -- what scripts read -------------------------------------------------------------------------------------


def specs(paths, tasks=TASKS):
    """TASK=PATH for every task."""
    return [f"{task}={paths[task]}" for task in tasks]


def few(split, n, folder):
    """TASK=FILE for every task of the toy: the first n prompts of its split, in files of their own."""
    found = []
    for task in TASKS:
        lines = Path(ROOT, f"toy/prompts/{task}_{split}.txt").read_text().splitlines(keepends=True)
        path = Path(folder, f"{task}_{split}.txt")
        path.write_text("".join(lines[:n]))
        found.append(f"{task}={path}")
    return found


def random_lora(folder, seed, rank=4, alpha=8, size=0.2):
    """A LoRA for the toy with random weights, saved in `folder`."""
    from flow_sde import SD3, save_lora

    model = SD3(BASE)
    model.new_adapter("x", rank, alpha, seed)
    save_lora(random_b(model.lora("x"), seed, size / rank), folder)
    return str(folder)


def random_b(lora, seed=0, size=1.0):
    """An untrained LoRA with noise for its B, which is zero."""
    gen = torch.Generator().manual_seed(seed)
    return {n: (A, size * torch.randn(B.shape, generator=gen), alpha) for n, (A, B, alpha) in lora.items()}


def huge_lora(lora, folder):
    """A LoRA of finite numbers under which the network overflows."""
    from flow_sde import save_lora

    save_lora({n: (A * 1e20, B * 1e20, alpha) for n, (A, B, alpha) in lora_of(lora).items()}, folder)
    return str(folder)


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """Three random teachers, an anchor and a student: {name: folder}."""
    root = tmp_path_factory.mktemp("loras")
    names = (*TASKS, "anchor", "student")
    return {name: random_lora(root / name, seed) for seed, name in enumerate(names, 1)}


def clip_tokenizer(folder):
    """CLIP's tokenizer, with printable characters for a vocabulary."""
    from transformers import CLIPTokenizer

    signs = [chr(c) for c in range(33, 127)]
    pieces = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def small_clip(folder, **settings):
    """A random CLIPModel with its tokenizer in a folder, 28 x 28 pixels."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = len(clip_tokenizer(folder))
    both = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **settings)
    text = dict(hidden_size=32, vocab_size=size, max_position_embeddings=77)
    text |= dict(bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=1)
    vision = dict(hidden_size=48, image_size=28, patch_size=14)
    config = CLIPConfig(
        text_config=both | text, vision_config=both | vision, projection_dim=24, initializer_factor=4.0
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


# -- what scripts leave, and what it is compared with ------------------------------------------------------


def read_json(*path):
    return json.loads(Path(*path).read_text())


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def lora_of(path, base=BASE):
    """A LoRA for that base as {module: (A, B, alpha)}."""
    from flow_sde import read_lora, skeleton

    return read_lora(str(path), skeleton(str(base)))


def saved(out):
    """The tensors of a run's LoRA by name."""
    from safetensors.torch import load_file

    return load_file(Path(out, "lora/adapter_model.safetensors"))


def checkpoint(out, step):
    """The weights in a checkpoint by name and place, the student's (or teacher's) and the average's."""
    state = torch.load(Path(out, f"checkpoints/{step:06d}/state.pt"), weights_only=True)
    return {f"{name} {i}": w for name, weights in state["weights"].items() for i, w in enumerate(weights)}


def equal(a, b):
    """Whether two {name: tensor} are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of every update that is made from here on, flat, before it is clipped."""
    caught, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(params, most):
        caught.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(params, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return caught


def sigma_schedule(num_steps, shift=3.0):
    """The num_steps + 1 sigmas that diffusers' scheduler visits, as floats."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.tolist()


def stock_pictures(folder, prompts, latents, steps, guidance=1.0, lora=None, scheduler=None, length=256):
    """What diffusers' own SD3 pipeline draws from these latents, (B, 3, H, W)."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler or pipe.scheduler
    if lora:
        pipe.load_lora_weights(str(lora))
    side = latents.shape[-1] * pipe.vae_scale_factor
    what = dict(prompt=prompts, negative_prompt=[""] * len(prompts), latents=latents, output_type="pt")
    how = dict(num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=length)
    return pipe(**what, **how, height=side, width=side).images
