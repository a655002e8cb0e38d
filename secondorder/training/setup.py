"""What a training needs before its first step: data that fit the run, and the network with its initial weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from secondorder.accelerator import seed_random_numbers
from secondorder.data import DATASETS, ImageDataset, own_dataset
from secondorder.data.own import is_own
from secondorder.errors import InputError, check_flag, check_number, check_whole
from secondorder.networks import Network, network
from secondorder.training.device import check_device, resolve_device
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.parts import divide_groups, freeze
from secondorder.training.processes import world_size
from secondorder.training.run import Run
from secondorder.training.weights import Initial, OwnNetwork, description, digest, load_initial, own_network

MOST_WORKERS = 1024
"""Threads or processes that prepare batches: a number beyond any machine's cores is a mistake."""

Data = ImageDataset | tuple[Dataset[Any] | DataLoader[Any], Dataset[Any] | DataLoader[Any]]


def dataset_of(run: Run, data: Data) -> ImageDataset:
    """The data of a run, a pair (train, test) of the user's among them; raises InputError for anything else."""
    if isinstance(data, ImageDataset):
        return data
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError(
            f"data is {type(data).__name__}; use load_dataset(...), own_dataset(...) or a pair (train, test)"
        )
    if not is_own(run.dataset):
        raise InputError(f"the run is on {run.dataset!r}, the data is a pair of your own; use Run(dataset='own-NAME')")
    return own_dataset(run.dataset, *data)


def check_is_run(run: object) -> None:
    """Raise InputError for anything but a `Run`, the settings of a training."""
    if not isinstance(run, Run):
        raise InputError(f"run is {run!r:.100}; it must be a Run(...)")


def check_settings(run: Run, resume: bool, checkpoint_every: float, progress: bool, workers: int) -> None:
    """Raise InputError unless the arguments of `train` beside data, network and observers are of their kinds."""
    check_is_run(run)
    check_flag("resume", resume)
    check_flag("progress", progress)
    check_number("checkpoint_every", checkpoint_every, 0, math.inf, "[]", hint="; in seconds")
    check_whole("workers", workers, 0, MOST_WORKERS)


def check_given(run: Run, network: object, initial: object) -> None:
    """Raise InputError unless network and initial weights are given where, and only where, the run speaks of them."""
    if is_own(run.backbone) and network is None:
        raise InputError(f"the run is of the network {run.backbone!r}, which is yours: give it with network=")
    if network is not None and not is_own(run.backbone):
        raise InputError(
            f"the run is of the network {run.backbone!r}; use Run(backbone='own-NAME', pooling='own') for yours"
        )
    if network is not None and not callable(network):
        raise InputError(f"network is {network!r:.100}; it must be a torch.nn.Module, or a function that builds one")
    if run.initial and initial is None:
        raise InputError(f"the run begins with the weights {run.initial!r}: give them with initial=")
    if initial is not None and not run.initial:
        raise InputError("initial weights are given, which the run does not name; use Run(initial=NAME)")


def check_fit(run: Run, data: ImageDataset) -> None:
    """Raise InputError unless the data and the number of processes are those of the run."""
    row = DATASETS.get(run.dataset)
    if data.name not in (run.dataset, row and row.substitute):
        raise InputError(f"the run is on {run.dataset!r}, the data is {data.name!r}; load the run's data set")
    for name, split, limit in (("train", data.train, run.train_limit), ("test", data.test, run.test_limit)):
        if limit is not None and len(split) != limit:
            raise InputError(f"{name}_limit is {limit} but the data has {len(split)} images; load it with that limit")
        if len(split) == 0:
            raise InputError(f"the {name} data of {run.dataset!r} has no images; at least 1 is needed")
    if run.image_size not in (None, data.image_size):
        raise InputError(f"image_size is {run.image_size} but the data has {data.image_size}; load it with that size")
    if len(data.train) < run.batch_size:
        raise InputError(f"batch_size is {run.batch_size} but there are {len(data.train)} training images; lower it")
    if run.batch_size % world_size():
        raise InputError(f"batch_size is {run.batch_size}; it must be divisible by {world_size()}, one part a process")
    cut = getattr(data.train, "batch_size", None)
    if cut not in (None, run.batch_size):
        raise InputError(f"batch_size is {run.batch_size} but the training loader has {cut}; make them the same")


def check_run(run: Run, data: ImageDataset) -> None:
    """Raise InputError for whatever would stop the run at its first step: data, batch size, images too small, device."""
    check_is_run(run)
    if not isinstance(data, ImageDataset):
        raise InputError(f"data is {data!r:.100}; use load_dataset(...) or own_dataset(...)")
    check_device(resolve_device(run.device).type, run.amp)
    check_fit(run, data)
    initial_network(run, data).check_image_size(data.image_size)


def initial_network(run: Run, data: ImageDataset) -> Network:
    """The run's network for the images and classes of the data, on the CPU.

    Its weights depend on the seed alone, and the caller's generator is left alone. Raises InputError for a run of a network of
    the user's, and data without a number of classes.
    """
    if is_own(run.backbone):
        raise InputError(f"the run is of the network {run.backbone!r}, which is yours: give it with network=")
    if data.num_classes < 1:
        raise InputError(f"the data {data.name!r} have no number of classes; use own_dataset(..., num_classes=...)")
    with torch.random.fork_rng(devices=[]):
        seed_random_numbers(run.seed)
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


def first_model(
    run: Run, data: ImageDataset, own: OwnNetwork | None, initial: Initial | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network before the first step, on the CPU, and what a checkpoint notes of networks and weights from outside."""
    model: nn.Module = initial_network(run, data) if own is None else own_network(run, own)
    origin = {} if initial is None else load_initial(model, initial)
    freeze(model, run.frozen)
    if own is not None:
        origin |= description(model)
    elif initial is not None:
        origin |= {"initial_weights": digest(model)}
    return model, origin


def first_state(
    run: Run, data: ImageDataset, device: torch.device, own: OwnNetwork | None, initial: Initial | None
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """The network before the first step on its device, its optimiser, and what a checkpoint notes of their origin."""
    model, origin = first_model(run, data, own, initial)
    memory_format = torch.channels_last if run.channels_last else torch.preserve_format
    model = model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = OPTIMIZERS[run.optimizer](model, run)
    divide_groups(optimizer, model, run)
    return model, optimizer, origin
