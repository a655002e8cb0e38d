"""What a network costs: parameters, operations of an image, memory of a training step."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.training import Run
from secondorder.training.evaluation import to_device
from secondorder.training.setup import first_state
from studies.engine.fake_data import fake_data
from studies.engine.records import Row
from studies.optimisers.costs import Stepper, memory

PARAMETERS, FLOPS, PEAK = "parameters", "operations of an image", "peak memory of a step [MiB]"


def measure_costs(case: Mapping[str, Any]) -> Iterator[Row]:
    """Costs of the network of a run, on random images of the shape of its data set.

    Operations are those of one image's forward pass, as `torch.utils.flop_counter` counts them: products of matrices and
    convolutions, a multiplication and an addition are two; decompositions are not counted. Those of GCP are of the published
    head, which takes five steps of three products. Memory is what torch's allocator holds at the peak of a step in float32:
    weights, the optimiser's state, activations and gradients.
    """
    run, device = Run.from_dict(case["run"]), torch.device(case["device"])
    data = replace(fake_data(run.dataset, run.batch_size, run.image_size), num_classes=case["classes"])
    slow = replace(run, learning_rate=run.learning_rate / 1000)  # no step diverges
    model, optimizer, _ = first_state(slow, data, device, None, None)
    images, labels = data.train.batch(torch.arange(run.batch_size))
    images, labels = to_device(images, device, run.channels_last), labels.to(device)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    yield {"quantity": PARAMETERS, "value": sum(p.numel() for p in model.parameters()), "error": 0.0}

    counted = replace(run, pooling="covariance") if run.pooling == "gcp" else run
    plain = first_state(counted, data, device, None, None)[0].eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = plain.head(plain.features(plain.stem(images[:1])))  # type: ignore[operator]
        if run.pooling == "gcp":
            newton_schulz_sqrt(torch.eye(math.isqrt(2 * features.shape[1]), device=device))  # C (C + 1) / 2 features
        plain.classifier(features)  # type: ignore[operator]
    yield {"quantity": FLOPS, "value": counter.get_total_flops(), "error": 0.0}

    stepper = Stepper(model, optimizer, F.cross_entropy, [(images, labels)])
    stepper()  # the first step makes the optimiser's state
    optimizer.zero_grad(set_to_none=True)
    peak, state = memory(stepper, device)
    yield {"quantity": PEAK, "value": held / 2**20 + state + peak}
