"""DefensiveToken transfer for lm-evaluation-harness.

Importing this package imports nothing else: every interpreter of the
environment does so at start-up, through ``dtt_plugin.pth``.
"""

__version__ = "0.1.0"
