"""Where a run's metrics go: metrics.jsonl always, TensorBoard and W&B on demand."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rlhf_jax.errors import UserError, first_line
from rlhf_jax.run_files import RunFiles, append_metrics

Row = Mapping[str, Any]


class Writers(NamedTuple):
    """write(phase, row) sends a row of scalars to every place; close() ends them."""

    write: Callable[[int, Row], None]
    close: Callable[[], None]


def open_writers(
    files: RunFiles,
    *,
    first_phase: int = 0,
    tensorboard: bool = False,
    wandb: str = "",
    wandb_project: str = "rlhf_jax",
    config: Row | None = None,
) -> Writers:
    """Opens the run's writers; those of a resumed run go on where it stopped.

    Args:
      files: From `run_files.open_run`.
      first_phase: The first phase that will be written. Rows of this phase and later
        from before a restart are hidden in TensorBoard.
      tensorboard: Write event files to `<workdir>/tensorboard`.
      wandb: "online", "offline" (files in `<workdir>/wandb`, for `wandb sync`), or "".
      wandb_project: The W&B project.
      config: Shown beside the W&B run.

    Raises:
      UserError: A package for a writer is not installed.
    """

    def write_jsonl(phase: int, row: Row) -> None:
        append_metrics(files, {"phase": phase, **row})

    writers = [Writers(write_jsonl, lambda: None)]
    if jax.process_index() == 0:
        if tensorboard:
            writers.append(_tensorboard(files, first_phase))
        if wandb:
            writers.append(_wandb(files, wandb, wandb_project, config or {}))

    def write(phase: int, row: Row) -> None:
        for writer in writers:
            writer.write(phase, row)

    def close() -> None:
        for writer in writers:
            writer.close()

    return Writers(write, close)


def _tensorboard(files: RunFiles, first_phase: int) -> Writers:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise _missing("TensorBoard", "tensorboard") from error
    writer = SummaryWriter(
        logdir=str(files.workdir / "tensorboard"),
        purge_step=first_phase,
        # Files are named by the second: a quick restart must not overwrite one.
        filename_suffix=f".{uuid.uuid4().hex[:8]}",
    )

    def write(phase: int, row: Row) -> None:
        for key, value in _finite(row).items():
            writer.add_scalar(key, value, phase)
        writer.flush()

    return Writers(write, writer.close)


def _wandb(files: RunFiles, mode: str, project: str, config: Row) -> Writers:
    if mode not in ("online", "offline"):
        raise UserError(f'wandb is "online", "offline" or "" (off), not {mode!r}')
    try:
        import wandb
    except ImportError as error:
        raise _missing("Weights & Biases", "wandb") from error
    # The id outlives a restart, so that a resumed run is one curve.
    id_file = files.workdir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    try:
        run = wandb.init(
            project=project,
            id=id_file.read_text("utf-8").strip(),
            name=files.workdir.name,
            dir=str(files.workdir),
            config=dict(config),
            resume="allow",
            mode=mode,
        )
    except wandb.Error as error:
        raise UserError(
            f"W&B did not start ({first_line(error)}); "
            'run wandb login, or choose wandb="offline"'
        ) from error
    # W&B's own step only goes up; against "phase", rows written again lie on their old
    # selves.
    run.define_metric("*", step_metric="phase")

    def write(phase: int, row: Row) -> None:
        run.log({"phase": phase, **_finite(row)})

    return Writers(write, run.finish)


def _finite(row: Row) -> dict[str, float]:
    """Leaves nan and inf out: neither TensorBoard nor W&B draws them."""
    numbers = {key: float(value) for key, value in row.items()}
    return {key: x for key, x in numbers.items() if math.isfinite(x)}


def _missing(name: str, extra: str) -> UserError:
    return UserError(
        f"logging to {name} needs a package that is not installed; "
        f'run pip install "rlhf_jax[{extra}]"'
    )
