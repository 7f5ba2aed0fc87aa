"""stkit: a notebook-first research kit for egocentric spatio-temporal video question answering.

Everything that the command line does is one call away::

    from stkit import build_benchmark, load_model, evaluate, report
    build_benchmark("runs/walks", clips=40, seed=0)
    result = evaluate("runs/walks", model="tiny", out="runs/first")
    report("runs/first", out="runs/first/report.html")

The names below are imported when they are first used, so that ``import stkit`` loads neither torch nor a game engine.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "audit": "stkit.bench.audit",
    "build_benchmark": "stkit.bench.build",
    "clips_needed": "stkit.stats",
    "doctor": "stkit.vlm.doctor",
    "evaluate": "stkit.evaluation",
    "export_lmms_eval": "stkit.bench.lmms_eval",
    "grpo": "stkit.train.grpo",
    "import_egost": "stkit.bench.egost",
    "load_benchmark": "stkit.bench.schema",
    "load_model": "stkit.vlm.load",
    "load_questions": "stkit.bench.schema",
    "merge": "stkit.train.merge",
    "open_run": "stkit.train.run",
    "plan": "stkit.train.plan",
    "read_video": "stkit.vlm.video",
    "report": "stkit.reporting.html",
    "setup": "stkit.runtime",
    "sft": "stkit.train.sft",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'stkit' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__():
    return __all__
