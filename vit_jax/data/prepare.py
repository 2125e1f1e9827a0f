"""Writes TFDS datasets as array_record, without TensorFlow; goes on where it stopped.

A `Plan` lists the shards of a dataset and how to read the records of each; it is made
by `imagenet` or `tfrecords`. A shard is a pure function of the plan. It is written
under another name and renamed once it is whole, in a folder that gets its own name once
all of it is: nothing half-finished looks finished, and a second run makes the bytes
that an uninterrupted one would have made.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import filelock

from vit_jax.data.prepared import is_prepared, list_splits
from vit_jax.data.progress import Progress, duration, size
from vit_jax.errors import UserError, reason

# One record a chunk, so that each is found alone. Images are compressed as they are,
# and a file that is not compressed again is as large as arithmetic says.
_WRITER_OPTIONS = 'group_size:1,uncompressed'
_RECORD_OVERHEAD = 128  # bytes, at most: chunk and block headers, and the index
_SHARD_OVERHEAD = 3 << 16  # files end on a block of 64 KiB
_PROBE_BYTES = 128 << 20
_PLAN = 'prepare.json'
_NO_SPACE = ('No space left', 'Disk quota exceeded', 'File too large')


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be written.

    Attributes:
      split: of the dataset.
      name: of the file.
      num_examples: in it.
      num_bytes: of its records.
      read: gives its records, serialized `tf.train.Example`s, in their order.
    """

    split: str
    name: str
    num_examples: int
    num_bytes: int
    read: Callable[[], Iterator[bytes]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to be written.

    Attributes:
      name: what `dataset.name` will be, 'imagenet2012'.
      source: where from, for people.
      folder: where it will lie, `data_dir/name/version`.
      shards: of all splits, in their order.
      digest: of all that decides what the shards hold.
      write_info: called with a folder and the bytes of the files of each split when
        all shards lie there; writes the files by which TFDS knows the dataset.
    """

    name: str
    source: str
    folder: pathlib.Path
    shards: Sequence[Shard]
    digest: str
    write_info: Callable[[pathlib.Path, Mapping[str, int]], None]

    @property
    def unfinished(self) -> pathlib.Path:
        """Where it lies until it is whole; TFDS looks at no such name."""
        return self.folder.parent / f'.{self.folder.name}.unfinished'

    @property
    def splits(self) -> dict[str, int]:
        """Examples of each split."""
        splits: dict[str, int] = {}
        for shard in self.shards:
            splits[shard.split] = splits.get(shard.split, 0) + shard.num_examples
        return splits

    def missing(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [s for s in self.shards if not (self.unfinished / s.name).exists()]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Attributes:
      read: bytes of records to be read.
      write: bytes that the files may take at most.
      free: bytes free where they will lie.
      probed: bytes of records that were copied to see how fast that goes.
      probe_seconds: that it took, by one worker.
    """

    read: int
    write: int
    free: int
    probed: int
    probe_seconds: float

    @property
    def seconds(self) -> float:
        """The time it will take if one worker does it all."""
        return self.read * self.probe_seconds / max(self.probed, 1)


def estimate(plan: Plan) -> Estimate:
    """Measures what is left to do; copies the first of it to a file without a name.

    Raises:
      UserError: when that folder cannot be written to, or holds the beginning of
        something else.
    """
    _check_begun(plan)
    missing = plan.missing()
    parent = _find_parent(plan.folder)
    probed, start = 0, time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            for record in missing[0].read() if missing else ():
                file.write(record)
                probed += len(record)
                if probed >= _PROBE_BYTES:
                    break
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:  # told below, with numbers
            where = error.filename or parent
            raise UserError(f'{where}: {reason(error).lower()}') from error
    return Estimate(
        read=sum(shard.num_bytes for shard in missing),
        write=sum(
            shard.num_bytes
            + shard.num_bytes // 2048  # a header of 24 bytes for 64 KiB
            + shard.num_examples * _RECORD_OVERHEAD
            + _SHARD_OVERHEAD
            for shard in missing
        ),
        free=find_free(parent),
        probed=probed,
        probe_seconds=time.perf_counter() - start,
    )


def find_root(data_dir: str | None) -> pathlib.Path:
    """Where TFDS keeps its datasets."""
    import tensorflow_datasets as tfds

    return pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def find_free(folder: pathlib.Path) -> int:
    """Bytes free where `folder` lies or will lie."""
    return shutil.disk_usage(_find_parent(folder)).free


def _find_parent(folder: pathlib.Path) -> pathlib.Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def describe(plan: Plan, estimate: Estimate) -> Iterator[str]:
    """What will be done, line by line, before any of it is."""
    yield f'{plan.name}: {list_splits(plan.splits)} examples from {plan.source}'
    done = len(plan.shards) - len(plan.missing())
    there = f', {done:,} of them are there already' if done else ''
    yield (
        f'  reads {size(estimate.read)}, writes at most {size(estimate.write)} to '
        f'{plan.folder} ({len(plan.shards):,} shards{there})'
    )
    yield f'  free there: {size(estimate.free)}'
    if estimate.probed:
        rate = size(estimate.probed / estimate.probe_seconds)
        yield (
            f'  takes about {duration(estimate.seconds)} for one worker, at the '
            f'{rate}/s of a copy of {size(estimate.probed)}'
        )


def check_space(plan: Plan, estimate: Estimate) -> None:
    """Raises UserError when it does not fit."""
    if estimate.write > estimate.free:
        raise UserError(
            f'{plan.folder} may take {size(estimate.write)}, and '
            f'{size(estimate.free)} are free there; make room, or choose another '
            '--data_dir'
        )


def write(plan: Plan, workers: int = 1) -> None:
    """Writes the shards that are missing, then names the folder, if it has no name yet.

    Args:
      plan: what to write.
      workers: threads, each with a shard at a time.

    Raises:
      UserError: when a source is damaged or the disk is full; what was finished stays.
    """
    try:
        with _lock(plan):
            if is_prepared(plan.folder, plan.splits):  # by another, since it was asked
                return
            _begin(plan)
            _write_shards(plan, workers)
            sizes: dict[str, int] = {}
            for shard in plan.shards:
                path = plan.unfinished / shard.name
                sizes[shard.split] = sizes.get(shard.split, 0) + path.stat().st_size
            plan.write_info(plan.unfinished, sizes)
            for path in plan.unfinished.glob('*.json'):
                _sync(path)
            if plan.folder.exists():  # and is empty, see `is_prepared`
                plan.folder.rmdir()
            os.replace(plan.unfinished, plan.folder)
    except OSError as error:
        if _is_full(error):
            raise _full(plan, error) from error
        where = error.filename or plan.folder
        raise UserError(f'{where}: {reason(error).lower()}') from error


@contextlib.contextmanager
def _lock(plan: Plan) -> Iterator[None]:
    """Lets one process at a time write a dataset."""
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    path = plan.folder.parent / f'.{plan.folder.name}.lock'
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f'another process is writing {plan.folder}') from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _begin(plan: Plan) -> None:
    """Makes the folder, or takes up the one that is there."""
    path = plan.unfinished / _PLAN
    if path.exists():
        _check_begun(plan)
        for leftover in plan.unfinished.glob('*.tmp'):
            leftover.unlink()
        return
    if plan.unfinished.exists():  # killed before there was a plan
        shutil.rmtree(plan.unfinished)
    plan.unfinished.mkdir()
    text = json.dumps({'source': plan.source, 'digest': plan.digest}, indent=2)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(text + '\n')
    os.replace(temporary, path)


