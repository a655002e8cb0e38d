"""Heads under torch.export, the ONNX exporter, torch.fx, torch.jit and torch.compile."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.pooling import POOLINGS, PoolingHead, pooling_head

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # of torch's exporters among themselves
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # of torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning"),
]
F64 = torch.float64
SPECTRAL = ("gcp_exact", "gcp_power", "gcp_log")
DYNAMIC = {"x": {0: torch.export.Dim("batch")}}


def head_and_features(name: str, layout: str = "NCHW", dtype: torch.dtype = F64) -> tuple[PoolingHead, Tensor]:
    """Fewer positions than channels: null directions, whose eigenvalues coincide."""
    head = pooling_head(name, 6, 5, layout=layout).to(dtype).eval()
    return head, torch.randn(*((3, 6, 2, 2) if layout == "NCHW" else (3, 4, 6)), dtype=dtype)


def same(got: nn.Module, head: nn.Module, x: Tensor, derivative: bool = True) -> None:
    """Equal values and gradients with respect to features and parameters."""
    torch.testing.assert_close(got(x), head(x), rtol=1e-6, atol=1e-9)
    if not derivative:
        return
    x = x.clone().requires_grad_()
    results = [
        torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], allow_unused=True)
        for model in (got, head)
    ]
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def code(program: torch.export.ExportedProgram) -> str:
    return "".join(part.code for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))


@pytest.mark.parametrize(("name", "layout"), [*((name, "NCHW") for name in POOLINGS), ("gcp", "NLC")])
def test_export_with_gradients_and_other_batches(name: str, layout: str) -> None:
    head, x = head_and_features(name, layout)
    program = torch.export.export(head, (x,), dynamic_shapes=DYNAMIC)
    same(program.module(), head, torch.cat([x, -2 * x[:2]]))
    assert ("secondorder" in code(program)) == (name in SPECTRAL)
    assert "linalg_eigh" not in code(program)


def test_strict_export() -> None:
    head, x = head_and_features("gcp")
    same(torch.export.export(head, (x,), strict=True).module(), head, x)


def test_export_of_any_size_of_maps() -> None:
    head, x = head_and_features("gcp")
    sizes = {"x": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    program = torch.export.export(head, (torch.randn(3, 6, 4, 5, dtype=F64),), dynamic_shapes=sizes).module()
    same(program, head, torch.randn(2, 6, 3, 7, dtype=F64))
    same(program, head, x)


@pytest.mark.parametrize("name", SPECTRAL)
def test_export_without_gradients_has_plain_operations_only(name: str) -> None:
    head, x = head_and_features(name)
    with torch.no_grad():
        program = torch.export.export(head, (x,))
        assert "secondorder" not in code(program)
        same(program.module(), head, x, derivative=False)


def test_export_of_a_network_that_trains_on() -> None:
    net = network("digits_tiny", "gcp", 3, 1).double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=F64)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    same(torch.export.load(saved).module(), net, x[:3])


def test_export_with_weights() -> None:
    head, x = head_and_features("gcp")
    w = torch.rand(3, 2, 2, dtype=F64)
    program = torch.export.export(head, (x, w)).module()
    torch.testing.assert_close(program(x, w), head(x, w))


@pytest.mark.parametrize("name", ["gap_lifted", "gcp"])
def test_onnx_of_any_batch(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    head, x = head_and_features(name, dtype=torch.float32)
    program = torch.onnx.export(head, (x,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    more = torch.cat([x, x[:1] * 3])
    (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), head(more).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gcp_exact"])
def test_onnx_without_eigenvalues_is_refused_in_one_line(name: str) -> None:
    pytest.importorskip("onnxscript")
    head, x = head_and_features(name, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"InputError.*ONNX has no eigenvalues.*gcp") as error:
        torch.onnx.export(head, (x,), dynamo=True, verbose=False)
    assert isinstance(error.value.__cause__, InputError)
    assert "\n" not in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "NCHW") for name in POOLINGS), ("gcp", "NLC"), ("dropcov", "NLC")]
)
def test_jit_traces_are_saved_and_run(name: str, layout: str) -> None:
    head, x = head_and_features(name, layout)
    traced = torch.jit.trace(head, (x,))
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    same(torch.jit.load(saved), head, torch.cat([x, -x[:1]]))


def test_jit_checks_shapes() -> None:
    with pytest.raises(InputError, match="single position"):
        torch.jit.trace(pooling_head("gcp", 6).eval(), (torch.randn(2, 6, 1, 1),))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize(("layout", "training"), [("NCHW", False), ("NLC", True)])
def test_fx_traces_every_layer(name: str, layout: str, training: bool) -> None:
    head, x = head_and_features(name, layout)
    head.train(training)
    traced = torch.fx.symbolic_trace(head)
    results = []
    for model in (head, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for weights in (None, torch.arange(1.0, 13).view(3, 4)):
            torch.manual_seed(1)
            results.append(model(x, weights))
    for got, want in zip(results[2:], results[:2] * 2, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match=r"got torch\.int64"):
        traced(x.long())
    if name == "gcp" and not training:
        same(traced, head, x)


@pytest.mark.parametrize("name", POOLINGS)
def test_feature_extractor(name: str) -> None:
    net = network("digits_tiny", name, 3, 1).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=F64)
    layers = [f"head.layers.{index}" for index, layer in enumerate(net.head.layers) if name != "dropcov" or index]
    if name != "gap":
        assert "head.layers.1" in " ".join(get_graph_node_names(net, suppress_diff_warning=True)[1])
    nodes = {"features": "features", "head": "pooled", "classifier": "logits"}
    outputs = create_feature_extractor(net, nodes, suppress_diff_warning=True)(x)
    maps = net.features(net.stem(x))
    for key, want in (("features", maps), ("pooled", net.head(maps)), ("logits", net(x))):
        torch.testing.assert_close(outputs[key], want, rtol=1e-6, atol=1e-9)
    inner = create_feature_extractor(net, layers, suppress_diff_warning=True)(x)
    torch.testing.assert_close(inner[layers[-1]], outputs["pooled"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gcp"])
def test_compile(name: str) -> None:
    """The default options of torch.compile, with a back end that needs no compiler of C++."""
    torch._dynamo.reset()
    head, x = head_and_features(name)
    same(torch.compile(head, backend="aot_eager"), head, x)
    torch._dynamo.reset()
