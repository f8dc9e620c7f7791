"""A calibration in a folder, so that other bits and other methods need not sample again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .calibration import Calibration, InputStatistics
from .files import staged

ABOUT, TENSORS = "calibration.json", "calibration.safetensors"


def save_calibration(folder: Path, calibration: Calibration, facts: Mapping[str, Any]) -> None:
    """Write the statistics of a calibration; it counts as complete once all is written.

    Args:
        folder: made where it is not there; what it held of a calibration is replaced.
        facts: what the calibration is known by, as JSON can hold it.
    """
    leaders: dict[int, str] = {}  # layers of one group share their statistics
    for name, statistics in calibration.layers.items():
        leaders.setdefault(id(statistics), name)
    own = {name: calibration.layers[name] for name in leaders.values()}
    tensors = {f"{name}.{key}": getattr(one, key) for name, one in own.items() for key in ("amax", "rows")}
    about = {
        "facts": dict(facts),
        "leaders": {name: leaders[id(one)] for name, one in calibration.layers.items()},
        "numbers": {name: (one.rms, one.num_rows, one.calls) for name, one in own.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    with staged(folder, [TENSORS, ABOUT]) as paths:  # ABOUT last: with it, the tensors are complete
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[TENSORS])
        paths[ABOUT].write_text(json.dumps(about))


def load_calibration(
    folder: Path, facts: Mapping[str, Any], runs: tuple[Callable[[], Any], ...] = ()
) -> Calibration | None:
    """The calibration that a folder holds, or None when it holds none.

    Args:
        facts: what it must have been saved with.
        runs: of the calibration returned.

    Raises:
        ValueError: one sentence, for a calibration with other facts, or damaged files.
    """
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text())
        known = dict(about["facts"])
        tensors = load_file(folder / TENSORS)
        own = {
            leader: InputStatistics(
                tensors[f"{leader}.amax"], float(rms), tensors[f"{leader}.rows"], int(num_rows), int(calls)
            )
            for leader, (rms, num_rows, calls) in about["numbers"].items()
        }
        layers = {name: own[leader] for name, leader in about["leaders"].items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} and {TENSORS} must be a calibration, they are damaged ({error}); remove them"
        ) from error
    wanted = json.loads(json.dumps(dict(facts)))
    for key in wanted:
        if known.get(key) != wanted[key]:
            raise ValueError(
                f"{folder} must hold a calibration with {key} {json.dumps(wanted[key])}, it was made with "
                f"{json.dumps(known.get(key))}; name another folder"
            )
    return Calibration(layers, runs)
