"""One module for every weight format: :class:`QuantLinear`, and the plain data it is made from.

Formats are in :mod:`.weights`, what is done to inputs in :mod:`.transform`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .transform import InputTransform
from .weights import FORMATS, Layout, QuantizedRows, Weight, _Weight


@dataclass(frozen=True)
class QuantLayer:
    """A quantized linear as data: ``y = transform(x) @ dequantize(weight).T + bias``.

    Attributes:
        weight: one of the formats; already transformed (:meth:`InputTransform.weight`).
        bias: fp32 ``[O]`` or None.
        transform: what is done to the input.
        group: layers with the same group read one tensor and have equal transforms, so that it is quantized
            once for all of them; None for a layer that reads a tensor of its own.
    """

    weight: Weight
    bias: Tensor | None = None
    transform: InputTransform = field(default_factory=InputTransform)
    group: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> QuantLayer:
        """The same layer with its tensors on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, transform=self.transform.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in a :class:`QuantLinear`'s state dict."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return self.weight.tensors() | self.transform.tensors() | bias

    def config(self) -> dict[str, Any]:
        """All but the tensors, as JSON can hold it."""
        return self.weight.settings() | {
            "has_bias": self.bias is not None,
            "group": self.group,
            "input": self.transform.settings(),
        }

    @staticmethod
    def layout(config: dict[str, Any]) -> Layout:
        """Names, shapes and dtypes of the tensors that a config asks for."""
        form = _format(config)
        found = form.layout(config) | InputTransform.layout(config["input"], config["in_features"])
        if config["has_bias"]:
            found["bias"] = ((config["out_features"],), torch.float32)
        return found

    @classmethod
    def from_tensors(
        cls, config: dict[str, Any], tensors: dict[str, Tensor], name: str = "layer"
    ) -> QuantLayer:
        """The layer that a config and the tensors of a file describe.

        Raises:
            ValueError: an unknown format, or tensors that are missing, left over, or of another shape or dtype
                than the config asks for; one sentence that begins with ``name``.
        """
        layout = cls.layout(config)
        if missing := sorted(layout.keys() - tensors.keys()):
            raise ValueError(f"{name}: the tensors {', '.join(layout)} must be there, {missing[0]} is missing")
        if extra := sorted(tensors.keys() - layout.keys()):
            raise ValueError(f"{name}: the tensors must be {', '.join(layout)}, got {extra[0]} too")
        for key, (shape, dtype) in layout.items():
            tensor = tensors[key]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: {key} must be {_describe(shape, dtype)}, got "
                    f"{_describe(tuple(tensor.shape), tensor.dtype)}; the file is another model's or version's"
                )
        return cls(
            weight=_format(config).from_tensors(config, tensors),
            bias=tensors.get("bias"),
            transform=InputTransform.from_tensors(config["input"], tensors),
            group=config["group"],
        )


def compute_device(linear: nn.Linear) -> torch.device:
    """Where to quantize a linear: where its weight is, or the CPU where no kernels are for that device."""
    device = linear.weight.device
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("vdit::quantize_rows", "CUDA")
    return device if device.type == "cuda" and has_kernels else torch.device("cpu")


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _format(config: dict[str, Any]) -> type[_Weight]:
    if config["format"] not in FORMATS:
        raise ValueError(
            f"vdit_ext.quant: format must be one of {', '.join(FORMATS)}, got {config['format']!r}; "
            "a newer version may have written it"
        )
    return FORMATS[config["format"]]


