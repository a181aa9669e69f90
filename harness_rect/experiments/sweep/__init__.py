"""``harness-rect sweep``: a grid of editing runs, evaluated at checkpoints."""
