"""What the lm-eval tasks of this package need: where their rows come from and how answers are scored."""
