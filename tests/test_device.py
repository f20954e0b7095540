"""Every script on a GPU that is none: tensors that say they are on "gpu:0", but their numbers lie on the CPU.
Tensors of two devices in one operation are refused as CUDA refuses them, and whatever would make the CPU wait
for a GPU is counted, by the statement of the script."""

import ast
import collections
import functools
import os
import sys
import threading
import types
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from conftest import BASE, ROOT, distill, few, random_b, read_log, run, sft, specs, teacher
from torch.utils import _python_dispatch as dispatch
from torch.utils import _pytree as tree
from torch.utils import backend_registration

import flow_sde
import toy
from flow_sde import SD3, to_device, update_average

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no devices made in Python", allow_module_level=True)
A, GPU = torch.ops.aten, "gpu:0"
INDEXING = (A.index.Tensor, A.index_put.default, A.index_put_.default, A._index_put_impl_.default)


@functools.cache
def statement(file, line):
    """The statement of a script that spans a line; of a loop or a condition, its head."""
    lines, found = Path(file).read_text().splitlines(), None
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno:
            found = node  # the innermost comes last
    last = found.body[0].lineno - 1 if hasattr(found, "body") else found.end_lineno
    return " ".join(text.strip() for text in lines[found.lineno - 1 : max(last, found.lineno)])


class OnGPU(torch.Tensor):
    """A tensor of the GPU that is none; `numbers` holds what it is."""

    @staticmethod
    def __new__(cls, numbers):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset())
        kind = dict(dtype=numbers.dtype, device=GPU)
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, **kind)
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Pretend.main.__torch_dispatch__(func, types, args, kwargs)


class Pretend(dispatch.TorchDispatchMode):
    """Computes every operation on the CPU, having checked that a GPU could, and counts the waits: {(what,
    statement of the script): times}."""

    main = None

    def __init__(self, waits):
        super().__init__()
        self.waits = waits
        Pretend.main = Pretend.main or self

    def note(self, what):
        frame = sys._getframe(2)
        while frame:
            code = frame.f_code
            if code.co_name == "<module>" and os.path.dirname(code.co_filename) == ROOT:
                self.waits[what, statement(code.co_filename, frame.f_lineno)] += 1
                break
            frame = frame.f_back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        gpu, cpu = ([t for t in tensors if isinstance(t, OnGPU) == there] for there in (True, False))
        device = kwargs.get("device")
        there = bool(gpu) if device is None else torch.device(device).type == "gpu"
        copy = func is A._to_copy.default
        moved = copy and there != bool(gpu) and not kwargs.get("non_blocking")
        if moved or func is A.copy_.default and gpu and cpu:
            self.note("copy")
        elif func is A._local_scalar_dense.default and gpu:
            self.note("number")
        elif func in INDEXING and gpu:
            if any(i is not None and (not isinstance(i, OnGPU) or i.dtype == torch.bool) for i in args[1]):
                self.note("index")
        elif not copy and gpu and any(t.dim() for t in cpu):
            raise RuntimeError(f"tensors of two devices in {func}")
        inside, options = tree.tree_map_only(OnGPU, lambda t: t.numbers, (args, kwargs))
        if device is not None:
            options["device"] = "cpu"
        with dispatch._disable_current_modes():
            out = func(*inside, **options)
        if not there:
            return out
        out = tree.tree_map_only(torch.Tensor, OnGPU, out)
        aliased = gpu and isinstance(args[0], torch.Tensor)
        return dispatch.return_and_correct_aliasing(func, args, kwargs, out) if aliased else out


