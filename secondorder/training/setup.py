"""What a training needs before its first step: data that fit the run, and the network with its initial weights."""

import torch

from secondorder.data import DATASETS, ImageDataset
from secondorder.errors import InputError
from secondorder.networks import Network, network
from secondorder.training.device import check_device, resolve_device
from secondorder.training.processes import world_size
from secondorder.training.run import Run


def check_fit(run: Run, data: ImageDataset) -> None:
    """Raise InputError unless the data and the number of processes are those of the run."""
    if data.name not in (run.dataset, DATASETS[run.dataset].substitute):
        raise InputError(f"the run is on {run.dataset!r}, the data is {data.name!r}; load the run's data set")
    for name, split, limit in (("train", data.train, run.train_limit), ("test", data.test, run.test_limit)):
        if limit is not None and len(split) != limit:
            raise InputError(f"{name}_limit is {limit} but the data has {len(split)} images; load it with that limit")
    if run.image_size not in (None, data.image_size):
        raise InputError(f"image_size is {run.image_size} but the data has {data.image_size}; load it with that size")
    if len(data.train) < run.batch_size:
        raise InputError(f"batch_size is {run.batch_size} but there are {len(data.train)} training images; lower it")
    if run.batch_size % world_size():
        raise InputError(f"batch_size is {run.batch_size}; it must be divisible by {world_size()}, one part a process")


def check_run(run: Run, data: ImageDataset) -> None:
    """Raise InputError for whatever would stop the run at its first step: data, batch size, images too small, device."""
    check_device(resolve_device(run.device).type, run.amp)
    check_fit(run, data)
    initial_network(run, data).check_image_size(data.image_size)


def initial_network(run: Run, data: ImageDataset) -> Network:
    """The run's network on the CPU; its weights depend on the seed alone, and the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return network(
            run.backbone,
            run.pooling,
            data.num_classes,
            data.in_channels,
            run.reduced_channels,
            last_stride=run.last_stride,
            dropout=run.dropout,
            **dict(run.pooling_options),
        )
