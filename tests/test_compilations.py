import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import compilations


def program():
    """A function that was never compiled before."""
    return jax.jit(lambda x: jnp.sin(x) + 1.0)


def test_a_program_is_counted_once_for_each_shape():
    x, y = jnp.ones(3), jnp.ones(4)
    function, started = program(), time.perf_counter()
    found = compilations.watch()
    for argument in (x, x, y, y):
        function(argument)
    found.close()
    assert found.report().programs == 2
    assert 0 < found.report().seconds < time.perf_counter() - started


def test_what_was_before_and_what_comes_after_is_not_counted():
    x = jnp.ones(3)
    program()(x)
    first, second = compilations.watch(), compilations.watch()
    program()(x)
    first.close()
    program()(x)
    assert first.report().programs == 1
    assert second.report().programs == 2
    second.close()
    program()(x)
    assert second.report().programs == 2


def test_what_the_persistent_cache_had(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    x = jnp.ones(5)
    found = compilations.watch()
    try:
        program()(x)
        assert found.report()[:2] == (1, 0)
        program()(x)
        assert found.report()[:2] == (2, 1)
    finally:
        found.close()
        for name, value in old.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((41, 0, 12.34), "41 programs compiled in 12.3 s"),
        ((1, 0, 0.96), "1 program compiled in 1.0 s"),
        ((7, 5, 2.0), "7 programs compiled in 2.0 s, 5 of them from the cache"),
    ],
)
def test_what_is_said(found, told):
    assert str(compilations.Compilations(*found)) == told
