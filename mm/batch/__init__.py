"""Jobs from a file, drawn through the pipeline: rows in, pictures with their settings out, and nothing drawn twice."""

from __future__ import annotations

from mm.core.lazy import loader

__all__ = ["read_jobs", "run_jobs"]
__getattr__ = loader("mm.batch", {"read_jobs": "jobs", "run_jobs": "run"})