class SharedRows:
    """Quantizes a tensor once for the layers that read it, such as ``to_q``, ``to_k`` and ``to_v``.

    The codes are kept only until every member has had them, or the tensor is gone, or it was changed in place
    (by its version counter, as in autograd). Tensors of inference mode have no such counter, and compiled code
    must not depend on what came before: there, each layer quantizes for itself.

    Args:
        members: how many layers share.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self._entry: tuple[weakref.ref, tuple, QuantizedRows] | None = None
        self._uses = 0

    def __reduce__(self) -> tuple:
        return (SharedRows, (self.members,))  # copies of a model share among themselves, from the next call on

    def get(self, x: Tensor, quantize: Callable[[Tensor], QuantizedRows]) -> QuantizedRows:
        """``quantize(x)``, or what it returned for this very tensor to another member."""
        if torch.compiler.is_compiling() or x.is_inference():
            return quantize(x)
        state = (x._version, x.is_cuda and torch.cuda.is_current_stream_capturing())
        entry = self._entry
        if entry is None or entry[0]() is not x or entry[1] != state:
            # A weak reference whose callback drops the codes when the tensor goes.
            entry = (weakref.ref(x, self._forget), state, quantize(x))
            self._entry, self._uses = entry, 0
        self._uses += 1
        if self._uses >= self.members:
            self._entry = None
        return entry[2]

    def _forget(self, reference: weakref.ref) -> None:
        if self._entry is not None and self._entry[0] is reference:
            self._entry = None


class QuantLinear(nn.Linear):
    """A linear on quantized weights; stands in for the ``nn.Linear`` of the same sizes.

    A subclass of ``nn.Linear`` so that adapters and offloading find it, but without a parameter ``weight``. The
    tensors are buffers under the names of the format's and the transform's fields. Moves of the model change
    their device and never their dtype: scales stay fp32 in a bf16 model.

    Args:
        layer: what it holds; its tensors are not copied.
        shared: object that members of ``layer.group`` have in common; None quantizes for this layer alone.
    """

    # What a fused block adds to its next call: further arguments of `quantize_rows`, and gate and residual.
    prologue: dict[str, Any] | None = None
    epilogue: dict[str, Any] | None = None
    ahead: QuantizedRows | None = None  # or the rows themselves, quantized once for several layers
    last_rows: int | None = None  # of the latest call that was not compiled; which product runs depends on it

    def __init__(self, layer: QuantLayer, shared: SharedRows | None = None) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would allocate a weight
        self.in_features, self.out_features = layer.weight.in_features, layer.weight.out_features
        self.shared = shared
        self._config = layer.config()
        self._format = FORMATS[self._config["format"]]
        self._arguments = self._format.arguments(self._config)
        self._weight_names = tuple(layer.weight.tensors())
        self._transform_names = tuple(layer.transform.tensors())
        self.register_parameter("weight", None)  # peft reads the attribute
        self.register_buffer("bias", None)
        for name, tensor in layer.tensors().items():
            self.register_buffer(name, tensor)
        self.bits: int = layer.weight.bits
        self.takes_prologue = layer.weight.takes_codes and layer.transform.is_fused

    @classmethod
    def empty(cls, config: dict[str, Any], device: torch.device | str | None = None) -> QuantLinear:
        """A layer of this config whose tensors are yet to be loaded with ``load_state_dict``."""
        layout = QuantLayer.layout(config)
        tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()
        }
        return cls(QuantLayer.from_tensors(config, tensors))

    def config(self) -> dict[str, Any]:
        """All but the tensors, as JSON can hold it; see :meth:`empty`."""
        return dict(self._config)

    def to_layer(self) -> QuantLayer:
        """The data this layer holds now."""
        return QuantLayer(self._weight(), self.bias, self._transform(), self._config["group"])

    @property
    def qweight(self) -> Tensor:
        """The first tensor of the weight, for code that asks where a layer lives."""
        return self._buffers[self._weight_names[0]]

    @property
    def switchable_bits(self) -> tuple[int, ...]:
        """The numbers of bits that :meth:`set_bits` takes."""
        return getattr(self._format, "switchable_bits", (self._config["bits"],))

    def set_bits(self, bits: int) -> None:
        """Read the weight as this many bits from now on.

        Raises:
            ValueError: a number that the format does not have.
        """
        if bits not in self.switchable_bits:
            raise ValueError(
                f"vdit_ext.quant: bits of a layer in format {self._config['format']} must be one of "
                f"{', '.join(map(str, self.switchable_bits))}, got {bits}"
            )
        self.bits = bits

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        rows: QuantizedRows | None = None,
    ) -> Tensor:
        """``[..., C]`` in fp32, fp16 or bf16 to ``[..., O]`` in the same dtype.

        Args:
            gate: ``[B|1, S|1, O]``, factor on the result, or None. x is then ``[B, S, C]``.
            residual: ``[..., O]`` in x's dtype, added last, or None.
            rows: what :meth:`rows` of a layer of this group returned for x, so that code that is compiled,
                where layers do not share by themselves, quantizes x once.
        """
        flat = x if x.ndim in (2, 3) else x.reshape(-1, self.in_features)
        if not torch.compiler.is_compiling():
            self.last_rows = x.numel() // self.in_features
        weight = self._weight()
        rows = self.ahead if rows is None else rows
        if rows is None:
            rows = self.rows(flat) if weight.takes_codes else self._floats(flat)
        epilogue = {"bias": self.bias, "gate": gate, "residual": residual, "out_dtype": x.dtype}
        epilogue |= self.epilogue or {}
        out = weight.multiply(rows, bits=self.bits, **epilogue)
        return out if flat is x else out.reshape(*x.shape[:-1], self.out_features)

    def rows(self, x: Tensor) -> QuantizedRows:
        """The quantized input, ``[M, C]`` or ``[B, S, C]``, shared with the layers of the group."""
        return self._quantize(x) if self.shared is None else self.shared.get(x, self._quantize)

    def _quantize(self, x: Tensor) -> QuantizedRows:
        x = x if x.stride(-1) == 1 else x.contiguous()  # Sana's attention passes channels apart
        transform = self._transform()
        if not transform.is_fused:
            return QuantizedRows(*ops.quantize_rows(transform.clipped(transform.rows(x)), bits=transform.bits))
        return QuantizedRows(
            *ops.quantize_rows(
                x,
                channel_scale=transform.channel_scale,
                hadamard=transform.hadamard,
                signs=transform.signs,
                bits=transform.bits,
                **(self.prologue or {}),
            )
        )

    def _floats(self, x: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        transform = self._transform()
        return transform.rows(x).to(x.dtype) if transform.changes_rows else x

    def _weight(self) -> Weight:
        return self._format(**self._arguments, **{name: self._buffers[name] for name in self._weight_names})

    def _transform(self) -> InputTransform:
        tensors = {name: self._buffers[name] for name in self._transform_names}
        return InputTransform.from_tensors(self._config["input"], tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        transform = self._config["input"]
        mask = ", channel scale" if transform["has_channel_scale"] else ""
        turn = ", dual rotation" if transform["rotation_block"] else ""
        turn = f", hadamard {transform['hadamard']}" if transform["hadamard"] else turn
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._config['format']}, {self.bits} bits{mask}{turn}"
        )
