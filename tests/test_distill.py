"""distill.py itself: the gradients it computes, whom it asks, and that it learns."""

import collections
import os

import pytest
import torch
from conftest import (
    BASE,
    TASKS,
    checkpoint,
    distill,
    equal,
    few,
    huge_lora,
    random_lora,
    read_log,
    run,
    saved,
    sigma_schedule,
    specs,
)

from flow_sde import SD3, generators, kl, kl_weight, pick_prompts, randn, rollout, transition

pytestmark = pytest.mark.usefixtures("numbers_only")


def weights_of_steps(sigmas):
    """w(t): the KL of two velocities that differ by 1, {t: w}."""
    return {t: kl_weight(t, t_next, 0.7) for t, t_next in zip(sigmas, sigmas[1:])}


def two_pass(
    ns, teacher_of=str, teacher_weight=1.0, anchor_weight=0.02, factors=None, walker=None, substeps=1
):
    """The gradient of a run's first update as the paper describes it: roll the student out and store the
    trajectory, then walk it again with gradient; one sample and one adapter at a time.

    ns: the script's globals. factors: {t: what that step's KL counts}; by default every distance weighs what
    the mean step's does. walker: whose trajectory, of a task; in cold_start.py's sft the teacher's."""
    args, model, params = ns["args"], ns["model"], ns["params"]
    sigmas = ns["sigmas"]
    w, labelled = weights_of_steps(sigmas), ns.get("labelled", sigmas[:-1])
    factors = factors or {t: sum(w.values()) / len(w) / w[t] for t in w}
    total = torch.zeros(sum(p.numel() for p in params))
    batch = pick_prompts(ns["prompts"], dict.fromkeys(ns["prompts"], 1.0), args.seed, 0, args.batch_size)
    for i, (task, row) in enumerate(batch):
        cond, gens = model.encode([row["prompt"]]), generators(args.seed, 0, [i])
        leader = walker(task) if walker else "student"
        weights = {teacher_of(task): teacher_weight, ns.get("anchor"): anchor_weight}

        def draw(gens=gens):
            return randn(gens, model.latent_shape(args.resolution), "cpu")

        def walk(x, t, name=leader, cond=cond):
            return model.velocity(x, t, cond, name, ns["guidance"].get(name, args.guidance))

        def step(x, t, t_next, name, walk=walk):
            if substeps == 1 or name == "student":
                return transition(x, walk(x, t, name), t, t_next, 0.7)
            end, dt = x, (t - t_next) / substeps
            for k in range(substeps):
                end = end - walk(end, t - k * dt, name) * dt
            return transition(x, (x - end) / (t - t_next), t, t_next, 0.7)

        with torch.no_grad():
            trajectory = list(rollout(walk, draw(), sigmas, 0.7, args.sde, draw))
        for x, _, t, t_next, *_ in trajectory:
            if t not in labelled:
                continue
            mean, std = step(x, t, t_next, "student")
            loss = 0.0
            for name, weight in weights.items():
                if weight:
                    with torch.no_grad():
                        other, _ = step(x, t, t_next, name)
                    loss += factors[t] * weight * kl(mean, other, std).sum()
            grads = torch.autograd.grad(loss, params, materialize_grads=True)  # zero where one is unused
            total += torch.cat([g.flatten() for g in grads])
    return total / (args.batch_size * len(labelled))


def off(a, b):
    """The relative distance of two gradients."""
    return ((a - b).norm() / b.norm()).item()


# -- the gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["flow", "ode", "cps"])
def test_single_pass_is_two_pass_and_every_prompt_reaches_its_own_teacher(sde, loras, tmp_path, gradients):
    ns = distill(loras, tmp_path, micro_batch_size=2, lr=0, sde=sde)
    assert ns["sigmas"] == sigma_schedule(4)[:-1]
    assert off(gradients[0], two_pass(ns)) < 1e-4
    swapped = {"compose": "ocr", "ocr": "compose", "scene": "scene"}
    assert off(gradients[0], two_pass(ns, swapped.get)) > 0.1


def test_teachers_take_smaller_steps(loras, tmp_path, gradients):
    """What teachers and anchor do in three steps on the way to the student's next state, as one velocity."""
    ns = distill(loras, tmp_path, micro_batch_size=2, lr=0, num_steps=3, teacher_substeps=3)
    assert off(gradients[0], two_pass(ns, substeps=3)) < 1e-4 < 0.01 < off(gradients[0], two_pass(ns))


