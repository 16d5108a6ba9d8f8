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
        value = getattr(rlhf_jax.losses, name)
        if isinstance(value, dict):  # which has the docstring of all dicts
            assert f"`{name}`" in rlhf_jax.losses.__doc__
            continue
        # a NamedTuple without a docstring has its signature for one
        assert value.__doc__ and not value.__doc__.startswith(f"{name}(")


def test_what_is_used_through_its_module_has_no_second_name():
    for module in (rlhf_jax.losses.masked, rlhf_jax.losses.aggregation):
        own = {
            name
            for name, x in vars(module).items()
            if getattr(x, "__module__", "") == module.__name__
        }
        assert {"sum_and_count", "aggregate"} & own
        assert not own & set(vars(rlhf_jax.losses))
