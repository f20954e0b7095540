"""Models and teachers as the hub has them: every stage by command line on a tiny pipeline in SD3.5-Medium's folder layout."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, hub_pipeline, hub_teacher, lora_of, read_log, refused, run
from PIL import Image

from flow_sde import SD3, generators, randn

QUICK = ["--resolution", 64, "--num-steps", 3, "--steps", 2]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """{"base", "peft", "diffusers", "full": folders; "tagged": GenEval's metadata; "mixed": our own lines with a task; "short": a .txt}"""
    root = tmp_path_factory.mktemp("hub")
    paths = {"base": hub_pipeline(root / "base")}
    for seed, layout in enumerate(("peft", "diffusers", "full"), 1):
        paths[layout] = hub_teacher(paths["base"], root / layout, seed, layout)
    tagged = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    }
    lines = {
        "tagged.jsonl": [json.dumps(tagged)] * 3,
        "short.txt": ['a sign saying "NEW"', 'a cup that says "TEA"'],
        "mixed.jsonl": [
            json.dumps({"task": t, "prompt": f"{t} {i}"}) for t in ("ocr", "counts") for i in range(3)
        ],
    }
    for name, rows in lines.items():
        (root / name).write_text("\n".join(rows) + "\n")
        paths[name.split(".")[0]] = str(root / name)
    return paths


def picture(path):
    return np.asarray(Image.open(path), dtype=float)


def test_every_stage(hub, tmp_path):
    model = ["--model", hub["base"]]
    memory = ["--gradient-checkpointing", "--offload-text-encoders"]
    run(
        "train_teacher.py",
        *model,
        *QUICK,
        "--reward",
        "jpeg",
        "--prompts",
        f"counts={hub['tagged']}",
        "--eval-prompts",
        f"counts={hub['tagged']}",
        "--batch-size",
        2,
        "--group-size",
        3,
        "--micro-batch-size",
        3,
        "--eval-num-steps",
        2,
        *memory,
        "--out",
        tmp_path / "teacher",
    )
    teachers = ["--teachers", f"ocr={hub['peft']}", f"counts={hub['diffusers']},guidance=1"]
    run(
        "cold_start.py",
        "merge",
        *model,
        *teachers,
        "--method",
        "svd",
        "--rank",
        8,
        "--out",
        tmp_path / "merge",
    )
    run(
        "cold_start.py",
        "sft",
        *model,
        *QUICK,
        "--teachers",
        f"ocr={hub['full']},guidance=2",
        "--prompts",
        f"ocr={hub['short']}",
        "--batch-size",
        2,
        *memory,
        "--out",
        tmp_path / "sft",
    )
    distill = run(
        "distill.py",
        *model,
        *QUICK,
        *teachers,
        f"taste={tmp_path}/teacher/lora",
        "--prompts",
        f"ocr={hub['mixed']}",
        f"counts={hub['mixed']}",
        f"taste={hub['short']}",
        "--init",
        tmp_path / "merge/lora",
        "--anchor",
        f"{hub['full']},guidance=2",
        "--batch-size",
        3,
        *memory,
        "--eval-num-steps",
        2,
        "--eval-prompts",
        f"counts={hub['tagged']}",
        "--reward",
        "jpeg",
        "--out",
        tmp_path / "student",
    )
    assert {"kl/ocr", "kl/counts", "kl/taste", "kl_to_anchor"} <= read_log(tmp_path / "student")[-1].keys()
    assert {row["prompt"] for row in distill["prompts"]["ocr"]} == {
        "ocr 0",
        "ocr 1",
        "ocr 2",
    }  # of the lines with a task, its own
    assert (
        all(p.dtype == torch.float32 for p in distill["params"])
        and distill["model"].transformer.dtype == torch.float16
    )
    run(
        "evaluate.py",
        *model,
        "--models",
        "base",
        f"student={tmp_path}/student/lora",
        f"full={hub['full']},guidance=1",
        "--prompts",
        f"counts={hub['tagged']}",
        "--reward",
        "jpeg",
        "--resolution",
        64,
        "--eval-num-steps",
        2,
        "--no-t5",
        "--out",
        tmp_path / "table",
    )
    assert [row["model"] for row in json.load(open(tmp_path / "table/results.json"))] == [
        "base",
        "student",
        "full",
    ]


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_the_student_in_plain_diffusers_and_alone_gives_the_same_picture(layout, hub, tmp_path):
    """alpha is twice the rank: a scale lost on the way would show."""
    from diffusers import StableDiffusion3Pipeline

    from flow_sde import save_lora

    save_lora(lora_of(hub[layout], hub["base"]), tmp_path / "student")
    draw = [
        "--resolution",
        64,
        "--num-steps",
        4,
        "--num-images",
        1,
        "--prompt",
        "a cup",
        "--dtype",
        "float32",
    ]
    run(
        "sample.py",
        "--model",
        hub["base"],
        *draw,
        "--lora",
        tmp_path / "student",
        "--merge",
        f"{tmp_path}/alone/",
        "--out",
        tmp_path / "a",
    )
    run("sample.py", "--model", tmp_path / "alone", *draw, "--out", tmp_path / "b")
    run("sample.py", "--model", hub["base"], *draw, "--out", tmp_path / "base")
    ours, alone, base = (picture(tmp_path / d / "00000.png") for d in ("a", "b", "base"))
    assert np.abs(ours - base).mean() > 3 and np.abs(ours - alone).max() <= 1
    pipe = StableDiffusion3Pipeline.from_pretrained(hub["base"], torch_dtype=torch.float32)
    pipe.load_lora_weights(str(tmp_path / "student"))
    pipe.set_progress_bar_config(disable=True)
    theirs = (
        pipe(
            "a cup",
            negative_prompt="",
            latents=randn(generators(0, 0, [0]), (16, 8, 8), "cpu"),
            num_inference_steps=4,
            guidance_scale=4.5,
            height=64,
            width=64,
            output_type="np",
        ).images[0]
        * 255
    )
    assert np.abs(ours - theirs).max() <= 1
    again = refused(
        "sample.py",
        "--model",
        hub["base"],
        "--lora",
        hub["peft"],
        "--merge",
        tmp_path / "alone",
        "--prompt",
        "x",
    )
    assert "that exists already" in again