@pytest.mark.parametrize("weighting", ["kl", "kl-dt", "dt2"])
def test_weightings(weighting, loras, tmp_path, gradients):
    """The KL as it is; times dt (what the released code descends); half the squared distance of two
    deterministic steps, dt^2/2."""
    ns = distill(loras, tmp_path, weighting=weighting, lr=0)
    w = weights_of_steps(ns["sigmas"])
    dt = {t: t - t_next for t, t_next in zip(ns["sigmas"], ns["sigmas"][1:])}
    factors = {"kl": dict.fromkeys(w, 1.0), "kl-dt": dt, "dt2": {t: dt[t] ** 2 / 2 / w[t] for t in w}}
    assert (
        off(gradients[0], two_pass(ns, factors=factors[weighting])) < 1e-4 < off(gradients[0], two_pass(ns))
    )


@pytest.mark.parametrize("number", [1, 2])
def test_labelled_steps(number, loras, tmp_path, gradients):
    """With 6 sampling steps there are 5 to learn from. Which of them are labelled is drawn anew in every
    update, a function of (seed, step), and all of them get their turn. The log has their mean distance and
    their mean KL."""
    ns = distill(loras, tmp_path, num_steps=6, label_steps=number, lr=0)
    [row] = read_log(tmp_path)
    assert len(ns["labelled"]) == number == len(row["kl_by_sigma"])
    kl_sums = sum(row["kl_by_sigma"].values()) / number
    logged = sum(row[f"kl/{task}"] for task, _ in ns["batch"]) / len(ns["batch"])
    assert logged == pytest.approx(kl_sums)
    if number == 1:
        w = weights_of_steps(ns["sigmas"])[ns["labelled"][0]]
        assert row["kl/ocr"] == pytest.approx(w * row["distance/ocr"])
    whole = ns | {"labelled": ns["sigmas"][:-1]}
    assert off(gradients[0], two_pass(ns)) < 1e-4 < off(gradients[0], two_pass(whole))
    drawn = [ns["labelled_steps"](step) for step in range(1000)]
    assert drawn == [ns["labelled_steps"](step) for step in range(1000)]
    for t in ns["sigmas"][:-1]:
        assert sum(t in steps for steps in drawn) / 1000 == pytest.approx(number / 5, abs=0.06)


def test_label_density(loras, tmp_path):
    """DanceOPD's: one low-noise step, P(k) = F((k + 1) / 5) - F(k / 5) with F(x) = 6 x^5 - 5 x^6."""
    ns = distill(loras, tmp_path, num_steps=6, label_steps=1, label_density=[5, 2])
    drawn = [t for step in range(1000) for t in ns["labelled_steps"](step)]
    shares = [drawn.count(t) / 1000 for t in ns["sigmas"][:-1]]
    assert shares == pytest.approx([0.0016, 0.0394, 0.1923, 0.4219, 0.3446], abs=0.05)


@pytest.mark.parametrize("weighting", ["uniform", "kl"])
def test_sft_learns_the_same_on_trajectories_of_the_teachers(weighting, loras, tmp_path, gradients):
    size = dict(num_steps=4, steps=1, batch_size=3, resolution=16)
    paths = dict(teachers=specs(loras), prompts=few("train", 8, tmp_path), init=loras["student"])
    ns = run("cold_start.py", "sft", **size, **paths, weighting=weighting, lr=0, out=tmp_path / "run")
    kl_itself = dict.fromkeys(sigma_schedule(4), 1.0)
    uniform, paper = (two_pass(ns, anchor_weight=0, factors=f, walker=str) for f in (None, kl_itself))
    expected, other = (uniform, paper) if weighting == "uniform" else (paper, uniform)
    assert off(gradients[0], expected) < 1e-4 < off(gradients[0], other)


# -- the anchor --------------------------------------------------------------------------------------------


def same_teachers(loras):
    """Of whom there is nothing to learn."""
    return dict(teachers=[f"{task}={loras['student']}" for task in TASKS], anchor_weight=0.5)


@pytest.mark.parametrize("ppo", [{}, dict(objective="ppo", updates_per_rollout=1, label_steps=2)], ids=len)
def test_anchor_pulls_towards_the_anchor_only(ppo, loras, tmp_path, gradients):
    """By lambda times the same distance, in every objective."""
    ns = distill(loras, tmp_path, lr=0, **ppo, **same_teachers(loras))
    assert off(gradients[0], two_pass(ns, teacher_weight=0.0, anchor_weight=0.5)) < 1e-4


