"""Evaluation of policies; reads weights and runs, never a trainer."""
