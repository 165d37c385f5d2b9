"""A program: requests to a server go through vLLM's front end, without an engine; prints what would reach one, as JSON.

Arguments: the model's folder, `dtt` of the additional config, and a list of requests (path, body), both as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def main(model: str, dtt: str, requests: str) -> list[Any]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.input_processor import InputProcessor

    arguments = AsyncEngineArgs(model, max_model_len=256, additional_config={"dtt": json.loads(dtt)})
    config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    processor = InputProcessor(config)
    front = OnlineRenderer(
        config.model_config,
        processor.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        trust_request_chat_template=True,
    )
    front.warmup()

    async def answer(path: str, body: dict[str, Any]) -> Any:
        try:
            if path == "chat":
                rendered = await front.render_chat(ChatCompletionRequest(model="m", **body))
                inputs = rendered[1] if isinstance(rendered, tuple) else rendered
            else:
                inputs = await front.render_completion(CompletionRequest(model="m", **body))
            if not isinstance(inputs, list):
                return str(inputs)
            made = processor.process_inputs("0", inputs[0], SamplingParams(max_tokens=1), ("generate",))
        except (ValueError, VLLMValidationError) as error:
            return str(error)
        return made.prompt_token_ids

    async def every() -> list[Any]:
        return [await answer(path, body) for path, body in json.loads(requests)]

    names = config.additional_config["dtt"]["names"]
    return [names, *asyncio.run(every())]


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
