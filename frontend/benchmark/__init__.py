"""Measuring an engine through its public client: what to send, when, and what came of it.

`workload` and `summary` are pure; `driver` runs a workload against an `AsyncLLMEngine`;
`report` says what was measured and where. `scripts/benchmark.py` is the command line.
"""
