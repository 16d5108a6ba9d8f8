"""What is generated is up to date, and what is shown runs."""

import importlib.util
import pathlib

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