def _check_begun(plan: Plan) -> None:
    """Raises UserError where the shards that are there are those of another plan."""
    path = plan.unfinished / _PLAN
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text())
        digest, source = begun['digest'], begun['source']
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged; remove {plan.unfinished}') from error
    if digest != plan.digest:
        raise UserError(
            f'{plan.unfinished} was begun with other examples, from {source}; go on '
            'with those, or remove that folder'
        )


def _write_shards(plan: Plan, workers: int) -> None:
    stop = threading.Event()
    missing = plan.missing()
    total = sum(shard.num_bytes for shard in plan.shards)
    have = total - sum(shard.num_bytes for shard in missing)
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        Progress(plan.name, total, have, unit='B') as progress,
    ):
        futures = [
            pool.submit(_write_shard, plan, shard, progress, stop) for shard in missing
        ]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:  # of a failure or an interrupt: the others end at their next record
            stop.set()
            pool.shutdown(cancel_futures=True)


def _write_shard(
    plan: Plan, shard: Shard, progress: Progress, stop: threading.Event
) -> None:
    from array_record.python import array_record_module

    path = plan.unfinished / shard.name
    temporary = plan.unfinished / f'{shard.name}.tmp'
    count = 0
    records = shard.read()
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for record in records:
            if stop.is_set():
                return
            writer.write(record)
            count += 1
        writer.close()
        if count != shard.num_examples:
            raise UserError(
                f'{shard.name} got {count:,} records instead of '
                f'{shard.num_examples:,}: its source has changed, or is damaged'
            )
        reader = array_record_module.ArrayRecordReader(str(temporary))
        written = reader.num_records()
        reader.close()
        if written != count:  # what a full disk may leave without a word
            raise RuntimeError(f'{written} of {count} records were written')
    except RuntimeError as error:  # of the writer, which knows no OSError
        if _is_full(error):
            raise _full(plan, error) from error
        raise UserError(f'cannot write {temporary}: {reason(error)}') from error
    _sync(temporary)
    os.replace(temporary, path)
    progress.advance(shard.num_bytes)


def _sync(path: pathlib.Path) -> None:
    """Has the bytes of a file on the disk before its name promises them."""
    with path.open('rb') as file:
        os.fsync(file.fileno())


def _is_full(error: Exception) -> bool:
    return any(text in str(error) for text in _NO_SPACE)


def _full(plan: Plan, error: Exception) -> UserError:
    text = next(text for text in _NO_SPACE if text in str(error))
    return UserError(
        f'{plan.unfinished}: {text.lower()}; its finished shards stay: make room and '
        'give the same command again'
    )
