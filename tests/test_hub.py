"""Models and teachers as the hub has them, on a tiny pipeline in SD3.5-Medium's folder layout."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import distill, equal, lora_of, read_json, read_log, refused, run, saved, stock_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import hub_pipeline, hub_teacher

from flow_sde import REVISIONS, SD3, fingerprint, generators, randn, save_lora

QUICK = dict(resolution=32, num_steps=3, batch_size=2)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """{"base", "peft", "diffusers", "full": folders; "tagged": GenEval's metadata; "mixed": our own lines
    with a task; "short": a .txt}"""
    root = tmp_path_factory.mktemp("hub")
    paths = {"base": hub_pipeline(root / "base")}
    for seed, layout in enumerate(("peft", "diffusers", "full"), 1):
        paths[layout] = hub_teacher(paths["base"], root / layout, seed, layout)
    counted = dict(include=[{"class": "clock", "count": 2}], exclude=[{"class": "clock", "count": 3}])
    tagged = {"tag": "counting", **counted, "prompt": "a photo of two clocks"}
    mixed = [{"task": task, "prompt": f"{task} {i}"} for task in ("ocr", "counts") for i in range(3)]
    lines = {
        "tagged.jsonl": [json.dumps(tagged)] * 3,
        "short.txt": ['a sign saying "NEW"', 'a cup that says "TEA"'],
        "mixed.jsonl": map(json.dumps, mixed),
    }
    for name, rows in lines.items():
        (root / name).write_text("\n".join(rows) + "\n")
        paths[name.split(".")[0]] = str(root / name)
    return paths


# -- every stage -------------------------------------------------------------------------------------------


def test_every_stage(hub, tmp_path, numbers_only):
    """With teachers in PEFT's layout, in diffusers' and our own, full fine-tunes, and the hub's defaults."""
    model, frugal = dict(model=hub["base"]), dict(gradient_checkpointing=True, offload_text_encoders=True)
    counts, ocr = f"counts={hub['tagged']}", f"ocr={hub['short']}"
    judged = dict(reward="jpeg", eval_prompts=counts, eval_num_steps=2)
    train = model | QUICK | frugal | dict(steps=1)
    run("train_teacher.py", **train, **judged, prompts=counts, group_size=2, out=tmp_path / "teacher")
    teachers = [f"ocr={hub['peft']}", f"counts={hub['diffusers']},guidance=1"]
    merge = dict(teachers=teachers, method="svd", rank=8, out=tmp_path / "merge")
    run("cold_start.py", "merge", **model, **merge)
    fine = dict(teachers=f"ocr={hub['full']},guidance=2", prompts=ocr)
    run("cold_start.py", "sft", **train, **fine, out=tmp_path / "sft")
    teachers.append(f"taste={tmp_path}/teacher/lora")
    prompts = [f"ocr={hub['mixed']}", f"counts={hub['mixed']}", f"taste={hub['short']}"]
    train |= judged | dict(batch_size=3, init=tmp_path / "merge/lora", anchor=f"{hub['full']},guidance=2")
    ns = run("distill.py", **train, teachers=teachers, prompts=prompts, out=tmp_path / "student")
    keys = {"distance/ocr", "distance/counts", "kl/taste", "distance/anchor"}
    assert keys <= read_log(tmp_path / "student")[-1].keys()
    its_own = {row["prompt"] for row in ns["prompts"]["ocr"]}
    assert its_own == {"ocr 0", "ocr 1", "ocr 2"}  # of the lines with a task
    assert all(p.dtype == torch.float32 for p in ns["params"])
    assert ns["model"].transformer.dtype == torch.float16
    models = ["base", f"student={tmp_path}/student/lora", f"full={hub['full']},guidance=1"]
    judge = dict(models=models, prompts=counts, reward="jpeg", resolution=32, eval_num_steps=2, no_t5=True)
    run("evaluate.py", **model, **judge, out=tmp_path / "table")
    rows = read_json(tmp_path, "table/results.json")
    assert [row["model"] for row in rows] == ["base", "student", "full"]


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_the_student_in_plain_diffusers_and_alone_gives_the_same_picture(layout, hub, tmp_path):
    """alpha is twice the rank: a scale lost on the way would show."""
    student, alone = tmp_path / "student", tmp_path / "alone"
    save_lora(lora_of(hub[layout], hub["base"]), student)
    draw = dict(resolution=64, num_steps=4, num_images=1, prompt="a cup", dtype="float32")

    def drawn(name, **flags):
        run("sample.py", **draw, **flags, out=tmp_path / name)
        return np.asarray(Image.open(tmp_path / name / "00000.png"), dtype=float)

    ours = drawn("ours", model=hub["base"], lora=student, merge=f"{alone}/")
    assert np.abs(ours - drawn("base", model=hub["base"])).mean() > 3
    assert np.abs(ours - drawn("merged", model=alone)).max() <= 1
    latents = randn(generators(0, 0, [0]), (16, 8, 8), "cpu")
    theirs = stock_pictures(hub["base"], ["a cup"], latents, 4, 4.5, lora=student)[0].movedim(0, -1).numpy()
    assert np.abs(ours - 255 * theirs).max() <= 1
    again = dict(model=hub["base"], lora=hub["peft"], merge=alone, prompt="x", out=tmp_path / "again")
    assert "that exists already" in refused("sample.py", **again)


