"""Greedy tokens of a serving engine, in its own Python: what `mohge serve-check` and the serving benchmark run there.

The argument is a name in `ENGINES`. Each line of standard input is a request in JSON: `engine`, with `model` and other
arguments, `prompts` (ids), `new_tokens` and `logprobs`, how many. Each answer is a line of standard output that starts
with `ANSWER`."""

import gc
import json
import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec


ANSWER = "mohge: "
NO_ENGINE = 3
"""Exit status where the engine is not installed."""


class VLLM:
    """vLLM with one model at a time."""

    module = "vllm"

    def __init__(self):
        # One process, and on CPU no more memory than small prompts need; what the user set comes first.
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        os.environ |= defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.arguments = self.llm = None

    def generate(self, arguments: dict, prompts: list[list[int]], new_tokens: int, logprobs: int | None) -> dict:
        """`tokens` of each prompt, the `logprobs` of these and of the likeliest others, `seconds` and `cpu_seconds`,
        and the bytes of the `parameters` and of the `process`."""
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
        start, used = time.perf_counter(), time.process_time()
        found = [output.outputs[0] for output in self.llm.generate(given, sampling, use_tqdm=False)]
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        steps = [
            [{token: entry.logprob for token, entry in step.items()} for step in one.logprobs or ()] for one in found
        ]
        (parameters,) = self.llm.apply_model(_parameter_bytes)
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        memory = {"parameters": parameters, "process": resident}
        return {"tokens": [list(one.token_ids) for one in found], "logprobs": steps, **times, **memory}

    def close(self):
        """Free what the model takes."""
        if self.llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.arguments = self.llm = None
            cleanup_dist_env_and_memory()
        gc.collect()


def _parameter_bytes(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class LlamaCpp:
    """The Python binding of llama.cpp."""

    module = "llama_cpp"

    def generate(self, arguments: dict, prompts: list[list[int]], new_tokens: int, logprobs: int) -> dict:
        """As of vLLM, without figures."""
        import numpy as np
        from llama_cpp import GGML_TYPE_F32, Llama

        llm = Llama(
            arguments["model"],
            n_ctx=arguments["max_model_len"],
            logits_all=True,
            verbose=False,
            type_k=GGML_TYPE_F32,  # keys and values, by default in 16 bits
            type_v=GGML_TYPE_F32,
        )
        tokens, steps = [], []
        for prompt in prompts:
            llm.reset()
            ids, found = list(prompt), []
            while len(ids) < len(prompt) + new_tokens:
                llm.eval(ids[llm.n_tokens :])
                logits = llm.scores[llm.n_tokens - 1].astype(np.float64)
                scores = logits - logits.max()
                scores -= np.log(np.exp(scores).sum())
                best = scores.argsort()[: -logprobs - 1 : -1].tolist()
                ids.append(best[0])
                found.append({token: float(scores[token]) for token in best})
            tokens.append(ids[len(prompt) :])
            steps.append(found)
        return {"tokens": tokens, "logprobs": steps}

    def close(self):
        """Nothing is kept."""


ENGINES = {"vllm": VLLM, "llama.cpp": LlamaCpp}


def main(name: str):
    """Answer requests until there are no more."""
    engine = ENGINES[name]
    if find_spec(engine.module) is None:
        sys.exit(NO_ENGINE)
    engine = engine()
    version = import_module(engine.module).__version__
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = engine.generate(request.pop("engine"), **request)
        except Exception as error:
            engine.close()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps({"version": version, **answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
