"""GET /user/balance: what the key has left, as DeepSeek writes it."""

from __future__ import annotations

from rorqual.server.caller import Caller
from rorqual.server.price import decimal_text
from rorqual.server.reply import Json, Reply


async def balance(caller: Caller) -> Reply:
    """Decimal strings. A key that is not metered, and an open door, are always available and have no
    balances.
    """
    key = caller.key
    if key is None or not key.metered:
        return Json({"is_available": True, "balance_infos": []})
    info = {
        "currency": caller.service.prices.currency,
        "total_balance": decimal_text(key.balance),
        "granted_balance": decimal_text(key.granted),
        "topped_up_balance": decimal_text(key.topped_up),
    }
    return Json({"is_available": key.balance > 0, "balance_infos": [info]})
