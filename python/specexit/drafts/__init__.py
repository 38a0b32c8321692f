"""Drafts: what proposes tokens and reads exit signals, and their checkpoints."""

from specexit.drafts.base import Candidates, Draft, DraftBatch
from specexit.drafts.checkpoint import load_draft, save_draft
from specexit.drafts.eagle3 import Eagle3Draft
from specexit.drafts.eagle3_config import Eagle3Config

__all__ = ["Candidates", "Draft", "DraftBatch", "Eagle3Config", "Eagle3Draft", "load_draft", "save_draft"]
