"""Greedy tokens of vLLM, in vLLM's own Python: what `mohge serve-check` and the benchmark of serving run there.

Each line of standard input is a request in JSON: `engine`, arguments of `vllm.LLM`, with `prompts` (ids), `new_tokens`
and `logprobs`, how many. Each answer is a line of standard output that starts with `ANSWER`."""

import gc
import json
import os
import sys
import time
from importlib.util import find_spec


ANSWER = "mohge: "
NO_ENGINE = 3
"""Exit status where the engine is not installed."""


class Engine:
    """vLLM with one model at a time."""

    def __init__(self):
        self.arguments = self.llm = None

    def generate(self, arguments: dict, prompts: list[list[int]], new_tokens: int, logprobs: int | None) -> dict:
        """`tokens` of each prompt, the `logprobs` of these and of the likeliest others, and `seconds`."""
        from vllm import LLM, SamplingParams

        if arguments != self.arguments:
            self.close()
            self.llm = LLM(
                **arguments,
                trust_remote_code=True,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                distributed_executor_backend="uni",
            )
            self.arguments = arguments
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, logprobs=logprobs, detokenize=False, ignore_eos=True
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        found = [output.outputs[0] for output in self.llm.generate(given, sampling, use_tqdm=False)]
        seconds = time.perf_counter() - start
        steps = [
            [{token: entry.logprob for token, entry in step.items()} for step in one.logprobs or ()] for one in found
        ]
        return {"tokens": [list(one.token_ids) for one in found], "logprobs": steps, "seconds": seconds}

    def memory(self) -> dict:
        """Bytes of the parameters, and of the whole process."""
        (parameters,) = self.llm.apply_model(_parameter_bytes)
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"parameters": parameters, "resident": resident}

    def close(self):
        """Free what the model takes."""
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.arguments = self.llm = None
            cleanup_dist_env_and_memory()
        gc.collect()


def _parameter_bytes(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main():
    """Answer requests until there are no more."""
    if find_spec("vllm") is None:
        sys.exit(NO_ENGINE)
    # One process, and on CPU no more memory than small prompts need; what the user set comes first.
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import vllm

    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = engine.generate(request.pop("engine"), **request) | {"memory": engine.memory()}
        except Exception as error:
            engine.close()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps({"version": vllm.__version__, **answer}), flush=True)


if __name__ == "__main__":
    main()
