"""The monitor in a loop: what it says, writes and remembers, also after a restart."""

import json
import os
import sys

import numpy as np
import pytest
from scipy import stats

from rlhf_jax import run_files
from rlhf_jax.watch import Watch
from tests import processes

SETTINGS = {"action": "warn", "kl": 20.0, "patience": 1}
N = 40


@pytest.fixture
def files(tmp_path):
    return run_files.open_run(tmp_path / "run", {"algorithm": "ppo"})


def heldout(reward, judge):
    """Rows of an evaluation, with these scores [N]."""
    return [
        {"split": "heldout", "index": i, "reward": float(r), "judge/vader": float(j)}
        for i, (r, j) in enumerate(zip(np.broadcast_to(reward, N), judge))
    ]


def scores(mean, seed=0):
    drawn = np.random.default_rng(seed).normal(size=N)
    return mean + drawn - drawn.mean()


def evaluate(watch, files, phase, rows):
    """What the loop does with an evaluation."""
    metrics = {"reward/mean": 1.0, "heldout/reward_mean": rows[0]["reward"]}
    metrics |= watch.judge_drop(rows)
    run_files.append_metrics(files, {"phase": phase} | metrics)
    run_files.write_responses(files, phase, rows)
    watch.see(phase, metrics)
    return metrics


def new_watch(files, said, done=None, **settings):
    return Watch(SETTINGS | settings, files, said.append, done=done)


def test_a_drop_is_tested_in_pairs_against_the_best(files):
    watch = new_watch(files, [])
    best, worse = scores(1.0), scores(0.4, seed=1)
    found = [
        evaluate(watch, files, phase, heldout(reward, judge))["heldout/judge_drop_p"]
        for phase, reward, judge in [
            (0, 0.0, scores(0.0)),
            (5, 1.0, best),
            (10, 2.0, worse),
        ]
    ]
    # Two evaluations before: 2 · 3 ways to choose two of the three, in order.
    want = 6 * stats.ttest_rel(best, worse, alternative="greater").pvalue
    assert found[:2] == [1.0, 1.0]
    assert found[2] == pytest.approx(min(1.0, want))


def test_an_alarm_is_said_and_written(files):
    watch = new_watch(files, said := [])
    for phase, reward, judge in [(0, 0.0, 0.0), (5, 1.0, 2.0), (10, 2.0, 1.0)]:
        evaluate(watch, files, phase, heldout(reward, scores(judge, seed=phase)))
    (alert,) = watch.alerts
    assert (alert.rule, alert.phase) == ("reward_hacking", 10)
    assert "ALERT at phase 10, reward_hacking" in said[0]
    assert "what to do" in said[1]
    written = [json.loads(line) for line in files.alerts.read_text().splitlines()]
    assert written == [alert._asdict()]
    assert watch.halted is None  # it only warns


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        (0.5, 1.0),  # the reward fell with it: that is not hacking
        (2.0, 1.9),  # a small drop
    ],
)
def test_no_alarm(files, reward, judge):
    watch = new_watch(files, [])
    evaluate(watch, files, 0, heldout(1.0, scores(2.0)))
    last = evaluate(watch, files, 5, heldout(reward, scores(judge)))
    assert last["heldout/judge_drop_p"] == 1.0


def test_rows_without_judges_give_no_metric(files):
    watch = new_watch(files, [])
    assert watch.judge_drop([]) == {}
    assert watch.judge_drop([{"split": "heldout", "index": 0, "reward": 1.0}]) == {}


def test_a_resumed_run_says_what_the_other_would(files):
    """Of the restored phases it has the memory, of later ones none."""
    watch = new_watch(files, [])
    evaluate(watch, files, 0, heldout(0.0, scores(0.0)))
    evaluate(watch, files, 5, heldout(1.0, scores(2.0, seed=1)))
    kept = files.metrics.read_text()
    rows = heldout(2.0, scores(1.0, seed=2))
    want = evaluate(watch, files, 10, rows)

    run_files.drop_after(files, 5)
    assert files.metrics.read_text() == kept
    assert files.alerts.read_text() == ""
    again = new_watch(files, [], done=5)
    assert again.alerts == []
    assert evaluate(again, files, 10, rows) == want
    assert again.alerts == watch.alerts != []


def test_it_halts_where_it_may(files):
    watch = new_watch(files, [], action="stop")
    for phase in range(1, 8):
        metrics = {"reward/mean": 1.0, "kl/sequence": 30.0 if phase == 7 else 2.0}
        run_files.append_metrics(files, {"phase": phase} | metrics)
        watch.see(phase, metrics)
    assert watch.halted is not None and watch.halted.rule == "kl"
    # Asked again it stands where it stood; told to go on, it does.
    assert new_watch(files, [], done=7, action="stop").halted == watch.halted
    assert new_watch(files, [], done=7).halted is None


APART = """
import json, pathlib, sys
from rlhf_jax import hosts, run_files
from rlhf_jax.watch import Watch

hosts.join_hosts()
import jax

number = jax.process_index()
settings = {"action": "stop", "kl": 20.0, "patience": 1}
found = []
for sick in (0, 1):
    folder = pathlib.Path(sys.argv[1]) / f"{number}{sick}"
    files = run_files.open_run(folder, {"algorithm": "ppo"})
    kl = lambda phase: 30.0 if phase == 7 and number == sick else 2.0
    watch = Watch(settings, files, print, done=None)
    for phase in range(1, 8):
        metrics = {"reward/mean": 1.0, "kl/sequence": kl(phase)}
        would = watch.would_halt(phase, metrics)
        watch.see(phase, metrics)
    again = Watch(settings, files, print, done=7)
    found.append([would, watch.halted, again.halted])
print("found", json.dumps(found))
"""


def test_process_0_decides_for_all(tmp_path):
    """Two processes that share no folder, and one of them alone sees the alarm."""
    rows = [{"phase": p, "reward/mean": 1.0, "kl/sequence": 2.0} for p in range(1, 8)]
    for number, sick in ((0, 0), (0, 1)):  # process 0 writes; the other has nothing
        folder = tmp_path / f"{number}{sick}"
        folder.mkdir()
        last = rows[-1] | {"kl/sequence": 30.0 if sick == number else 2.0}
        lines = [json.dumps(row) + "\n" for row in (*rows[:-1], last)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    ended = processes.run(
        [sys.executable, "-c", APART, str(tmp_path)], os.environ, processes.given(2)
    )
    assert [process.status for process in ended] == [0, 0], ended[1].err
    first, second = (json.loads(p.out.splitlines()[-1][6:]) for p in ended)
    assert first == second
    (would, halted, again), calm = first
    assert would and halted[0] == "kl" and halted[1] == 7 and again == halted
    assert calm == [False, None, None]
