"""Files of operators and spectra: every kind comes back to the last bit, and nothing else is read or written."""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import batch, chain
from torch import Tensor, nn

from secondorder.curvature import (
    CurvatureBlocks,
    DampedOperator,
    curvature_blocks,
    damped_inverse,
    fidelity,
    load_curvature,
    output_jacobians,
    save_curvature,
    spectral_density,
    spectral_summary,
    top_eigenvalues,
)
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    DifferenceOperator,
    EigenbasisOperator,
    FactoredOperator,
    InverseOperator,
    KroneckerOperator,
    PreconditionedOperator,
    SymmetricOperator,
    damped_inverse_root,
)
from secondorder.curvature.saving import KINDS
from secondorder.curvature.spectrum import Estimate, diagonal_estimate
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(size: int, seed: int) -> Tensor:
    rows = drawn(size + 2, size, seed=seed)
    return rows.T @ rows


def basis(size: int, seed: int) -> Tensor:
    return torch.linalg.eigh(positive(size, seed)).eigenvectors  # column by column


def kronecker() -> KroneckerOperator:
    return KroneckerOperator(positive(3, 3), FactoredOperator(drawn(2, 4, seed=4)))


def eigenbasis(vectors: int = 4) -> EigenbasisOperator:
    return EigenbasisOperator(basis(3, 5), basis(4, 6)[:, :vectors], drawn(3, vectors, seed=7).square())


def blocks(quantity: str, **options: Any) -> CurvatureBlocks:
    torch.manual_seed(0)
    model = chain("gcp")
    names = ["0.weight", "2.weight", "7.weight", "7.bias"]
    names = [name for name, _ in model.named_parameters()] if quantity != "output_jacobians" else names
    return curvature_blocks(model, CE, batch(CE), quantity, names, **options)


def jacobians() -> Any:
    torch.manual_seed(0)
    return output_jacobians(chain("gcp"), batch(CE)[0], ["0.weight", "2.bias"])


OPERATORS: dict[str, Callable[[], SymmetricOperator]] = {
    "dense": lambda: DenseOperator(positive(7, 1)),
    "dense, float32": lambda: DenseOperator(positive(7, 1).float()),
    "diagonal": lambda: DiagonalOperator(drawn(7, seed=2)),
    "factored": lambda: FactoredOperator(drawn(9, 3, seed=8).T),
    "kronecker": kronecker,
    "eigenbasis": eigenbasis,
    "damped": lambda: DampedOperator(kronecker(), 0.1 + 0.2),
    "block diagonal": lambda: BlockDiagonalOperator([kronecker(), eigenbasis(), DiagonalOperator(drawn(2))]),
    "difference": lambda: DifferenceOperator(kronecker(), eigenbasis()),
    "preconditioned": lambda: PreconditionedOperator(kronecker(), damped_inverse_root(kronecker(), 0.1)),
    "inverse by conjugate gradients": lambda: damped_inverse(eigenbasis(2), 0.5, tolerance=1e-9, iterations=77),
    "inverse by Woodbury": lambda: damped_inverse(FactoredOperator(drawn(3, 9, seed=8)), 0.5),
    "inverse of K-FAC": lambda: damped_inverse(blocks("kfac_expand").whole, 0.1),
    "rows of a Gauss-Newton matrix": lambda: blocks("ggn")["2.weight"].factored(),  # type: ignore[attr-defined]
    "a view": lambda: DenseOperator(drawn(9, 9)[1:4, 2:5]),
}
OTHERS: dict[str, Callable[[], Any]] = {
    **{quantity: (lambda q=quantity: blocks(q)) for quantity in ("kfac_expand", "kfac_reduce", "ekfac", "diagonal")},
    "exact summary": lambda: spectral_summary(DenseOperator(positive(7, 1))),
    "summary of zero": lambda: spectral_summary(DenseOperator(torch.zeros(3, 3))),
    "summary by Lanczos": lambda: spectral_summary(DenseOperator(positive(40, 1)), "lanczos", probes=3, steps=9),
    "density": lambda: spectral_density(DenseOperator(positive(40, 1)), method="lanczos", probes=3, steps=9, deflate=2),
    "curve": lambda: spectral_density(DenseOperator(positive(40, 1)), method="lanczos", probes=3, steps=9).curve(
        points=20
    ),
    "eigenvalues": lambda: top_eigenvalues(DenseOperator(positive(9, 1)), 2),
    "diagonal estimate": lambda: diagonal_estimate(DenseOperator(positive(9, 1)), probes=3),
    "fidelity": lambda: fidelity(kronecker(), DenseOperator(kronecker().dense())),
    "jacobians": jacobians,
    "a dict of lists": lambda: {
        "a": [Estimate(1.0, math.inf), kronecker()],
        "b": [3, True, None, "x", drawn(2)],
        "": {},
    },
}


