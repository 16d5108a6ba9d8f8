"""When, how and why a policy went wrong, from a run's checkpoints; see `analyzer`."""
