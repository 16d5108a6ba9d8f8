import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig

SIZES = {
    "vocab_size": 16,
    "d_model": 8,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 2,
    "d_ff": 8,
    "max_positions": 16,
}


def test_which_layers_slide():
    assert TransformerConfig(**SIZES).slides == (False, False, False)
    assert TransformerConfig(**SIZES, sliding_window=4).slides == (True, True, True)
    some = TransformerConfig(
        **SIZES, sliding_window=4, sliding_layers=(True, False, True)
    )
    assert some.slides == (True, False, True)


def test_rotary_dim_is_the_rotated_share_of_a_head():
    assert TransformerConfig(**SIZES).rotary_dim == 2
    sizes = SIZES | {"head_dim": 64}
    assert TransformerConfig(**sizes, rope_fraction=0.25).rotary_dim == 16


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match="4 query heads cannot share 3"):
        TransformerConfig(**(SIZES | {"num_kv_heads": 3}))


def test_sliding_layers_of_another_depth():
    with pytest.raises(UserError, match="names 1 layers of a model with 3"):
        TransformerConfig(**SIZES, sliding_window=4, sliding_layers=(True,))
