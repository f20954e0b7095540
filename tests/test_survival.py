"""What real runs meet: kills, preemption, a full disk, a dead process, another run's folder, wrong arguments
on resume."""

import errno
import fcntl
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
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    BASE,
    TASKS,
    begin,
    checkpoint,
    distill,
    equal,
    few,
    read_json,
    read_log,
    refused,
    saved,
    sft,
    start,
    teacher,
    write_end,
)

from flow_sde import descend, generators, lock_folder, saved_steps

pytestmark = pytest.mark.usefixtures("numbers_only")
EVERY_UPDATE = dict(save_every=1, num_steps=3)


def last_step(out):
    return int((saved_steps(str(out)) or ["0"])[-1])


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def logged(out):
    """log.jsonl but for what may differ: the time, and what the last update of a run adds."""
    rows = read_log(out)
    return [{key: row[key] for key in row.keys() - {"seconds", "kl_by_sigma"}} for row in rows]


# -- a run that is cut short goes on -----------------------------------------------------------------------


@pytest.mark.parametrize("script", ["distill.py", "cold_start.py", "train_teacher.py"])
def test_resumed_is_bit_equal_to_uninterrupted(script, loras, tmp_path):
    """Cut after its third update, a run that saves every second goes on from the second."""
    train = {
        "distill.py": partial(distill, loras, schedule="mixed"),
        "cold_start.py": partial(sft, loras),
        "train_teacher.py": partial(teacher, group_size=2, eval_every=2),
    }[script]
    train = partial(train, lr=1e-3, save_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, steps=4)
    train(cut, steps=3)
    shutil.rmtree(cut / "checkpoints/000003")
    train(cut, steps=4, resume="auto")
    assert equal(checkpoint(whole, 4), checkpoint(cut, 4)) and equal(saved(whole), saved(cut))
    if script != "train_teacher.py":  # where the end of the short run was validated
        assert logged(whole) == logged(cut)


def test_killed_again_and_again_it_ends_as_if_nothing_had_been(loras, tmp_path):
    """By SIGKILL, at any moment."""
    train = partial(distill, loras, **EVERY_UPDATE, steps=15, resume="auto")
    draw, out, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    for _ in range(3):
        before, process = last_step(out), begin(partial(train, out))
        wait_for(lambda before=before: last_step(out) > before)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    train(out)
    train(whole)
    assert equal(checkpoint(out, 15), checkpoint(whole, 15)) and equal(saved(out), saved(whole))
    assert logged(out) == logged(whole)


def test_a_run_stopped_in_its_first_update_goes_on(loras, tmp_path, monkeypatch):
    out, whole = tmp_path / "run", tmp_path / "whole"

    def stopped(*details):
        os.kill(os.getpid(), signal.SIGTERM)
        return generators(*details)

    with monkeypatch.context() as patch:
        patch.setattr("flow_sde.generators", stopped)
        distill(loras, out, steps=2)
    assert saved_steps(out) == ["000000"] and not read_log(out)
    distill(loras, out, steps=2, resume="auto")
    distill(loras, whole, steps=2)
    assert equal(checkpoint(out, 2), checkpoint(whole, 2)) and equal(saved(out), saved(whole))


@pytest.mark.parametrize("script", ["distill.py", "train_teacher.py"])
def test_a_run_stopped_between_two_updates_of_a_rollout_goes_on(script, loras, tmp_path, monkeypatch):
    """The rollout's first update is taken back: the second can take longer than a scheduler waits."""
    train = (
        partial(distill, loras, objective="ppo") if script == "distill.py" else partial(teacher, group_size=2)
    )
    train, out, whole = partial(train, steps=2, lr=1e-3), tmp_path / "run", tmp_path / "whole"
    norms = []

    def stopped(*details):
        norms.append(descend(*details))
        if len(norms) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return norms[-1]

    with monkeypatch.context() as patch:
        patch.setattr("flow_sde.descend", stopped)
        train(out)
    assert len(norms) == 3 and last_step(out) == 1
    assert [row["step"] for row in read_log(out) if "seconds" in row] == [1]
    train(out, resume="auto")
    train(whole)
    assert equal(checkpoint(out, 2), checkpoint(whole, 2)) and equal(saved(out), saved(whole))


