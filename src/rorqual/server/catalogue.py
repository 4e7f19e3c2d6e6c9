"""GET /v1/models and /v1/models/{id}, and loading and dropping models while others answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from msgspec import Struct

from rorqual.errors import RorqualError
from rorqual.server.caller import Caller
from rorqual.server.faults import ApiError, invalid
from rorqual.server.models import Served
from rorqual.server.price import PriceList, decimal_text
from rorqual.server.protocol import decode
from rorqual.server.reply import Json, Reply


class LoadModel(Struct):
    """POST /v1/models/load: a model folder under a name."""

    model: str
    path: str


class UnloadModel(Struct):
    """POST /v1/models/unload."""

    model: str


class LoadAdapter(Struct):
    """POST /v1/load_lora_adapter: an adapter folder for a base model, under a name."""

    lora_name: str
    lora_path: str
    base_model: str | None = None


class UnloadAdapter(Struct):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


async def list_models(caller: Caller) -> Reply:
    """Every name that a request may ask for."""
    models = caller.service.models
    entries = [describe(name, models.find(name), caller) for name in models.names()]
    return Json({"object": "list", "data": entries})


async def one_model(caller: Caller) -> Reply:
    """One of them; names may hold slashes."""
    name = caller.path["id"]
    return Json(describe(name, caller.service.models.find(name), caller))


def describe(name: str, model: Served, caller: Caller) -> dict[str, Any]:
    """OpenAI's four fields, then ours."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "rorqual",
        "root": model.name,
        "max_model_len": model.max_model_len,
        "chat": model.template is not None,
        "thinking": model.thinks,
        "prices": prices(caller.service.prices, model, caller),
    }


def prices(listed: PriceList, model: Served, caller: Caller) -> dict[str, str]:
    """What a million tokens of each class cost at this moment."""
    rates = listed.rates(model.name, caller.moment, model.base)
    return {
        "currency": listed.currency,
        "cache_hit": decimal_text(rates.hit),
        "cache_miss": decimal_text(rates.miss),
        "output": decimal_text(rates.output),
    }


def _path(text: str, param: str) -> Path:
    if "\0" in text:
        raise invalid(f"{param}={text!r}: a path holds no null character", param)
    return Path(text)


async def load_model(caller: Caller, body: bytes) -> Reply:
    """Load a model folder and serve it beside the others."""
    caller.require_admin()
    request = decode(body, LoadModel)
    path = _path(request.path, "path")
    service = caller.service
    if service.load is None:
        raise invalid("this server loads no models while it runs", "model", "unsupported_value")
    if request.model in service.models.names():
        raise ApiError(409, f"{request.model!r} is served already", code="model_exists", param="model")
    try:
        model = await asyncio.to_thread(service.load, request.model, path)
    except (RorqualError, OSError) as e:
        raise invalid(str(e), "path", "model_not_loadable") from None
    service.models.add(model)
    model.bridge.start()
    return Json(describe(model.name, model, caller))


async def unload_model(caller: Caller, body: bytes) -> Reply:
    """Serve no more requests for a model; those that run finish."""
    caller.require_admin()
    return await _unload(decode(body, UnloadModel).model, caller)


async def _unload(name: str, caller: Caller) -> Reply:
    service = caller.service
    model = service.models.remove(name)
    if all(model.bridge is not bridge for bridge in service.models.bridges()):
        service.retire(model.bridge)
    elif model.adapter is not None:
        engine: Any = model.bridge.engine  # which loaded it, so it has adapters
        await model.bridge.run_on_engine(lambda: engine.unload_adapter(model.adapter))
    return Json({"id": model.name, "object": "model", "deleted": True})


async def load_adapter(caller: Caller, body: bytes) -> Reply:
    """Serve an adapter of a base model under its own name."""
    caller.require_admin()
    request = decode(body, LoadAdapter)
    path = _path(request.lora_path, "lora_path")
    models = caller.service.models
    base = models.find(request.base_model or models.all()[0].name)
    load = getattr(base.bridge.engine, "load_adapter", None)
    if load is None:
        raise invalid(f"the engine of {base.name!r} serves no adapters", "lora_name", "unsupported_value")
    if request.lora_name in models.names():
        raise ApiError(
            409, f"{request.lora_name!r} is served already", code="model_exists", param="lora_name"
        )
    try:
        await base.bridge.run_on_engine(lambda: load(request.lora_name, path))
    except (RorqualError, OSError) as e:
        raise invalid(str(e), "lora_path", "model_not_loadable") from None
    models.add(base.adapted(request.lora_name))
    return Json(describe(request.lora_name, models.find(request.lora_name), caller))


async def unload_adapter(caller: Caller, body: bytes) -> Reply:
    """Serve no more requests for an adapter; those that run finish."""
    caller.require_admin()
    request = decode(body, UnloadAdapter)
    model = caller.service.models.find(request.lora_name)
    if model.adapter is None:
        raise invalid(f"{request.lora_name!r} is a model, not an adapter", "lora_name")
    return await _unload(request.lora_name, caller)
