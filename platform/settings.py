"""Plain settings of every run, their types, and which of them a run may change when it continues.

Values and explanations stand in ``experiments/base.yaml``; settings of rooms, data and callbacks are the arguments of
the classes named by ``_target_``.
"""

from typing import Annotated, Any, Literal

from platform.typecheck import Minimum

_Count = Annotated[int, Minimum(1)]
_CountOrZero = Annotated[int, Minimum(0)]

SETTINGS: dict[str, Any] = {
    "experiment": str,
    "tiny_run": bool,
    "about": str,
    "seed": _CountOrZero,
    "tag": str | None,
    "fresh": bool,
    "runs": str,
    "trainer.max_steps": _Count,
    "trainer.accelerator": Literal["cpu", "gpu", "auto"],
    "trainer.devices": _Count,
    "trainer.num_nodes": _Count,
    "trainer.precision": Literal["32", "bf16-mixed"],
    "trainer.threads": _Count | None,
    "trainer.val_every": _CountOrZero,
    "trainer.log_every": _Count,
    "trainer.gradient_clip": Annotated[float, Minimum(0)] | None,
    "trainer.compile": bool,
    "trainer.deterministic": bool,
    "checkpoints.every": _CountOrZero,
    "checkpoints.every_minutes": Annotated[float, Minimum(0)] | None,
    "checkpoints.keep": _Count,
    "checkpoints.milestones": list[_Count],
}
FROM_COMMAND = ("experiment", "tiny_run")  # known from the first word and from --tiny, never written in a file
OPEN = ("source", "sampling")  # free names: source is only shown, sampling is checked against the room's sample()
PARTS = ("module", "data", "callbacks")  # hold mappings with _target_
SECTIONS = ("trainer", "checkpoints", *OPEN, *PARTS)

VOLATILE = (
    "about",
    "source",
    "runs",
    "fresh",
    "trainer.max_steps",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.val_every",
    "trainer.log_every",
    "data.root",
    "data.workers",
    "data.cache_gib",
    "data.micro_batch",
    "checkpoints",
    "callbacks.progress",
    "callbacks.throughput",
)
"""Keys, and sections with all below them, that do not change what a run computes: a run continues under other values.

``trainer.max_steps`` is among them so that a finished run can be made longer; a learning-rate curve that depends on
the total then follows the new total from that step on.
"""


def is_volatile(key: str) -> bool:
    """Whether a dotted key may differ between a run and its continuation."""
    return any(key == name or key.startswith(name + ".") for name in VOLATILE)
