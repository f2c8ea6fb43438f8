"""The loop: engine, schedule, checkpoints, and what a person sees of a run."""
