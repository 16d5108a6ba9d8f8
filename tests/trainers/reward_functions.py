"""Rewards that the runs of these tests name by import path, good ones and bad ones."""

import os
import signal

import numpy as np

CALLS = []


def letters(prompts, responses, **columns):
    """Share of the response that is small letters and spaces.

    In a process with KILL_AT_CALL it is the end of everything at that call, and one
    with TERM_AT_CALL is asked to end. Held-out prompts make call 0, and each phase one
    more.
    """
    CALLS.append(len(responses))
    if os.environ.get("KILL_AT_CALL") == str(len(CALLS) - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TERM_AT_CALL") == str(len(CALLS) - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    plain = [sum(c == " " or "a" <= c <= "z" for c in text) for text in responses]
    return np.array(plain, np.float32) / [max(len(text), 1) for text in responses]


def says_good(prompts, responses, **columns):
    """1 or 0, so that the responses to a prompt are often worth the same."""
    return ["o" in text for text in responses]


def has_o(prompts, responses, **columns):
    """A cost: how often an o is in the response."""
    return [float(text.count("o")) for text in responses]


def breaks(prompts, responses, **columns):
    raise KeyError("no such thing")


def gives_nan(prompts, responses, **columns):
    return [0.0, float("nan")] + [1.0] * (len(responses) - 2)


def one_too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)
