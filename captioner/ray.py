"""Captioning on a cluster with Ray Data: a pool of actors, each with one model, and with one GPU where there are any.

`caption_dataset` adds captions to any `ray.data.Dataset`. `caption_jobs` captions shards, each into a file of its own.
Ray places the actors, restarts those that die, and repeats the blocks that they were at.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from captioner.api import Captioner
from captioner.bulk import BATCH_SIZES, Job, Outcome, Row, caption_columns, caption_samples, caption_shard
from captioner.images import quieten_pillow, reason
from captioner.options import Options
from captioner.pretrained import model_folders
from captioner.shards import COLUMN, Sample, import_pyarrow, picture

if TYPE_CHECKING:
    from ray.data import Dataset

ATTEMPTS = 4  # at a shard, until it is given up


class CaptionTable:
    """An actor's model, which adds captions to the tables that it is called with.

    Args:
        model, device: see `Captioner.from_pretrained`.
        column: the column of pictures.
        options: of `captioner.bulk.caption_samples`.
    """

    def __init__(self, model: str | None, device: str, column: str, options: dict[str, Any]) -> None:
        quieten_pillow()
        self.captioner, self.column, self.options = Captioner.from_pretrained(model, device), column, options

    def __call__(self, table: Any) -> Any:
        """The table with the columns of `captioner.bulk.caption_columns`.

        Raises:
            ValueError: it has no column of pictures, or one of the others already.
        """
        columns = caption_columns()
        if self.column not in table.column_names:
            raise ValueError(f"the dataset has no column {self.column!r}; it has {', '.join(table.column_names)}")
        if taken := [name for name, _ in columns if name in table.column_names]:
            raise ValueError(f"the dataset has a column {taken[0]!r} already; rename it before captioning")
        rows = list(caption_samples(self.captioner, samples(table.column(self.column)), **self.options))
        arrow = import_pyarrow("pyarrow")
        for name, kind in columns:
            table = table.append_column(name, arrow.array([row.get(name) for row in rows], kind))
        return table


class CaptionShards:
    """An actor's model, which captions the shards that it is called with; see `caption_jobs`.

    Args:
        model, device: see `Captioner.from_pretrained`.
        run: a name for the run.
        options: of `captioner.bulk.caption_shard`.
    """

    def __init__(self, model: str | None, device: str, run: str, options: dict[str, Any]) -> None:
        quieten_pillow()
        self.captioner, self.run, self.options = Captioner.from_pretrained(model, device), run, options

    def __call__(self, row: Row) -> Row:
        """The outcome for the one shard in a row of `shard` and `target`."""
        outcome = self.caption(Job(row["shard"], Path(row["target"])))
        return row | {"pictures": outcome.pictures, "failed": outcome.failed, "error": outcome.error}

    def caption(self, job: Job) -> Outcome:
        """Caption a shard, unless `ATTEMPTS` have failed or have ended with the death of an actor.

        Ray gives a shard whose actor died to another one, without end. A file beside the captions counts the attempts
        of this run, a byte for each; `caption_shard` removes it.
        """
        attempts = job.target.with_name(f".{job.target.name}.{self.run}")
        failure = "its worker died"
        try:
            attempts.parent.mkdir(parents=True, exist_ok=True)
            attempts.touch()
            while attempts.stat().st_size < ATTEMPTS:
                with attempts.open("ab") as file:
                    file.write(b".")
                try:
                    return caption_shard(self.captioner, job, **self.options)
                except Exception as error:
                    failure = reason(error)
            attempts.unlink()
        except OSError as error:  # of the file that counts
            failure = reason(error)
        return Outcome(job, error=f"{job.shard} could not be captioned in {ATTEMPTS} attempts: {failure}")


def caption_dataset(
    dataset: "Dataset",
    column: str = COLUMN,
    *,
    model: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    min_confidence: float = 0.0,
    **options: Unpack[Options],
) -> "Dataset":
    """Add captions to a dataset. As other transformations it is lazy: the work is done when the result is consumed.

    Args:
        dataset: with a column of pictures.
        column: its name. It holds the bytes of image files, paths, structs of `bytes` and `path`, or arrays.
        model: see `Captioner.from_pretrained`; a file or folder must be there on every node.
        device: "cpu", or "cuda" for one GPU for each worker; by default the latter where the cluster has GPUs.
        workers: most actors; by default one for each GPU, or for each `cpus` processors of the cluster.
        cpus: processors that each actor reserves.
        min_confidence: a caption of lower confidence is replaced by an error.
        options: see `Captioner.caption`. By default `batch_size` is 32 on a CPU and 128 on a GPU.

    Returns:
        The dataset with the columns `caption`, `log_probability`, `words` and `alternatives`, as in `Caption.to_dict`,
        and `error`, which is null unless the picture could not be captioned. The pictures are kept; `drop_columns`
        leaves them out of what is written.

    Raises:
        CheckpointError: there is no such model.
        ValueError: an option has a value that cannot be used.
    """
    model = check_model(model, options)
    device, pool = workers_for(device, workers, cpus)
    settings: dict[str, Any] = {"batch_size": BATCH_SIZES[device], **options, "min_confidence": min_confidence}
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        CaptionTable,
        fn_constructor_args=(model, device, column, settings),
        batch_format="pyarrow",
        batch_size=4 * settings["batch_size"],  # while the network computes, threads read the following images
        compute=ActorPoolStrategy(min_size=1, max_size=pool),
        num_cpus=cpus,
        num_gpus=int(device == "cuda"),
        udf_modifying_row_count=False,
    )


def caption_jobs(
    jobs: Sequence[Job],
    *,
    model: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    column: str = COLUMN,
    min_confidence: float = 0.0,
    **options: Unpack[Options],
) -> Iterator[Outcome]:
    """Caption shards, each into a file that is written whole or not at all by the actor that reads the shard.

    A shard whose actor dies is begun anew by another, and one that fails, such as for a full disk, is tried again, in
    all up to `ATTEMPTS` times. Pictures and captions do not pass through Ray's object store.

    Args:
        jobs: the shards; they and the folder for the captions must be there on every node.
        column, min_confidence: see `captioner.bulk.caption_shard`.
        model, ..., options: see `caption_dataset`.

    Returns:
        The outcome of each shard, as soon as it is known.

    Raises:
        CheckpointError: there is no such model.
        ValueError: an option has a value that cannot be used.
    """
    model = check_model(model, options)
    if not jobs:
        return
    device, pool = workers_for(device, workers, cpus)
    settings = {"batch_size": BATCH_SIZES[device], **options, "column": column, "min_confidence": min_confidence}
    import ray.data

    rows = [
        {"job": number, "shard": os.path.abspath(job.shard), "target": os.path.abspath(job.target)}
        for number, job in enumerate(jobs)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        CaptionShards,  # type: ignore[arg-type]  # Ray makes an instance in each actor
        fn_constructor_args=(model, device, secrets.token_hex(4), settings),
        compute=ray.data.ActorPoolStrategy(size=min(pool, len(rows)), max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=int(device == "cuda"),
    )
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        yield Outcome(jobs[row["job"]], row["pictures"], row["failed"], row["error"])


def check_model(model: str | None, options: Options) -> str | None:
    """Raise what `Captioner.from_pretrained` and `Captioner.stream` raise, before any actor is started.

    Returns:
        The name of the model; a path is absolute, because actors have a working folder of their own.
    """
    Captioner.from_pretrained(model).stream((), **options).close()
    return os.path.abspath(model) if model and model not in model_folders() and os.path.exists(model) else model


def workers_for(device: str | None, workers: int | None, cpus: float) -> tuple[str, int]:
    """What each actor computes on, and how many there are at most; see `caption_dataset`."""
    connect()
    import ray

    resources = ray.cluster_resources()
    device = device or ("cuda" if resources.get("GPU") else "cpu")
    if device not in BATCH_SIZES:
        raise ValueError(f"device must be one of {', '.join(BATCH_SIZES)}, not {device!r}")
    found = resources.get("GPU", 0) if device == "cuda" else resources.get("CPU", 0) / cpus
    return device, workers or max(1, int(found))


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or the one of this machine. Where there is none, one is started here.

    It has no dashboard and reports nothing about its use.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("this needs the package ray: pip install 'captioner[ray]'") from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False)


def samples(column: Any) -> Iterator[Sample]:
    """The pictures of a column of a table."""
    for value in column.to_pylist():
        path, image = picture(value)
        yield Sample("", path, path or "", image)
