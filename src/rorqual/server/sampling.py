"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

import sys

from rorqual.engine.request import SamplingParams
from rorqual.errors import RequestError
from rorqual.server.faults import from_request_error, invalid
from rorqual.server.models import Served
from rorqual.server.protocol import MAX_STOP, Sampling

UNLIMITED = sys.maxsize  # tokens: the context is the limit


def sampling_params(
    request: Sampling,
    model: Served,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How tokens are drawn; a 400 names the field that cannot be."""
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(request.top_k or 0, 0),  # -1 is another server's word for "off"
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            logit_bias=logit_bias(request, model),
            seed=request.seed,
            stop=stop_strings(request.stop),
            stop_token_ids=stop_tokens(request, model),
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except RequestError as e:
        raise from_request_error(e) from None


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """At most 16, none empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOP:
        raise invalid(f"stop: {len(stops)} strings; at most {MAX_STOP}", "stop")
    if "" in stops:
        raise invalid("stop: an empty string would stop before the first token", "stop")
    return stops


def logit_bias(request: Sampling, model: Served) -> dict[int, float]:
    """Token ids as numbers, each within the vocabulary."""
    out: dict[int, float] = {}
    size = model.bridge.engine.vocab_size
    for text, value in (request.logit_bias or {}).items():
        if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) >= size:
            raise invalid(f"logit_bias: {text[:40]!r} is not a token id from 0 to {size - 1}", "logit_bias")
        out[int(text)] = value
    return out


def stop_tokens(request: Sampling, model: Served) -> tuple[int, ...]:
    """Token ids within the vocabulary."""
    size = model.bridge.engine.vocab_size
    for token_id in request.stop_token_ids or ():
        if not 0 <= token_id < size:
            raise invalid(f"stop_token_ids: {token_id} is not from 0 to {size - 1}", "stop_token_ids")
    return tuple(request.stop_token_ids or ())
