"""``prepare``: build the data of an experiment without training."""

import argparse
import time

from platform import config as configs


def run(args: argparse.Namespace) -> int:
    """Compose the experiment, build its data where missing, and say what there is.

    Args:
        args: ``experiment``, ``overrides`` (``key=value`` words), ``tiny``.

    Returns:
        0.
    """
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
