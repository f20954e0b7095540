"""protocol.py: on the toy a wrong protocol is found and named, the right one passes, and --try tells which
setting it was; the published numbers have sources and protocols."""

import json
import math
import pathlib
import subprocess
from functools import partial

import pytest
from conftest import ROOT, begin, refused, run, words

from experiments import protocol
from flow_sde import load_prompts

BOOKS = {name: pathlib.Path(ROOT, f"experiments/{name}.json") for name in ("published", "published_toy")}
SETTINGS = {"eval_num_steps", "guidance", "resolution", "dtype", "no_t5", "max_sequence_length", "prompts"}
SETTINGS |= {"samples_per_prompt"}


def evaluated(out, task, file, **flags):
    """The toy's base on a task's prompts; the flags that evaluate.py was called with."""
    flags = dict(tasks=[f"{task}={ROOT}/toy/prompts/{file}.txt"], reward=[f"toy.{task}"], **flags)
    run("evaluate.py", models="base", out=out, **flags)
    return words(**flags)


def judged(capfd, out, *more):
    """(whether all rows agree, what protocol.py printed)."""
    capfd.readouterr()
    try:
        run("experiments/protocol.py", out, "--published", BOOKS["published_toy"], *more)
        agree = True
    except SystemExit as end:
        assert end.code == 1
        agree = False
    return agree, capfd.readouterr().out


def test_the_right_protocol_agrees(tmp_path, capfd):
    evaluated(tmp_path, "scene", "scene_dawn_test")
    agree, printed = judged(capfd, tmp_path)
    assert agree and "1 of 1 rows agree" in printed
    assert "though" not in printed


def in_a_fork(command, **options):
    """subprocess.run for a script, in a process that has the slow imports already."""
    process = begin(partial(run, *command[1:]))
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def test_wrong_settings_are_named_and_the_cause_is_found(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_a_fork)
    flags = evaluated(tmp_path, "compose", "compose_test", guidance=2, eval_num_steps=3)
    agree, printed = judged(capfd, tmp_path, "--try", *flags)
    line = printed.splitlines()[0]
    assert not agree and line.startswith("base, compose on compose:")
    assert "DIFFERS" in line and "guidance 2.0, published 1.0; eval_num_steps 3, published 10" in line
    assert "guidance: from 1 to 3" in printed and "\nprompts: " not in printed
    *_, answer = printed.splitlines()
    assert "yes: eval_num_steps 10 (+0." in answer and "yes: guidance" not in answer
    assert {path.name for path in (tmp_path / "protocol").iterdir()} == {
        "prompts",
        "guidance=1.0",
        "eval_num_steps=10",
    }
    other = [word.replace("compose_test", "compose_val") for word in flags]
    book = "--published", BOOKS["published_toy"]
    message = refused("experiments/protocol.py", tmp_path, *book, "--try", *other)
    assert "was not made with the prompts of" in message


def test_other_prompts_are_named(tmp_path, capfd):
    evaluated(tmp_path, "scene", "blue_test")
    agree, printed = judged(capfd, tmp_path)
    assert not agree and "DIFFERS" in printed
    assert "published toy/prompts/scene_dawn_test.txt\nprompts: " in printed
    assert "guidance" not in printed


def made_up(tmp_path, scores, settings=None, task="geneval"):
    """A folder of evaluate.py with these scores, {reward: mean}, each with an error of .01."""
    settings = {"guidance": 4.5, "eval_num_steps": 40, "dtype": "float16"} | (settings or {})
    row = {"model": "base", "scores": scores, "stderr": dict.fromkeys(scores, 0.01)}
    row["tasks"] = {reward: {task: [0.5, 0.02]} for reward in scores}
    (tmp_path / "base" / task).mkdir(parents=True)
    (tmp_path / "base" / task / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "results.json").write_text(json.dumps([row]))
    return protocol.compare(tmp_path, json.loads(BOOKS["published"].read_text()))


def test_a_strict_geneval_is_recognised(tmp_path):
    [entry] = made_up(tmp_path, {"geneval": 0.75, "geneval_strict": 0.63})
    assert entry["ours"] == (0.75, 0.01)  # the mean of the tags, not that of the pictures
    assert entry["hints"] == ["our geneval_strict, 0.630, would agree"]
    theirs = math.hypot(0.01, 0.01 / math.sqrt(12))
    assert entry["sigmas"] == pytest.approx((0.75 - 0.63) / math.hypot(0.01, theirs))


def test_another_published_number_says_which_protocol_it_was(tmp_path):
    [entry] = made_up(tmp_path, {"geneval": 0.245}, {"guidance": 1.0, "dtype": "float32"})
    assert [name for name, *_ in entry["differ"]] == ["guidance", "dtype"]
    assert len(entry["hints"]) == 1 and "without guidance" in entry["hints"][0]
    assert protocol.variants([entry]) == [("guidance", 4.5), ("dtype", "float16")]
    del entry["protocol"]["dtype"]
    entry["differ"].pop()
    tried = [("guidance", 4.5), ("dtype", "float16"), ("dtype", "bfloat16")]
    assert protocol.variants([entry]) == tried


def test_a_score_on_unknown_prompts_is_not_judged(tmp_path, capfd):
    made_up(tmp_path, {"aesthetic": 1.0}, task="drawbench")
    run("experiments/protocol.py", tmp_path)
    printed = capfd.readouterr().out
    assert "not judged, its prompts are not said" in printed and "0 of 0 rows agree" in printed


def test_where_no_setting_differs_what_others_have_is_tried(tmp_path):
    [entry] = made_up(tmp_path, {"geneval": 0.4})
    assert not entry["differ"] and not entry["hints"]
    assert "no setting differs" in protocol.verdict(entry, {"prompts": {}, "effects": {}})
    others = [("guidance", 1.0), ("eval_num_steps", 10), ("eval_num_steps", 28), ("dtype", "bfloat16")]
    assert protocol.variants([entry]) == others


@pytest.mark.parametrize("name", BOOKS)
def test_every_published_number_has_a_source_and_a_protocol(name):
    book = json.loads(BOOKS[name].read_text())
    assert set(book["effects"]) <= SETTINGS
    for row in book["rows"]:
        assert row["source"] and -1 <= float(row["score"]) / book["divided"].get(row["reward"], 1) <= 7
        assert set(book["protocols"][row["protocol"]]) <= SETTINGS
    for digest, file in book["prompts"].items():
        if file.startswith("toy/"):
            task = pathlib.Path(file).name.partition("_")[0]
            assert book["protocols"][task]["prompts"] == digest
            assert protocol.digest_of(load_prompts(task, f"{ROOT}/{file}")) == digest


def test_refusals(tmp_path):
    assert "has no results.json" in refused("experiments/protocol.py", tmp_path)
    (tmp_path / "results.json").write_text("[]")
    assert "none of its rows is in" in refused("experiments/protocol.py", tmp_path)
