"""CyberSecEval2's indirect prompt injections."""
