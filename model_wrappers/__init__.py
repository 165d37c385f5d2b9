"""lm-eval models that run a language model under a defense."""
