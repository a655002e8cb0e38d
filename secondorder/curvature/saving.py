"""Operators, blocks and spectra in files: tensors and plain values, as `torch.load(weights_only=True)` reads them.

A file holds ``{"format": "secondorder.curvature", "version": 1, "content": ...}``. An object of a class of KINDS is written as
``{"kind": its class, "fields": the arguments that make it again}``, tensors and numbers as they are: what is loaded is equal
to the last bit, in its number format and with its strides, on which the rounding of products depends.
"""

import inspect
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from secondorder.atomic import read_regular, write_atomically
from secondorder.curvature.kronecker.fidelity import Fidelity
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DampedOperator,
    DenseOperator,
    DiagonalOperator,
    DifferenceOperator,
    EigenbasisOperator,
    FactoredOperator,
    InverseOperator,
    KroneckerOperator,
    PreconditionedOperator,
    SymmetricOperator,
    WoodburyOperator,
)
from secondorder.curvature.output_jacobians import OutputJacobians
from secondorder.curvature.quantities import CurvatureBlocks
from secondorder.curvature.resuming.journal import FILES
from secondorder.curvature.spectrum import (
    DensityCurve,
    DiagonalEstimate,
    Estimate,
    SpectralDensity,
    SpectralSummary,
    TopEigenvalues,
)
from secondorder.curvature.spectrum.counting_bounds import CountingBounds
from secondorder.curvature.spectrum.quadrature import Quadrature
from secondorder.errors import InputError, first_line, short

FORMAT, VERSION = "secondorder.curvature", 1
OPERATORS: tuple[type[SymmetricOperator], ...] = (
    *(DenseOperator, DiagonalOperator, FactoredOperator, KroneckerOperator, EigenbasisOperator, BlockDiagonalOperator),
    *(DampedOperator, DifferenceOperator, InverseOperator, PreconditionedOperator, WoodburyOperator),
)
SPECTRA = (SpectralSummary, SpectralDensity, DensityCurve, TopEigenvalues, DiagonalEstimate, Estimate, Fidelity)
PARTS = (CountingBounds, Quadrature)
"""What a density is made of."""
KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (*OPERATORS, *SPECTRA, *PARTS, CurvatureBlocks, OutputJacobians)
}
"""Name in a file -> class, whose attributes are called as the arguments that make it."""
MAPPING = "dict"


def save_curvature(file: str | os.PathLike[str], value: object) -> None:
    """Write an operator, `CurvatureBlocks`, `OutputJacobians`, what a spectrum was found to be, or a dict or list of these.

    Operators that hold their numbers can be saved: Kronecker-factored blocks, diagonals, `ggn.factored()`, dense matrices, and
    what is made of these. Blocks of "ggn", "hessian" and the Fishers are products with a network, which a file cannot hold.

    Args:
        file: is written whole or not at all.
        value: tensors in it are written in their number format; views without what they are views of.

    Raises:
        InputError: for what cannot be saved, naming the way out, and where the file cannot be written.
    """
    content = io.BytesIO()
    write_file(content, FORMAT, VERSION, value)
    path = _path(file)
    try:
        write_atomically(path, content.getbuffer())
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another file") from error


def write_file(file: BinaryIO, format: str, version: int, value: object) -> None:
    """Write a value as `save_curvature` does, under the name of a format and its version. InputError for what cannot be saved."""
    torch.save({"format": format, "version": version, "content": _encoded(value, {})}, file)


def load_curvature(file: str | os.PathLike[str], map_location: str | torch.device | None = None) -> Any:
    """What `save_curvature` has written. The file may come from anybody: it holds no code.

    Args:
        file: written by `save_curvature`.
        map_location: the device of all tensors; None: that which each of them was on.

    Raises:
        InputError: for a file that cannot be read, is damaged, or was written by something else, and where this machine lacks
            the device.
    """
    path = _path(file)
    try:
        device = None if map_location is None else torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"map_location must be a device such as 'cpu', or None, got {short(map_location)}") from error
    return read_file(path, FORMAT, VERSION, device, "not written by save_curvature, or is damaged", "save it again")


def read_file(path: Path, format: str, version: int, device: torch.device | None, otherwise: str, way_out: str) -> Any:
    """What `write_file` has written into a file, its tensors on a device, None for their own.

    Raises InputError as `load_curvature`, in the words `otherwise` and `way_out` for what is nothing of the kind.
    """
    try:
        content = read_regular(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        saved = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if not isinstance(saved, dict) or saved.get("format") != format:
            raise ValueError("it has other content")
        if saved.get("version") != version:
            raise ValueError(f"version {saved.get('version')!r:.20} instead of {version}")
        return _decoded(saved["content"])
    except Exception as error:  # a damaged file can fail anywhere in the unpickler, and in what is made of it
        if "map_location" in str(error):  # torch names the way out on its second line
            raise InputError(f"{str(path)!r} is of a device that is not here; use map_location='cpu'") from error
        objects = isinstance(error, pickle.UnpicklingError)  # torch tells how to load code from a file
        why = "it holds other objects" if objects else f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{str(path)!r} was {otherwise} ({why}); {way_out}") from error


def _path(file: str | os.PathLike[str]) -> Path:
    try:
        return Path(file)
    except TypeError as error:
        raise InputError(f"file must be a path, got {short(file)}") from error


def _encoded(value: object, copies: dict[object, Tensor]) -> object:
    """Tensors and plain values for the value. InputError for what is of no class of KINDS."""
    if isinstance(value, CurvatureBlocks):
        fields: dict[str, object] = {"blocks": dict(value), "whole": value.whole}
    elif KINDS.get(type(value).__name__) is type(value):
        fields = {name: getattr(value, name) for name in inspect.signature(type(value)).parameters}
    elif isinstance(value, Tensor):
        return _own(value.detach(), copies)
    elif value is None or isinstance(value, bool | str):
        return value
    elif isinstance(value, int | float):  # NumPy's, too, which weights_only refuses
        return int(value) if isinstance(value, int) else float(value)
    elif isinstance(value, list | tuple):
        return [_encoded(item, copies) for item in value]
    elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"kind": MAPPING, "fields": {name: _encoded(item, copies) for name, item in value.items()}}
    else:
        raise _refusal(value)
    return {"kind": type(value).__name__, "fields": {name: _encoded(v, copies) for name, v in fields.items()}}


def _own(tensor: Tensor, copies: dict[object, Tensor]) -> Tensor:
    """The tensor with nothing but its own numbers: torch.save writes all that a view is taken from."""
    if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() <= tensor.nbytes:
        return tensor
    key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return copies.setdefault(key, tensor.clone())


def _refusal(value: object) -> InputError:
    kind = type(value).__name__
    if isinstance(value, SymmetricOperator):
        factored = " or operator.factored()" if hasattr(value, "factored") else ""
        return InputError(
            f"a {kind} knows its products, not its numbers, and cannot be saved; save DenseOperator(operator.dense()){factored}"
        )
    return InputError(
        f"{kind} cannot be saved here; operators, CurvatureBlocks, spectra, and dicts and lists of them can"
    )


def _decoded(content: Any) -> Any:
    """The inverse of `_encoded`; raises anything for content that does not fit."""
    if isinstance(content, list):
        return [_decoded(item) for item in content]
    if not isinstance(content, dict):
        return content
    fields = {name: _decoded(value) for name, value in content["fields"].items()}
    return fields if content["kind"] == MAPPING else KINDS[content["kind"]](**fields)


FILES.update(write=write_file, read=read_file)
