"""What is generated is up to date, and what is shown runs."""

import importlib.util
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


def load(path):
    """The module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_losses_is_current():
    make_losses = load(ROOT / "docs" / "make_losses.py")
    written = (ROOT / "docs" / "losses.md").read_text("utf-8")
    assert written == make_losses.document(), "run python docs/make_losses.py"


def test_every_row_of_the_table_has_its_cells():
    lines = (ROOT / "docs" / "losses.md").read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| **")]
    assert len(rows) > 60
    for row in rows:
        cells = row.replace(r"\|", "").strip("|").split("|")
        assert len(cells) == 3, row


def test_the_example_learns_with_the_losses_alone(capsys):
    path = ROOT / "examples" / "grpo.py"
    ours = [line for line in path.read_text("utf-8").splitlines() if "rlhf_jax" in line]
    assert ours == ["from rlhf_jax import losses"]
    rewards = load(path).main(steps=61)
    assert rewards[0] < 0.4
    assert min(rewards[-5:]) > 0.8
    assert "step  60  reward 0." in capsys.readouterr().out


def test_the_readme_calls_the_losses_as_they_are():
    text = (ROOT / "README.md").read_text("utf-8")
    _, _, section = text.partition("## The losses in your own code")
    code = section.partition("```python")[2].partition("```")[0]
    rng, (B, T, D, V) = np.random.default_rng(0), (16, 6, 8, 11)
    names = {
        "rewards": rng.normal(size=B),
        "mask": rng.random((B, T)) < 0.8,
        "hidden": rng.normal(size=(B, T, D)),
        "unembedding": rng.normal(size=(V, D)),
        "responses": rng.integers(0, V, (B, T)),
        "old_logprobs": rng.normal(size=(B, T)),
    }
    exec(code, names)
    assert float(names["count"]) == names["mask"].sum()
    assert np.isfinite(float(names["total"]))
