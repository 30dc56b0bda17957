"""Proving the numbers: cases, rungs, metrics, verdict, report. `validate` judges a bundle, `dump_engines` keeps tensors for another machine."""

from sessa_deploy.export.parity.prove import dump_engines, record, validate

__all__ = ["dump_engines", "record", "validate"]
