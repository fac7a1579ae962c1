# SPDX-License-Identifier: MIT
"""A kernel as it is launched: argument types, constants and launch options, compiled without a GPU.

Each kernel file lists the specializations it ships in ``shipped()``; :func:`all_of_them` is
the union over :data:`KERNEL_FILES`. ``benchmarks/resource_table.py`` compiles them all and writes
the table of what they need, which is committed.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# One line per file with kernels; the file defines shipped().
KERNEL_FILES = (
    "margin_loss", "pair_norm", "operator_product", "operator_gradient", "symbol_pass",
    "symbol_finish", "symbol_gradient", "separable_pass", "separable_gradient", "composition",
)  # fmt: skip
ALIGNED = ":16"


@dataclass(frozen=True)
class Specialization:
    """One kernel with everything the compiler must know.

    Attributes:
        kernel: A ``@triton.jit`` function.
        label: What this one is for, unique among the kernel's specializations.
        arguments: Every parameter of the kernel, by name: of a ``tl.constexpr`` its value, of any
            other its type as the launcher would derive it (``"*fp32"``, ``"i32"``, ``"fp32"``).
            Integers that are multiples of 16 end in ``":16"``; an integer that is 1 is given as 1,
            for the launcher makes it a constant. Pointers are taken to be aligned to 16 bytes, as
            a tensor's first element is.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    kernel: Any
    label: str
    arguments: Mapping[str, Any] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, capability: int = 90) -> Any:
        """The compiled kernel for ``sm_<capability>``; ``asm["cubin"]`` is its machine code."""
        signature, constants, attributes = {}, {}, {}
        for position, (name, parameter) in enumerate(
            zip(self.kernel.arg_names, self.kernel.params, strict=True)
        ):
            value = self.arguments[name]
            if parameter.is_constexpr or not isinstance(value, str):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = value.removesuffix(ALIGNED)
            if value.startswith("*") or value.endswith(ALIGNED):
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def digest(self) -> str:
        """Twelve digits that change with the source of the kernel or of a function it calls, with
        the arguments and with the options."""
        functions, waiting = {}, [self.kernel]
        while waiting:
            function = waiting.pop()
            if function.__name__ in functions:
                continue
            functions[function.__name__] = function.src
            used = {
                name: function.fn.__globals__.get(name) for name in function.fn.__code__.co_names
            }
            waiting += [value for value in used.values() if isinstance(value, triton.JITFunction)]
            constants = {n: v for n, v in used.items() if isinstance(v, triton.language.constexpr)}
            functions[f"{function.__name__}: constants"] = repr(sorted(constants.items()))
        said = (
            sorted(functions.items()),
            list(self.arguments.items()),
            self.num_warps,
            self.num_stages,
        )
        return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def all_of_them() -> list[Specialization]:
    """Every specialization that is shipped, in the order of :data:`KERNEL_FILES`."""
    modules = [importlib.import_module(f"lmtfast.kernels.{name}") for name in KERNEL_FILES]
    return [entry for module in modules for entry in module.shipped()]
