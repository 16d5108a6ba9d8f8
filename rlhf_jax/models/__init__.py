"""Decoder-only language models: one transformer, driven by a configuration."""