@pytest.fixture
def gpu(monkeypatch):
    """All tensors of a script on the pretended GPU; the waits of its last update or, without updates, of
    all."""
    if not hasattr(torch, "gpu"):
        backend_registration._setup_privateuseone_for_python_backend("gpu")
        torch.gpu.get_amp_supported_dtype = list  # which gradient checkpointing asks for ever after
    waits = collections.Counter()
    tolist, pick, start = torch.Tensor.tolist, flow_sde.pick_prompts, threading.Thread.run
    process = types.SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
    process.device, process.gather = torch.device(GPU), lambda t: t
    process.wait_for_everyone = process.end_training = lambda: None
    monkeypatch.setattr(flow_sde, "start_processes", lambda *a: process)
    monkeypatch.setattr(accelerate, "PartialState", lambda: process)
    monkeypatch.setattr(flow_sde, "to_device", lambda v, to: torch.as_tensor(v).to(to, non_blocking=True))
    monkeypatch.setattr(flow_sde, "pick_prompts", lambda *a: waits.clear() or pick(*a))

    def waiting_tolist(tensor):
        if isinstance(tensor, OnGPU):
            Pretend.main.note("number")
        return tolist(getattr(tensor, "numbers", tensor))

    monkeypatch.setattr(torch.Tensor, "tolist", waiting_tolist)

    def in_thread(self):  # modes are a thread's own
        torch._C._set_only_lift_cpu_tensors(True)
        with Pretend(collections.Counter()):
            start(self)

    monkeypatch.setattr(threading.Thread, "run", in_thread)
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU, then copied
    with Pretend(waits), torch.autograd.set_multithreading_enabled(False):
        yield waits
    Pretend.main = None
    torch._C._set_only_lift_cpu_tensors(lift)


def only_at(waits, *statements):
    """Nothing waits but in statements of the script that contain one of these: none of them is passed more
    than once an update."""
    found = {key: times for key, times in waits.items() if not any(known in key[1] for known in statements)}
    assert waits and not found, found


UPDATE = ("model.encode(", "run.stopping()", "descend(", "run.save(", "save_lora(")
DISTILL = (*UPDATE, "labels = ", "kls[", "kl_sum, number in zip(", "anchor_sum", "by_sigma", "draw_grid()")


@pytest.mark.parametrize("objective", ["kl", "ppo"])
def test_distill(objective, loras, tmp_path, gpu):
    """ppo with a full fine-tune for a teacher."""
    paths = loras | ({"ocr": ROOT + "/toy/base/transformer"} if objective == "ppo" else {})
    flags = dict(teachers=specs(paths), micro_batch_size=2, num_steps=3, guidance=2)
    distill(loras, tmp_path, objective=objective, **flags)
    only_at(gpu, *DISTILL, "ppo_updates(")
    walks = {kind: times for (kind, statement), times in gpu.items() if "ppo_updates(" in statement}
    assert walks == (
        {"copy": 2, "number": 4} if objective == "ppo" else {}
    )  # two updates: to stop? and a norm


@pytest.mark.parametrize("name", ["flux", "klein", "flux2", "qwen", "zimage", "sana"])
def test_families(name, tmp_path, gpu):
    """In diffusers, Qwen-Image's network copies a number at every forward, and Z-Image's its frequencies at
    the first: the second update counts."""
    with dispatch._disable_current_modes():
        base = tiny.build(name, str(tmp_path))
        model = flow_sde.FAMILIES[flow_sde.pipeline_folder(base)[1].__name__](base)
        model.new_adapter("x", 4, 8)
        flow_sde.save_lora(random_b(model.lora("x")), tmp_path / "lora")
    (tmp_path / "prompts.txt").write_text("a cup\ntwo cups and a dog\n")
    quick = dict(model=base, prompts=f"x={tmp_path}/prompts.txt", resolution=32, dtype="float32")
    quick |= dict(steps=2, num_steps=3, batch_size=2, micro_batch_size=2, eval_num_steps=2)
    flags = dict(teachers=f"x={tmp_path}/lora", anchor="base", rank=4, gradient_checkpointing=True)
    run("distill.py", **quick, **flags, out=tmp_path / "student")
    only_at(gpu, *DISTILL, *(["label(", "in trajectory"] if name == "qwen" else []))
    if name == "zimage":  # its prompts are lists
        run("train_teacher.py", **quick, reward="jpeg", group_size=2, out=tmp_path / "teacher")


def test_train_teacher(tmp_path, gpu):
    teacher(tmp_path / "run", steps=1, micro_batch_size=4, sde_window=2, guidance=2)
    only_at(gpu, *UPDATE, "gather(", "advantage", "kl_name", "clip_fraction", "validate(", "draw_grid()")


def test_sft(loras, tmp_path, gpu):
    sft(loras, tmp_path, micro_batch_size=2, guidance=2)
    only_at(gpu, *UPDATE, "reduce_sum(kl_sum)")