def test_a_full_fine_tune_answers_beside_adapters(hub, tmp_path):
    """A transformer, or a pipeline with it."""
    other = tmp_path / "other"
    shutil.copytree(hub["base"], other, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(hub["full"], other / "transformer")
    model = SD3(hub["base"])
    model.new_adapter("student", 4, 8)
    for name, path in {"peft": hub["peft"], "full": hub["full"], "pipeline": str(other)}.items():
        model.load_teacher(name, path)
    assert model.full.keys() == {"full", "pipeline"}
    for name in "ab":  # LoRAs on one network of their own
        model.load_teacher(name, f"{hub['full']}+{hub['peft']},scale={1 + (name == 'b')}")
    assert model.full["a"] is model.full["b"] is model.full["full"]
    model.train_adapter("student")
    x, cond = randn(generators(0, 0, range(3)), (16, 4, 4), "cpu"), model.encode(["a", "b", "a"])
    assert torch.equal(cond[0][0], cond[0][2]) and not torch.equal(cond[0][0], cond[0][1])
    with torch.no_grad():
        base, full, lora = (model.velocity(x, 0.6, cond, name, 3.0) for name in ("base", "full", "peft"))
        assert torch.equal(model.velocity(x, 0.6, cond, "full", 3.0), full)  # no adapter is left on
        assert torch.equal(model.velocity(x, 0.6, cond, "pipeline", 3.0), full)
        alone = SD3(str(other))
        assert torch.allclose(alone.velocity(x, 0.6, cond, guidance=3.0), full, atol=1e-5)
        alone.load_teacher("a", hub["peft"])
        both = model.velocity(x, 0.6, cond, "a", 3.0)
        assert torch.allclose(alone.velocity(x, 0.6, cond, "a", 3.0), both, atol=1e-5)
        twice = model.velocity(x, 0.6, cond, "b", 3.0)
    assert len({v.sum().item() for v in (base, full, lora, both, twice)}) == 5


def test_a_full_fine_tune_where_only_a_lora_will_do_is_refused(hub, tmp_path):
    out, base = tmp_path / "out", hub["base"]
    assert "a full fine-tune" in refused("sample.py", model=base, lora=hub["full"], prompt="x", out=out)
    merge = dict(model=base, resolution=32, teachers=f"x={hub['full']}", prompts=f"x={hub['short']}")
    assert "x is a full fine-tune" in refused("distill.py", **merge, init="merge", out=out)
    assert "does not fit this model" in refused("evaluate.py", models=f"x={hub['full']}", out=out)


@pytest.mark.parametrize("dtype, least", [("float16", 0.999), ("bfloat16", 0.98)])
def test_half_precision_has_the_gradient_of_full(dtype, least, hub, tmp_path, gradients, numbers_only):
    """The frozen base is half, the LoRA, the SDE and the loss are float32: the gradient hardly differs."""
    who = dict(model=hub["base"], teachers=f"ocr={hub['peft']}", prompts=f"ocr={hub['short']}")
    for precision in ("float32", dtype):
        run("distill.py", **who, **QUICK, steps=1, dtype=precision, out=tmp_path / precision)
    full, half = gradients
    cosine = torch.cosine_similarity(full, half, 0).item()
    print(f"{dtype}: cosine {cosine}, size {half.norm() / full.norm()}")
    assert full.norm() > 0 and cosine > least and abs(half.norm() / full.norm() - 1) < 0.03


# -- text encoders -----------------------------------------------------------------------------------------


def test_text_encoders_are_on_the_device_only_while_they_encode(hub, monkeypatch):
    model, moves = SD3(hub["base"], offload=True), []
    expected, encode = SD3(hub["base"]).encode(["a cup"]), model.pipe.encode_prompt

    def spy(*args, **options):
        moves.append("encode")
        return encode(*args, **options)

    model.device = "the GPU"
    monkeypatch.setattr("flow_sde.free_memory", lambda device: math.inf)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moves.append(device))
    monkeypatch.setattr(model.pipe, "encode_prompt", spy)
    cond = model.encode(["a cup"])
    assert moves == ["the GPU"] * 3 + ["encode"] + ["cpu"] * 3 + ["the GPU"]  # the transformer, if it left
    assert all(torch.equal(a, b) for a, b in zip(cond, expected, strict=True))
    moves.clear()
    monkeypatch.setattr("flow_sde.free_memory", lambda device: 1000)  # the transformer has to make room
    model.encode(["a cup"])
    assert moves == ["cpu"] + ["the GPU"] * 3 + ["encode"] + ["cpu"] * 3 + ["the GPU"]


