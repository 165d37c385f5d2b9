"""BIPIA: e-mails, tables and code answers that hold instructions, judged by the benchmark's own rules."""