def test_a_full_fine_tune_answers_beside_adapters(hub, tmp_path):
    model = SD3(hub["base"])
    model.new_adapter("student", 4, 8)
    for name in ("peft", "full"):
        model.load_teacher(name, hub[name])
    model.train_adapter("student")
    x, cond = randn(generators(0, 0, range(3)), (16, 8, 8), "cpu"), model.encode(["a", "b", "a"])
    assert torch.equal(cond[0][0], cond[0][2]) and not torch.equal(cond[0][0], cond[0][1])
    with torch.no_grad():
        names, guidance = ["full", "base", "peft"], [3.0, 1.0, 2.0]
        mixed = model.velocity(x, 0.6, cond, names, guidance)
        for i in range(3):
            alone = model.velocity(x[i : i + 1], 0.6, [c[i : i + 1] for c in cond], names[i], guidance[i])
            assert torch.allclose(mixed[i], alone[0], atol=1e-5), names[i]
        shutil.copytree(hub["base"], tmp_path / "other")  # a pipeline with that transformer says the same
        shutil.rmtree(tmp_path / "other/transformer")
        shutil.copytree(hub["full"], tmp_path / "other/transformer")
        assert torch.allclose(
            SD3(str(tmp_path / "other")).velocity(x, 0.6, cond),
            model.velocity(x, 0.6, cond, "full"),
            atol=1e-5,
        )
    model.load_teacher("pipeline", str(tmp_path / "other"))
    assert "pipeline" in model.full
    assert "a full fine-tune" in refused(
        "sample.py", "--model", hub["base"], "--lora", hub["full"], "--prompt", "x"
    )
    assert "x is a full fine-tune" in refused(
        "distill.py",
        "--model",
        hub["base"],
        "--resolution",
        64,
        "--teachers",
        f"x={hub['full']}",
        "--prompts",
        f"x={hub['short']}",
        "--init",
        "merge",
    )
    assert "does not fit this model" in refused("evaluate.py", "--models", f"x={hub['full']}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_the_gradient_of_full(dtype, hub, tmp_path, monkeypatch):
    """The frozen base is half, the LoRA, the SDE and the loss are float32: the first update's gradient hardly differs."""
    gradients, clip = [], torch.nn.utils.clip_grad_norm_
    caught = lambda p, most: gradients.append(torch.cat([q.grad.flatten() for q in p])) or clip(p, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", caught)
    for precision in ("float32", dtype):
        run(
            "distill.py",
            "--model",
            hub["base"],
            *QUICK[:4],
            "--steps",
            1,
            "--dtype",
            precision,
            "--teachers",
            f"ocr={hub['peft']}",
            "--prompts",
            f"ocr={hub['short']}",
            "--batch-size",
            2,
            "--eval-num-steps",
            1,
            "--out",
            tmp_path / precision,
        )
    full, half = gradients
    cosine = torch.nn.functional.cosine_similarity(full, half, 0).item()
    print(dtype, "cosine", cosine, "size", (half.norm() / full.norm()).item())
    assert (
        full.norm() > 0
        and cosine > {"float16": 0.999, "bfloat16": 0.98}[dtype]
        and abs(half.norm() / full.norm() - 1) < 0.03
    )


def test_text_encoders_leave_after_encoding(hub, monkeypatch):
    plain, model = SD3(hub["base"]), SD3(hub["base"], offload=True)
    tensors = [t for e in model.text_encoders for t in (*e.parameters(), *e.buffers())]
    rest, seen, encode, to = [t.data_ptr() for t in tensors], [], model.pipe.encode_prompt, torch.Tensor.to

    def spy(*args, **kwargs):
        seen.append([t.data_ptr() for t in tensors])
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.pipe, "encode_prompt", spy)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, **k: t.clone() if a == (model.device,) else to(t, *a, **k)
    )  # as if it were another device
    cond = model.encode(["a cup", "two cups"])
    assert [t.data_ptr() for t in tensors] == rest and not set(seen[0]) & set(rest)
    assert all(torch.equal(a, b) for a, b in zip(cond, plain.encode(["a cup", "two cups"])))


