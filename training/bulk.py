"""Caption millions of pictures: `python -m training.bulk --input 'shards/{000..999}.tar' --output captions`.

Each shard gives a file of captions, written whole or not at all; shards that have one are left out, so the same command
continues a run that was stopped. With `--engine ray` the workers of a Ray cluster take the shards as they become free;
with `--engine local` this process does, and each process of `torchrun` takes its share.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from captioner.api import Captioner, has_gpu
from captioner.bulk import BATCH_SIZES, Job, Outcome, caption_jobs, plan, remaining
from captioner.cli import add_caption_options, job_options, positive, report, report_outcomes
from captioner.images import quieten_pillow
from captioner.modelfile import CheckpointError
from captioner.shards import shard_names

from . import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 all captioned, 1 some could not be, 2 wrong usage."""
    options = parse(argv)
    name = command("bulk")
    try:
        rank, size, local_rank = process(os.environ)
        # Ray's workers take shards as they become free: there is nothing to share beforehand.
        rank, size = (0, 1) if options.engine == "ray" else (rank, size)
        jobs = remaining(plan(shard_names(options.input), options.output, options.format, rank, size))
        failed = report_outcomes(
            caption_on_ray(jobs, options) if options.engine == "ray" else caption_here(jobs, options, local_rank),
            len(jobs),
            name,
        )
    except (CheckpointError, ConnectionError, ImportError, ValueError) as error:
        report(f"{name}: {error}")
        return 2
    except OSError as error:
        report(f"{name}: cannot write to {options.output}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        report("interrupted; run the same command again to continue")
        return 130
    return 1 if failed and size == 1 else 0  # torchrun ends all processes when one of them fails


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 and a message where it cannot be used."""
    parser = argparse.ArgumentParser(
        prog=command("bulk"),
        description="Caption shards: WebDataset's .tar files, or .parquet tables with a column of pictures. Run again "
        "to continue what was interrupted.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="SHARD",
        help="shards, also by patterns such as 'shards/{000..099}.tar'",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the captions, a file for each shard"
    )
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="(default: %(default)s)")
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="this process and those that torchrun starts beside it, or the cluster of RAY_ADDRESS (default: local)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: GPUs where there are any)")
    ray = parser.add_argument_group("with --engine ray")
    ray.add_argument(
        "--workers", type=positive, metavar="N", help="most workers (default: one for each GPU, or for --cpus)"
    )
    ray.add_argument(
        "--cpus", type=positive, default=1, metavar="N", help="processors that each worker reserves (default: 1)"
    )
    add_caption_options(parser)
    parser.set_defaults(batch_size=None)
    return parser.parse_args(argv)


def process(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes and local rank, which `torchrun` sets; 0, 1 and 0 for a process on its own.

    Raises:
        ValueError: they are not such numbers.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    values = [environment.get(name, default) for name, default in names.items()]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        raise ValueError(f"{', '.join(names)} should be as torchrun sets them, and are {', '.join(values)}")
    rank, size, local_rank = map(int, values)
    return rank, size, local_rank


def caption_here(jobs: Sequence[Job], options: argparse.Namespace, local_rank: int) -> Iterator[Outcome]:
    """Caption shards in this process, on the GPU of its local rank where there are any."""
    quieten_pillow()
    device = options.device or ("cuda" if has_gpu() else "cpu")
    captioner = Captioner.from_pretrained(options.model, f"cuda:{local_rank}" if device == "cuda" else device)
    return caption_jobs(captioner, jobs, **{"batch_size": BATCH_SIZES[device], **job_options(options)})


def caption_on_ray(jobs: Sequence[Job], options: argparse.Namespace) -> Iterator[Outcome]:
    """Caption shards on a Ray cluster."""
    from captioner import ray

    return ray.caption_jobs(
        jobs,
        model=options.model,
        device=options.device,
        workers=options.workers,
        cpus=options.cpus,
        **job_options(options),
    )


if __name__ == "__main__":
    sys.exit(main())
