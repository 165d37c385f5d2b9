"""lm-eval tasks that measure prompt injection; each folder is one benchmark."""
