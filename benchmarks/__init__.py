"""What knnstore costs, beside the limit and beside what one would use instead: `python -m benchmarks` (docs/benchmarks.md)."""
