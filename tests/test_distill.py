"""distill.py itself: the gradients it computes, whom it asks, and that nothing is lost."""

import os
import shutil

import pytest
import torch
from conftest import TASKS, distill, few, lora_of, read_log, run, sigma_schedule, table
from safetensors.torch import load_file

from flow_sde import generators, kl, pick_prompts, randn, rollout, transition


@pytest.fixture
def gradients(monkeypatch):
    """Run distill.py with learning rate 0 and catch the gradient of every update: f(loras, out, **flags) -> (globals, [gradient])."""

    def record(loras, out, **flags):
        caught, clip = [], torch.nn.utils.clip_grad_norm_

        def spy(params, most):
            caught.append(torch.cat([p.grad.flatten() for p in params]).clone())
            return clip(params, most)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        return flags.pop("script", distill)(loras, str(out), lr=0, **flags), caught

    return record


def two_pass(
    run,
    teacher_of=lambda task: task,
    anchor_weight=0.02,
    teacher_weight=1.0,
    sde="flow",
    labelled=None,
    factor=None,
    walker=lambda task: "student",
):
    """The gradient of the first update as the paper describes it: roll the student out and store the trajectory, then walk it again
    with gradient; one sample and one adapter at a time. In cold_start.py's sft the walker is the teacher. factor(step, KL of a velocity distance
    of 1): what that step's KL counts; by default every distance weighs what the mean step's does."""
    args, model, params = run["args"], run["model"], run["params"]
    sigmas, batch = (
        sigma_schedule(args.num_steps, 3.0)[:-1],
        pick_prompts(run["prompts"], dict.fromkeys(TASKS, 1.0), args.seed, 0, args.batch_size),
    )
    total, one = torch.zeros(sum(p.numel() for p in params)), torch.ones(1, 1)
    labelled = range(len(sigmas) - 1) if labelled is None else labelled
    moved = [
        [transition(one, v, t, t_next, 0.7) for v in (one, 2 * one)] for t, t_next in zip(sigmas, sigmas[1:])
    ]
    terms = [kl(a, b, std).item() for (a, std), (b, _) in moved]
    factor = factor or (lambda k, term: sum(terms) / len(terms) / term)
    w = {sigmas[k]: factor(k, terms[k]) for k in labelled}
    for i, (task, row) in enumerate(batch):
        cond, gens = model.encode([row["prompt"]]), generators(args.seed, 0, [i])
        draw = lambda: randn(gens, model.latent_shape(32), "cpu")
        with torch.no_grad():
            steps = list(
                rollout(lambda x, t: model.velocity(x, t, cond, walker(task)), draw(), sigmas, 0.7, sde, draw)
            )
        for s in [s for s in steps if s.t in w]:
            mean, std = transition(s.x, model.velocity(s.x, s.t, cond, "student"), s.t, s.t_next, 0.7)
            loss = 0.0
            for name, weight in [
                (n, w) for n, w in ((teacher_of(task), teacher_weight), ("anchor", anchor_weight)) if w
            ]:
                with torch.no_grad():
                    other, _ = transition(s.x, model.velocity(s.x, s.t, cond, name), s.t, s.t_next, 0.7)
                loss = loss + w[s.t] * weight * kl(mean, other, std).sum()
            total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
    return total / (args.batch_size * len(w))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_single_pass_is_two_pass_and_every_prompt_reaches_its_own_teacher(loras, tmp_path, gradients):
    run, (gradient,) = gradients(loras, tmp_path / "a", micro_batch_size=4)
    assert distance(gradient, two_pass(run)) < 1e-4
    swapped = {"compose": "ocr", "ocr": "compose", "scene": "scene"}
    assert distance(gradient, two_pass(run, swapped.get)) > 0.1
    run, (gradient,) = gradients(loras, tmp_path / "b", sde="ode")
    assert distance(gradient, two_pass(run, sde="ode")) < 1e-4