def two_processes(loras, out):
    """At a long run of quick updates, three of which are made."""
    out.mkdir()
    flags = dict(num_steps=3, steps=5000, save_every=1000, eval_every=10_000)
    processes = start(partial(write_end, partial(distill, loras, out, **flags), out))
    wait_for(lambda: (out / "log.jsonl").exists() and len(read_log(out)) >= 3)
    return processes


def test_preempted_processes_save_and_go_on(loras, tmp_path):
    """One of them gets SIGTERM: the update in hand is given up, the last one is saved. One process with the
    batch of both goes on."""
    out = tmp_path / "run"
    processes = two_processes(loras, out)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(timeout=25)  # torchrun kills what is left after 30 seconds
    assert [process.exitcode for process in processes] == [0, 0] and not list(out.glob("*.txt"))
    done = last_step(out)
    assert done == read_log(out)[-1]["step"] >= 3 and len(saved(out)) > 0
    distill(loras, out, num_steps=3, batch_size=6, resume="auto", steps=done + 2)
    assert [row["step"] for row in read_log(out)] == list(range(1, done + 3))


def test_a_process_that_dies_takes_the_job_down_with_a_message(loras, tmp_path):
    out = tmp_path / "run"
    processes = two_processes(loras, out)
    processes[1].kill()
    processes[0].join(timeout=60)
    said = (out / "0.txt").read_text()
    assert re.search("process 0 could not reach the others of this job, .* What was saved before", said), said


