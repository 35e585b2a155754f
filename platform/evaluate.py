"""``evaluate``: the metrics of training, measured again on finished weights, with the same code and the same seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from platform import config as configs

FOLDER = "evaluated"
METRICS_OF = ("fid", "likelihood", "quality")  # callbacks that measure, by their names in the configuration


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``run`` (run or weights folder), ``overrides`` (``key=value`` sampling settings), ``n`` (samples for
            distances, or None for the run's own number), ``weights``, ``decoder``, ``scorer`` and ``mauve`` (folders or
            None), ``metrics`` (some of ``METRICS_OF``, or None for all); ``problems`` and what belongs to it, see
            ``platform.solve``, instead of the metrics.

    Returns:
        0.
    """
    import json

    from platform import solve
    from platform.runs import METRICS, load_module, read_config, use_decoder
    from platform.screens import number

    if args.problems:
        solve.check(args)
    cfg, kind = read_config(args.run), args.weights or "ema"
    if not args.problems and not cfg.data.get("val", True):
        raise ValueError(
            f"{args.run} has no validation data (data.val is null in its config.yaml), and metrics are measured in a"
            " pass over it. Set data.val there to shards or a folder."
        )
    settings = configs.check_sampling(cfg, args.overrides)
    callbacks = []
    if not args.problems:
        callbacks = meters(cfg, settings, kind, args.n, _judges(args.scorer, args.mauve), args.metrics)
    module, _ = load_module(args.run, kind)
    decoder = use_decoder(module, args.decoder)
    source = Path(args.run)
    root = source if source.is_dir() else source.parent
    if args.problems:
        solve.run(module, settings, args, root / FOLDER / f"step_{module.updates:09d}")
        return 0
    drawn_by = f"_decoder-{decoder}" if decoder else ""
    file = root / FOLDER / f"step_{module.updates:09d}{drawn_by}" / METRICS
    before = len(file.read_text().splitlines()) if file.is_file() else 0
    measure(module, cfg, callbacks, file)
    rows = [json.loads(line) for line in file.read_text().splitlines()[before:]] if file.is_file() else []
    print(
        f"{args.run} at step {module.updates}, weights {module.active_weights},"
        f" sampling {settings or 'as the method sets it'}"
    )
    for row in (row for row in rows if row["tag"].startswith("metrics/") or row["tag"] == "val/loss"):
        print(f"  {row['tag']:<28} {number(row['value'])}   {row.get('protocol', '')}".rstrip())
    print(f"rows with every setting: {file}")
    return 0


def _judges(scorer: str | None, mauve: str | None) -> dict[str, Any]:
    """Settings of ``callbacks.text_quality`` that name models which judge texts."""
    judges: dict[str, Any] = {}
    if scorer is not None:
        kind = "Trained" if (Path(scorer).expanduser() / "config.yaml").is_file() else "Pretrained"
        judges["scorer"] = {"_target_": f"callbacks.features.scorer.{kind}", "folder": scorer}
    if mauve is not None:
        judges["mauve"] = mauve
    return judges


def meters(
    cfg: DictConfig,
    settings: dict[str, Any],
    weights: str,
    n: int | None,
    judges: dict[str, Any],
    metrics: Sequence[str] | None,
) -> list[Any]:
    """The callbacks that measure.

    Args:
        cfg: of the run; ``callbacks.fid``, ``likelihood`` and ``quality`` say what is measured. One that is asked for
            and that the run was trained without is as the experiment has it.
        settings: keywords of the room's ``sample``.
        weights: kind to measure.
        n: samples, or None for the configured number.
        judges: further settings of ``callbacks.quality``.
        metrics: which of ``METRICS_OF``, or None for all that the configuration has.

    Raises:
        ValueError: there are judges, but no texts; the configuration has none of the metrics; a judge is not there.
    """
    import hydra

    plan = _callbacks(cfg)
    named = {*(metrics or ()), *(["quality"] if judges else [])}
    known = plan if named <= plan.keys() else _recipe(cfg) | plan  # trained without, as with callbacks.fid=null
    if judges:
        if "quality" not in known:
            raise ValueError(
                f"--{next(iter(judges))} judges texts, and {cfg.experiment} has no callbacks.quality that draws some."
                " Leave it out."
            )
        if metrics and "quality" not in metrics:
            raise ValueError(
                f"--{next(iter(judges))} judges texts, and --metrics {','.join(metrics)} leaves them out. Add quality"
                " to it, or leave the other out."
            )
        plan["quality"] = known["quality"] = {**known["quality"], **judges}
    if absent := [name for name in metrics or () if name not in known]:
        there = ", ".join(name for name in METRICS_OF if name in known)
        choice = f"measures {there}. Type some of these" if there else "measures only its loss. Leave it out"
        raise ValueError(f"--metrics {absent[0]}: {cfg.experiment} {choice}.")
    wanted = metrics or [name for name in METRICS_OF if name in plan]
    chosen: list[Any] = [dict(known[name]) for name in wanted]
    for entry in chosen:
        if "settings" in entry:
            entry |= {"settings": settings, "weights": [weights]} | ({"n": n} if n else {})
    return [hydra.utils.instantiate(entry, _convert_="all") for entry in chosen]


def _callbacks(cfg: DictConfig) -> dict[str, Any]:
    """The metrics among a configuration's callbacks that are not null."""
    from omegaconf import OmegaConf

    plan = OmegaConf.to_container(cfg.callbacks, resolve=True)
    assert isinstance(plan, dict)
    return {name: plan[name] for name in METRICS_OF if plan.get(name)}


def _recipe(cfg: DictConfig) -> dict[str, Any]:
    """Metrics of the run's experiment as its file has them today; none where there is no such file any more."""
    try:
        return _callbacks(configs.compose(cfg.experiment, [], tiny=cfg.tiny_run))
    except ValueError:
        return {}


def measure(module: Any, cfg: DictConfig, callbacks: list[Any], file: Path) -> None:
    """Run metrics once on the active weights, in the precision and with the batches per device of training.

    Args:
        module: the room with the weights to measure active.
        cfg: its configuration.
        callbacks: from :func:`meters`.
        file: rows are added to it, one JSON object per line.
    """
    import lightning as L
    import torch

    from callbacks.records import JsonlLogger
    from platform import assemble
    from platform.runs import make_out

    datamodule, ranks = assemble.data(cfg), assemble.world_size(cfg)
    size = datamodule.val_batch_size or datamodule.batch_size // datamodule.accumulation_for(ranks)
    datamodule.val_batch_size = max(1, size // ranks)  # one device measures here, and need not hold those of all ranks
    for callback in callbacks:
        if getattr(callback, "max_batches", None):
            callback.max_batches *= ranks  # as many samples
    assemble.quiet()
    make_out(file.parent, "The folder for what is measured,")
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=assemble.precision_of(cfg),
        logger=JsonlLogger(file, lambda: module.samples_seen),
        callbacks=callbacks,
        default_root_dir=file.parent,
        inference_mode=False,  # score-based denoising differentiates while sampling
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with trainer.precision_plugin.forward_context():  # callbacks, too, as in callbacks.checkpointing
        trainer.validate(module, datamodule=datamodule, verbose=False)
