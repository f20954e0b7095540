"""paper.sh: a rehearsal with the real programs, killed and gone on from; with programs that only write down
how they were called, its flags, their order, and what it says when a stage fails."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
from conftest import ROOT, begin, read_json, read_log, run
from test_recipes import parser_of

SPARE = """#!/usr/bin/env bash
me={spool}/$$
if [ "$1" = - ]; then
    cat > $me.py
    shift
    set -- $me.py "$@"
fi
printf '%s\\n' "$@" > $me.new && mv $me.new $me.call
while [ ! -e $me.end ]; do sleep 0.05; done
cat $me.out
exit $(cat $me.end)
"""
FAKE = """#!/usr/bin/env bash
printf '%s\n' "$(printf '%q ' "$(basename "$0")" "$@")" >> calls
case "$*" in *"$FAIL"*) exit 3;; esac
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then mkdir -p "$2/lora" && touch "$2/results.md"; fi
    if [ "$1" = -o ]; then mkdir -p "$(dirname "$2")" && printf '%s\n' 1 2 3 4 > "$2"; fi
    shift
done
"""
STAGES = ["data", "base", "base-agrees", "released", "released-agree", "merge", "sft"]
STAGES += ["opd-merge", "opd-sft", "opd-nomar", "opd-ours", "table"]


def programs(folder, names, text):
    """A PATH on which these programs come first."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_there(out, argv):
    """A script of the project, in a process of its own that has the slow imports already."""
    for number in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run(*argv)


