"""How much memory a run needs at most."""

import pathlib

import jax

_STATUS, _CLEAR = (
    pathlib.Path("/proc/self/status"),
    pathlib.Path("/proc/self/clear_refs"),
)


def peak_memory() -> float | None:
    """The most that was in use since `reset_peak_memory`, in bytes.

    Of an accelerator it is the fullest one's own memory, since the process began; on a
    CPU the resident memory of this process. None where neither is told.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [
        found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found
    ]
    if used:
        return float(max(used))
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text("ascii").splitlines()
    peaks = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    peak = next(peaks, None)
    return None if peak is None else 1024.0 * int(peak)


def reset_peak_memory() -> None:
    """Begins to measure anew, where the system can: the resident memory on Linux."""
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        return  # then the peak is that of the whole process