def test_labelled_steps(loras, tmp_path, gradients):
    """With 6 sampling steps there are 5 to learn from. Which of them are labelled is drawn anew in every update, and all of them get their turn."""
    for number in (1, 2):
        run, (gradient,) = gradients(loras, tmp_path / str(number), num_steps=6, label_steps=number)
        labelled = [run["sigmas"].index(t) for t in run["labelled"]]
        assert len(labelled) == number == len(read_log(tmp_path / str(number))[0]["kl_by_sigma"])
        assert (
            distance(gradient, two_pass(run, labelled=labelled)) < 1e-4 < distance(gradient, two_pass(run))
        ), labelled
    drawn = [tuple(run["labelled_steps"](step)) for step in range(1000)]
    assert drawn == [
        tuple(run["labelled_steps"](step)) for step in range(1000)
    ]  # a function of seed and step
    for t in run["sigmas"][:-1]:
        assert sum(t in steps for steps in drawn) / 1000 == pytest.approx(2 / 5, abs=0.06)
    # DanceOPD's: one low-noise step, P(k) = F((k + 1) / 5) - F(k / 5) with F(x) = 6 x^5 - 5 x^6
    run = distill(loras, tmp_path / "dance", num_steps=6, label_steps=1, label_density=[5, 2], lr=0)
    share = [
        sum(run["labelled_steps"](step) == [t] for step in range(1000)) / 1000 for t in run["sigmas"][:-1]
    ]
    assert share == pytest.approx([0.0016, 0.0394, 0.1923, 0.4219, 0.3446], abs=0.05)


@pytest.mark.parametrize("weighting", ["kl", "kl-dt", "dt2"])
def test_weightings(weighting, loras, tmp_path, gradients):
    """The KL as it is; times dt (what the released code descends); half the squared distance of two deterministic steps."""
    run, (gradient,) = gradients(loras, tmp_path / "run", weighting=weighting)
    dt = [t - t_next for t, t_next in zip(run["sigmas"], run["sigmas"][1:])]
    if weighting == "dt2":  # an ODE step of v is dt v away from one of 0
        expected = two_pass(run, factor=lambda k, term: dt[k] ** 2 / 2 / term)
    else:
        expected = two_pass(run, factor=lambda k, term: {"kl": 1.0, "kl-dt": dt[k]}[weighting])
    assert distance(gradient, expected) < 1e-4 < distance(gradient, two_pass(run))


def test_sft_learns_the_same_on_trajectories_of_the_teachers(loras, tmp_path, gradients):
    def sft(loras, out, **flags):
        return run(
            "cold_start.py",
            "sft",
            "--teachers",
            *[f"{t}={loras[t]}" for t in TASKS],
            "--init",
            loras["student"],
            "--num-steps",
            4,
            "--steps",
            1,
            "--batch-size",
            6,
            "--out",
            out,
            *[word for flag, value in flags.items() for word in (f"--{flag}", value)],
        )

    for weighting in ("uniform", "kl"):
        ns, (gradient,) = gradients(loras, tmp_path / weighting, script=sft, weighting=weighting)
        uniform, paper = (
            two_pass(ns, anchor_weight=0, factor=factor, walker=lambda task: task)
            for factor in (None, lambda k, term: 1.0)
        )
        expected, other = (uniform, paper) if weighting == "uniform" else (paper, uniform)
        assert distance(gradient, expected) < 1e-4 < distance(gradient, other), weighting


