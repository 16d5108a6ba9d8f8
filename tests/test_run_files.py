"""The run folder: what is written, what a killed process leaves, what may change."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import run_files
from rlhf_jax.errors import UserError

CONFIG = {
    "algorithm": "ppo",
    "seed": 0,
    "workdir": "runs/a",
    "ppo": {"clip_ratio": 0.2, "schedule": [1, 2]},
    "log": {"every": 1, "tensorboard": False},
}


def make_run(tmp_path, phases=0):
    files = run_files.open_run(tmp_path / "runs" / "a", CONFIG)
    for phase in range(1, phases + 1):
        run_files.append_metrics(files, {"phase": phase, "reward": 0.5 * phase})
        run_files.write_responses(files, phase, [{"prompt": "a", "reward": phase}])
        run_files.append_samples(files, phase, [{"prompt": "## Phase 9\nb"}])
    return files


def test_config_is_sorted_json(tmp_path):
    files = make_run(tmp_path)
    text = files.config.read_text()
    assert json.loads(text) == CONFIG
    assert text == json.dumps(CONFIG, indent=2, sort_keys=True) + "\n"
    assert [p.name for p in files.workdir.iterdir()] == ["config.json"]


def test_the_same_config_goes_on(tmp_path):
    make_run(tmp_path, phases=2)
    tuples = CONFIG | {"ppo": {"clip_ratio": 0.2, "schedule": (1, 2)}}
    files = run_files.open_run(tmp_path / "runs" / "a", tuples)
    assert len(run_files.read_metrics(files.workdir)) == 2


def test_a_try_before_the_first_phase_binds_nobody(tmp_path):
    files = make_run(tmp_path)
    files.checkpoints.mkdir()  # as a run does that then fails in its first phase
    other = CONFIG | {"seed": 1}
    run_files.open_run(files.workdir, other)
    assert json.loads(files.config.read_text()) == other


def test_the_config_of_something_else_stays(tmp_path):
    """As a model's directory has one, given as the workdir by mistake."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds a run with another configuration"):
        run_files.open_run(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_another_config_is_a_sentence(tmp_path):
    files = make_run(tmp_path, phases=1)
    before = files.config.read_text()
    other = {
        "algorithm": "ppo",
        "workdir": "elsewhere",
        "ppo": {"clip_ratio": 0.3, "schedule": [1, 2], "new": None},
        "log": {"every": 5, "tensorboard": True},
    }
    with pytest.raises(UserError) as caught:
        run_files.open_run(files.workdir, other, may_change=("workdir", "log"))
    message = str(caught.value)
    assert "ppo.clip_ratio was 0.2 and is now 0.3" in message
    assert "ppo.new was unset and is now null" in message
    assert "seed was 0 and is now unset" in message
    assert "log" not in message
    assert "choose another workdir, or delete" in message
    assert files.config.read_text() == before


def test_keys_that_may_change_are_taken_over(tmp_path):
    files = make_run(tmp_path, phases=1)
    changed = CONFIG | {"workdir": "b", "log": {"every": 9}}
    run_files.open_run(files.workdir, changed, may_change=("workdir", "log"))
    assert json.loads(files.config.read_text()) == changed
    # "log" frees log.every, not logarithm.
    with pytest.raises(UserError, match="logarithm"):
        run_files.open_run(
            files.workdir, changed | {"logarithm": 1}, may_change=("log",)
        )


def test_broken_config_is_a_sentence(tmp_path):
    files = make_run(tmp_path)
    for text in ("{", "[1]"):
        files.config.write_text(text)
        with pytest.raises(UserError, match=r"config\.json is not a configuration"):
            run_files.open_run(files.workdir, CONFIG)


def test_a_file_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write in the run folder"):
            run_files.open_run(path, CONFIG)


def test_metrics_lines(tmp_path):
    files = make_run(tmp_path)
    row = {
        "phase": 1,
        "python": 0.1,
        "numpy": np.float32(0.1),
        "half": jnp.bfloat16(0.5),
        "jax": jnp.float32(1) / 3,
        "count": jnp.int32(7),
        "flag": np.bool_(True),
        "list": np.arange(2.0),
        "nan": jnp.float32(jnp.nan),
        "inf": -math.inf,
    }
    run_files.append_metrics(files, row)
    assert files.metrics.read_text() == (
        '{"phase": 1, "python": 0.1, "numpy": 0.1, "half": 0.5, "jax": 0.33333334, '
        '"count": 7, "flag": true, "list": [0.0, 1.0], "nan": null, "inf": null}\n'
    )
    (back,) = run_files.read_metrics(files.workdir)
    assert back["count"] == 7
    assert math.isnan(back["nan"])


def test_float32_survives(tmp_path):
    files = make_run(tmp_path)
    values = jax.random.normal(jax.random.key(0), (200,)) * 10.0 ** jnp.arange(
        -30, 30, 0.3
    )
    run_files.append_metrics(files, {"phase": 1, "values": values})
    (row,) = run_files.read_metrics(files.workdir)
    np.testing.assert_array_equal(np.float32(row["values"]), values)


def test_a_value_that_is_no_number_raises(tmp_path):
    with pytest.raises(TypeError):
        run_files.append_metrics(make_run(tmp_path), {"phase": 1, "x": object()})


def test_half_a_line_is_dropped(tmp_path):
    files = make_run(tmp_path, phases=3)
    whole = files.metrics.read_bytes()
    with files.metrics.open("a") as file:
        file.write('{"phase": 4, "rew')
    assert [row["phase"] for row in run_files.read_metrics(files.workdir)] == [1, 2, 3]
    run_files.drop_after(files, 10)
    assert files.metrics.read_bytes() == whole


def test_a_bad_line_in_the_middle_is_a_sentence(tmp_path):
    files = make_run(tmp_path, phases=1)
    with files.metrics.open("a") as file:
        file.write('nonsense\n{"phase": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl .*'nonsense'"):
        run_files.read_metrics(files.workdir)


def test_no_metrics_yet(tmp_path):
    assert run_files.read_metrics(tmp_path) == []


def test_drop_after_and_writing_again_gives_the_same_bytes(tmp_path):
    files, other = make_run(tmp_path / "1", phases=5), make_run(tmp_path / "2", 3)
    (files.responses / "phase_00004.jsonl.tmp").write_text("{")
    run_files.drop_after(files, 3)
    names = sorted(p.relative_to(files.workdir) for p in files.workdir.rglob("*"))
    assert names == sorted(
        p.relative_to(other.workdir) for p in other.workdir.rglob("*")
    )
    for name in names:
        if (files.workdir / name).is_file():
            assert (files.workdir / name).read_bytes() == (
                other.workdir / name
            ).read_bytes()
    run_files.drop_after(files, -1)
    assert files.metrics.read_text() == files.samples.read_text() == ""
    assert list(files.responses.iterdir()) == []


def test_drop_after_in_a_new_run(tmp_path):
    run_files.drop_after(make_run(tmp_path), -1)


def test_responses(tmp_path):
    files = make_run(tmp_path)
    rows = [{"response": "naïve\u2028☃\n", "reward": np.float32(0.7), "tokens": [1, 2]}]
    run_files.write_responses(files, 50, rows)
    assert (files.responses / "phase_00050.jsonl").read_text("utf-8").count("\n") == 1
    assert run_files.read_responses(files.workdir, 50) == [
        {"response": "naïve\u2028☃\n", "reward": 0.7, "tokens": [1, 2]}
    ]
    with pytest.raises(UserError, match="no responses of phase 3; saved phases: 50"):
        run_files.read_responses(files.workdir, 3)


def test_samples_are_one_table_a_phase(tmp_path):
    files = make_run(tmp_path)
    run_files.append_samples(files, 10, [{"response": "a|b\n<c>", "reward": 1.0}])
    assert files.samples.read_text() == (
        "## Phase 10\n\n| response | reward |\n| --- | --- |\n"
        "| a&#124;b<br>&lt;c> | 1.000 |\n\n"
    )


def test_summary(tmp_path):
    files = make_run(tmp_path)
    run_files.write_summary(files, {"b": np.float32(0.1), "a": math.nan})
    assert json.loads(files.summary.read_text()) == {"b": 0.1, "a": None}


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    files = make_run(tmp_path, phases=2)
    run_files.write_summary(files, {})
    run_files.drop_after(files, 0)
    assert list(files.workdir.iterdir()) == []
