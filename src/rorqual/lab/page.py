"""`rorqual lab serve`: a page of every idea, read from the state file; it changes nothing and needs no network."""

from __future__ import annotations

import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rorqual.errors import ConfigError, RunError
from rorqual.lab.job import curve, tail
from rorqual.lab.report import verdict
from rorqual.lab.status import as_tree, brief
from rorqual.lab.store import Store

PAGE = Path(__file__).with_name("page.html")
MOST = 1000  # ideas that a page lists
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def serve(folder: Path, host: str, port: int) -> int:
    """Serve until stopped. Raises ConfigError where the address cannot be had."""
    with server(folder, host, port) as running:
        print(f"the lab at http://{host}:{running.server_port}/ (Ctrl-C stops)", flush=True)
        running.serve_forever()
    return 0


def server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet running."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if parts.path == "/":
                self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
                return
            store = Store.open(folder)
            try:
                found = look(store, parts.path, parse_qs(parts.query))
            except RunError as e:
                found = {"error": str(e)}
            finally:
                store.close()
            code = 404 if found is None or "error" in found else 200
            body = json.dumps(
                _finite(found or {"error": f"{parts.path}: not a page of the lab"}), allow_nan=False
            )
            self.answer(code, body.encode(), "application/json")

        def answer(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            for key, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                               ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff")):  # fmt: skip
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as e:
        raise ConfigError(f"--port {port}: cannot listen on {host} ({e.strerror}); choose another") from e


def look(store: Store, path: str, query: dict[str, list[str]]) -> dict[str, Any] | None:
    """What a path means, as plain values; None: no such path."""
    if path == "/api/lab":
        last = _number(query.get("story", ["200"])[0])
        events = [vars(e) for e in store.events(last=200 if last is None else min(last, 5000))]
        return {**as_tree(store), "ideas": ideas(store), "story": events}
    number = _number(path.removeprefix("/api/trial/"))
    return None if number is None else idea(store, number)


def _finite(tree: Any) -> Any:
    """A tree with null for what JSON cannot say, such as a setting of infinity."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _number(text: str) -> int | None:
    """A number as the state file can hold it."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


def ideas(store: Store) -> list[dict[str, Any]]:
    """Every idea in a line, those that run and the newest first."""
    rows = store.db.execute(
        "SELECT id FROM trials ORDER BY state='running' DESC, state='waiting' DESC, id DESC LIMIT ?", (MOST,)
    )
    return [brief(store, store.trial(r[0])) for r in rows.fetchall()]


def idea(store: Store, number: int) -> dict[str, Any]:
    """One idea: its curve beside the best one's, its rungs, its story and the log's end."""
    t = store.trial(number)
    study = next(s for s in store.studies() if s.id == t.study)
    best = best_of(store, study.id, study.ladder.goal)
    return {
        **brief(store, t),
        "verdict": verdict(store, study, number), "message": t.message, "metric": study.metric,
        "budgets": list(study.ladder.budgets), "curve": curve(store.folder_of(t), study.metric),
        "best": None if best is None else {"trial": best, "curve": curve(where(store, best), study.metric)},
        "results": store.results(number), "story": [vars(e) for e in store.events(trial=number)],
        "log": tail(store.folder_of(t), 40),
    }  # fmt: skip


def where(store: Store, number: int) -> Path:
    """A trial's folder."""
    return store.folder_of(store.trial(number))


def best_of(store: Store, study: int, goal: str) -> int | None:
    """The leader of a study."""
    row = store.db.execute(
        "SELECT id FROM trials WHERE study=? AND reached>0 AND value IS NOT NULL "
        f"ORDER BY reached DESC, {'' if goal == 'min' else '-'}value, id LIMIT 1",
        (study,),
    ).fetchone()
    return None if row is None else int(row[0])