def there_and_back(value: Any, folder: Path, **options: Any) -> Any:
    save_curvature(folder / "x.pt", value)
    assert [path.name for path in folder.iterdir()] == ["x.pt"]
    return load_curvature(folder / "x.pt", **options)


def parts(value: Any) -> dict[str, Any]:
    """What an object is made of."""
    if isinstance(value, CurvatureBlocks):
        return {**value, "whole": value.whole}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, InverseOperator):
        return {
            name: v for name, v in vars(value).items() if name not in ("residual", "products")
        }  # of its last product
    return vars(value) if is_dataclass(value) or isinstance(value, SymmetricOperator) else {}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places at which two objects are not the same to the last bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, Tensor):
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        same = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(*bits)
        return [] if same else [where]
    if isinstance(a, dict):
        inner = [place for key in a.keys() & b.keys() for place in differences(a[key], b[key], f"{where}.{key}")]
        return inner + ([] if list(a) == list(b) else [f"{where}: keys"])
    if isinstance(a, list):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differences(x, y, f"{where}[{i}]")]
    if parts(a):
        return differences(parts(a), parts(b), where)
    return [] if a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)) else [f"{where}: {a}, {b}"]


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_come_back_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    operator = OPERATORS[kind]()
    loaded = there_and_back(operator, tmp_path)
    assert differences(operator, loaded) == []
    V = drawn(operator.size, 3, seed=12)
    assert torch.equal(loaded @ V, operator @ V)
    assert torch.equal(loaded @ V[:, 0], operator @ V[:, 0])
    assert torch.equal(loaded.diagonal(), operator.diagonal())
    assert loaded.shape == operator.shape


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_and_spectra_come_back_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    value = OTHERS[kind]()
    loaded = there_and_back(value, tmp_path)
    assert differences(value, loaded) == []
    if isinstance(value, CurvatureBlocks):
        v = drawn(value.whole.size)
        assert torch.equal(value.whole @ v, loaded.whole @ v)
        assert list(value) == list(loaded)


def test_a_loaded_density_answers_as_the_saved_one(tmp_path: Path) -> None:
    density = OTHERS["density"]()
    loaded = there_and_back(density, tmp_path)
    assert loaded.statistic(lambda x, n: float((x.abs() * n).sum())) == density.statistic(
        lambda x, n: float((x.abs() * n).sum())
    )
    assert loaded.trace == density.trace
    at = torch.tensor([0.1], dtype=torch.float64)
    assert loaded.bounds.beyond(at) == density.bounds.beyond(at)


def test_every_kind_is_tried() -> None:
    seen: set[str] = set()

    def look(value: Any) -> None:
        seen.add(type(value).__name__)
        for part in value if isinstance(value, list) else (value if isinstance(value, dict) else parts(value)).values():
            look(part)

    for make in (*OPERATORS.values(), *OTHERS.values()):
        look(make())
    assert seen >= KINDS.keys()


def test_the_file_is_of_plain_values(tmp_path: Path) -> None:
    save_curvature(tmp_path / "x.pt", kronecker())
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert saved["content"]["kind"] == "KroneckerOperator"
    assert (saved["format"], saved["version"]) == ("secondorder.curvature", 1)


def test_a_view_is_written_without_what_it_is_taken_from(tmp_path: Path) -> None:
    save_curvature(tmp_path / "view.pt", DiagonalOperator(drawn(100_000)[:10]))
    assert (tmp_path / "view.pt").stat().st_size < 5_000
    shared = DiagonalOperator(drawn(100_000)[:50_000])
    save_curvature(tmp_path / "twice.pt", [shared, BlockDiagonalOperator([shared])])
    assert 400_000 < (tmp_path / "twice.pt").stat().st_size < 410_000


def test_tensors_that_require_gradients_are_saved_without_their_graph(tmp_path: Path) -> None:
    rows = drawn(2, 3).requires_grad_()
    loaded = there_and_back(FactoredOperator(rows * 2), tmp_path)
    assert torch.equal(loaded.rows, rows.detach() * 2)
    assert not loaded.rows.requires_grad


