"""Proves a JAX port equal to its PyTorch model, or names the first place where it differs."""

from portproof.command import main
from portproof.ladder import prove
from portproof.port import BadInput, Port, tokens
from portproof.report import Report
from portproof.taps import mask, tap, watch

__all__ = ["BadInput", "Port", "Report", "main", "mask", "prove", "tap", "tokens", "watch"]