def test_anchor_pulls_towards_the_anchor_and_the_anchor_only(loras, tmp_path, gradients):
    same = dict(teachers=[f"{t}={loras['student']}" for t in TASKS])  # nothing to learn from the teachers
    _, (none,) = gradients(loras, tmp_path / "a", anchor_weight=0, **same)
    assert none.abs().max() == 0
    run, (pull,) = gradients(loras, tmp_path / "b", anchor_weight=0.5, **same)
    assert distance(pull, two_pass(run, anchor_weight=0.5, teacher_weight=0.0)) < 1e-4
    ppo = dict(
        objective="ppo", updates_per_rollout=1, label_steps=2
    )  # here too, every step's distance weighs alike
    out, (pull,) = gradients(loras, tmp_path / "ppo", anchor_weight=0.5, **ppo, **same)
    assert (
        distance(
            pull,
            two_pass(
                out,
                anchor_weight=0.5,
                teacher_weight=0.0,
                labelled=[out["sigmas"].index(t) for t in out["labelled"]],
            ),
        )
        < 1e-4
    )
    _, (settled,) = gradients(loras | {"anchor": loras["student"]}, tmp_path / "c", anchor_weight=0.5, **same)
    assert settled.abs().max() == 0
    # and a student that follows the pull comes closer to the anchor
    out = str(tmp_path / "d")
    distill(loras, out, anchor_weight=1.0, lr=3e-3, steps=20, **same)
    log = read_log(out)
    assert log[-1]["kl_to_anchor"] < 0.7 * log[0]["kl_to_anchor"]


def test_policy_gradients_are_what_they_say(loras, tmp_path, gradients):
    """Over 40 trajectories per state, the action-dependent reward's gradient points the way of the closed form's; the
    paper's does not."""
    flags = dict(
        batch_size=6,
        group_size=40,
        micro_batch_size=240,
        num_steps=3,
        updates_per_rollout=1,
        anchor="none",
        clip_range=10,
    )
    _, (exact,) = gradients(loras, tmp_path / "kl", **flags)
    for objective in ("ppo", "ppo-paper"):
        _, (estimate,) = gradients(loras, tmp_path / objective, objective=objective, **flags)
        cosine = torch.nn.functional.cosine_similarity(estimate, exact, 0).item()
        print(objective, "cosine", cosine, "size", (estimate.norm() / exact.norm()).item())
        assert cosine > 0.5 if objective == "ppo" else abs(cosine) < 0.3, cosine


@pytest.mark.parametrize("objective", ["kl", "ppo"])
def test_learning_comes_closer_to_every_teacher(objective, loras, tmp_path):
    flags = (
        dict(group_size=4, micro_batch_size=48, lr=1e-3, clip_range=0.1)
        if objective == "ppo"
        else dict(lr=3e-3)
    )
    distill(loras, str(tmp_path / "run"), objective=objective, steps=12, batch_size=12, num_steps=3, **flags)
    log = read_log(tmp_path / "run")
    for task in (
        TASKS if objective == "kl" else ["all"]
    ):  # the policy gradient is too noisy to ask it of every task so soon
        of = lambda rows: sum(row[f"kl/{t}"] for row in rows for t in (TASKS if task == "all" else [task]))
        print(objective, task, of(log[-2:]) / of(log[:2]))
        assert of(log[-2:]) < (0.75 if objective == "kl" else 0.95) * of(log[:2]), task


def test_the_average_follows_its_decay(loras, tmp_path):
    """Two runs of three updates that differ in --ema have the same student and other averages."""
    a, b = (
        distill(loras, str(tmp_path / str(ema)), steps=3, lr=1e-3, ema=ema)["model"] for ema in (0.5, 0.9)
    )
    weights = [
        [torch.cat([p.flatten() for p in model.weights(name).values()]) for model in (a, b)]
        for name in ("student", "ema")
    ]
    assert torch.equal(*weights[0]) and not torch.equal(*weights[1])


