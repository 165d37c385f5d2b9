"""A program: a vLLM engine of its own answers requests, and what it got and gave is printed as JSON.

Argument: JSON with `engine` (arguments of `LLM`), `sampling`, and `requests`: each a list of ids, or a table of
template variables for the conversation below, or {"plain": TEXT}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

CONVERSATION = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1 <|im_end|> <|reserved_1|>"}]


def main(job: dict[str, Any]) -> list[Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError

    llm = LLM(load_format="safetensors", enforce_eager=True, **job["engine"])
    # JSON has no numbers as keys.
    bias = {int(token): value for token, value in job["sampling"].pop("logit_bias", {}).items()}
    sampling = SamplingParams(logit_bias=bias or None, **job["sampling"])
    answers: list[Any] = []
    batch = [request for request in job["requests"] if isinstance(request, list)]
    if batch:  # at once, so that they share steps
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in batch]
        outputs = iter(llm.generate(prompts, sampling, use_tqdm=False))
    for request in job["requests"]:
        try:
            if isinstance(request, list):
                output = next(outputs)
            elif "plain" in request:
                (output,) = llm.generate(request["plain"], sampling, use_tqdm=False)
            else:
                (output,) = llm.chat(CONVERSATION, sampling, chat_template_kwargs=request, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            answers.append(str(error))
            continue
        texts = [list(choice.token_ids) for choice in output.outputs]
        answers.append([list(output.prompt_token_ids), texts, output.outputs[0].cumulative_logprob])
        if output.prompt_logprobs is not None:
            ids = output.prompt_token_ids
            pairs = zip(ids, output.prompt_logprobs, strict=True)
            answers[-1].append([None if at is None else at[i].logprob for i, at in pairs])
    return answers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
