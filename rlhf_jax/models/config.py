"""The shape of a decoder-only transformer, whatever family it comes from."""

import dataclasses

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach longer contexts.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" divides only those
            whose wavelength is long against the original context, with a smooth
            passage between the two bounds.
        factor: by how much the context grew.
        low_frequency_factor: llama3 only; wavelengths above
            original_max_positions / low_frequency_factor are divided by `factor`.
        high_frequency_factor: llama3 only; wavelengths below
            original_max_positions / high_frequency_factor are left alone.
        original_max_positions: llama3 only; the context before it grew.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that tells one supported decoder-only transformer from another.

    Attributes:
        vocab_size: V, rows of the token embedding.
        d_model: D, width of the residual stream.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: Hkv, key and value heads; it divides `num_heads`.
        head_dim: hd, width of one head; H·hd need not equal D.
        d_ff: width inside the feed-forward part.
        max_positions: the longest sequence the model is meant for; with learned
            positions also the rows of their table.
        positions: "rope" or "learned".
        rope_theta: base of the rotary frequencies.
        rope_fraction: share of each head that is rotated (GPT-NeoX: 0.25).
        rope_scaling: stretching of the rotary frequencies, or None.
        rope_local_theta: base on sliding-window layers where it differs (Gemma 3);
            these layers are then never stretched.
        norm: "rms" or "layer" (with bias).
        norm_eps: added to the variance.
        norm_unit_offset: RMS scales are stored as their distance from 1 (Gemma).
        post_norms: the output of each branch is normalised too (Gemma 2 and 3).
        parallel_residual: both branches read the same input (GPT-NeoX).
        activation: "gelu", "gelu_tanh", "silu" or "relu".
        gated_mlp: down(activation(gate(x)) * up(x)) instead of down(activation(up(x))).
        qkv_bias: biases on the query, key and value projections.
        attention_out_bias: a bias on the attention's output projection.
        mlp_bias: biases in the feed-forward part.
        qk_norm: RMS norm on each query and key head (Qwen 3, Gemma 3).
        tied_embeddings: the unembedding is the token embedding.
        embedding_scale: factor on token embeddings, or None (Gemma: sqrt(D)).
        query_scale: factor on query·key, or None for 1/sqrt(hd).
        attention_softcap: c in c·tanh(score/c), or None.
        logit_softcap: the same on the logits.
        sliding_window: a query sees itself and the window-1 tokens before it, on the
            layers of `sliding_layers`.
        sliding_layers: per layer, whether the window applies; None with a window set
            means every layer.
        dropout: rate on the embedding and on both residual branches; it acts only
            where a dropout key is given.
        neftune_alpha: noise on the embedding, where a dropout key is given: uniform in
            ±alpha/sqrt(T·D) for a text of T tokens. Jain et al. 2023,
            https://arxiv.org/abs/2310.05914
        lora_scale: α/r, the factor on what an adapter adds to a linear layer.
        lora_dropout: rate on the adapter's input, where a dropout key is given.
        init_std: standard deviation of fresh weights.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    post_norms: bool = False
    parallel_residual: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    embedding_scale: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    dropout: float = 0.0
    neftune_alpha: float = 0.0
    lora_scale: float = 0.0
    lora_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"A model with {self.num_heads} query heads cannot share "
                f"{self.num_kv_heads} key-value heads: the number must divide."
            )
        if self.sliding_layers is not None and (
            len(self.sliding_layers) != self.num_layers
        ):
            raise UserError(
                f"sliding_layers (layer_types) names {len(self.sliding_layers)} layers "
                f"of a model with {self.num_layers}."
            )

    @property
    def slides(self) -> tuple[bool, ...]:
        """Per layer, whether attention is limited to the sliding window."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        return self.sliding_layers or (True,) * self.num_layers

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels are rotated."""
        return int(self.head_dim * self.rope_fraction)
