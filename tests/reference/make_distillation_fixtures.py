"""Make tests/fixtures/losses/distillation.npz: the loss of TRL's GKD trainer.

Run in an environment with torch and trl 1.16 (the tests need neither):

    python tests/reference/make_distillation_fixtures.py

The file holds, in double precision (B sequences, T tokens, V vocabulary):
    logits, teacher_logits [B, T, V], mask [B, T], betas, temperature
    losses [beta], gradients [beta, B, T, V]   of the mean over the tokens of the mask,
                                               in the student's logits
"""

import pathlib

import numpy as np
import torch
from trl.experimental.gkd import GKDTrainer

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "distillation.npz"
B, T, V = 3, 4, 6
BETAS, TEMPERATURE = (0.0, 0.3, 0.5, 1.0), 0.7


def main():
    """Write the file."""
    rng = np.random.default_rng(0)
    logits, teacher_logits = rng.normal(0.0, 2.0, (2, B, T, V))
    mask = np.arange(T) < np.array([[4], [2], [3]])
    labels = torch.where(torch.tensor(mask), 0, -100)
    losses, gradients = [], []
    for beta in BETAS:
        student = torch.tensor(logits, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            student,
            torch.tensor(teacher_logits),
            labels,
            beta=beta,
            temperature=TEMPERATURE,
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.grad.numpy())
    np.savez_compressed(
        OUT,
        logits=logits,
        teacher_logits=teacher_logits,
        mask=mask,
        betas=BETAS,
        temperature=TEMPERATURE,
        losses=losses,
        gradients=gradients,
    )


if __name__ == "__main__":
    main()