def test_pictures(tmp_path, loras, gpu):
    """Drawing waits when its prompts are encoded, once for each text encoder, and not in its steps; pictures
    are written by another thread."""
    encoders, flags = 3, dict(guidance=2, resolution=16, out=tmp_path)
    what = dict(models=["base", f"ocr={loras['ocr']}"], tasks=few("test", 3, tmp_path)[1], reward="jpeg")
    run("evaluate.py", **what, **flags, eval_num_steps=3, eval_batch_size=2)
    assert sum(times for (_, text), times in gpu.items() if text == "guarded(draw_all)") == 4 * encoders
    loading = ("load_model(", "model.load_teacher(", "model.load_adapter(", "stop.arrived(")
    only_at(gpu, *loading, "check_rewards(", "guarded(draw_all)")
    gpu.clear()
    run("sample.py", lora=loras["ocr"], prompt="a cup", num_images=2, num_steps=3, **flags)
    drawing = sum(times for (_, text), times in gpu.items() if "model.generate(" in text)
    assert drawing == encoders + 1  # is the picture finite?
    only_at(gpu, *loading, "model.generate(", "pil(drawn)")


def test_the_average_that_is_drawn_is_the_latest(loras, gpu):
    """CUDA's torch._foreach_lerp_ writes what PyTorch does not count as written."""
    model = SD3(BASE, device=GPU)
    model.load_adapter("ema", loras["ocr"])
    x = torch.ones(1, *model.latent_shape(16), device=GPU)
    with torch.no_grad():
        before, base = (model.velocity(x, 0.5, model.null, name) for name in ("ema", "base"))
        update_average(model.adapters["ema"], [0 * p for p in model.adapters["ema"]], decay=0.9, update=1)
        after = model.velocity(x, 0.5, model.null, "ema")
    assert not torch.equal(before.numbers, base.numbers) and torch.equal(after.numbers, base.numbers)


def test_rewards_are_loaded_before_threads_score(loras, tmp_path, gpu, monkeypatch):
    """transformers changes global state while it loads a model, so the first call is the main thread's."""
    calls, quality = [], toy.quality

    def watched(images, *rest):
        calls.append((images.device.type, threading.current_thread() is threading.main_thread()))
        return quality(getattr(images, "numbers", images), *rest)

    monkeypatch.setattr(toy, "quality", watched)
    distill(loras, tmp_path, eval_prompts=few("test", 2, tmp_path)[0], reward="toy.quality")
    on_gpu = [in_main for device, in_main in calls if device == "gpu"]
    assert on_gpu[0] and not all(on_gpu)


def test_micro_batches_are_as_large_as_fits(loras, tmp_path, gpu, monkeypatch, capsys):
    """Three samples do not fit, one does: the update is the same. What does not fit another process does not
    fit this one. If not even one sample fits, or memory runs out later, the flags that help are named."""
    most, velocity = 2, SD3.velocity

    def limited(model, x, *args, **options):
        if len(x) > most:
            if most == 0:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return velocity(model, x, *args, **options)

    # with --model, the toy's own defaults are out of the way
    flags = dict(model=ROOT + "/toy/base", dtype="float32", guidance=1, num_steps=3, eval_batch_size=2)
    distill(loras, tmp_path / "given", **flags)
    monkeypatch.setattr(SD3, "velocity", limited)
    flags["micro_batch_size"] = None
    ours = distill(loras, tmp_path / "chosen", **flags)
    assert ours["micro"] == 1
    given, chosen = (read_log(tmp_path / name)[0] for name in ("given", "chosen"))
    assert all(chosen[key] == pytest.approx(given[key], rel=1e-4) for key in given if key != "seconds")
    most, failures = 6, iter((1.0, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(flow_sde, "reduce_sum", lambda failed: failed + next(failures))
        assert flow_sde.what_fits(ours["model"], 6, ours["shape"], 1.0) == 3
    most = 0
    with pytest.raises(RuntimeError, match="MPS") as caught:
        distill(loras, tmp_path / "none", **flags)
    sys.excepthook(caught.type, caught.value, None)
    said = capsys.readouterr().err
    assert "less of it is needed with --micro-batch-size 1, --eval-batch-size 1, --gradient-check" in said
    assert "--offload-text-encoders, --no-t5" in said


def test_numbers_are_sent_to_every_kind_of_device(gpu):
    """Apple's and Intel's too, not CUDA's only."""
    assert to_device([1.0, 2.0], GPU).device.type == "gpu" and to_device([1.0], "cpu").device.type == "cpu"
