"""Tells, by forward passes alone, whether tokens defend a model: a go or no-go before an evaluation is paid for."""
