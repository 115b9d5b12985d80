"""
The phases of campaign.py that run in processes of their own: `python phases.py '{"out": ...}' PHASE [ARGUMENT]`.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import benchmark_experts
import pieces
import torch
from campaign import Results
from layers import SHAPES, TOLERANCES, Shape
from rivals import LayerWithRivals, few_tokens, rivals_table

from mohge_kernels import offline, tuning


TOKENS = {"many": 32768, "some": 4096, "few": 600, "decode": 32}
"""Of each class of shapes."""


class Phases(Results):
    def __init__(self, out: str, shape: str, dry: bool, until: float):
        super().__init__(Path(out))
        self.dry, self.until, self.device = dry, until, "cpu" if dry else "cuda"
        self.shape = Shape(16, (16, 32), 1, 2) if dry else SHAPES[shape]
        self.tokens = dict.fromkeys(TOKENS, 2) if dry else TOKENS
        self.table = self.out / "tuning_table.json"
        torch.manual_seed(0)
        if self.table.exists():  # the tiles found so far
            tuning.TABLE = self.table
        if machine := self.recorded("machine"):
            (major, minor), *rest = machine[-1]["gpu"]
            tuning.OFFLINE = tuning.Gpu((major, minor), *rest)
        if dry:
            benchmark_experts.copy_bandwidth = lambda: 1e12

    def layer(self) -> LayerWithRivals:
        return LayerWithRivals(self.shape, torch.bfloat16, self.device)

    def environment(self):
        gpu = tuning.OFFLINE if self.dry else tuning.gpu(torch.device("cuda:0"))
        clocks = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.getoutput(" ".join(clocks)) if shutil.which("nvidia-smi") else ""
        self.record("machine", **benchmark_experts.machine(self.device), gpu=gpu, driver=driver)
        size = 64 if self.dry else 8192
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        product = median(benchmark_experts.timed(lambda _: a @ b, None) for _ in range(15))
        bandwidth = benchmark_experts.copy_bandwidth()
        self.record("ceiling", product=f"{size}^3", tflops=2 * size**3 / product / 1e12, copy_tbs=bandwidth / 1e12)

    def compile(self):
        """Ahead of the other phases, while they leave cores idle."""
        if self.dry:  # the interpreter compiles nothing
            return
        layer, even = offline.Layer(*astuple(self.shape)), (self.shape.mean_width,) * len(self.shape.widths)
        tasks = [(each, n, None, None) for n in self.tokens.values() for each in (layer, layer._replace(widths=even))]
        for name, kernels in pieces.CANDIDATES.items():
            tasks += [(layer, self.tokens[name], k, tried) for k, configs in kernels.items() for tried in configs]
        for found in pieces.compile_ahead(tasks, max(1, len(os.sched_getaffinity(0)) // 3)):
            self.record(**found)

    def tables(self, label: str):
        layer, rounds = self.layer(), 1 if self.dry else 7
        names = ["loop", "pad", "uniform", "mohge"]
        checks = [layer.check(names, tokens) for tokens in self.tokens.values()]
        for name in list(names):
            error = max(check[name] for check in checks)
            ok = error < TOLERANCES[layer.dtype]
            self.record("check", label=label, name=name, ok=ok, detail=error)
            if not ok:
                names.remove(name)
        for name in ("many", "some", "decode"):
            alone = pieces.Pieces(layer, self.tokens[name])
            for kernel, (flops, moved) in alone.work.items():
                s = alone.seconds(kernel)
                rates = {"us": 1e6 * s, "tflops": flops / s / 1e12, "tbs": moved / s / 1e12}
                self.record("kernel", label=label, shapes=name, kernel=kernel, **rates)
        large, small = self.tokens["many"], self.tokens["some"]
        options = SimpleNamespace(rounds=rounds, tokens=[large, small])
        tables = benchmark_experts.gpu_tables(layer, options, ["C", *names])
        for table in itertools.islice(tables, 4) if self.dry else tables:
            self.record("table", label=label, **table)
        self.record("table", label=label, **rivals_table(layer, rounds, large))
        if not self.dry:
            self.record("table", label=label, **few_tokens(layer, 10 * rounds))

    def sweep(self, name: str):
        alone = pieces.Pieces(self.layer(), self.tokens[name])
        candidates = (pieces.TINY_CANDIDATES if self.dry else pieces.CANDIDATES).get(name, {})
        bad = [r for r in self.recorded("compiled", tokens=self.tokens[name]) if r.get("spilled", 99) > 64]
        for kernel, configs in candidates.items():
            known = [*self.recorded("trying", shapes=name, kernel=kernel), *bad]
            known = {tuning.Config(*r["config"]) for r in known if r["kernel"] == kernel}
            for found in pieces.sweep(alone, kernel, configs, known, name == "decode"):
                self.record(**found, shapes=name, kernel=kernel)
                if found["kind"] == "tuned":
                    table = json.loads(tuning.TABLE.read_text())
                    of_gpu = table.setdefault("{}.{}".format(*tuning.OFFLINE.capability), {})
                    of_gpu.setdefault("16 bits", {}).setdefault(name, {})[kernel] = found["config"]
                    tuning.TABLE = self.table
                    self.table.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
                if time.time() > self.until:
                    return

    def profile(self):
        layer = self.layer()
        step, x = benchmark_experts.training(layer, "mohge"), layer.inputs(self.tokens["many"])
        step(x)
        with torch.profiler.profile() as profile:
            step(x)
        averages = profile.key_averages()
        by = "self_cpu_time_total" if self.dry else "self_device_time_total"
        (self.out / "profile.txt").write_text(averages.table(sort_by=by, row_limit=30), encoding="utf-8")


if __name__ == "__main__":
    what, phase, *arguments = sys.argv[1:]
    getattr(Phases(**json.loads(what)), phase)(*arguments)
