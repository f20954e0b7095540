"""Is everything right on CUDA? The toy there against the toy on the CPU in float32: numbers first, then every
script. Without CUDA the numbers are those of the CPU's half precision, and test_device.py has the scripts."""

import os

import pytest
import torch
from conftest import BASE, ROOT, TASKS, command, few, finish, read_json, read_log

from flow_sde import SD3, generators, randn, update_average

CUDA = torch.cuda.is_available()
PROMPTS = ["two red circles and one blue square", 'a yellow sign saying "HAT"', "a red house", "a pine"]


def numbers(dtype, device, checkpointing=False):
    """What the networks make of fixed inputs: {what: tensor}, float64 on the CPU."""
    model = SD3(BASE, dtype, device, gradient_checkpointing=checkpointing)
    for name in TASKS:
        model.load_adapter(name, os.path.join(ROOT, "toy/teachers", name))
    model.copy_adapter("scene", "student")
    params = model.train_adapter("student")
    x, w = (randn(generators(seed, 0, range(4)), model.latent_shape(32), device) for seed in (0, 1))
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        asked = {"ocr": 1, "base": 4, "compose": 2}  # and their guidance
        adapters = [model.velocity(x, 0.7, cond, name, guidance) for name, guidance in asked.items()]
    v = model.velocity(x, 0.7, cond, "student", 4.5)
    with torch.no_grad():
        model.velocity(x, 0.7, cond, "compose", 2.0)
    (v * w).sum().backward()
    update_average(model.adapters["ocr"], model.adapters["compose"], decay=0.9, update=2)
    with torch.no_grad():
        averaged = model.velocity(x, 0.7, cond, "ocr")
    found = {
        "embeddings": cond[0],
        "pooled": cond[1],
        "adapters": torch.cat(adapters),
        "average": averaged,
        "student": v.detach(),
        "gradient": torch.cat([p.grad.flatten() for p in params]),
        "pictures": model.decode(x),
    }
    return {what: tensor.cpu().double() for what, tensor in found.items()}


@pytest.mark.parametrize(
    "dtype, checkpointing, most",
    [
        (torch.float32, False, 2e-3),
        (torch.float32, True, 2e-3),
        (torch.float16, False, 2e-2),
        (torch.bfloat16, False, 0.15),
    ],
)
def test_numbers(dtype, checkpointing, most):
    exact, found = numbers(torch.float32, "cpu"), numbers(dtype, "cuda" if CUDA else "cpu", checkpointing)
    off = {what: ((found[what] - exact[what]).norm() / exact[what].norm()).item() for what in exact}
    print("\n" + ", ".join(f"{what} {value:.1e}" for what, value in off.items()))
    assert max(off.values()) < most


QUICK = dict(steps=2, batch_size=6, micro_batch_size=3, num_steps=4, guidance=2)
DISTILL = QUICK | dict(eval_num_steps=2, eval_prompts=[], reward=[])
FINE = dict(teachers=["compose=toy/base/transformer", "ocr=toy/teachers/ocr"], init="none")
FINE["prompts"] = [f"{task}=toy/prompts/{task}_train.txt" for task in ("compose", "ocr")]
SCRIPTS = {
    "distill": (["distill.py"], DISTILL),
    "ppo": (["distill.py"], DISTILL | dict(objective="ppo")),
    "frugal": (["distill.py"], DISTILL | dict(gradient_checkpointing=True, offload_text_encoders=True)),
    "compiled": (["distill.py"], DISTILL | dict(compile=True)),
    "float16": (["distill.py"], DISTILL | dict(dtype="float16")),
    "bfloat16": (["distill.py"], DISTILL | dict(dtype="bfloat16")),
    "fine-tune": (["distill.py"], DISTILL | FINE),
    "sft": (["cold_start.py", "sft"], QUICK),
    "teacher": (["train_teacher.py"], QUICK | dict(group_size=4, sde_window=2, eval_num_steps=4)),
    "evaluate": (["evaluate.py"], dict(models=["base", "x=toy/teachers/ocr,guidance=2"], reward="toy.ocr")),
}


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name, tmp_path):
    """The first update's numbers, and scores of pictures (whose letters can jump), as on the CPU in
    float32."""
    (script, flags), logs, scores = SCRIPTS[name], [], []
    for hidden in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        out = tmp_path / str(len(logs) + len(scores))
        if hidden:
            flags = {flag: value for flag, value in flags.items() if flag not in ("compile", "dtype")}
        if name == "evaluate":
            flags = flags | {"prompts": few("test", 8, tmp_path)[1]}
        environment = os.environ | hidden | {"OMP_NUM_THREADS": "2"}
        got = finish(command(*script, **flags, out=out), env=environment)
        assert got.returncode == 0, got.stderr[-3000:]
        if name != "evaluate":
            logs.append(read_log(out)[:1])
        if name in ("evaluate", "teacher"):
            scores.append([row["scores"] for row in read_json(out, "results.json")])
    most = {"float16": 0.05, "bfloat16": 0.3}.get(name, 0.02)
    for here, there in zip(*logs):
        for key in here.keys() - {"seconds", "memory_gb", "kl_by_sigma"}:
            assert here[key] == pytest.approx(there[key], rel=most, abs=1e-6), key
    for here, there in zip(*scores):
        assert here == pytest.approx(there, abs=0.06)
