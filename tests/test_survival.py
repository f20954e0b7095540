"""What real runs meet: kills, preemption, a full disk, a dead process, wrong arguments on resume; and how much memory teachers cost."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TASKS, distill, few, hub_pipeline, hub_teacher, read_log, refused
from safetensors.torch import load_file

from flow_sde import saved_steps

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(loras, out, *extra, processes=1):
    """A long run of quick updates that saves after each of them."""
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else [sys.executable]
    )
    flags = [
        "--teachers",
        *[f"{t}={loras[t]}" for t in TASKS],
        "--init",
        loras["student"],
        "--anchor",
        "base",
        "--batch-size",
        3,
        "--num-steps",
        3,
        "--micro-batch-size",
        3,
        "--save-every",
        1,
        "--eval-every",
        1000,
        "--eval-num-steps",
        1,
        "--eval-prompts",
        *few("test", 2, os.path.dirname(out)),
        "--resume",
        "auto",
        "--out",
        out,
        *extra,
    ]
    return [*launch, "distill.py", *map(str, flags)]


def start(argv):
    return subprocess.Popen(
        argv, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def last_checkpoint(out):
    root = os.path.join(out, "checkpoints")
    return max((int(d) for d in os.listdir(root) if d.isdigit()), default=0) if os.path.isdir(root) else 0


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_killed_ten_times_it_ends_as_if_nothing_had_been(loras, tmp_path):
    draw = random.Random(0)
    out = str(tmp_path / "killed")
    for _ in range(10):
        process, before = start(command(loras, out, "--steps", 60)), last_checkpoint(out)
        wait_for(lambda: last_checkpoint(out) > before)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill(), process.communicate()
    for folder in (out, tmp_path / "whole"):
        assert (
            subprocess.run(
                command(loras, folder, "--steps", 60), cwd=ROOT, env=ENV, capture_output=True
            ).returncode
            == 0
        )
    a, b = (
        torch.load(os.path.join(d, "checkpoints/000060/state.pt"), weights_only=True)
        for d in (out, tmp_path / "whole")
    )
    assert all(
        torch.equal(a["weights"][name][k], b["weights"][name][k])
        for name in a["weights"]
        for k in a["weights"][name]
    )
    a, b = (load_file(os.path.join(d, "lora/adapter_model.safetensors")) for d in (out, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda log: [{k: v for k, v in row.items() if k != "seconds"} for row in log]
    assert strip(read_log(out)) == strip(read_log(tmp_path / "whole"))
    assert json.load(open(os.path.join(out, "results.json"))) == json.load(
        open(tmp_path / "whole/results.json")
    )


def test_preempted_processes_save_and_go_on(loras, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: the update in hand is given up, the last one is saved."""
    out = str(tmp_path / "run")
    argv = command(loras, out, "--steps", 5000, "--save-every", 1000, processes=2)
    process = start(argv)
    log = tmp_path / "run/log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 25  # torchrun kills what is left after 30 seconds
    done = last_checkpoint(out)
    assert done == read_log(out)[-1]["step"] >= 3 and os.path.exists(
        tmp_path / "run/lora/adapter_model.safetensors"
    )
    argv[argv.index("5000")] = str(done + 2)
    assert subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True).returncode == 0
    assert [row["step"] for row in read_log(out)] == list(range(1, done + 3))


def test_a_process_that_dies_takes_the_job_down_with_a_message(loras, tmp_path):
    process = start(command(loras, str(tmp_path / "run"), "--steps", 5000, processes=2))
    wait_for(lambda: last_checkpoint(tmp_path / "run") >= 2)
    workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == process.pid]
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    errors = process.communicate(timeout=90)[1]
    assert time.monotonic() - began < 60 and process.returncode != 0
    said = (
        "could not reach the others of this job, so it ends too: .* What was saved before is whole, --resume"
    )
    assert re.search(f"process [01] {said}", errors), errors[-3000:]


def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def test_a_full_disk_leaves_the_last_checkpoint(loras, tmp_path):
    """Files may not grow beyond what a checkpoint needs: the write fails as it does on a full disk."""
    out = str(tmp_path / "run")
    assert (
        subprocess.run(command(loras, out, "--steps", 2), cwd=ROOT, env=ENV, capture_output=True).returncode
        == 0
    )
    before = {
        f: open(os.path.join(out, f), "rb").read()
        for f in ("checkpoints/000002/state.pt", "lora/adapter_model.safetensors")
    }
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    answer = subprocess.run(
        command(loras, out, "--steps", 4), cwd=ROOT, env=ENV, capture_output=True, text=True, preexec_fn=limit
    )
    lines = [line for line in answer.stderr.splitlines() if "distill.py: " in line]
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr[-3000:]
    assert "could not be written; what was saved before is whole" in lines[0]
    assert (
        all(open(os.path.join(out, f), "rb").read() == data for f, data in before.items())
        and last_checkpoint(out) == 2
    )
    assert (
        subprocess.run(command(loras, out, "--steps", 4), cwd=ROOT, env=ENV, capture_output=True).returncode
        == 0
        and last_checkpoint(out) == 4
    )


