"""``sample``: pictures or texts from a run or from a weights folder, one file per seed and one of all."""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from platform import config as configs

SETTINGS, EVALUATIONS = "settings.json", "evaluations.json"
PICTURE, TEXT = ".png", ".txt"


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``run`` (folder), ``overrides`` (``key=value`` sampling settings), ``seeds`` (list of int), ``label``
            (int or None), ``prompt`` (text or None), ``image`` and ``mask`` (files, or None: nothing is filled in),
            ``decoder`` (folder or None), ``weights``, ``out`` (folder or None), ``batch`` (samples at a time),
            ``grid``.

    Returns:
        0.
    """
    from callbacks.sampling import asked_for
    from platform import inpainting
    from platform.runs import device, load_module, use_decoder

    module, cfg = load_module(args.run, args.weights or "ema")
    decoder = use_decoder(module, args.decoder)
    gap = None if args.image is None else inpainting.read(args.image, args.mask, module)
    settings = configs.check_sampling(
        cfg, args.overrides, "inpaint" if gap is not None and hasattr(module, "inpaint") else "sample"
    )
    draw = partial(_generate if gap is None else gap.fill, module)
    labels = _labels(module, args.seeds, args.label)
    if args.prompt is not None:
        asked_for(module, args.prompt, "--prompt")
    request = {
        "run": str(Path(args.run).resolve()),
        "step": module.updates,
        "weights": module.active_weights,
        "label": args.label,
        **({} if args.prompt is None else {"prompt": args.prompt}),
        **({"decoder": decoder} if decoder else {}),
        **({} if gap is None else {"image": args.image, "mask": args.mask, "gap": gap.digest}),
        "settings": settings,
    }
    out = Path(args.out) if args.out else _default_folder(Path(args.run), request)
    _claim(out, request)
    todo = [seed for seed in args.seeds if not _file(out, seed).is_file()]
    if len(todo) < len(args.seeds):
        print(f"{len(args.seeds) - len(todo)} of {len(args.seeds)} samples are in {out} already")
    module.to(device())
    begin = time.monotonic()
    calls: dict[int, int] = {}  # network evaluations, for methods that count them
    for first in range(0, len(todo), args.batch):
        seeds = todo[first : first + args.batch]
        _write(module, draw, out, seeds, labels, args.prompt, settings)
        if getattr(module, "evaluations", None) is not None:
            calls |= dict(zip(seeds, module.evaluations.tolist(), strict=True))
            _note_calls(out, calls)
    if todo:
        seconds = time.monotonic() - begin
        kind = _file(out, todo[0]).suffix[1:]
        print(
            f"{len(todo)} samples in {seconds:.1f} s ({seconds / len(todo):.3f} s each), one {kind} per seed in {out}"
        )
    if args.grid and _file(out, args.seeds[0]).suffix == TEXT:
        print(f"all of them: {_list(out, args.seeds)}")
    elif args.grid:
        print(f"grid: {_grid(out, module, cfg.experiment, args.seeds, settings)}")
    return 0


def _labels(module: Any, seeds: Sequence[int], label: int | None) -> dict[int, int] | None:
    if not module.num_classes:
        if label is not None:
            raise ValueError(f"--label {label}: this model was trained without classes. Leave --label out.")
        return None
    if label is not None and not -1 <= label < module.num_classes:
        raise ValueError(
            f"--label {label}: the model has {module.num_classes} classes."
            f" Type 0 to {module.num_classes - 1}, or -1 for none."
        )
    return {seed: seed % module.num_classes if label is None else label for seed in seeds}


def _write(
    module: Any,
    draw: Callable[..., Any],
    out: Path,
    seeds: list[int],
    labels: dict[int, int] | None,
    prompt: str | None,
    settings: dict[str, Any],
) -> None:
    import torch
    from PIL import Image

    from callbacks.sampling import prompted

    condition = module.condition([labels[seed] for seed in seeds]) if labels is not None else None
    if prompt is not None:
        condition = prompted(module, condition, prompt, len(seeds), settings)
    drawn = draw(seeds, condition, settings)
    for seed, sample in zip(seeds, drawn.cpu().numpy() if isinstance(drawn, torch.Tensor) else drawn, strict=True):
        file = out / f"{_stem(seed)}{TEXT if isinstance(sample, str) else PICTURE}"
        aside = file.with_suffix(f".{os.getpid()}.tmp")
        if isinstance(sample, str):
            aside.write_bytes(sample.encode())
        else:
            Image.fromarray(sample[0] if len(sample) == 1 else sample.transpose(1, 2, 0)).save(aside, "PNG")
        os.replace(aside, file)


def _generate(module: Any, seeds: Sequence[int], condition: Any, settings: Mapping[str, Any]) -> Any:
    return module.generate(seeds, condition, **settings)


def _note_calls(out: Path, calls: Mapping[int, int]) -> None:
    """Add to ``evaluations.json`` how many network evaluations each seed took."""
    file = out / EVALUATIONS
    known = json.loads(file.read_text()) if file.is_file() else {}
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(known | {str(seed): count for seed, count in calls.items()}))
    os.replace(aside, file)


def _list(out: Path, seeds: Sequence[int]) -> Path:
    """One line of JSON per seed."""
    calls = json.loads((out / EVALUATIONS).read_text()) if (out / EVALUATIONS).is_file() else {}
    rows = [
        {"seed": seed, "text": _file(out, seed).read_bytes().decode()}  # as it was drawn, whatever ends its lines
        | ({"evaluations": calls[str(seed)]} if str(seed) in calls else {})
        for seed in seeds
    ]
    file = out / "samples.jsonl"
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, file)
    return file


def _grid(out: Path, module: Any, experiment: str, seeds: Sequence[int], settings: dict[str, Any]) -> Path:
    import numpy as np
    from PIL import Image

    from callbacks import pictures

    tiles = [np.atleast_3d(np.asarray(Image.open(_file(out, seed)))) for seed in seeds]
    white = int(getattr(module.codec, "white", 255))
    row = list(range(seeds[0], seeds[0] + len(seeds))) == list(seeds)
    shown = f"{seeds[0]}-{seeds[-1]}" if row else ",".join(map(str, seeds[:8])) + (",..." if len(seeds) > 8 else "")
    title = f"{experiment} {module.active_weights} seeds {shown}"
    if "guidance" in settings:
        title += f" guidance {settings['guidance']:g}"
    return pictures.write_grid(out / "grid.png", np.stack(tiles).transpose(0, 3, 1, 2), title=title, white=white)


def _stem(seed: int) -> str:
    return f"seed_{seed:06d}"


def _file(out: Path, seed: int) -> Path:
    """The sample of a seed, a text where there is one."""
    text = out / f"{_stem(seed)}{TEXT}"
    return text if text.is_file() else text.with_suffix(PICTURE)


def _default_folder(run: Path, request: dict[str, Any]) -> Path:
    settings = "_".join(f"{key}-{value}" for key, value in sorted(request["settings"].items()))
    label = "" if request["label"] is None else f"_label-{request['label']}"
    if "prompt" in request:
        label += f"_prompt-{hashlib.sha256(request['prompt'].encode()).hexdigest()[:8]}"
    if "decoder" in request:
        label += f"_decoder-{request['decoder']}"
    label += f"_gap-{request['gap']}" if "gap" in request else ""
    root = run if run.is_dir() else run.parent
    return (
        root
        / "sampled"
        / f"step_{request['step']:09d}"
        / f"{request['weights']}{label}{'_' + settings if settings else ''}"
    )


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Note what the folder holds; samples made with other settings are never mixed in.

    Raises:
        ValueError: the folder holds samples of another request.
    """
    from platform.runs import make_out

    make_out(out)
    file = out / SETTINGS
    if any(out.glob("seed_*")):
        try:
            old = json.loads(file.read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"{out} holds samples, but no {SETTINGS} that says how they were made. Type another --out FOLDER."
            ) from None
        old["run"] = str(Path(old["run"]).resolve())  # older folders hold it as it was typed
        free = {"image", "mask"}  # their content stands in "gap"
        if out.resolve().is_relative_to(request["run"]) and not Path(old["run"]).exists():
            free.add("run")  # it was moved, and its samples with it
        changed = [key for key in request | old if key not in free and old.get(key) != request.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{out} holds samples made with {key}={old.get(key)}, now {key}={request.get(key)}."
                " Type another --out FOLDER."
            )
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(request, indent=1))
    os.replace(aside, file)
