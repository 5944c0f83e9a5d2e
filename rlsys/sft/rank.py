"""Ranks 1..K-1 of a fine-tuning: `python -P -m rlsys.sft.rank OUT RANK PORT [resume]`, started by rank 0 and killed with it."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from learner.parallel import connect_store, join
from learner.step import pick_device
from protocol.errors import UserError
from protocol.node import die_with_parent
from rlsys.sft.config import parse_sft_config
from rlsys.sft.training import fine_tune, read_material

HOST = "127.0.0.1"


def main(out: Path, rank: int, port: int, *, resume: bool) -> int:
    """Train beside rank 0, which alone reports and writes."""
    die_with_parent()
    path = out / "config.yaml"
    config = parse_sft_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    settings = config.learner
    try:
        material = read_material(config)
        store = connect_store(HOST, port, settings.ranks, settings.collective_timeout_s)
        device = pick_device(settings.device, rank)
        group = join(store, rank, settings.ranks, device=device, timeout_s=settings.collective_timeout_s)
        fine_tune(config, material, out, group, lambda *_: None, resume=resume)
        group.close()
    except UserError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), resume=sys.argv[4:] == ["resume"]))