def test_another_run_is_not_resumed(loras, tmp_path):
    """A different base, teacher set, rank, prompt file or schedule: refused, with the difference. Fewer processes with larger batches, other
    places and other habits of saving: the same run."""
    base = tmp_path / "base"
    shutil.copytree(os.path.join(ROOT, "toy/base"), base)
    flags = dict(
        model=str(base),
        init="none",
        rank=4,
        save_every=1,
        steps=1,
        resolution=32,
        guidance=1,
        dtype="float32",
        prompts=few("train", 5, str(tmp_path)),
    )
    distill(loras, str(tmp_path / "run"), **flags)
    distill(
        loras,
        str(tmp_path / "run"),
        resume="auto",
        **flags | dict(steps=2, keep=5, save_every=7, micro_batch_size=2, gradient_checkpointing=[]),
    )
    other = tmp_path / "other"
    other.mkdir()
    prompts = flags["prompts"][:2] + few("val", 5, str(other))[2:]
    for change, message in (
        (dict(rank=8), "rank was 4, now 8"),
        (dict(schedule="alternate"), "schedule was 'mixed', now 'alternate'"),
        (dict(prompts=prompts), "prompts scene was '[0-9a-f]+', now '[0-9a-f]+'"),
        (dict(batch_size=3), "batch-size x processes was 6, now 3"),
        (
            dict(teachers=[f"{t}={loras[t]}" for t in TASKS[:2]], prompts=flags["prompts"][:2]),
            "teacher scene was '[0-9a-f]+', now None",
        ),
    ):
        with pytest.raises(SystemExit, match=f"another run: .*{message}"):
            distill(loras, str(tmp_path / "run"), resume="auto", **flags | change)
    config = json.load(open(base / "scheduler/scheduler_config.json"))
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"shift": 2.0}))
    with pytest.raises(SystemExit, match="another run: base was '[0-9a-f]+', now '[0-9a-f]+'"):
        distill(loras, str(tmp_path / "run"), resume="auto", **flags)


def test_the_last_checkpoints_are_kept(loras, tmp_path):
    distill(loras, str(tmp_path / "run"), steps=5, save_every=1, keep=3)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["000003", "000004", "000005"]


# the most that lies in memory at once, mapped weights included, over what the libraries take
WATCH = """
import runpy, sys, threading, time
sys.argv, sys.path = sys.argv[1:], [".", *sys.path]
from diffusers import StableDiffusion3Pipeline
import accelerate, peft
resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
libraries, peak, run = resident(), 0, True
def watch():
    global peak
    while run:
        peak = max(peak, resident() - libraries)
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    run = False
    thread.join()
    print("peak kB", peak)
"""


