"""Prompts, texts, tokenizers and the builtin data set."""
