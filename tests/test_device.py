"""Scripts on a GPU that is none: its tensors say they are on another device, "meta", and compute on the CPU.
Tensors of two devices in one operation are refused as CUDA refuses them, and what would make the CPU wait for
a GPU is counted, by the line of ours that asked for it."""

import collections
import contextlib
import threading
import traceback
import types
from functools import partial

import pytest
import tiny
import torch
from conftest import ROOT, distill, random_b, run, sft, teacher
from torch.utils._python_dispatch import TorchDispatchMode

import flow_sde

A, GPU = torch.ops.aten, torch.device("meta")
INDEXING = (A.index.Tensor, A.index_put.default, A.index_put_.default, A._index_put_impl_.default)
WAITING = (A._local_scalar_dense.default, A.nonzero.default, A.masked_select.default)
waits = collections.Counter()  # {line of ours: times}


class OnGPU(torch.Tensor):
    """A tensor of the GPU that is none; `numbers` holds what it is."""

    @staticmethod
    def __new__(cls, numbers):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset())
        kind = dict(dtype=numbers.dtype, device=GPU, requires_grad=False)
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, **kind)
        made.numbers = numbers
        return made

    def __getitem__(self, key):
        """A list as an index would become a tensor in C++, past this file."""
        keys = list(key) if isinstance(key, tuple) else [key]
        for place, k in enumerate(keys):
            if isinstance(k, list):
                wait()
                keys[place] = OnGPU(torch.tensor(k))
        return super().__getitem__(tuple(keys))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class OnEveryCall(TorchDispatchMode):
    asleep = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {}) if self.asleep else computed(func, args, kwargs or {})


@contextlib.contextmanager
def asleep():
    """Nothing is pretended: transformers loads weights by way of meta tensors of its own."""
    OnEveryCall.asleep = True
    try:
        yield
    finally:
        OnEveryCall.asleep = False


def wait():
    """Count that the CPU waits here; what other threads wait for holds nobody up."""
    if threading.current_thread() is threading.main_thread():
        frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
        waits[[frame for frame in frames if frame.startswith(ROOT) and __file__ not in frame][-1]] += 1


def each(value, change):
    """An operation's arguments or results with each of their tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(each(v, change) for v in value)
    return value


def computed(func, args, kwargs):
    """An operation's result, computed on the CPU, if a GPU could."""
    gpu, cpu = [], []

    def numbers(tensor):
        (gpu if isinstance(tensor, OnGPU) else cpu).append(tensor)
        return getattr(tensor, "numbers", tensor)

    plain, options = each(args, numbers), {name: each(value, numbers) for name, value in kwargs.items()}
    device = options.get("device")
    to_gpu = bool(gpu) if device is None else torch.device(device) == GPU
    assert not any(t.is_meta for t in cpu), f"{func}: a tensor that was made past this file has no numbers"
    if func is A._to_copy.default:
        waiting = to_gpu != bool(gpu) and not options.get("non_blocking")
    elif func is A.copy_.default:
        waiting = gpu and cpu
    elif func in INDEXING:
        indices = [i for i in args[1] if i is not None]
        waiting = gpu and any(not isinstance(i, OnGPU) or i.dtype == torch.bool for i in indices)
    elif gpu and any(t.dim() for t in cpu):
        raise RuntimeError(f"tensors of two devices in {func}")
    else:
        waiting = gpu and func in WAITING
    if waiting:
        wait()
    if device is not None:
        options["device"] = "cpu"
    found = func(*plain, **options)
    return each(found, OnGPU) if to_gpu else found


@pytest.fixture
def gpu(monkeypatch):
    """Scripts run on the pretended GPU. Waits are those of the last update."""
    process = types.SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=GPU)
    process.gather = lambda t: t
    process.wait_for_everyone = process.end_training = lambda: None
    monkeypatch.setattr(flow_sde, "start_processes", lambda *a: process)
    monkeypatch.setattr(flow_sde, "to_device", lambda v, to: torch.as_tensor(v).to(to, non_blocking=True))
    pick, tolist, adamw = flow_sde.pick_prompts, torch.Tensor.tolist, torch.optim.AdamW
    load = flow_sde.load_network

    def load_network(kind, folder, dtype, device, how=None):
        with asleep():
            network = load(kind, folder, dtype, "cpu")
        return network.to(device)

    def by_way_of_the_cpu(make):
        def made(data, device=None, **how):
            return make(data, **how) if device is None else make(data, device="cpu", **how).to(device)

        return made

    def waiting_tolist(values):
        if isinstance(values, OnGPU):
            wait()
        return tolist(getattr(values, "numbers", values))

    monkeypatch.setattr(flow_sde, "load_network", load_network)
    monkeypatch.setattr(flow_sde, "pick_prompts", lambda *a: waits.clear() or pick(*a))
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, by_way_of_the_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "tolist", waiting_tolist)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **how: adamw(*a, **how))
    waits.clear()
    with OnEveryCall():
        yield


@pytest.mark.parametrize("stage", ["distill", "ppo", "sft", "teacher"])
def test_no_step_waits(stage, loras, tmp_path, gpu, numbers_only):
    """An update waits as often with more sampling steps in more micro-batches, so none of these waits."""
    train = {
        "distill": partial(distill, loras, guidance=2),
        "ppo": partial(distill, loras, objective="ppo", updates_per_rollout=1),
        "sft": partial(sft, loras),
        "teacher": partial(teacher, group_size=2, updates_per_rollout=1),
    }[stage]
    found = []
    for num_steps, micro_batch_size in ((2, 2), (3, 1)):
        flags = dict(batch_size=1 if stage == "teacher" else 2, micro_batch_size=micro_batch_size)
        train(tmp_path / str(num_steps), num_steps=num_steps, **flags, steps=1)
        found.append(dict(waits))
    assert found[0] and found[0] == found[1]


def test_no_step_of_a_picture_waits(loras, tmp_path, gpu):
    what = dict(lora=loras["ocr"], prompt="a cup", guidance=2, resolution=16, num_images=1)
    found = []
    for num_steps in (2, 3):
        waits.clear()
        run("sample.py", **what, num_steps=num_steps, out=tmp_path / str(num_steps))
        found.append(dict(waits))
    assert found[0] and found[0] == found[1]


@pytest.mark.parametrize("name", ["flux", "klein", "qwen", "zimage", "sana"])
def test_families(name, tmp_path, gpu, numbers_only):
    """No family mixes devices."""
    with asleep():
        base = tiny.build(name, str(tmp_path))
        model = flow_sde.family_of(flow_sde.pipeline_folder(base)[1])(base)
        model.new_adapter("x", 4, 8)
        flow_sde.save_lora(random_b(model.lora("x")), tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("a cup\ntwo cups and a dog\n")
    flags = dict(model=base, prompts=f"x={tmp_path}/prompts.txt", resolution=32, dtype="float32", steps=1)
    flags |= dict(
        num_steps=2, label_steps=1, batch_size=2, teachers=f"x={tmp_path}/lora", anchor="base", rank=4
    )
    run("distill.py", **flags, gradient_checkpointing=True, out=tmp_path / "student")


def test_devices_are_not_mixed(gpu):
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2, device=GPU) + torch.ones(2)
