"""Greedy tokens of vLLM, for `mohge serve-check`, which runs this file in vLLM's own Python. Standard input has a JSON
list of requests with `folder`, `prompts` (ids) and `new_tokens`; the last line of standard output the results."""

import gc
import json
import os
import sys
from importlib.util import find_spec


NO_ENGINE = 3
"""Exit status where the engine is not installed."""


def generate(request: dict) -> dict:
    """`tokens` of each prompt, and `logprobs` of these and of the likeliest others; or `error`."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], logprobs=5, detokenize=False, ignore_eos=True
    )
    llm = None
    try:
        llm = LLM(
            request["folder"],
            trust_remote_code=True,
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max(map(len, request["prompts"])) + request["new_tokens"],
            distributed_executor_backend="uni",
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        found = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
        steps = [[{token: entry.logprob for token, entry in step.items()} for step in one.logprobs] for one in found]
        return {"tokens": [list(one.token_ids) for one in found], "logprobs": steps}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def main():
    """Answer the request."""
    if find_spec("vllm") is None:
        sys.exit(NO_ENGINE)
    # One process and no more memory than small prompts need; what the user set comes first.
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import vllm

    results = [generate(request) for request in json.load(sys.stdin)]
    print(json.dumps({"version": vllm.__version__, "results": results}))


if __name__ == "__main__":
    main()