@pytest.mark.parametrize("nothing", ["anchor_weight", "anchor"])
def test_anchor_of_no_weight_or_no_distance_does_not_pull(nothing, loras, tmp_path, gradients):
    change = {"anchor_weight": 0, "anchor": loras["student"]}[nothing]
    distill(loras, tmp_path, **same_teachers(loras) | {nothing: change})
    assert gradients[0].abs().max() < 1e-6  # rounding: a task's rows are a forward of their own


def test_a_student_comes_closer_to_the_anchor(loras, tmp_path):
    distill(loras, tmp_path, lr=3e-3, steps=12, **same_teachers(loras) | dict(anchor_weight=1.0))
    log = read_log(tmp_path)
    assert log[-1]["kl/anchor"] < 0.7 * log[0]["kl/anchor"]


# -- learning ----------------------------------------------------------------------------------------------


def test_policy_gradients_are_what_they_say(loras, tmp_path, gradients):
    """Over 600 trajectories of one token, the action-dependent reward's gradient is the closed form's; the
    paper's has nothing of it. (What is left is noise.)"""
    flags = dict(resolution=4, group_size=200, micro_batch_size=600, num_steps=2, anchor="none", lr=0)
    for objective in ("kl", "ppo", "ppo-paper"):
        ppo = {} if objective == "kl" else dict(updates_per_rollout=1, clip_range=10)
        distill(loras, tmp_path / objective, objective=objective, **ppo, **flags)
    exact, *estimates = gradients
    ppo, paper = ((estimate @ exact / (exact @ exact)).item() for estimate in estimates)
    print(f"of the closed form's gradient: ppo {ppo:.2f}, ppo-paper {paper:.2f}")
    assert ppo == pytest.approx(1, abs=0.35) and abs(paper) < 0.4
    assert torch.cosine_similarity(estimates[0], exact, 0) > 0.9


def test_learning_comes_closer_to_every_teacher(loras, tmp_path):
    distill(loras, tmp_path, steps=12, batch_size=12, micro_batch_size=12, num_steps=3, lr=3e-3)
    log = read_log(tmp_path)
    for key in (f"kl/{task}" for task in TASKS):
        assert sum(row[key] for row in log[-2:]) < 0.75 * sum(row[key] for row in log[:2]), key


def test_policy_gradient_comes_closer_to_the_teachers(loras, tmp_path):
    """To all together: it is too noisy to ask it of each so soon."""
    flags = dict(resolution=8, batch_size=6, group_size=8, micro_batch_size=48, num_steps=3)
    distill(loras, tmp_path, objective="ppo", steps=8, lr=2e-3, clip_range=0.1, **flags)
    log = [sum(row[f"kl/{task}"] for task in TASKS) for row in read_log(tmp_path)]
    assert sum(log[-2:]) < 0.95 * sum(log[:2])


def test_the_average_follows_its_decay(loras, tmp_path):
    """Two runs that differ in --ema have the same student and other averages."""
    a, b = (distill(loras, tmp_path / str(ema), steps=2, lr=1e-3, ema=ema)["model"] for ema in (0.5, 0.9))
    for adapter, same in (("student", True), ("ema", False)):
        assert all(map(torch.equal, a.adapters[adapter], b.adapters[adapter])) == same


def test_alternate_gives_whole_updates_in_turn(loras, tmp_path):
    teachers = [f"compose={loras['compose']},weight=2", f"ocr={loras['ocr']}"]
    prompts = few("train", 3, tmp_path)[:2]
    distill(loras, tmp_path / "run", schedule="alternate", steps=6, teachers=teachers, prompts=prompts)
    tasks = [[key for key in row if key.startswith("kl/")] for row in read_log(tmp_path / "run")]
    assert tasks == [[f"kl/{task}", "kl/anchor"] for task in ("compose", "compose", "ocr")] * 2


# -- where a student starts, and where it cannot go on -----------------------------------------------------


def test_init(loras, tmp_path):
    """The average of the teachers; an untrained LoRA, which is the base; what another run made."""
    merged = distill(loras, tmp_path / "merge", init="merge", lr=0)["model"]
    assert merged.lora("student").keys() == merged.lora("ocr").keys()
    assert not os.path.exists(tmp_path / "merge/results.json")  # no table was asked for
    untrained = distill(loras, tmp_path / "none", init="none", anchor="none", rank=4, alpha=8)["model"]
    assert all(B.abs().max() == 0 for _, B, _ in untrained.lora("start").values())
    distill(loras, tmp_path / "next", init=tmp_path / "none/lora", anchor="base", lr=0)
    assert equal(saved(tmp_path / "next"), saved(tmp_path / "none"))


