"""Lightweight Recurrent Network (Zhang and Sennrich, ACL 2019) as a fairseq plugin."""

import argparse

import torch

# fairseq's checkpoints hold an argparse.Namespace; allowing it keeps weights_only=True's protection.
if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals([argparse.Namespace])
