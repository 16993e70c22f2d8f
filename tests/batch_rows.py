"""Job files and an engine that counts, for tests of batch jobs."""

from __future__ import annotations

import json

from tiny import tiny_pipeline

from mm.engine.loading import load


def row(custom_id="a", **body):
    return {"custom_id": custom_id, "task": "generate", "body": {"prompt": "two red cats", "steps": 1, **body}}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


class Counting:
    """An engine of the tiny pipeline, counting pictures; raises for a word in the prompt."""

    def __init__(self, folder):
        self.engine, self.pipe, self.drawn, self.loads, self.calls = load(folder), tiny_pipeline(), 0, 0, 0
        self.run_all, self.engine.run_all = self.engine.run_all, self.counted

    def load(self, model):
        self.loads += 1
        return self.engine

    def counted(self, requests, *args, **kwargs):
        self.calls += 1
        if any("wolf" in request.prompt for request in requests):
            raise RuntimeError("out of\nmemory")
        self.drawn += len(requests)
        return self.run_all(requests, *args, **kwargs)
