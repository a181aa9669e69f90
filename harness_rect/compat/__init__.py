"""All uses of names that lm-eval and transformers do not document as stable."""
