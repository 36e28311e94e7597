"""Typed errors. Each message states the rule, what was got, and what to do."""

from __future__ import annotations


class EmbedFilterError(Exception):
    """Base class of every error this package raises on purpose."""


class BandError(EmbedFilterError, ValueError):
    """A band, its width or its parameters are out of range."""


class UnembeddingError(EmbedFilterError, ValueError):
    """The unembedding matrix W_U cannot be found, read or used."""


class LinkError(UnembeddingError):
    """A file of a model folder is a symbolic link out of it."""


class PrecisionError(UnembeddingError):
    """The numbers do not fit the arithmetic that was asked for."""


class BackboneError(EmbedFilterError, ValueError):
    """A model cannot be loaded as a text backbone."""


class DepthError(EmbedFilterError, ValueError):
    """A model cannot be cut to these layers."""


class ShapeError(EmbedFilterError, ValueError):
    """A width does not fit: filter against embedding, or filter against model."""


class PlacementError(EmbedFilterError, ValueError):
    """The filter stands in the wrong place of a module pipeline."""


class ProvenanceError(EmbedFilterError, ValueError):
    """A filter was made from another unembedding matrix than the one it meets."""


class FormatError(EmbedFilterError, ValueError):
    """A file of a model folder breaks the rules of its format."""


class OutputError(EmbedFilterError, OSError):
    """The output folder cannot be written as asked."""


class CalibrationError(EmbedFilterError, ValueError):
    """Calibration texts, or what came of them, are unfit."""


class DataError(EmbedFilterError, ValueError):
    """A file of evaluation data breaks the rules of its format, or data do not suffice."""


class HubError(EmbedFilterError, OSError):
    """The Hugging Face Hub cannot be read or written as asked."""


class PromptError(EmbedFilterError, ValueError):
    """An unknown or malformed prompt recipe."""


class CorpusError(EmbedFilterError, ValueError):
    """Texts to count or to embed cannot be read as asked."""


class WorkerError(EmbedFilterError, RuntimeError):
    """A process that encodes died, or lacks memory."""


class LensError(EmbedFilterError, ValueError):
    """The lens cannot read this model as asked."""


class MissingPackageError(EmbedFilterError, ImportError):
    """An optional package is needed and not installed."""


class SampleWarning(UserWarning):
    """Texts that a language model wrote may be unfit to calibrate on."""


class DegenerateEdgeWarning(UserWarning):
    """A band separates directions of (nearly) equal singular values: which ones is arbitrary."""
