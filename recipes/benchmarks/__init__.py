"""What benchmark.py measures, one module each."""
