"""``harness-rect compare``: evaluations side by side."""
