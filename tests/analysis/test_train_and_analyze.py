"""One call that trains and hands back an analyzer; runs whose weights are no use."""

from rlhf_jax.analysis.analyzer import AlignmentAnalyzer
from rlhf_jax.analyze import train_and_analyze
from tests.analysis.conftest import EVERY_PHASE


def test_it_trains_and_the_phases_can_be_asked(world, run, tmp_path):
    config = world.ppo_config(tmp_path, total_phases=1, **EVERY_PHASE)
    analyzer = train_and_analyze(config)
    assert analyzer.phases == [0, 1]
    found = analyzer.generate_responses_from_checkpoint(1, num_samples=2)
    assert len(found["samples"]) == 2


def test_a_run_of_another_version_has_its_responses_left(edit, capsys):
    """One whose settings this version cannot read is not lost."""
    workdir = edit(lambda config: config["rollout"].pop("temperature"))
    found = AlignmentAnalyzer(workdir, num_samples=16).findings()
    said = capsys.readouterr().out
    assert "no 'temperature'; so the saved responses are analysed" in said
    assert list(found.summaries) == [0, 1, 2, 3]
    assert found.weights == {} and found.moves == []