def test_without_t5(hub, tmp_path):
    """Its tokens are zeros, whether it is left out by a flag or absent from the pipeline."""
    shutil.copytree(hub["base"], tmp_path / "small", ignore=shutil.ignore_patterns("*_3"))
    index = json.load(open(tmp_path / "small/model_index.json"))
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (tmp_path / "small/model_index.json").write_text(json.dumps(index))
    conds = [SD3(hub["base"], use_t5=False).encode(["a cup"]), SD3(str(tmp_path / "small")).encode(["a cup"])]
    assert all(torch.equal(a, b) for a, b in zip(*conds)) and conds[0][0][:, 77:].abs().max() == 0
    assert SD3(hub["base"]).encode(["a cup"])[0][:, 77:].abs().max() > 0


def test_the_tokens_that_t5_reads(hub):
    """--max-sequence-length, against the pipeline's own call: another length, another picture."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(hub["base"], torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = {}
    for length in (128, 256):
        model = SD3(hub["base"], max_sequence_length=length)
        assert model.encode(["a cup"])[0].shape[1] == 77 + length
        pictures[length] = model.generate(["a cup"], generators(0, 0, [0]), 3, 64, guidance=4.5)
        theirs = pipe(
            "a cup",
            negative_prompt="",
            latents=randn(generators(0, 0, [0]), (16, 8, 8), "cpu"),
            num_inference_steps=3,
            guidance_scale=4.5,
            height=64,
            width=64,
            max_sequence_length=length,
            output_type="pt",
        ).images
        assert (pictures[length] - theirs).abs().max() < 1e-3
    assert (pictures[128] - pictures[256]).abs().max() > 1e-2


def test_hub_ids(hub, tmp_path):
    """A model, a LoRA and a full fine-tune by hub id, and those of a folder or a file in a repository, from a cache filled as huggingface_hub
    fills it."""
    for name, place in (
        ("base", ""),
        ("peft", ""),
        ("full", ""),
        ("many/peft", "GenEvalTeacher/lora"),
        ("many/diffusers", "loras"),
        ("many/full", "a/full"),
    ):
        repo = tmp_path / f"hub/models--someone--{name.partition('/')[0]}"
        shutil.copytree(
            hub[name.rpartition("/")[2]], repo / "snapshots/0123456789012345678901234567890123456789" / place
        )
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs/main").write_text("0123456789012345678901234567890123456789")
    models = [
        "lora=someone/peft",
        "full=someone/full",
        "nested=someone/many/GenEvalTeacher/lora",
        "deep=someone/many/a/full",
        "file=someone/many/loras/pytorch_lora_weights.safetensors",
        "peft=someone/many/GenEvalTeacher/lora/adapter_model.safetensors",
    ]
    command = [
        sys.executable,
        "evaluate.py",
        "--model",
        "someone/base",
        "--models",
        *models,
        "--prompts",
        f"x={hub['short']}",
        "--reward",
        "jpeg",
        "--resolution",
        "64",
        "--eval-num-steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert answer.returncode == 0, answer.stderr[-3000:]
    drawn = {
        name: next((tmp_path / "out" / name / "x/samples").glob("*_000000.png")).read_bytes()
        for name, _, _ in (m.partition("=") for m in models)
    }
    assert drawn["lora"] == drawn["nested"] == drawn["peft"] and drawn["full"] == drawn["deep"]
    assert len({drawn[name] for name in ("lora", "full", "file")}) == 3
    answer = subprocess.run(
        [*command, "--models", "lora=someone/nothing", "--out", str(tmp_path / "other")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "someone/nothing: neither a local path nor to be had from the hub" in answer.stderr
    answer = subprocess.run(
        [*command, "--models", "lora=someone/many/elsewhere", "--out", str(tmp_path / "other")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert answer.returncode == 1 and "someone/many is on the hub, but has no elsewhere" in answer.stderr, (
        answer.stderr[-500:]
    )


def test_alpha_patterns_are_regular_expressions_as_in_peft(hub, tmp_path):
    shutil.copytree(hub["peft"], tmp_path / "lora")
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {"alpha_pattern": {r"transformer_blocks\.0\..*": 8, "attn.to_k": 4}}
        )
    )
    alphas = {n: alpha for n, (_, _, alpha) in lora_of(tmp_path / "lora", hub["base"]).items()}
    expected = {
        n: 8 if n.startswith("transformer_blocks.0.") else 4 if n.endswith("attn.to_k") else 64
        for n in alphas
    }
    assert alphas == expected and set(alphas.values()) == {8, 4, 64}


def changed(folder, part, change=None, config=None):
    """Another `part` in a pipeline's folder: its tensors after `change`, or other values in its
    config.json."""
    from safetensors.torch import load_file, save_file

    name = "model.safetensors" if "encoder" in part else "diffusion_pytorch_model.safetensors"
    file = os.path.join(folder, part, name)
    if change:
        save_file(change(load_file(file)), file, {"format": "pt"})
    if config:
        path = os.path.join(folder, part, "config.json")
        settings = json.load(open(path)) | config
        open(path, "w").write(json.dumps(settings))


def before(prefix):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def without(text):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if text not in key}


def only(name, change):
    return lambda tensors: {key: change(tensor) if key == name else tensor for key, tensor in tensors.items()}


NAN, FC1 = float("nan"), "text_model.encoder.layers.1.mlp.fc1.bias"
FAULTS = {  # part: [(what, change of its tensors, change of its config, the line)]
    "text_encoder": [
        ("wrapped", before("module."), None, "its keys begin with 'module.'"),
        ("cut", without("layers.1.mlp.fc1"), None, "missing are " + FC1),
        ("more", lambda tensors: tensors | {"nonsense": torch.zeros(1)}, None, "unexpected are nonsense"),
        ("shape", only(FC1, lambda bias: bias[:5]), None, "of another shape are " + FC1),
        ("quantised", None, {"quantization_config": {"quant_method": "torchao"}}, "a quantised network"),
    ],
    "transformer": [
        ("compiled", before("_orig_mod."), None, "its keys begin with '_orig_mod.'"),
        ("prefixed", before("transformer."), None, "its keys begin with 'transformer.'"),
        ("lost norm", without("norm_q"), None, "missing are transformer_blocks.0.attn.norm_q.weight"),
        ("extra norm", None, {"qk_norm": None}, "unexpected are transformer_blocks.0.attn.norm_added_k"),
        (
            "shape",
            only("transformer_blocks.0.attn.to_q.weight", lambda weight: weight[:5]),
            None,
            "transformer_blocks.0.attn.to_q.weight expected shape",
        ),
        (
            "float8",
            only("proj_out.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
            None,
            "proj_out.weight is F8_E4M3: a quantised network",
        ),
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
        with pytest.raises(SystemExit, match="its keys begin with '_orig_mod.'"):
            model.load_teacher("x", str(tmp_path / "compiled"))


def test_parts_that_are_not_whole_are_refused(hub, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    cut, link = "not a whole safetensors file", "only a Git LFS pointer"
    for part, name in (
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("text_encoder_3", "model-00001-of-00003.safetensors"),
    ):
        folder = shutil.copytree(hub["base"], tmp_path / part)
        file = folder / part / name
        whole = file.read_bytes()
        for data, message in ((whole[: len(whole) // 2], cut), (b"", cut), (pointer, link), (None, "")):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            with pytest.raises(SystemExit) as caught:
                SD3(str(folder))
            said = str(caught.value)
            assert message in said and part in said and "\n" not in said
            file.write_bytes(b"")


@pytest.mark.parametrize(
    "part, lost", [("tokenizer", ["vocab.json", "merges.txt"]), ("tokenizer_3", ["tokenizer.json"])]
)
def test_a_tokenizer_without_its_vocabulary_is_refused(part, lost, hub, tmp_path):
    folder = shutil.copytree(hub["base"], tmp_path / "base")
    for file in lost:
        os.remove(folder / part / file)
    with pytest.raises(SystemExit, match=f"{part} has no whole vocabulary"):
        SD3(str(folder))


def test_content_decides_what_a_fine_tune_is(hub, tmp_path, monkeypatch):
    """A file of 300 MB whose bytes change in place, and an evaluation of a fine-tune that did."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from flow_sde import fingerprint

    large = tmp_path / "large.safetensors"
    with open(large, "wb") as f:
        f.truncate(300_000_000)
    seen = []
    for byte in (b"\0", b"\1", b"\1"):
        times = os.stat(large)
        with open(large, "r+b") as f:
            f.seek(299_000_000)
            f.write(byte)
        os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen.append(fingerprint(str(large)))
    assert seen[0] != seen[1] == seen[2] and len(os.listdir(tmp_path / "cache/flow-opd")) == 3
    fine = shutil.copytree(hub["full"], tmp_path / "full")
    evaluate = [
        "evaluate.py",
        "--model",
        hub["base"],
        "--models",
        f"x={fine}",
        "--prompts",
        f"counts={hub['tagged']}",
        "--reward",
        "jpeg",
        "--resolution",
        64,
        "--eval-num-steps",
        1,
        "--out",
        tmp_path / "table",
    ]
    run(*evaluate)
    changed(fine, "", lambda t: {k: v * 1.01 for k, v in t.items()})
    assert "LoRA was" in refused(*evaluate)


def test_a_hub_id_is_pinned_to_its_revision(tmp_path, monkeypatch):
    """By name, by a folder in it and by its path in the cache."""
    from flow_sde import REVISIONS, fingerprint

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--one"
    (repo / "refs").mkdir(parents=True)
    for revision in ("0" * 40, "1" * 40):
        place = repo / "snapshots" / revision / "deep"
        place.mkdir(parents=True)
        (repo / "refs/main").write_text(revision)
        assert fingerprint("some/one") == f"some/one@{revision}"
        (repo / "refs/main").write_text("2" * 40)  # what others push while this process runs is not seen
        assert fingerprint("some/one/deep") == fingerprint(str(place)) == f"some/one/deep@{revision}"
        REVISIONS.clear()
    assert fingerprint("merge") == "merge"