def test_the_device_of_a_file(tmp_path: Path) -> None:
    there = there_and_back(kronecker(), tmp_path, map_location="meta")
    assert there.device.type == there.gradient.matrix.device.type == there.input.rows.device.type == "meta"
    here = there_and_back(kronecker(), tmp_path, map_location=torch.device("cpu"))
    assert here.device.type == "cpu"
    for device in ("nowhere", 3.5, {"cpu": "cpu"}):
        with pytest.raises(InputError, match="map_location must be a device such as 'cpu'"):
            load_curvature(tmp_path / "x.pt", device)  # type: ignore[arg-type]


def test_a_device_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:63")
        save_curvature(tmp_path / "x.pt", kronecker())
    with pytest.raises(InputError, match=r"x.pt' is of a device that is not here; use map_location='cpu'"):
        load_curvature(tmp_path / "x.pt")
    assert differences(kronecker(), load_curvature(tmp_path / "x.pt", "cpu")) == []


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "mc_fisher", "empirical_fisher"])
def test_products_with_a_network_are_refused(quantity: str, tmp_path: Path) -> None:
    found = blocks(quantity)
    for value in (found, found.whole, {"a": [found["0.weight"]]}, DampedOperator(found["0.bias"], 0.1)):
        with pytest.raises(InputError, match=r"knows its products.*; save DenseOperator\(operator.dense\(\)\)"):
            save_curvature(tmp_path / "x.pt", value)
    assert not list(tmp_path.iterdir())
    exact = there_and_back(DenseOperator(found["0.weight"].dense()), tmp_path)
    assert torch.equal(exact.matrix, found["0.weight"].dense())


@pytest.mark.parametrize("value", [object(), {3: kronecker}, nn.Linear(2, 2), 1j, {1, 2}, (v for v in ())])
def test_other_things_are_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^\w+ cannot be saved here; operators, CurvatureBlocks, spectra"):
        save_curvature(tmp_path / "x.pt", value)


def saved_bytes(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def flipped(content: bytes) -> bytes:
    """A bit of the numbers is another."""
    place = content.index(drawn(7, seed=2).numpy().tobytes()) + 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def of(kind: str, **fields: object) -> bytes:
    return saved_bytes({"format": "secondorder.curvature", "version": 1, "content": {"kind": kind, "fields": fields}})


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", "b")
    return stream.getvalue()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "File is not a zip file"),
    "truncated": (lambda content: content[: len(content) // 2], "File is not a zip file"),
    "the end is missing": (lambda content: content[:-1], ""),
    "a bit": (flipped, "wrong checksum of"),
    "text": (lambda content: b"loss,1.0\n" * 99, "File is not a zip file"),
    "another archive": (lambda content: zipped(), ""),
    "weights": (lambda content: saved_bytes(nn.Linear(2, 2).state_dict()), "it has other content"),
    "a tensor": (lambda content: saved_bytes(torch.ones(3)), "it has other content"),
    "an object": (lambda content: saved_bytes(DiagonalOperator(torch.ones(3))), "it holds other objects"),
    "a later version": (
        lambda content: saved_bytes({"format": "secondorder.curvature", "version": 2}),
        "version 2 instead of 1",
    ),
    "no content": (lambda content: saved_bytes({"format": "secondorder.curvature", "version": 1}), "content"),
    "another kind": (lambda content: of("Module"), "Module"),
    "a kind that is no word": (lambda content: of(["x"]), ""),  # type: ignore[arg-type]
    "fields that are missing": (lambda content: of("DenseOperator"), "matrix"),
    "fields that do not fit": (lambda content: of("DenseOperator", matrix=torch.ones(2, 3)), "needs a square matrix"),
    "fields that are no operators": (lambda content: of("KroneckerOperator", gradient="a", input="b"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    save_curvature(file, OPERATORS["diagonal"]())
    change, words = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(
        InputError, match=r"x.pt' was not written by save_curvature, or is damaged \(.*\); save it again"
    ) as e:
        load_curvature(file)
    assert words in str(e.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing.pt': No such file or directory"):
        load_curvature(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        load_curvature(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*x.pt': No such file or directory; choose another file"):
        save_curvature(tmp_path / "nowhere" / "x.pt", kronecker())
    for call in (load_curvature, lambda file: save_curvature(file, kronecker())):
        with pytest.raises(InputError, match="file must be a path, got 3"):
            call(3)


def test_a_refused_value_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    save_curvature(tmp_path / "x.pt", kronecker())
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(InputError):
        save_curvature(tmp_path / "x.pt", [kronecker(), object()])
    assert (tmp_path / "x.pt").read_bytes() == before
