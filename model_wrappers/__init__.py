"""lm-eval model classes that edit a model before it is evaluated."""
