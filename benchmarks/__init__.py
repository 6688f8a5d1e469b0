"""Measurements that stand behind figures of the project: `python -m benchmarks NAME`; results in RESULTS.md."""