def test_memory_hardly_grows_with_the_number_of_teachers(tmp_path):
    """A transformer of 112 M parameters and LoRAs of rank 32: four teachers and an anchor against one teacher."""
    base = hub_pipeline(tmp_path / "base", heads=16, head_dim=64, layers=3, dtype=torch.float32)
    assert (
        sum(
            t.numel()
            for t in load_file(os.path.join(base, "transformer/diffusion_pytorch_model.safetensors")).values()
        )
        > 100e6
    )
    lora = hub_teacher(base, tmp_path / "lora", 1)  # under five names it takes the memory of five
    (tmp_path / "prompts.txt").write_text("a cup\n")
    peaks = {}
    for count in (1, 4):
        tasks = [f"t{i}" for i in range(count)]
        argv = [
            "--model",
            base,
            "--teachers",
            *[f"{t}={lora}" for t in tasks],
            "--prompts",
            *[f"{t}={tmp_path}/prompts.txt" for t in tasks],
            "--anchor",
            lora if count > 1 else "none",
            "--dtype",
            "float32",
            "--resolution",
            "64",
            "--num-steps",
            "2",
            "--batch-size",
            "4",
            "--micro-batch-size",
            "1",
            "--steps",
            "1",
            "--eval-num-steps",
            "1",
            "--eval-batch-size",
            "1",
            "--out",
            str(tmp_path / f"out{count}"),
        ]
        answer = subprocess.run(
            [sys.executable, "-c", WATCH, "distill.py", *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ
            | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        peaks[count] = int(re.search(r"peak kB (\d+)", answer.stdout)[1]) / 1e6
    print(
        f"peak GB: one teacher {peaks[1]:.2f}, four and an anchor {peaks[4]:.2f}, ratio {peaks[4] / peaks[1]:.3f}"
    )
    assert peaks[4] < 1.10 * peaks[1]


def state_of(folder):
    return torch.load(os.path.join(folder, "state.pt"), weights_only=True)["weights"]


def same(a, b):
    return all(torch.equal(a[name][k], b[name][k]) for name in a for k in a[name])


def test_a_folder_belongs_to_one_run(loras, tmp_path):
    """While another process lives; then, until it is given up by name."""
    out = tmp_path / "run"
    out.mkdir()
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    for script, *argv in (
        ["distill.py"],
        ["cold_start.py", "merge"],
        ["sample.py"],
        ["evaluate.py"],
        ["train_teacher.py", "--resume", "auto"],
    ):
        assert "another process is at work there" in refused(script, *argv, "--out", out)
    process.kill(), process.communicate()  # the lock falls with it

    distill(loras, str(out), steps=2, save_every=1)
    kept = state_of(out / "checkpoints/000002")
    for changes in ({}, {"seed": 3}, {"resume": str(out / "checkpoints/000001")}):
        with pytest.raises(SystemExit, match="an earlier run left checkpoints there; --resume auto"):
            distill(loras, str(out), steps=3, save_every=1, **changes)
    assert "an earlier run left checkpoints" in refused("cold_start.py", "merge", "--out", out)
    assert same(kept, state_of(out / "checkpoints/000002"))
    distill(loras, str(out), steps=3, save_every=1, resume=str(out / "checkpoints/000002"))  # the last one
    assert saved_steps(out) == ["000002", "000003"]
    distill(loras, str(out), steps=1, save_every=1, seed=3, overwrite=[])
    assert saved_steps(out) == ["000001"] and len(read_log(out)) == 1
    shutil.rmtree(out / "checkpoints")
    for changes in ({}, {"resume": "auto"}):
        with pytest.raises(SystemExit, match="there is a LoRA already; --overwrite"):
            distill(loras, str(out), **changes)
    with pytest.raises(SystemExit, match="give one of them"):
        distill(loras, str(out), overwrite=[], resume="auto")


def test_a_run_from_the_lora_in_its_own_folder_can_be_resumed(loras, tmp_path):
    """The LoRA is kept, since the run writes its own in its place."""
    flags = dict(save_every=1, init=str(tmp_path / "cut/lora"))
    shutil.copytree(loras["student"], tmp_path / "cut/lora")
    distill(loras, str(tmp_path / "cut"), steps=1, **flags)
    run = distill(loras, str(tmp_path / "cut"), steps=2, resume="auto", **flags)
    whole = distill(loras, str(tmp_path / "whole"), steps=2, init=loras["student"])
    assert same(
        state_of(tmp_path / "cut/checkpoints/000002"), state_of(tmp_path / "whole/checkpoints/000002")
    )
    for a, b in zip(run["model"].weights("start").values(), whole["model"].weights("start").values()):
        assert torch.equal(a, b)


def test_a_checkpoint_that_is_not_whole_gives_way_to_the_one_before(loras, tmp_path, capsys):
    for steps in (2, 3):
        distill(loras, str(tmp_path / str(steps)), steps=steps, save_every=1, keep=3)
    for damage in (lambda data: data[: len(data) // 2], lambda data: b""):
        out = shutil.copytree(tmp_path / "2", tmp_path / "damaged", dirs_exist_ok=True)
        file = out / "checkpoints/000002/state.pt"
        file.write_bytes(damage(file.read_bytes()))
        capsys.readouterr()
        distill(loras, str(out), steps=3, save_every=1, resume="auto")
        assert re.search(r"note: .*000002: not a whole checkpoint", capsys.readouterr().out)
        assert same(state_of(out / "checkpoints/000003"), state_of(tmp_path / "3/checkpoints/000003"))
        shutil.rmtree(out)
    (tmp_path / "2/checkpoints/000002/state.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="000002: not a whole checkpoint"):
        distill(loras, str(tmp_path / "2"), steps=3, resume=str(tmp_path / "2/checkpoints/000002"))
    with pytest.raises(SystemExit, match="--steps 1: .*000003 has made 3 already"):
        distill(loras, str(tmp_path / "3"), steps=1, resume="auto")


def test_a_folder_that_cannot_be_written_is_known_at_once(loras, tmp_path):
    (tmp_path / "file").write_text("")
    for script in ("distill.py", "train_teacher.py", "sample.py", "evaluate.py", "cold_start.py"):
        assert "cannot be written" in refused(script, "--out", tmp_path / "file/run")
        assert "cannot be written" in refused(script, "--out", tmp_path / "file")


def test_links_are_followed(loras, tmp_path):
    """lora and checkpoints on another disk."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    out.mkdir(), (disk / "checkpoints").mkdir(parents=True)
    os.symlink(disk / "lora", out / "lora"), os.symlink(disk / "checkpoints", out / "checkpoints")
    distill(loras, str(out), steps=1, save_every=1)
    distill(loras, str(out), steps=2, save_every=1, resume="auto")
    assert os.path.islink(out / "lora") and os.path.islink(out / "checkpoints")
    assert os.path.exists(disk / "lora/adapter_config.json")
    assert sorted(os.listdir(disk)) == ["checkpoints", "lora"] and saved_steps(out) == ["000001", "000002"]
    distill(loras, str(out), steps=1, save_every=1, seed=3, overwrite=[])
    assert saved_steps(disk) == ["000001"] and os.path.islink(out / "lora")
