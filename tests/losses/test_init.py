import json
import subprocess
import sys

import rlhf_jax.losses

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import jax, numpy
middle = time.perf_counter()
before = set(sys.modules)
import rlhf_jax.losses
end = time.perf_counter()
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([middle - start, end - middle, sorted(loaded)]))
"""


def test_import_loads_only_jax_and_is_quick():
    """In a new interpreter: after jax, nothing but this package and no waiting."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    jax_seconds, losses_seconds, loaded = json.loads(done.stdout)
    assert loaded == ["rlhf_jax"]
    assert losses_seconds < 0.5 * jax_seconds


def test_every_public_name_is_documented():
    assert sorted(rlhf_jax.losses.__all__) == rlhf_jax.losses.__all__
    for name in rlhf_jax.losses.__all__:
        assert getattr(rlhf_jax.losses, name).__doc__
