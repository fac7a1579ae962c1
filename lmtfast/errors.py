# SPDX-License-Identifier: MIT
"""Exception types. Every message says, in this order: expected, got, where, what to do."""

from __future__ import annotations


class LmtfastError(Exception):
    """Base class of every error the library raises on purpose.

    Args:
        expected: What the library needed.
        got: What it found instead.
        where: The node, argument or file it found it at.
        remedy: What the caller can do about it.
    """

    def __init__(self, expected: str, got: str, where: str, remedy: str) -> None:
        self.expected, self.got, self.where, self.remedy = expected, got, where, remedy
        super().__init__(f"expected {expected}; got {got}; at {where}.\n  Do this: {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.expected, self.got, self.where, self.remedy)


class UnsupportedLayerError(LmtfastError):
    """An operation has no Lipschitz rule, or a keyword the rule does not cover."""


class StalePlanError(LmtfastError):
    """The model no longer has the structure that was traced."""


class ShapeError(LmtfastError, ValueError):
    """Shapes of two arguments, or of an argument and the traced network, disagree."""


class DtypeError(LmtfastError, TypeError):
    """A tensor has a dtype the operation does not accept."""


class ArgumentError(LmtfastError, ValueError):
    """An argument has a value outside its documented set."""


class NonFiniteError(LmtfastError, ValueError):
    """A weight, buffer or input holds NaN or infinity."""


class NotCertifiedError(LmtfastError):
    """A statement about robustness was asked of an estimate."""


class TrainModeError(LmtfastError):
    """A certificate was asked of a model in training mode."""


class InputDomainError(LmtfastError, ValueError):
    """An input lies outside the declared input range, or the range itself is not one."""


class BackendUnavailableError(LmtfastError):
    """An explicitly requested backend cannot run here. It never falls back."""


class MissingDependencyError(LmtfastError, ImportError):
    """An optional dependency is not installed."""


class CertificateError(LmtfastError, ValueError):
    """A certificate file is damaged, stale, or does not belong to the model."""


class ViolationError(LmtfastError):
    """An attack changed the class of an input inside its certified radius."""


class WriteError(LmtfastError, OSError):
    """A file cannot be written: the disk is full, or may not be written to, or fails."""


class ConfigError(LmtfastError, ValueError):
    """A training configuration or checkpoint cannot be used."""
