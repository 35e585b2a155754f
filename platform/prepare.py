"""``prepare``: build the data of an experiment without training, or encode shards as latents or text features."""

import argparse
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from platform import config as configs
from platform.quantities import data_size
from platform.verbs import PROGRAM

_MOST_WORKERS = 8
_IMAGES = ("png", "jpg", "jpeg", "webp")


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``action``; without one ``experiment``, ``overrides`` (``key=value`` words) and ``tiny``, else ``source``,
            ``out`` and the options of the action.

    Returns:
        0.
    """
    return _encode(args) if args.action else _build(args)


def _build(args: argparse.Namespace) -> int:
    """Compose the experiment, build its data where missing, and say what there is."""
    cfg = configs.compose(args.experiment, args.overrides, tiny=args.tiny)
    from hydra.utils import instantiate

    begin = time.monotonic()
    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    facts = datamodule.describe()
    print(f"data of {args.experiment} ready after {time.monotonic() - begin:.1f} s")
    for key, value in facts.items():
        print(f"  {key:<{max(map(len, facts))}}  {value}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    from platform.data import Bar
    from platform.encode import Choices, Encoding

    begin = time.monotonic()
    rank, world = ranks()
    source, origin = open_source(args.source, args.skip_bad)
    workers = args.workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    choices = Choices(args.batch, workers, args.skip_bad, rank, world)
    encoder = _pictures(args, source) if args.action == "latents" else _captions(args, source)
    job = Encoding(source, encoder, Path(args.out).expanduser(), choices, origin)
    try:
        with Bar() as bar:
            done = job.run(bar if rank == 0 else lambda *state: None)
    finally:
        source.close()
    if done.index is None:
        print(
            f"process {rank} of {world}: its {done.encoded + done.kept} shards are done; the process that ends last"
            " writes index.json (if none did, type the same command again)"
        )
        return 0
    print(_headline(args, done, time.monotonic() - begin))
    for label, fact in _facts(args, done):
        print(f"{label:<12} {fact}")
    return 0


def ranks() -> tuple[int, int]:
    """Number of this process and of all, by what torchrun sets.

    Raises:
        ValueError: RANK and WORLD_SIZE do not fit.
    """
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if world is None:
        return 0, 1
    if not (world.isdigit() and (rank or "").isdigit() and int(rank or 0) < int(world)):
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment: expected a number below WORLD_SIZE. torchrun sets"
            " both; for a single process, unset them."
        )
    return int(rank or 0), int(world)


def open_source(text: str, skip_bad: bool) -> tuple[Any, tuple[str, str]]:
    """The shards to encode.

    Args:
        text: folder, shard, pattern or address.
        skip_bad: accept damage.

    Returns:
        The samples; name and licence of the data set.

    Raises:
        ValueError: there are no such shards, some are missing or damaged, or two have one name.
    """
    shards, survey, catalogue = (import_module(f"datamodules.{name}") for name in ("shards", "survey", "catalogue"))
    patterns = [text]
    path = Path(text).expanduser()
    name, licence = path.name, "unknown"
    if path.is_dir() and not any(path.glob("*.tar")):
        raise ValueError(
            f"{text} is a folder without shards (.tar). Make some of what is in it: {PROGRAM} data pack {text} OUT"
        )
    if ":" not in text and "{" not in text:
        paths = survey.find(path)
        missing = [str(one) for one in paths if not one.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is listed in {catalogue.FILE_NAME}, but it is missing. Copy it again.")
        patterns = [str(one.absolute()) for one in paths]
        index = catalogue.read(paths[0].parent)
        name, licence = (index.dataset, index.licence) if index is not None else (name, licence)
    try:
        source = shards.open_source(patterns, Path.cwd(), "SOURCE", max_bad_fraction=float(skip_bad))
    except ValueError as error:
        more = " Here that is --skip-bad." if "max_bad_fraction" in str(error) else ""
        raise ValueError(f"{error}{more}") from None
    twice = [one for one in source.names if source.names.count(one) > 1 or "/" in one]
    if twice:
        raise ValueError(f"{text} names two shards {twice[0]}. Encode one folder after the other.")
    return source, (name, licence)


def _pictures(args: argparse.Namespace, source: Any) -> Any:
    from platform import encoders

    members = source.extensions()
    if not set(_IMAGES) & set(members):
        raise ValueError(
            f"{args.source}: its samples have {_listed(members)}, but no image ({_listed(_IMAGES)}). Type the shards of"
            " the images."
        )
    device = encoders.device_of(args.device)
    net, white, scale = encoders.open_autoencoder(args.encoder, args.weights, args.white)
    if net.in_channels not in (1, 3):
        raise ValueError(f"--encoder {args.encoder} takes pictures of {net.in_channels} channels, expected 1 or 3.")
    return encoders.Pictures(
        net,
        _name(args.encoder),
        white=white,
        size=(args.size, args.size) if args.size else _first_shape(source, args.skip_bad),
        resize=args.size is not None,
        flip=args.flip,
        scale=scale if args.scale is None else args.scale,
        shift=net.shift_factor if args.shift is None else args.shift,
        device=device,
    )


def _captions(args: argparse.Namespace, source: Any) -> Any:
    from platform import encoders

    members = source.extensions()
    wanted = args.member.partition(":")[0]
    if wanted not in members:
        raise ValueError(
            f"{args.source}: its samples have {_listed(members)}, but no .{wanted}. Type the member with the caption:"
            " --member NAME, or --member json:ENTRY."
        )
    return encoders.Captions(
        encoders.open_text_encoder(args.encoder, args.length),
        _name(args.encoder),
        caption=args.member,
        member=f"emb.{args.name}" if args.name else "emb",
        kind=args.dtype,
        device=encoders.device_of(args.device),
    )


def _first_shape(source: Any, skip_bad: bool) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    transforms = import_module("datamodules.transforms")
    for sample in range(int(source.counts.sum())):
        try:
            shape: tuple[int, int] = transforms.shape_of(transforms.picture_of(source.read(sample)))
        except ValueError as error:
            if not skip_bad:
                place = f"{source.shard(sample)}, sample {source.key(sample)}: "
                raise ValueError(f"{place}{str(error).removeprefix(place)}. Put it right, or add --skip-bad.") from None
        else:
            return shape
    raise ValueError("SOURCE: there is no image in it that can be read.")


def _headline(args: argparse.Namespace, done: Any, seconds: float) -> str:
    samples = sum(entry.samples for entry in done.index.shards.values())
    size = sum(entry.bytes for entry in done.index.shards.values())
    held = f"{args.action} of {samples:,} samples in {len(done.index.shards)} shards, {data_size(size)}, in {args.out}"
    if not done.encoded:
        return f"{held}: all of it was there already"
    before = f" ({done.kept} shards by an earlier attempt)" if done.kept else ""
    return f"{held}, {seconds:.1f} s{before}"


def _facts(args: argparse.Namespace, done: Any) -> list[tuple[str, str]]:
    card = done.index.card
    name = "lat" if args.action == "latents" else card["prepare"]["member"]
    entry = card[name]
    if name == "lat":
        spread, shape = card["spread"], "x".join(map(str, entry["shape"]))
        rows = [
            ("latents", f"{shape} (mean, log-variance){', also mirrored' * entry['flip']}"),
            ("scale", f"{entry['scale']:g}, shift {entry['shift']:g}"),
            ("spread", f"mean {spread['mean']:.4g}, standard deviation {spread['std']:.4g} before scale and shift"),
        ]
    else:
        mean, width = card["rows"]["mean"], entry["shape"][1]
        rows = [("features", f".{name}, {mean:.1f} rows of {width} numbers ({entry['dtype']}) on average")]
    rows.append(("encoder", entry["encoder"]))
    if done.skipped:
        rows.append(("left out", f"{done.skipped} samples, see {Path(args.out) / 'skipped.jsonl'}"))
        rows.append(("", "so the keys differ from the source's: read these shards alone, not through data.columns"))
    return rows


def _name(encoder: str) -> str:
    """What the card calls an encoder: the name of its folder, without the path, which differs between machines."""
    if encoder.startswith("random:"):
        return encoder
    kind, colon, folder = encoder.rpartition("embeddings:")
    return kind + colon + Path(folder).expanduser().resolve().name


def _listed(members: Any) -> str:
    return ", ".join(f".{name}" for name in members)