def test_prompts_of_many_updates_are_encoded_at_once(hub, monkeypatch):
    def pick(step):
        return None, [("task", {"prompt": prompt}) for prompt in (f"a cup of {step}", "a cup", "a cup")]

    moves, plain = [], SD3(hub["base"])
    model = SD3(hub["base"], offload=True)
    monkeypatch.setattr(model, "_move_encoders", moves.append)
    monkeypatch.setattr(model, "ahead", 3)
    for step in range(5):
        prompts = [f"a cup of {step}", "a cup", "a cup"]
        found = model.encode_update(pick(step)[1], step, pick)
        assert all(torch.equal(a, b) for a, b in zip(found, plain.encode(prompts), strict=True))
        assert len(moves) == (2 if step < 3 else 4)


def test_a_run_with_prompts_encoded_ahead_is_the_same(loras, tmp_path, numbers_only):
    """Also one that resumes between two of its encodings."""
    distill(loras, tmp_path / "a", steps=3)
    distill(loras, tmp_path / "b", steps=1, offload_text_encoders=True)
    distill(loras, tmp_path / "b", steps=3, offload_text_encoders=True, resume="auto")
    assert equal(saved(tmp_path / "a"), saved(tmp_path / "b"))


def test_without_t5(hub, tmp_path):
    """Its tokens are zeros, whether it is left out by a flag or absent from the pipeline."""
    small = shutil.copytree(hub["base"], tmp_path / "small", ignore=shutil.ignore_patterns("*_3"))
    index = read_json(small, "model_index.json")
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (small / "model_index.json").write_text(json.dumps(index))
    left_out, absent = (m.encode(["a cup"]) for m in (SD3(hub["base"], use_t5=False), SD3(str(small))))
    assert all(torch.equal(a, b) for a, b in zip(left_out, absent))
    assert left_out[0][:, 77:].abs().max() == 0 < SD3(hub["base"]).encode(["a cup"])[0][:, 77:].abs().max()


def test_the_tokens_that_t5_reads(hub):
    """--max-sequence-length, against the pipeline's own call: another length, another picture."""
    pictures, latents = {}, randn(generators(0, 0, [0]), (16, 8, 8), "cpu")
    for length in (128, 256):
        model = SD3(hub["base"], max_sequence_length=length)
        assert model.encode(["a cup"])[0].shape[1] == 77 + length
        pictures[length] = model.generate(["a cup"], generators(0, 0, [0]), 3, 64, guidance=4.5)
        theirs = stock_pictures(hub["base"], ["a cup"], latents, 3, 4.5, length=length)
        assert (pictures[length] - theirs).abs().max() < 1e-3
    assert (pictures[128] - pictures[256]).abs().max() > 1e-2


# -- ids and revisions -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's, which is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    REVISIONS.clear()
    return tmp_path / "hub"


REVISION = "0123456789012345678901234567890123456789"


