"""The only files that touch what lm-eval and transformers do not promise."""