def test_resumed_is_bit_equal_to_uninterrupted(loras, tmp_path):
    flags = dict(lr=1e-3, save_every=3, schedule="mixed")
    whole = distill(loras, str(tmp_path / "whole"), steps=9, **flags)
    distill(loras, str(tmp_path / "cut"), steps=5, **flags)
    shutil.rmtree(
        tmp_path / "cut/checkpoints/000005"
    )  # killed after update 5: the last checkpoint is of update 3
    again = distill(loras, str(tmp_path / "cut"), steps=9, resume="auto", **flags)
    for name in ("student", "ema"):
        for p, q in zip(whole["model"].weights(name).values(), again["model"].weights(name).values()):
            assert torch.equal(p, q)
    a, b = (load_file(tmp_path / f"{d}/lora/adapter_model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda log: [{k: v for k, v in row.items() if k not in ("seconds", "kl_by_sigma")} for row in log]
    assert strip(read_log(tmp_path / "whole")) == strip(read_log(tmp_path / "cut"))
    for change, word in (
        ({"teachers": [f"{t}={loras['ocr']}" for t in TASKS]}, "teacher compose"),
        ({"schedule": "alternate"}, "schedule"),
        ({"noise_level": 0.5}, "noise_level"),
        ({"teachers": [f"{t}={loras[t]},guidance=2" for t in TASKS]}, "teacher ocr"),
    ):
        with pytest.raises(SystemExit, match=f"another run: .*{word}"):
            distill(loras, str(tmp_path / "cut"), steps=12, resume="auto", **(flags | change))


def test_alternate_gives_whole_updates_in_turn(loras, tmp_path):
    distill(
        loras,
        str(tmp_path / "run"),
        schedule="alternate",
        steps=6,
        teachers=[f"compose={loras['compose']},weight=2", f"ocr={loras['ocr']}"],
        prompts=few("train", 9, str(tmp_path))[:2],
    )
    tasks = [[k for k in row if k.startswith("kl/")] for row in read_log(tmp_path / "run")]
    assert tasks == [["kl/compose"], ["kl/compose"], ["kl/ocr"]] * 2


def test_what_a_run_leaves_behind(loras, tmp_path):
    from PIL import Image

    run = distill(loras, str(tmp_path / "run"), steps=2, save_every=1, **table(tmp_path))
    files = set(os.listdir(tmp_path / "run"))
    assert {
        "lora",
        "checkpoints",
        "log.jsonl",
        "curves.png",
        "samples.png",
        "results.json",
        "args.json",
    } <= files
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["000001", "000002"]
    assert [r["model"] for r in run["results"]] == ["base", *TASKS, "anchor", "start", "student"]
    assert all(r["n"] == 9 and set(r["scores"]) == {*TASKS, "quality"} for r in run["results"])
    assert Image.open(tmp_path / "run/samples.png").width > 300
    # every sampler and the base as anchor
    for sde, anchor in (("cps", "base"), ("ode", loras["anchor"])):
        distill(loras, str(tmp_path / sde), sde=sde, anchor=anchor, steps=1)
    # the student, a file like any teacher: from it, or from nothing, another run can start
    distill(loras, str(tmp_path / "next"), init=str(tmp_path / "run/lora"))
    untrained = distill(
        loras, str(tmp_path / "none"), init="none", anchor="none", rank=4, alpha=8, lr=0, **table(tmp_path)
    )
    assert untrained["results"][-1]["scores"] == pytest.approx(untrained["results"][0]["scores"])
    merged = distill(loras, str(tmp_path / "merged"), init="merge", lr=0)
    assert not os.path.exists(tmp_path / "merged/results.json")  # no table was asked for
    assert merged["model"].lora("student").keys() == merged["model"].lora("ocr").keys()


def test_what_is_broken_stops_the_run_with_its_name(loras, tmp_path):
    """LoRAs of finite numbers under which the network overflows: a teacher, the anchor, the student's
    start."""
    from flow_sde import save_lora

    huge = {n: (A * 1e20, B * 1e20, alpha) for n, (A, B, alpha) in lora_of(loras["ocr"]).items()}
    save_lora(huge, tmp_path / "huge")
    distill(loras, str(tmp_path / "run"), steps=1, save_every=1)
    teachers = [f"{t}={tmp_path / 'huge' if t == 'ocr' else loras[t]}" for t in TASKS]
    huge = tmp_path / "huge"
    for changes, broken in (
        ({"teachers": teachers}, "the teacher of ocr"),
        ({"anchor": huge}, "the anchor"),
        ({"init": huge}, "the student"),
    ):
        with pytest.raises(SystemExit, match=f"step 1: {broken} is not finite"):
            distill(loras, str(tmp_path / broken), steps=3, **changes)
        assert not {"checkpoints", "lora"} & set(os.listdir(tmp_path / broken))