@pytest.mark.parametrize("broken", ["the teacher of ocr", "the anchor", "the student"])
def test_what_is_broken_stops_the_run_with_its_name(broken, loras, tmp_path, capsys):
    """A LoRA of finite numbers under which the network overflows: updates are skipped, three end the run, and
    the student is as it was."""
    huge = huge_lora(loras["ocr"], tmp_path / "huge")
    changes = {
        "the teacher of ocr": dict(teachers=specs(loras | {"ocr": huge})),
        "the anchor": dict(anchor=huge),
        "the student": dict(init=huge),
    }
    with pytest.raises(SystemExit, match=f"{broken} is not finite, three times in a row"):
        distill(loras, tmp_path / "run", steps=5, **changes[broken])
    assert capsys.readouterr().out.count("skipped") == 3
    assert os.listdir(tmp_path / "run/checkpoints") == ["000000"] and not os.path.exists(
        tmp_path / "run/lora"
    )


def test_a_gradient_that_is_not_finite_is_skipped(loras, tmp_path, monkeypatch):
    """As float16 has them now and then: the parameters are those of the updates before, and the log tells."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def overflow(params, most):
        calls.append(None)
        if len(calls) == 2:
            params[0].grad.fill_(torch.inf)
        return clip(params, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    distill(loras, tmp_path, steps=3, save_every=1, keep=9, lr=1e-3)
    first, second, third = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    student = [key for key in first if key.startswith("student")]
    assert all(torch.equal(first[key], second[key]) for key in student)
    assert not all(torch.equal(second[key], third[key]) for key in student)
    assert [row.get("skipped") for row in read_log(tmp_path)] == [None, 1, None]


@pytest.mark.parametrize("checkpointing", [None, True])
def test_every_kind_of_teacher_at_once(checkpointing, loras, tmp_path, gradients):
    """Several tasks in a micro-batch, a teacher with guidance of its own, a full fine-tune, a guided student
    and anchor; with and without gradient checkpointing."""
    network, gen = SD3(BASE).transformer, torch.Generator().manual_seed(0)
    for p in network.parameters():
        p += 0.02 * torch.randn(p.shape, generator=gen)
    network.save_pretrained(tmp_path / "full")
    teachers = [f"compose={loras['compose']},guidance=3", f"ocr={tmp_path}/full", f"scene={loras['scene']}"]
    flags = dict(teachers=teachers, anchor=f"{loras['anchor']},guidance=1", anchor_weight=0.5, guidance=2)
    flags |= dict(batch_size=4, micro_batch_size=3, gradient_checkpointing=checkpointing, lr=0)
    ns = distill(loras, tmp_path / "run", **flags)
    ns["model"].transformer.disable_gradient_checkpointing()
    assert off(gradients[0], two_pass(ns, anchor_weight=0.5)) < 1e-4
    unguided = ns | {"guidance": ns["guidance"] | {"compose": 2.0}}
    assert off(gradients[0], two_pass(unguided, anchor_weight=0.5)) > 0.01


def test_many_teachers_from_a_file(tmp_path, numbers_only, monkeypatch):
    """Sixty-four, a line each; an update asks only those of its prompts, and an empty line is none."""
    shared = [random_lora(tmp_path / f"lora{i}", i) for i in range(4)]
    prompts = few("train", 2, tmp_path)[0].partition("=")[2]
    for name, lines in {
        "teachers": [f"t{i}={shared[i % 4]}" for i in range(64)],
        "prompts": [f"t{i}={prompts}" for i in range(64)],
    }.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines) + "\n")
    asked, velocity = collections.Counter(), SD3.velocity

    def spy(model, x, t, cond, adapter="base", guidance=1.0):
        asked[adapter] += 1
        return velocity(model, x, t, cond, adapter, guidance)

    monkeypatch.setattr(SD3, "velocity", spy)
    flags = dict(batch_size=4, micro_batch_size=4, num_steps=3, resolution=16, steps=1, eval_num_steps=1)
    flags |= dict(teachers=f"@{tmp_path}/teachers.txt", prompts=f"@{tmp_path}/prompts.txt", compare=[])
    run("distill.py", **flags, init="none", eval_prompts=[], reward=[], out=tmp_path / "out")
    learnt = read_log(tmp_path / "out")[-1]
    tasks = [name.partition("/")[2] for name in learnt if name.startswith("distance/")]
    assert len(tasks) == 4 and asked == {"student": 2, **dict.fromkeys(tasks, 2)}