def rehearse(tmp_path, until=None):
    """paper.sh with a random model; killed once the stage `until` is done. (exit status, what it printed)"""
    spool, alive = tmp_path / "spool", {}
    shutil.rmtree(spool, ignore_errors=True)  # a call that was killed
    spool.mkdir()
    path = programs(tmp_path / "bin", ["python"], SPARE.format(spool=spool))
    env = os.environ | {"PATH": path, "OUT": str(tmp_path / "out"), "MODEL": "tiny-random", "SEED": "1"}
    with open(tmp_path / "printed", "w+") as printed:
        how = dict(cwd=ROOT, stdout=printed, stderr=printed, env=env, start_new_session=True)
        script = subprocess.Popen(["bash", "experiments/paper.sh"], **how)
        while script.poll() is None:
            for call in spool.glob("*.call"):
                argv = call.read_text().splitlines()
                call.unlink()
                alive[call] = begin(partial(run_there, str(call.with_suffix(".out")), argv))
            for call, process in alive.items():
                if not process.is_alive():
                    call.with_suffix(".out").touch()
                    call.with_suffix(".end").write_text(str(process.exitcode))
            if until and (tmp_path / f"out/{until}.done").exists():
                os.killpg(script.pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in alive.values():
            process.kill()
            process.join()
        printed.seek(0)
        return script.returncode, printed.read()


def test_a_rehearsal_that_is_killed_goes_on(tmp_path):
    status, printed = rehearse(tmp_path, until="sft")
    out = tmp_path / "out"
    assert status == -signal.SIGKILL and "sft: about" in printed and not (out / "table.done").exists(), (
        printed
    )
    status, printed = rehearse(tmp_path)
    assert status == 0, printed
    done = re.findall(r"^([\w-]+): (done before|took \d\.\d\d hours)$", printed, re.M)
    assert [name for name, _ in done] == STAGES
    assert [how == "done before" for _, how in done] == [True] * 7 + [False] * 5
    assert "1 of 1 rows agree" in printed
    rows = {row["model"]: row["scores"]["jpeg"] for row in read_json(out / "eval/results.json")}
    students = {"merge", "sft", "opd-merge", "opd-sft", "opd-nomar", "opd-ours"}
    assert rows.keys() == {"base", "geneval", "ocr", "pickscore", "deqa", "flow-opd"} | students
    for name in students - {"merge"}:
        log = read_log(out / name)
        assert [row["step"] for row in log] == [1, 2]
        assert ("kl/anchor" in log[0]) == (name in ("opd-merge", "opd-sft")), name


@pytest.fixture
def paper(tmp_path):
    """Run a copy of paper.sh on fake programs: f(**environment) -> (exit status, printed, calls)."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(os.path.join(ROOT, "experiments/paper.sh"), tmp_path / "experiments")
    path = programs(tmp_path / "bin", ["python", "torchrun", "curl"], FAKE)

    def start(**environment):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"PATH": path, "FAIL": "nothing fails"} | environment
        command = ["bash", str(tmp_path / "experiments/paper.sh")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=env)
        calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, done.stdout + done.stderr, calls

    return start


def flags_of(call):
    """A call's parsed flags, by the script's own parser."""
    script = next(word for word in call if word.endswith(".py"))
    return script, parser_of(script).parse_args(call[call.index(script) + 1 :])


def test_its_calls(paper):
    """Flags exist, LoRAs are made before they are used, and what differs between the students is what the
    paper varies."""
    status, printed, calls = paper(DEQA="http://localhost:18086", GPUS="4")
    assert status == 0, printed
    downloads = [call[-1] for call in calls if call[0] == "curl"]
    readme = pathlib.Path(ROOT, "README.md").read_text()
    assert len(downloads) == 7 and downloads[0].rpartition("/geneval/")[0] in readme
    students, made = {}, []
    for call in calls:
        if call[0] == "curl" or "experiments/protocol.py" in call:
            continue
        for lora in re.findall(r"out/paper/([\w-]+)/lora", " ".join(call)):
            assert lora in made, call
        script, args = flags_of(call)
        assert (call[:2] == ["torchrun", "--nproc_per_node=4"]) == (args.out != "out/paper/merge")
        made.append(pathlib.Path(args.out).name)
        if script == "distill.py":
            students[made[-1]] = args
        elif script == "evaluate.py":
            assert args.max_sequence_length == 128 and args.eval_num_steps == 40 and not args.no_t5
            assert "deqa@drawbench,pickle+http://localhost:18086" in args.reward
    check = "python experiments/protocol.py out/paper/eval --published experiments/published.json"
    assert [" ".join(call) for call in calls if "experiments/protocol.py" in call] == [check] * 3
    published, ours = students["opd-merge"], students["opd-ours"]
    assert (published.weighting, published.anchor_weight, published.steps) == ("kl", 0.02, 1000)
    for name, changed in {
        "opd-sft": {"init"},
        "opd-nomar": {"anchor"},
        "opd-ours": {"anchor", "weighting"},
    }.items():
        theirs = vars(students[name])
        differing = {key for key, value in vars(published).items() if theirs[key] != value}
        assert differing == changed | {"out"}, name
    assert ours.weighting == parser_of("distill.py").get_default("weighting")


def test_a_stage_that_fails_stops_it_with_its_name(paper):
    status, printed, calls = paper(FAIL="out/paper/opd-sft")
    assert status == 1 and "opd-sft failed or was stopped, see out/paper/opd-sft.log" in printed
    assert not any("out/paper/opd-nomar" in call for call in calls)
    status, printed, calls = paper()
    assert status == 0 and "opd-merge: done before" in printed and "opd-sft: took" in printed
    assert "out/paper/opd-sft" in calls[0]


def test_released_checkpoints_that_do_not_agree_stop_it(paper):
    status, printed, calls = paper(FAIL="protocol.py")
    assert status == 1 and "base-agrees failed" in printed
    assert [call[0] for call in calls].count("torchrun") == 1  # the base's evaluation, and no more
    [why] = re.findall(r"find out why: python experiments/protocol.py (.*)", printed)
    _, args = flags_of(["evaluate.py", *shlex.split(why.partition("--try ")[2])])
    assert (args.models, args.max_sequence_length) == (["base"], 128)
    status, printed, calls = paper(FAIL="protocol.py", ANYWAY="1")
    assert status == 0 and "not all rows are the paper's" in printed