def test_hub_ids(hub, cache, tmp_path):
    """A model, a LoRA and a full fine-tune by hub id, and those of a folder or a file in a repository, from a
    cache filled as huggingface_hub fills it."""
    nested = {"GenEvalTeacher/lora": "peft", "loras": "diffusers", "a/full": "full"}
    places = [("base", "", "base"), ("peft", "", "peft"), ("full", "", "full")]
    places += [("many", folder, what) for folder, what in nested.items()]
    for name, folder, what in places:
        repository = cache / f"models--someone--{name}"
        shutil.copytree(hub[what], repository / "snapshots" / REVISION / folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(REVISION)
    ids = {
        "lora": "someone/peft",
        "full": "someone/full",
        "nested": "someone/many/GenEvalTeacher/lora",
        "deep": "someone/many/a/full",
        "file": "someone/many/loras/pytorch_lora_weights.safetensors",
        "peft": "someone/many/GenEvalTeacher/lora/adapter_model.safetensors",
    }
    flags = dict(model="someone/base", prompts=f"x={hub['short']}", reward="jpeg")
    flags |= dict(resolution=32, eval_num_steps=1)
    out = tmp_path / "out"
    run("evaluate.py", **flags, models=[f"{name}={path}" for name, path in ids.items()], out=out)
    drawn = {}
    for name in ids:
        (file,) = (out / name / "x/samples").glob("*_000000.png")
        drawn[name] = file.read_bytes()
    assert drawn["lora"] == drawn["nested"] == drawn["peft"] and drawn["full"] == drawn["deep"]
    assert len({drawn[name] for name in ("lora", "full", "file")}) == 3
    for path, message in (
        ("someone/nothing", "someone/nothing: neither a local path nor to be had from the hub"),
        ("someone/many/elsewhere", "someone/many is on the hub, but has no elsewhere"),
    ):
        assert message in refused("evaluate.py", **flags, models=f"lora={path}", out=tmp_path / "other")


def test_a_hub_id_is_pinned_to_its_revision(cache):
    """By name, by a folder in it and by its path in the cache."""
    repository = cache / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    for revision in ("0" * 40, "1" * 40):
        deep = repository / "snapshots" / revision / "deep"
        deep.mkdir(parents=True)
        (repository / "refs/main").write_text(revision)
        assert fingerprint("some/one") == f"some/one@{revision}"
        (repository / "refs/main").write_text("2" * 40)  # what others push while this process runs
        assert fingerprint("some/one/deep") == fingerprint(str(deep)) == f"some/one/deep@{revision}"
        REVISIONS.clear()
    assert fingerprint("merge") == "merge"


def test_content_decides_what_a_fine_tune_is(hub, tmp_path):
    """A file of 300 MB whose bytes change in place, a LoRA's file with its settings beside it, and an
    evaluation of a fine-tune that did."""
    large, seen = tmp_path / "large.safetensors", []
    with open(large, "wb") as file:
        file.truncate(300_000_000)
    for byte in (b"\0", b"\1", b"\1"):
        with open(large, "r+b") as file:
            file.seek(299_000_000)
            file.write(byte)
        seen.append(fingerprint(str(large)))
    assert seen[0] != seen[1] == seen[2]
    lora = shutil.copytree(hub["peft"], tmp_path / "lora")
    file, settings = str(lora / "adapter_model.safetensors"), lora / "adapter_config.json"
    before = fingerprint(file)
    settings.write_text(json.dumps(read_json(settings) | {"lora_alpha": 1}))  # a LoRA of another strength
    assert fingerprint(file) != before
    fine = shutil.copytree(hub["full"], tmp_path / "full")
    flags = dict(model=hub["base"], models=f"x={fine}", prompts=f"counts={hub['tagged']}", reward="jpeg")
    flags |= dict(resolution=32, eval_num_steps=1, out=tmp_path / "table")
    run("evaluate.py", **flags)
    changed(fine, "", lambda tensors: {name: 1.01 * tensor for name, tensor in tensors.items()})
    assert "LoRA was" in refused("evaluate.py", **flags)


def test_alpha_patterns_are_regular_expressions_as_in_peft(hub, tmp_path):
    shutil.copytree(hub["peft"], tmp_path / "lora")
    file = tmp_path / "lora/adapter_config.json"
    patterns = {r"transformer_blocks\.0\..*": 8, "attn.to_k": 4}
    file.write_text(json.dumps(read_json(file) | {"alpha_pattern": patterns}))
    alphas = {n: alpha for n, (_, _, alpha) in lora_of(tmp_path / "lora", hub["base"]).items()}
    for n, alpha in alphas.items():
        expected = 4 if n.endswith("attn.to_k") else 64
        assert alpha == (8 if n.startswith("transformer_blocks.0.") else expected)
    assert set(alphas.values()) == {8, 4, 64}


# -- files that are not what they say ----------------------------------------------------------------------


def changed(folder, part, change=None, config=None):
    """Another `part` in a pipeline's folder: its tensors after `change`, or other values in its
    config.json."""
    name = "model.safetensors" if "encoder" in part else "diffusion_pytorch_model.safetensors"
    file, settings = Path(folder, part, name), Path(folder, part, "config.json")
    if change:
        save_file(change(load_file(file)), file, {"format": "pt"})
    if config:
        settings.write_text(json.dumps(read_json(settings) | config))


def before(prefix):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def without(text):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if text not in key}


