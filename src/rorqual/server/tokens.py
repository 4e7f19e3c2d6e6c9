"""POST /v1/tokenize and /v1/detokenize: counts and ids without generating anything.

On threads: a long text takes longer to read than other streams should wait.
"""

from __future__ import annotations

import asyncio

from rorqual.server.caller import Caller
from rorqual.server.faults import invalid
from rorqual.server.prompt import check_messages, render, specs
from rorqual.server.protocol import DetokenizeRequest, TokenizeRequest, decode
from rorqual.server.reply import Json, Reply


async def tokenize(caller: Caller, body: bytes) -> Reply:
    """Ids of a text, or of a conversation as the model would read it."""
    request = decode(body, TokenizeRequest)
    model = caller.service.models.find(request.model or caller.service.models.names()[0])
    text = request.prompt if request.prompt is not None else request.content
    if request.messages is not None:
        check_messages(request.messages)
        tools = specs(request.tools)
        generate = request.add_generation_prompt
        prompt = await asyncio.to_thread(render, model, request.messages, tools, generate=generate)
        ids = prompt.ids
    elif text is None:
        raise invalid("give prompt (a text) or messages", "prompt", "missing_required_parameter")
    else:
        add_bos = None if request.add_special_tokens else False
        ids = await asyncio.to_thread(model.tokenizer.encode, text, add_bos=add_bos)
    return Json({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids})


async def detokenize(caller: Caller, body: bytes) -> Reply:
    """The text of ids, special tokens included."""
    request = decode(body, DetokenizeRequest)
    model = caller.service.models.find(request.model or caller.service.models.names()[0])
    size = model.tokenizer.vocab_size
    wrong = next((i for i in request.tokens if not 0 <= i < size), None)
    if wrong is not None:
        raise invalid(f"tokens: {wrong} is not from 0 to {size - 1}", "tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, request.tokens, skip_special=False)
    return Json({"prompt": text})
