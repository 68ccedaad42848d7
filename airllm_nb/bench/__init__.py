"""How fast a model runs on this machine, beside what its plan predicted and what each link could do."""

from __future__ import annotations

from .measure import bench, bench_model, bench_open, bench_synthetic, machine_facts, synthetic_model
from .result import BenchResult

__all__ = ["BenchResult", "bench", "bench_model", "bench_open", "bench_synthetic", "machine_facts", "synthetic_model"]