def only(name, change):
    return lambda tensors: {key: change(tensor) if key == name else tensor for key, tensor in tensors.items()}


def float8(tensor):
    return tensor.to(torch.float8_e4m3fn)


NAN, FC1 = float("nan"), "text_model.encoder.layers.1.mlp.fc1.bias"
TO_Q = "transformer_blocks.0.attn.to_q.weight"
FAULTS = {  # part: [(what, change of its tensors, change of its config, the line)]
    "text_encoder": [
        ("wrapped", before("module."), None, "unexpected are module."),
        ("cut", without("layers.1.mlp.fc1"), None, "missing are " + FC1),
        ("more", lambda tensors: tensors | {"nonsense": torch.zeros(1)}, None, "unexpected are nonsense"),
        ("shape", only(FC1, lambda bias: bias[:5]), None, "of another shape are " + FC1),
        ("quantised", None, {"quantization_config": {"quant_method": "torchao"}}, "a quantized network"),
    ],
    "transformer": [
        ("compiled", before("_orig_mod."), None, "unexpected are _orig_mod."),
        ("prefixed", before("transformer."), None, "unexpected are transformer."),
        ("lost norm", without("norm_q"), None, "missing are transformer_blocks.0.attn.norm_q.weight"),
        ("extra norm", None, {"qk_norm": None}, "unexpected are transformer_blocks.0.attn.norm_added_k"),
        ("shape", only(TO_Q, lambda weight: weight[:5]), None, TO_Q + " expected shape"),
        ("float8", only("proj_out.weight", float8), None, "a quantized network"),
        ("nan", only("proj_out.bias", lambda bias: bias * NAN), None, "proj_out.bias has values that are"),
        ("large", only("proj_out.bias", lambda bias: bias.float() + 7e4), None, "not finite (as float16)"),
    ],
    "vae": [("nan", only("decoder.conv_in.bias", lambda bias: bias * NAN), None, "decoder.conv_in.bias has")],
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_base_that_is_not_what_its_files_say_is_refused(part, hub, tmp_path):
    """No weight is drawn at random or left out without a word; nor where the transformer is a teacher's."""
    for what, change, config, message in FAULTS[part]:
        folder = shutil.copytree(hub["base"], tmp_path / what)
        changed(folder, part, change, config)
        with pytest.raises(SystemExit) as caught:
            SD3(str(folder), torch.float16 if what == "large" else torch.float32)
        said = str(caught.value)
        assert message in said and f"/{part}" in said and "\n" not in said, (what, said)
    if part == "transformer":
        model = SD3(hub["base"])
        with pytest.raises(SystemExit, match="unexpected are _orig_mod."):
            model.load_teacher("x", str(tmp_path / "compiled"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_parts_that_are_not_whole_are_refused(part, hub, tmp_path):
    """A file, or one of several, that is cut, empty, a Git LFS pointer or not there."""
    folder = shutil.copytree(hub["base"], tmp_path / "base")
    file = min((folder / part).glob("*.safetensors"))
    data = file.read_bytes()
    for kept in (data[: len(data) // 2], b"", POINTER, None):
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        with pytest.raises(SystemExit) as caught:
            SD3(str(folder))
        said = str(caught.value)
        assert ("not a whole safetensors file" in said or kept is None) and part in said and "\n" not in said


@pytest.mark.parametrize(
    "part, lost", [("tokenizer", ["vocab.json", "merges.txt"]), ("tokenizer_3", ["tokenizer.json"])]
)
def test_a_tokenizer_without_its_vocabulary_is_refused(part, lost, hub, tmp_path):
    folder = shutil.copytree(hub["base"], tmp_path / "base")
    for file in lost:
        os.remove(folder / part / file)
    with pytest.raises(SystemExit, match=f"{part} has no whole vocabulary"):
        SD3(str(folder))
