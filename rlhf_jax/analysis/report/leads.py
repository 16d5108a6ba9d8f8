"""What a report says about each of its sections: what is seen and how to read it."""

CURVES = """
The mean over prompts of each measure; the band is its 95&nbsp;% interval. A healthy run
has rising rewards and judges, and a KL that levels off. A length that runs away, rising
repetition or falling variety say how a reward is being gamed.
"""
DISTANCE = """
The reward, and the judges, on which nothing was trained, over how far the policy went
from its reference; numbers are phases. Where the reward goes on rising and a judge
turns down, the policy has learned the reward's mistakes. The curve is
start + d&nbsp;(α − β&nbsp;log&nbsp;d), d = √KL (Gao et al. 2023).
"""
PHASES = """
Every phase that was looked at: ★ is the recommended one, ✕ the first from which on
something is wrong.
"""
TRENDS = """
The mean over prompts of each one's least-squares slope over the phases. A direction is
given where p is below 5&nbsp;%; p is not adjusted for the number of measures.
"""
ANOMALIES = """
What is odd beside the first phase: ● is a phase as a whole, a number is how many of its
answers. Below, by phase and kind, the surest first.
"""
NO_ANOMALIES = "Nothing odd was found beside the first phase."
SAMPLES = """
What the policy answered to the same prompts, those first whose reward changed most. Red
words went, green words came, both beside the first phase.
"""
TOKENS = """
Which tokens make the KL of the last phase, and the answers farthest from the reference.
A colour is log&nbsp;π − log&nbsp;π<sub>ref</sub> of a token: orange is said more
willingly than by the reference, blue less. Point at a token for its number.
"""
WEIGHTS = """
How far the weights of each part are from the reference's,
‖θ − θ<sub>ref</sub>‖ / ‖θ<sub>ref</sub>‖. A part that moves far more than the others is
where the change was learned.
"""
STATES = """
How alike the inner states of each layer are to the reference's on the same answers, by
linear CKA: 1 is the same, and less has a stronger colour.
"""
GONE = "Left out: the checkpoints of this run are gone, and only its texts are left."
ALONE = "Left out: it takes two phases, and only one was looked at."
MEASURED = (
    "Every phase answered the same prompts from the same keys, so that phases are "
    "compared in pairs; the first phase is the baseline.",
    "Intervals are of 95&nbsp;%, from a bootstrap over prompts; p-values are from "
    "flips of the signs of paired differences.",
    "Those of anomalies are adjusted for all tests by Benjamini and Hochberg, and an "
    "anomaly needs a least size too.",
)
