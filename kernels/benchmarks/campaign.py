"""
All that is to be done on a GPU, in one command and a few minutes: `python kernels/benchmarks/campaign.py --out DIR`.

environment  machine, versions and ceilings: bare products and copies
tests        the GPU tests of kernels/tests, in processes that may die
tables       every contestant checked against float64, the tables of benchmark_experts.py, rivals, few tokens from
             CUDA graphs, and every kernel alone
sweep        candidates for the tiles of each kernel, class of shapes by class; their results are compared first, and
             DIR/tuning_table.json gets the best: copy it to mohge_kernels, whose kernels read it
tables       again, with these tiles
models       training step and decoding of models with layers like mohge-3b's and OLMoE-1B-7B's, against OLMoE
profile      of one forward and backward pass

Each phase is a process of its own with a limit of time, and writes what it finds to DIR/results.jsonl at once; logs
are beside it. Nothing needs to be installed but torch, triton, transformers and pytest. Ends with status 1 if a
phase, a check or a test failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "match_the_reference or half_precision or repeats_bit or layout_of_the_inputs or synchronization or captured or "
    "inference or frozen_parts or sorted_by_key or not_finite or routing_equals or beyond_2_to_31"
)
MODELS = {
    "mohge-3b": "--hidden-size 1024 --widths 384,512,640,768,896,1024,1152,1280 --experts-per-group 8 --top-k 6",
    "OLMoE-1B-7B": "--hidden-size 2048 --widths 576,704,832,960,1088,1216,1344,1472 --experts-per-group 8 --top-k 8",
}
FULL = "--layers 4 --tokens 16384 --memory-tokens 16384 --new-tokens 64 --repeats 7 --dtype bfloat16 --device cuda"
TINY = "--hidden-size 64 --widths 16,32 --experts-per-group 2 --top-k 2"
TINY_RUN = "--layers 1 --tokens 8 --memory-tokens 8 --new-tokens 2 --repeats 2 --device cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="that it may take in all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shape", choices=["paper", "large"], default="paper", help="paper layer or large layer")
    parser.add_argument("--dry", action="store_true", help="a walk through everything, tiny and on the CPU")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device is to be seen: --dry walks through it on the CPU")
    if (options.out / "results.jsonl").exists():
        parser.error(f"--out: {options.out} holds results already, choose another folder")
    return Campaign(options).run()


class Results:
    """What was found, line by line."""

    def __init__(self, out: Path):
        self.out = out

    def record(self, kind: str, **what):
        line = {"kind": kind, "at": round(time.time()), **what}
        with (self.out / "results.jsonl").open("ab", buffering=0) as file:  # whole lines, whoever writes or is killed
            file.write(json.dumps(line).encode() + b"\n")
        print(json.dumps(line)[:300], flush=True)

    def recorded(self, kind: str, **wanted) -> list[dict]:
        lines = map(json.loads, (self.out / "results.jsonl").read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["kind"] == kind and wanted.items() <= line.items()]


class Campaign(Results):
    def __init__(self, options: argparse.Namespace):
        super().__init__(options.out.resolve())
        self.options, self.dry = options, options.dry
        self.until = time.time() + 60 * options.minutes

    def left(self) -> float:
        return self.until - time.time()

    def run(self) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "results.jsonl").touch()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the summary is written all the same
        with tempfile.TemporaryDirectory() as packages:
            self.export_environment(Path(packages))
            compiler = None
            try:
                self.child("environment", limit=60)
                compiler = self.start("compile", CUDA_VISIBLE_DEVICES="")
                self.run_tests(time.time() + 0.22 * self.left())
                self.child("tables", "first", limit=0.35 * self.left())
                for name in ("many", "decode", "some", "few"):
                    for _ in range(2):  # what ended a process is not tried again
                        if self.child("sweep", name, limit=self.left() - (20 if self.dry else 160)) == 0:
                            break
                self.child("tables", "tuned", limit=self.left() - (20 if self.dry else 90))
                for name in MODELS:
                    self.model(name, self.left() / 2)
                self.child("profile", limit=self.left())
            finally:
                if compiler is not None:
                    stop(compiler)
                summary = self.summary()
                (self.out / "summary.txt").write_text(summary, encoding="utf-8")
                print(summary)
        failed = [line for line in self.recorded("check") if not line["ok"]] + self.recorded("ended")
        return int(bool(failed or any(line["failed"] for line in self.recorded("tests"))))

    def export_environment(self, packages: Path):
        """Makes this checkout importable, whatever is installed."""
        (packages / "mohge").mkdir()
        parts = {f.name: f for f in (ROOT / "modeling_mohge").iterdir()}
        parts |= {name: ROOT / name for name in ("training", "conversion", "model_cards")}
        for name, path in {**parts, "commands": ROOT / "training/commands"}.items():
            (packages / "mohge" / name).symlink_to(path)
        (packages / "mohge_kernels").symlink_to(ROOT / "kernels/torch-ext/mohge_kernels")
        paths = [packages, ROOT / "kernels/benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ.setdefault("TRITON_CACHE_DIR", str(packages / "cache"))
        if self.dry:
            os.environ |= {"TRITON_INTERPRET": "1", "MOHGE_KERNELS_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *phase: str, limit: float | None = None, **environment) -> subprocess.Popen:
        until = self.until if limit is None else time.time() + limit
        what = {"out": str(self.out), "shape": self.options.shape, "dry": self.dry, "until": until}
        command = [sys.executable, "kernels/benchmarks/phases.py", json.dumps(what), *phase]
        return self.launch(command, "-".join(phase), **environment)

    def launch(self, command: list[str], log: str, **environment) -> subprocess.Popen:
        with (self.out / f"{log}.log").open("a", encoding="utf-8") as file:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
            )

    def child(self, *phase: str, limit: float) -> int | None:
        """The status of the phase; None if there was no time (left)."""
        return self.wait(self.start(*phase, limit=limit), "-".join(phase), limit) if limit > 5 else None

    def wait(self, process: subprocess.Popen, name: str, limit: float) -> int | None:
        try:
            status = process.wait(max(limit, 0) + 5)  # the sweep ends by itself
        except subprocess.TimeoutExpired:
            status = None
        finally:
            stop(process)
        if status != 0:
            self.record("ended", phase=name, why="time" if status is None else f"status {status}")
        return status

    def run_tests(self, until: float):
        """In several processes; each begins anew behind a test that failed, or that ended the process."""
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-k", TESTS]
        listed = subprocess.run([*pytest, "--collect-only", "-q", "kernels/tests"], cwd=ROOT, capture_output=True)
        ids = re.findall(r"^\S+::.+$", listed.stdout.decode(), re.M)[: 2 if self.dry else None]
        lanes = 2 if self.dry else max(2, len(os.sched_getaffinity(0)) // 2)

        def lane(number: int) -> dict[str, str]:
            rest, results = ids[number::lanes], {}
            while rest and time.time() < until:
                name = f"tests-{number}-{len(rest)}"
                command = [*pytest[:-2], "-x", "-v", "-o", "faulthandler_timeout=60", *rest]
                process = self.launch([*command, "-o", "faulthandler_exit_on_timeout=true"], name)
                try:
                    process.wait(max(until - time.time(), 1))
                except subprocess.TimeoutExpired:
                    return results
                finally:
                    stop(process)
                    log = (self.out / f"{name}.log").read_text(errors="replace")
                    seen = dict(re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", log, re.M))
                    results |= seen
                if len(seen) < len(rest) and not {"FAILED", "ERROR"} & set(seen.values()):
                    results[rest[len(seen)]] = "DIED"
                rest = [each for each in rest if each not in results]
            return results

        with ThreadPoolExecutor(lanes) as pool:
            results = {name: result for part in pool.map(lane, range(lanes)) for name, result in part.items()}
        failed = [name for name, result in results.items() if result not in ("PASSED", "SKIPPED")]
        passed = sum(result == "PASSED" for result in results.values())
        why = "" if ids else listed.stdout.decode()[-300:] + listed.stderr.decode()[-300:]
        self.record("tests", found=len(ids), run=len(results), passed=passed, failed=failed, why=why)

    def model(self, name: str, limit: float):
        arguments = f"{TINY} {TINY_RUN}" if self.dry else f"{MODELS[name]} {FULL}"
        if limit < 15:
            return
        file = self.out / f"{name}.json"
        command = [sys.executable, "-m", "mohge.training.benchmarks.step", *arguments.split(), "--json", str(file)]
        if self.wait(self.launch(command, name), name, limit) != 0:
            return
        found = json.loads(file.read_text())
        products = self.recorded("ceiling")[-1]["tflops"]
        for what, passes in (("training step", 3), ("decode", 1)):
            for who, seconds in found["seconds_per_token"][what].items():
                rate = 1 / seconds["p50"]
                share = 2 * passes * found["parameters_total_and_used"][who][1] * rate / 1e12 / products
                self.record("model", model=name, what=what, who=who, tokens_per_s=rate, share_of_products=share)

    def summary(self) -> str:
        lines = [json.dumps(line) for kind in ("machine", "ceiling", "tests", "ended") for line in self.recorded(kind)]
        lines += [f"check {r['name']}: {'ok' if r['ok'] else 'WRONG'} {r['detail']}" for r in self.recorded("check")]
        for r in self.recorded("table"):
            times = {name: f"{each['median']:.4g}" for name, each in r["quantiles"].items()}
            lines.append(f"{r['label']}: {r['title']} {r['unit']} {times}")
            for name, demand in r["demands"].items():
                value, must, aim = demand["value"]["median"], demand["must"], demand["aim"]
                verdict = "aim" if value >= aim else "must" if value >= must else "SHORT"
                lines.append(f"    {name:60}{value:8.3f}  must {must}, aim {aim}: {verdict}")
        for r in self.recorded("kernel"):
            rates = f"{r['tflops']:6.0f} TFLOP/s {r['tbs']:6.2f} TB/s"
            lines.append(f"{r['label']}: {r['shapes']:8}{r['kernel']:18}{r['us']:10.1f} us {rates}")
        for r in self.recorded("tuned"):
            lines.append(f"tuned {r['shapes']} {r['kernel']}: {r['before']:.1f} -> {r['us']:.1f} us {r['config']}")
        for r in self.recorded("model"):
            rates = f"{r['tokens_per_s']:10.0f} tokens/s, {r['share_of_products']:.1%} of bare products"
            lines.append(f"{r['model']:12}{r['what']:14} {r['who']:16}{rates}")
        return "\n".join(lines) + "\n"


def stop(process: subprocess.Popen):
    """The process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
