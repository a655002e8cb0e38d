"""secondorder in a process in which no library of the extras can be imported; prints what each of REFUSED says, as JSON."""

import importlib
import json
import pkgutil
import sys
import tempfile

LIBRARIES = (
    *("torchvision", "PIL", "pandas", "matplotlib", "seaborn", "sklearn", "statsmodels", "tyro", "markdown_it", "loky"),
    *("cloudpickle", "psutil", "threadpoolctl", "pytorch_optimizer", "singd", "submitit", "ray", "timm", "onnx"),
    *("faster_coco_eval", "tensorboard"),
)
for library in LIBRARIES:
    sys.modules[library] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

import secondorder  # noqa: E402

for module in pkgutil.walk_packages(secondorder.__path__, "secondorder."):
    importlib.import_module(module.name)

from secondorder.curvature import (  # noqa: E402
    CurvatureBlocks,
    curvature_blocks,
    fidelity,
    fidelity_table,
    spectral_summary,
    summary_table,
)
from secondorder.curvature.backpack import supports  # noqa: E402
from secondorder.data import load_dataset  # noqa: E402
from secondorder.data.decoding import decode  # noqa: E402
from secondorder.kfac import KFAC  # noqa: E402
from secondorder.networks import network, replace_pooling  # noqa: E402
from secondorder.optional import MissingLibraryError  # noqa: E402
from secondorder.preconditioning import head_spectrum  # noqa: E402
from secondorder.robustness import corrupt  # noqa: E402
from secondorder.training import Run, Trained, train  # noqa: E402
from secondorder.transfer import detection_metrics, detector, linear_probe, training_transform  # noqa: E402  # noqa: E402
from secondorder.transfer.segmentation import compressed  # noqa: E402

Batch = tuple[Tensor, Tensor]


def trained(optimizer: str = "sgd") -> Trained:
    """A linear network trained on numbers, both the user's."""
    data = TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    run = Run("own", "own", "own", epochs=1, batch_size=8, learning_rate=0.1, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        return train(run, (data, data), folder, network=nn.Linear(4, 3), progress=False)


def curvature(model: nn.Module, batch: Batch) -> tuple[CurvatureBlocks, CurvatureBlocks]:
    """The exact block of the classifier and K-FAC's."""
    loss, name = nn.CrossEntropyLoss(), "classifier.weight"
    exact, approximate = (curvature_blocks(model, loss, batch, q, [name]) for q in ("ggn", "kfac_expand"))
    assert spectral_summary(exact[name]).largest.value > 0
    assert 0 < fidelity(approximate[name], exact[name]).cosine.value <= 1
    assert supports(model, "DiagGGNExact")
    return exact, approximate


def kfac_step(model: nn.Module, batch: Batch) -> KFAC:
    images, labels = batch
    optimizer = KFAC(model, lr=0.1)
    logits = model(images)
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, labels).backward()
    optimizer.step()
    return optimizer


def main() -> dict[str, str]:
    batch = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    model = replace_pooling(network("digits_tiny", "gap", 3, 1), "gcp", image_size=8)
    exact, approximate = curvature(model.eval(), batch)
    report = kfac_step(model.train(), batch).report()
    assert "classifier.weight" in str(report)
    assert (head_spectrum(torch.randn(2, 4, 4, 4), "gcp_exact").condition < 1.5).all()
    assert trained().history[0]["epoch"] == 1

    refused = {
        "digits": lambda: load_dataset("digits"),
        "image": lambda: decode(__file__),
        "resnet18": lambda: network("resnet18", "gcp", 3),
        "jpeg": lambda: corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "jpeg_compression", 1),
        "detector": lambda: detector(model, 2),
        "probe": lambda: linear_probe(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2)),
        "metrics": lambda: detection_metrics([], [], classes=("cell",)),
        "polygon": lambda: compressed([[0, 0, 4, 0, 4, 4]], 8, 8),
        "boxes": lambda: training_transform()(torch.zeros(3, 8, 8), {}),
        "report": report.table,
        "summary": lambda: summary_table(exact),
        "fidelity": lambda: fidelity_table(approximate, exact),
        **{name: lambda name=name: trained(name) for name in ("soap", "shampoo", "muon", "singd")},
    }
    said = {}
    for name, call in refused.items():
        try:
            call()
        except MissingLibraryError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()))
