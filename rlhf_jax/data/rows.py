"""What a row of data holds, in one form for all formats."""

from typing import NamedTuple

from rlhf_jax.data.dialogues import Prompt


class Completion(NamedTuple):
    """What supervised fine-tuning learns: the response, given the prompt."""

    prompt: Prompt  # "" for plain texts; messages until they are rendered
    response: str


class Pair(NamedTuple):
    """Two responses to one prompt, of which `chosen` is preferred."""

    prompt: Prompt  # messages until they are rendered
    chosen: str  # prompt + chosen is the whole text
    rejected: str
    probability: float = 1.0  # P(a rater prefers chosen), ties half
    domain: str = ""
    chosen_safe: bool | None = None  # for cost models; None where nobody said
    rejected_safe: bool | None = None
    margin: float | None = None  # by how much chosen is better; None where nobody said


class Dropped(NamedTuple):
    """A row that cannot be used, and why; its prompt tells the split it is in."""

    prompt: Prompt
    reason: str
