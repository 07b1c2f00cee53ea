"""How well a scale is found where the right answer is known: `python -m benchmarks.recovery`, docs/benchmark.md."""
