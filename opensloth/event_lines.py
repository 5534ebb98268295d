"""Events as lines for people. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from opensloth.human import human_bytes, human_duration

Event = Mapping[str, Any]
_PHASES: Final = {
    "data": "preparing the dataset",
    "model": "loading the model",
    "train": "training",
    "done": "done",
}


def render_event(event: Event) -> str:
    """One line; an event of a kind that is not known here as JSON."""
    render = _RENDERERS.get(event["event"])
    return render(event) if render else json.dumps(event)


def _step(event: Event) -> str:
    parts = [f"step {event.get('step')}{_of(event.get('total_steps'))}"]
    parts += [f"loss {_loss(event.get('loss'))}"]
    if (rate := event.get("target_tokens_per_second")) is not None:
        parts.append(f"{rate:,.0f} target tok/s")
    if (mfu := event.get("mfu")) is not None:
        parts.append(f"MFU {mfu:.0%}")
    if (memory := event.get("memory")) is not None:
        parts.append(human_bytes(memory))
    if (eta := event.get("eta")) is not None:
        parts.append(f"ETA {human_duration(eta)}")
    return "  ".join(parts)


def _phase(event: Event) -> str:
    phase = str(event.get("phase"))
    return f"-- {_PHASES.get(phase, phase)}"


def _progress(event: Event) -> str:
    done = event.get("done") or 0
    return f"{event.get('phase')} {done:,}{_of(event.get('total'))} {event.get('unit') or ''}".rstrip()


def _note(event: Event) -> str:
    prefix = "warning: " if event.get("level") == "warning" else ""
    return f"{prefix}{event.get('message')}"


def _check(event: Event) -> str:
    said = [f"gradient cosine {_figure(event.get('cosine'))}, norm ratio {_figure(event.get('norm_ratio'))}"]
    said += ["from an earlier start"] if event.get("remembered") else []
    said += [f"{seconds:.1f}s"] if (seconds := event.get("seconds")) is not None else []
    return f"{event.get('check')} checked against single documents: {', '.join(said)}"


def _plan(event: Event) -> str:
    counts = {
        "rows": event.get("rows"),
        "documents": event.get("documents"),
        "target tokens": event.get("target_tokens"),
        "rows a step": event.get("rows_per_step"),
        "steps": event.get("total_steps"),
    }
    return "plan: " + ", ".join(f"{value:,} {name}" for name, value in counts.items() if value is not None)


def _engine(event: Event) -> str:
    return f"engine {event.get('engine')}: {event.get('reason')}"


def _resumed(event: Event) -> str:
    return f"resumed at step {event.get('step')} from {event.get('checkpoint')}"


def _eval(event: Event) -> str:
    return f"evaluation at step {event.get('step')}  loss {_loss(event.get('loss'))}"


def _checkpoint(event: Event) -> str:
    took = f" in {seconds:.1f}s" if (seconds := event.get("seconds")) is not None else ""
    return f"checkpoint at step {event.get('step')}: {event.get('path')}{took}"


def _result(event: Event) -> str:
    took = f" in {human_duration(seconds)}" if (seconds := event.get("seconds")) is not None else ""
    evaluated = f"  evaluation loss {_loss(event['eval_loss'])}" if event.get("eval_loss") is not None else ""
    loss = f"loss {_loss(event.get('loss'))}"
    return f"result after {event.get('steps')} steps{took}: {event.get('final')}  {loss}{evaluated}"


def _end(event: Event) -> str:
    message = event.get("message")
    return f"ended: {event.get('cause')}" + (f": {message}" if message else "")


def _of(total: Any) -> str:
    return f"/{total:,}" if total else ""


def _figure(value: Any) -> str:
    return "not finite" if value is None else f"{value:.6f}"


def _loss(loss: Any) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"


_RENDERERS: Final[Mapping[str, Any]] = {
    "step": _step,
    "phase": _phase,
    "progress": _progress,
    "note": _note,
    "check": _check,
    "plan": _plan,
    "engine": _engine,
    "resumed": _resumed,
    "eval": _eval,
    "checkpoint": _checkpoint,
    "result": _result,
    "end": _end,
}