def test_a_full_disk_leaves_the_last_checkpoint(loras, tmp_path, capsys):
    """Files may not grow beyond what a checkpoint needs: the write fails as it does on a full disk."""
    train = partial(distill, loras, tmp_path, **EVERY_UPDATE)
    train(steps=2)
    kept = {
        name: (tmp_path / name).read_bytes()
        for name in ("checkpoints/000002/state.pt", "lora/adapter_model.safetensors")
    }
    limits, hook = resource.getrlimit(resource.RLIMIT_FSIZE), sys.excepthook
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        with pytest.raises(OSError) as full:
            train(steps=4, resume="auto")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.excepthook(full.type, full.value, full.tb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.excepthook = hook
    said = capsys.readouterr().err
    assert "could not be written; what was saved before is whole" in said and "Traceback" not in said
    assert all((tmp_path / name).read_bytes() == data for name, data in kept.items())
    assert last_step(tmp_path) == 2
    train(steps=4, resume="auto")
    assert last_step(tmp_path) == 4


def test_a_checkpoint_that_is_not_whole_gives_way_to_the_one_before(loras, tmp_path, capsys):
    """Empty, cut, or with a flipped byte, which PyTorch would read. Junk in log.jsonl is skipped."""
    train = partial(distill, loras, **EVERY_UPDATE)
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(out, steps=2)
    train(whole, steps=3)
    file = out / "checkpoints/000002/state.pt"
    data = file.read_bytes()
    middle = len(data) // 2
    for broken in (b"", data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
        file.write_bytes(broken)
        with pytest.raises(SystemExit, match="000002: not a whole checkpoint"):
            train(out, steps=3, resume=out / "checkpoints/000002")
    log = out / "log.jsonl"
    log.write_bytes(b"\0\0\nnull\n" + log.read_bytes() + b'{"step": 2, "ki')
    train(out, steps=3, resume="auto")
    assert re.search(r"note: .*000002: not a whole checkpoint", capsys.readouterr().out)
    assert equal(checkpoint(out, 3), checkpoint(whole, 3)) and logged(out) == logged(whole)
    with pytest.raises(SystemExit, match="--steps 1: .*000003 has made 3 already"):
        train(out, steps=1, resume="auto")


# -- another run is not resumed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(loras, tmp_path_factory):
    """(folder, flags) of a run of one update that does not use the toy's own settings."""
    root = tmp_path_factory.mktemp("made")
    base = shutil.copytree(BASE, root / "base")
    flags = dict(model=base, init="none", rank=4, dtype="float32", guidance=1, prompts=few("train", 5, root))
    flags["teachers"] = [f"{task}={loras[task]},guidance=1" for task in TASKS]
    flags["anchor"] = f"{loras['anchor']},guidance=1"
    distill(loras, root / "run", **EVERY_UPDATE, **flags)
    return root / "run", EVERY_UPDATE | flags | dict(resume="auto", steps=3)


SUM = "'[0-9a-f]+'"  # of a file's content
CHANGES = [
    (dict(rank=8), "rank was 4, now 8"),
    (dict(schedule="alternate"), "schedule was 'mixed', now 'alternate'"),
    (dict(noise_level=0.5), "noise_level was 0.7, now 0.5"),
    (dict(batch_size=2), "batch-size x processes was 3, now 2"),
    (dict(guidance=2), "guidance was 1.0, now 2.0"),
    (
        dict(teachers=["compose", "ocr", "scene,guidance=2"]),
        "guidance of each was .*'scene': 1.0.*'scene': 2.0",
    ),
    (
        dict(teachers=["compose", "ocr", "scene,guidance=1,weight=2"]),
        "shares was .*'scene': 1.0.*'scene': 2.0",
    ),
    (dict(teachers=["compose", "ocr", "ocr"]), f"teacher scene was {SUM}, now {SUM}"),
    (dict(teachers=["compose", "ocr"]), f"teacher scene was {SUM}, now None"),
    (dict(prompts="val"), f"prompts scene was {SUM}, now {SUM}"),
    (dict(model="another"), f"base was {SUM}, now {SUM}"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=str)
def test_another_run_is_not_resumed(change, message, made, loras, tmp_path):
    """Other flags, teachers, prompts or another base: refused, with the difference."""
    out, flags = made
    for name, value in change.items():
        if name == "teachers":
            named = [spec.partition(",") for spec in value]
            paths = [f"{loras[who]},{options or 'guidance=1'}" for who, _, options in named]
            value = [f"{task}={path}" for task, path in zip(TASKS, paths)]
            flags = flags | {"prompts": flags["prompts"][: len(value)]}
        elif name == "prompts":
            value = flags["prompts"][:2] + few(value, 5, tmp_path)[2:]
        elif name == "model":
            value = shutil.copytree(flags["model"], tmp_path / "base")
            file = value / "scheduler/scheduler_config.json"
            file.write_text(json.dumps(read_json(file) | {"shift": 2.0}))
        flags = flags | {name: value}
    with pytest.raises(SystemExit, match=f"another run: .*{message}"):
        distill(loras, out, **flags)


def test_a_teacher_is_resumed_with_its_own_validation_prompts_and_beta(tmp_path):
    train = partial(teacher, tmp_path / "run", save_every=1, steps=1)
    train()
    train = partial(train, resume="auto")
    with pytest.raises(SystemExit, match=f"validation prompts compose was {SUM}, now {SUM}"):
        train(eval_prompts="compose=toy/prompts/compose_val.txt")
    with pytest.raises(SystemExit, match="beta was 0.04, now 0.1"):
        train(beta=0.1)


def test_other_places_and_habits_are_the_same_run(made, loras, tmp_path):
    out, flags = made
    shutil.copytree(out, tmp_path / "moved")
    flags = flags | dict(model=shutil.copytree(flags["model"], tmp_path / "base"), keep=5, save_every=7)
    distill(loras, tmp_path / "moved", **flags | dict(micro_batch_size=2, gradient_checkpointing=True))
    assert len(read_log(tmp_path / "moved")) == 3


# -- the run's folder --------------------------------------------------------------------------------------


HOLDER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
input()
"""


def test_a_folder_belongs_to_one_process(tmp_path):
    line, pipe = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], subprocess.PIPE
    holder = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True)
    holder.stdout.readline()
    scripts = ["distill.py"], ["cold_start.py", "merge"], ["sample.py"], ["evaluate.py"], ["train_teacher.py"]
    for script in scripts:
        assert "another process is at work there" in refused(*script, out=tmp_path)
    holder.kill()
    holder.communicate()  # the lock falls with it
    assert "no such LoRA" in refused("sample.py", lora=tmp_path / "nothing", out=tmp_path)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    """A note, or filelock's own way, and on; what else goes wrong is refused."""

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        lock_folder(str(tmp_path / str(number)))
    assert capsys.readouterr().out.count("has no locks") >= 2
    number = errno.EIO
    with pytest.raises(SystemExit, match="cannot be written"):
        lock_folder(str(tmp_path))


def test_a_folder_belongs_to_one_run(loras, tmp_path):
    """Only its last checkpoint can be gone on from; a LoRA alone is one that a run left before its first."""
    train = partial(distill, loras, tmp_path, **EVERY_UPDATE)
    train(steps=2)
    kept, lora = checkpoint(tmp_path, 2), saved(tmp_path)
    for changes in ({}, {"seed": 3}, {"resume": tmp_path / "checkpoints/000001"}):
        with pytest.raises(SystemExit, match="an earlier run left .*000002; --resume auto"):
            train(steps=3, **changes)
    assert "an earlier run left" in refused("cold_start.py", "sft", out=tmp_path)
    for init in (tmp_path / "lora", tmp_path / "checkpoints/000002/lora/adapter_model.safetensors"):
        with pytest.raises(SystemExit, match="lies in --out"):
            train(steps=3, init=init)
    assert equal(kept, checkpoint(tmp_path, 2))
    train(steps=3, resume=tmp_path / "checkpoints/000002")
    assert saved_steps(tmp_path) == ["000002", "000003"]
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SystemExit, match="an earlier run left .*lora; --resume auto"):
        train(steps=2)
    train(steps=2, resume="auto")
    assert equal(kept, checkpoint(tmp_path, 2)) and equal(lora, saved(tmp_path))


def test_the_last_checkpoints_are_kept(loras, tmp_path):
    """Two, or --keep; what is not ours is left alone."""
    theirs = [tmp_path / "checkpoints" / name for name in ("20240101", "notes")]
    for folder in theirs:
        folder.mkdir(parents=True)
    distill(loras, tmp_path, **EVERY_UPDATE, steps=4)
    assert saved_steps(tmp_path) == ["000003", "000004"]
    distill(loras, tmp_path, **EVERY_UPDATE, steps=6, keep=3, resume="auto")
    assert saved_steps(tmp_path) == ["000004", "000005", "000006"] and all(map(Path.is_dir, theirs))
    for step in ("999999", "1000000"):
        (tmp_path / "checkpoints" / step).mkdir()
        (tmp_path / "checkpoints" / step / "state.pt").touch()
    assert saved_steps(tmp_path)[-1] == "1000000"


def test_words_are_no_folders(loras, tmp_path, monkeypatch):
    """`merge` and `base` mean the same where folders that are called so come to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "chdir", lambda folder: None)  # `run` stays here
    who = dict(model=BASE, dtype="float32", guidance=1, init="merge", anchor="base")
    train = partial(distill, loras, tmp_path / "run", **EVERY_UPDATE, **who)
    prompts = few("train", 8, tmp_path)
    train(steps=1, prompts=prompts)
    for word in ("merge", "base"):
        (tmp_path / word).mkdir()
    train(steps=2, prompts=prompts, resume="auto")
    assert last_step(tmp_path / "run") == 2


@pytest.mark.parametrize(
    "script", ["distill.py", "train_teacher.py", "sample.py", "evaluate.py", "cold_start.py"]
)
def test_a_folder_that_cannot_be_written_is_known_at_once(script, tmp_path):
    (tmp_path / "file").write_text("")
    mode = ["merge"] if script == "cold_start.py" else []
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert "cannot be written" in refused(script, *mode, out=out)


def test_links_are_followed(loras, tmp_path):
    """lora and checkpoints on another disk."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    out.mkdir()
    (disk / "checkpoints").mkdir(parents=True)
    for name in ("lora", "checkpoints"):
        (out / name).symlink_to(disk / name)
    train = partial(distill, loras, out, **EVERY_UPDATE)
    train(steps=1)
    train(steps=2, resume="auto")
    assert (disk / "lora/adapter_config.json").exists()
    assert sorted(os.listdir(disk)) == ["checkpoints", "lora"] and saved_steps(disk) == ["000001", "000002"]
    assert (out / "lora").is_symlink() and (out / "checkpoints").is_symlink()
